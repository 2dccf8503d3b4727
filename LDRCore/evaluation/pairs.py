"""`ldr evaluate`: pairs of files registered (or their given transforms) and measured with labels and landmarks."""

from __future__ import annotations

import argparse
import csv
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import numpy as np
import SimpleITK as sitk

from LDRCore.errors import RegistrationError
from LDRCore.evaluation import learn2reg, scoring
from LDRCore.evaluation.scoring import Truth
from LDRCore.io import images
from LDRCore.io.points import read_points
from LDRCore.io.transforms import read_transform

NUMBERS = (*scoring.NUMBERS, "seconds")
_BEFORE = ("overlap", "landmarks")  # what is also measured before registration and with the affine part alone


@dataclass(frozen=True)
class PairFiles:
    """Paths of one pair; empty where there is none."""

    fixed: str
    moving: str
    fixed_labels: str = ""
    moving_labels: str = ""
    fixed_landmarks: str = ""
    moving_landmarks: str = ""
    transform: str = ""


def listed(options: argparse.Namespace) -> list[PairFiles]:
    """The pairs that the command line names: one, or those of a CSV.

    Raises:
        RegistrationError: neither or both, or a list that cannot be used.
    """
    if (options.pairs is None) == (options.fixed is None) or (options.fixed is None) != (options.moving is None):
        raise RegistrationError("evaluate takes either a fixed and a moving image or --pairs CSV, got neither or both")
    if options.pairs is None:
        return [PairFiles(**{f.name: getattr(options, f.name) or "" for f in fields(PairFiles)})]
    extra = [f.name for f in fields(PairFiles)[2:] if getattr(options, f.name)]
    if extra:
        raise RegistrationError(f"with --pairs the columns of the CSV name the files, got also --{extra[0]}")
    return read_pairs(options.pairs)


def read_pairs(path: Path) -> list[PairFiles]:
    """Pairs of a CSV with the columns fixed and moving and any others of `PairFiles`, relative to its folder.

    Raises:
        RegistrationError: missing file, missing or unknown column, no pair.
    """
    if not path.is_file():
        raise RegistrationError(f"the list of pairs must be an existing CSV file, got {path} (not found)")
    known = [f.name for f in fields(PairFiles)]
    with path.open(newline="", encoding="utf-8-sig") as stream:
        reader = csv.DictReader(stream)
        columns = reader.fieldnames or []
        if not {"fixed", "moving"} <= set(columns) or set(columns) - set(known):
            raise RegistrationError(f"{path} must have the columns fixed, moving and any of {known[2:]}, got {columns}")
        rows = [{k: str(path.parent / v) if v else "" for k, v in row.items()} for row in reader]
    if not rows or not all(r["fixed"] and r["moving"] for r in rows):
        raise RegistrationError(
            f"{path} must name a fixed and a moving image in every line, got one without or no line"
        )
    return [PairFiles(**row) for row in rows]


def evaluate(
    pairs: Sequence[PairFiles],
    *,
    model: dict[str, Any],
    frame: str = "lps",
    protocol: str = "nearest",
    surface: bool = True,
    learn2reg: Path | None = None,
    overwrite: bool = False,
    keep_going: bool = True,
    progress: Callable[[float, str], None] | None = None,
) -> dict[str, Any]:
    """Register and measure pairs.

    Args:
        pairs: files; where `transform` is given it is measured instead of registering.
        model: keywords of `register` (model, cascades, refine_steps, device).
        frame: of landmark files, see `scoring.landmarks_lps`.
        protocol: see `scoring.overlaps`.
        surface: also surface distances.
        learn2reg: folder for displacement fields in the challenge's form, or None.
        overwrite: replace such fields.
        keep_going: a pair that cannot be measured becomes an entry of `problems` instead of an error.
        progress: told the fraction of pairs done.

    Returns:
        pairs: one dict each, with fixed, moving, before and affine (Dice and landmark errors where the scanner put the
        images, and with the affine part alone), after (everything `scoring.score` returns, and seconds); summary:
        {measure: {n, mean, std}} of what came after; problems: one sentence a pair that could not be measured.
    """
    measures = [m for m in scoring.MEASURES if surface or m != "surface"]
    found, problems = [], []
    for number, files in enumerate(pairs):
        if progress is not None:
            progress(number / len(pairs), Path(files.moving).name)
        try:
            found.append(_one(files, model, frame, protocol, measures, learn2reg, overwrite))
        except RegistrationError as error:
            if not keep_going:
                raise
            problems.append(f"{files.fixed} <- {files.moving}: {error}")
            found.append({"fixed": files.fixed, "moving": files.moving, "error": str(error)})
    if progress is not None:
        progress(1.0, "done")
    return {"pairs": found, "summary": _summary(found), "problems": problems, "protocol": protocol}


def _one(
    files: PairFiles,
    model: dict[str, Any],
    frame: str,
    protocol: str,
    measures: list[str],
    folder: Path | None,
    overwrite: bool,
) -> dict[str, Any]:
    target = _submission(files, folder, overwrite)
    fixed, moving = images.load(files.fixed, "fixed image"), images.load(files.moving, "moving image")
    truth = _truth(files, fixed, moving, frame)
    result: dict[str, Any] = {"fixed": files.fixed, "moving": files.moving}
    identity = sitk.Transform(3, sitk.sitkIdentity)
    result["before"] = _overall(scoring.score(identity, truth, measures=_BEFORE, protocol=protocol))
    began = time.perf_counter()
    if files.transform:
        transform = read_transform(files.transform)
        seconds = None
    else:
        from LDRCore.registration import register

        registered = register(fixed, moving, **model)
        transform, seconds = registered.transform, round(time.perf_counter() - began, 3)
        score = scoring.score(registered.affine, truth, measures=_BEFORE, protocol=protocol)
        result["affine"] = _overall(score)
    result["after"] = scoring.score(transform, truth, measures=measures, protocol=protocol)
    result["after"]["seconds"] = seconds
    if target is not None:
        displacement = learn2reg.displacement_in_voxels(transform, fixed, moving)
        target.parent.mkdir(parents=True, exist_ok=True)
        part = target.with_name(f".part-{target.name}")
        try:
            learn2reg.write_submission(part, displacement, fixed)
            part.replace(target)
        finally:
            part.unlink(missing_ok=True)
        result["learn2reg"] = str(target)
    return result


def _submission(files: PairFiles, folder: Path | None, overwrite: bool) -> Path | None:
    """Where a pair's field goes, refused before any work is done for it."""
    if folder is None:
        return None
    target = folder / learn2reg.submission_name(files.fixed, files.moving)
    if target.exists() and not overwrite:
        raise RegistrationError(f"the output must not exist yet (or --overwrite must be given), got {target}")
    return target


def _truth(files: PairFiles, fixed: sitk.Image, moving: sitk.Image, frame: str) -> Truth:
    for what in ("labels", "landmarks"):
        given = [bool(getattr(files, f"{side}_{what}")) for side in ("fixed", "moving")]
        if given[0] != given[1]:
            raise RegistrationError(f"{what} must be given for both images or for none, got only one")
    labels: list[sitk.Image | None] = [None, None]
    points: list[np.ndarray | None] = [None, None]
    if files.fixed_labels:
        labels = [
            scoring.load_labels(files.fixed_labels, "fixed labels"),
            scoring.load_labels(files.moving_labels, "moving labels"),
        ]
    if files.fixed_landmarks:
        sides = ((files.fixed_landmarks, fixed, "fixed"), (files.moving_landmarks, moving, "moving"))
        points = [
            scoring.landmarks_lps(read_points(Path(path)), frame, image, f"{name} landmarks")
            for path, image, name in sides
        ]
    return Truth(fixed, labels[0], labels[1], points[0], points[1])


def _overall(score: dict[str, Any]) -> dict[str, Any]:
    return {k: v for k, v in score.items() if k != "structures"}


def _summary(found: list[dict[str, Any]]) -> dict[str, dict[str, float]]:
    summary = {}
    for name in NUMBERS:
        values = np.array([p["after"][name] for p in found if p.get("after", {}).get(name) is not None], dtype=float)
        values = values[~np.isnan(values)]
        if values.size:
            summary[name] = {"n": int(values.size), "mean": float(values.mean()), "std": float(values.std())}
    return summary


def write_csv(found: dict[str, Any], name: str) -> None:
    """One row a pair: files, error, the numbers after registration, Dice and landmark error before and affine."""
    stages = [(stage, key) for stage in ("before", "affine") for key in ("dice_mean", "tre_mm")]
    heads = ["fixed", "moving", "error", *NUMBERS, *(f"{key}_{stage}" for stage, key in stages)]
    with open(name, "w", newline="", encoding="utf-8") as stream:
        writer = csv.writer(stream)
        writer.writerow(heads)
        for pair in found["pairs"]:
            row = [pair["fixed"], pair["moving"], pair.get("error", "")]
            row += [_cell(pair.get("after", {}).get(k)) for k in NUMBERS]
            row += [_cell(pair.get(stage, {}).get(key)) for stage, key in stages]
            writer.writerow(row)


def _cell(value: Any) -> str:
    return "" if value is None else f"{value:.6g}"


def text(found: dict[str, Any]) -> str:
    """What a person reads: a line a pair, then means."""
    lines = []
    for pair in found["pairs"]:
        head = f"{Path(pair['fixed']).name} <- {Path(pair['moving']).name}"
        if "error" in pair:
            lines.append(f"{head}: FAILED: {pair['error']}")
            continue
        parts = []
        for key, title, digits in (("dice_mean", "Dice", 3), ("tre_mm", "landmark error mm", 2)):
            stages = [(s, pair[s][key]) for s in ("before", "affine", "after") if pair.get(s, {}).get(key) is not None]
            if stages:
                parts.append(f"{title} " + ", ".join(f"{v:.{digits}f} {s}" for s, v in stages))
        parts.append(f"{pair['after']['folding_count']} folding voxels")
        lines.append(f"{head}: " + "; ".join(parts))
    if found["summary"]:
        most = max(v["n"] for v in found["summary"].values())
        lines.append(f"mean and std over {most} pair{'s' * (most > 1)}:")
        lines += [f"  {k:<26}{v['mean']:.5g} +- {v['std']:.3g}" for k, v in found["summary"].items()]
    return "\n".join(lines)
