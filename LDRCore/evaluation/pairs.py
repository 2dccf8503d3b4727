"""Pairs of files: registered, or with transforms that are given, and measured with labels and landmarks."""

from __future__ import annotations

import csv
import io
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
from LDRCore.io.files import read_text
from LDRCore.io.transforms import Context, read_transform

NUMBERS = (*scoring.NUMBERS, "seconds")  # of a pair, in the order of columns
_EARLIER_MEASURES = ("overlap", "landmarks")  # also measured before registration and with the affine part alone


SEPARATOR = ";"
ReadTransform = Callable[[str, sitk.Image, sitk.Image], sitk.Transform]


@dataclass(frozen=True)
class PairFiles:
    """Paths of one pair; empty where there is none. Several transforms are separated by `SEPARATOR`, in ANTs' order."""

    fixed: str
    moving: str
    fixed_labels: str = ""
    moving_labels: str = ""
    fixed_landmarks: str = ""
    moving_landmarks: str = ""
    transform: str = ""


@dataclass(frozen=True)
class EvaluationOptions:
    """How pairs are registered and measured, checked before any file is read.

    Attributes:
        model: keywords of `register` (model, cascades, refine, device).
        frame: of landmark files, see `scoring.landmarks_lps`.
        protocol: see `scoring.overlaps`.
        surface: also measure surface distances.
        learn2reg_folder: where to write displacement fields in the challenge's form, or None.
        overwrite: replace such fields.
        read: reads what `PairFiles.transform` names, for the fixed and the moving image; None: as `read_transform`.

    Raises:
        RegistrationError: a frame or protocol that does not exist.
    """

    model: dict[str, Any]
    frame: str = "lps"
    protocol: str = "nearest"
    surface: bool = True
    learn2reg_folder: Path | None = None
    overwrite: bool = False
    read: ReadTransform | None = None

    def __post_init__(self) -> None:
        scoring.check_choice("the frame of landmarks", self.frame, scoring.FRAMES)
        scoring.check_choice("protocol", self.protocol, scoring.PROTOCOLS)


def read_pairs(path: Path) -> list[PairFiles]:
    """Read pairs from a CSV with the columns fixed and moving and any others of `PairFiles`.

    Args:
        path: of the CSV; paths in it are relative to its folder.

    Raises:
        RegistrationError: missing file, missing or unknown column, a line with too many cells, no pair.
    """
    known = [field.name for field in fields(PairFiles)]
    text = io.StringIO(read_text(path, "the list of pairs", "CSV file"))
    reader = csv.DictReader(text, restkey="", restval="")  # cells beyond the last column come under ""
    try:
        columns, rows = list(reader.fieldnames or []), list(reader)
    except csv.Error as error:
        raise RegistrationError(f"the list of pairs must be a CSV file, got {path} ({error})") from None
    if not {"fixed", "moving"} <= set(columns) or set(columns) - set(known):
        raise RegistrationError(f"{path} must have the columns fixed, moving and any of {known[2:]}, got {columns}")
    if any("" in row for row in rows):
        raise RegistrationError(f"{path} must have {len(columns)} cells in every line, got one with more")
    if not rows or not all(row["fixed"] and row["moving"] for row in rows):
        raise RegistrationError(
            f"{path} must name a fixed and a moving image in every line, got one without or no line"
        )
    placed = [{name: _placed(path.parent, cell) for name, cell in row.items()} for row in rows]
    return [PairFiles(**row) for row in placed]


def _placed(folder: Path, cell: str) -> str:
    return SEPARATOR.join(str(folder / part) for part in cell.split(SEPARATOR)) if cell else ""


def evaluate_pairs(
    pairs: Sequence[PairFiles],
    options: EvaluationOptions,
    *,
    keep_going: bool = True,
    progress: Callable[[float, str], None] | None = None,
    evaluate: Callable[[PairFiles, EvaluationOptions], dict[str, Any]] | None = None,
) -> dict[str, Any]:
    """Register and measure pairs.

    Args:
        pairs: files; where `transform` is given it is measured instead of registering.
        options: how.
        keep_going: a pair that cannot be measured becomes an entry of `problems` instead of an error.
        progress: called with the fraction of pairs done and what is being done.
        evaluate: does one pair instead of `evaluate_pair`, as a `process.PairProcess`.

    Returns:
        pairs: one dict each, with fixed, moving, before and affine (Dice and landmark errors where the scanner put the
        images, and with the affine part alone), after (everything `scoring.score` returns, and seconds); summary:
        {measure: {n, mean, std}} of what came after; problems: one sentence for each pair that could not be measured;
        interrupted: by Ctrl-C, so that the pairs are only those that were finished.

    Raises:
        RegistrationError: without `keep_going`, a pair that cannot be measured.
    """
    evaluated: list[dict[str, Any]] = []
    problems: list[str] = []
    interrupted = False
    for number, files in enumerate(pairs):
        if progress is not None:
            progress(number / len(pairs), Path(files.moving).name)
        try:
            evaluated.append((evaluate or evaluate_pair)(files, options))
        except RegistrationError as error:
            if not keep_going:
                raise
            problems.append(f"{files.fixed} <- {files.moving}: {error}")
            evaluated.append({"fixed": files.fixed, "moving": files.moving, "error": str(error)})
        except KeyboardInterrupt:
            if not keep_going or not evaluated:
                raise
            problems.append(f"interrupted after {len(evaluated)} of {len(pairs)} pairs")
            interrupted = True
            break
    if progress is not None:
        progress(1.0, "done")
    summary = _summarise(evaluated)
    return {
        "pairs": evaluated,
        "summary": summary,
        "problems": problems,
        "interrupted": interrupted,
        "protocol": options.protocol,
    }


def evaluate_pair(files: PairFiles, options: EvaluationOptions) -> dict[str, Any]:
    """Register and measure one pair.

    Returns:
        An entry of `pairs`, see `evaluate_pairs`.

    Raises:
        RegistrationError: a file that cannot be used, or a submission that exists already.
    """
    submission = _choose_submission(files, options)
    fixed, moving = images.load(files.fixed, "fixed image"), images.load(files.moving, "moving image")
    truth = _read_truth(files, fixed, moving, options.frame)

    def score_early(transform: sitk.Transform) -> dict[str, Any]:
        scores = scoring.score(transform, truth, measures=_EARLIER_MEASURES, protocol=options.protocol)
        return {name: value for name, value in scores.items() if name != "structures"}

    result: dict[str, Any] = {"fixed": files.fixed, "moving": files.moving}
    result["before"] = score_early(sitk.Transform(3, sitk.sitkIdentity))
    if files.transform:
        transform, seconds = (options.read or _read_transforms)(files.transform, fixed, moving), None
    else:
        from LDRCore.registration import register

        began_s = time.perf_counter()
        registered = register(fixed, moving, **options.model)
        transform, seconds = registered.transform, round(time.perf_counter() - began_s, 3)
        result["affine"] = score_early(registered.affine)
    measures = [measure for measure in scoring.MEASURES if options.surface or measure != "surface"]
    result["after"] = scoring.score(transform, truth, measures=measures, protocol=options.protocol)
    result["after"]["seconds"] = seconds
    if submission is not None:
        submission.parent.mkdir(parents=True, exist_ok=True)
        learn2reg.write_submission(submission, learn2reg.displacement_in_voxels(transform, fixed, moving), fixed)
        result["learn2reg"] = str(submission)
    return result


def _read_transforms(text: str, fixed: sitk.Image, moving: sitk.Image) -> sitk.Transform:
    return read_transform(text.split(SEPARATOR), context=Context(fixed, moving))


def _choose_submission(files: PairFiles, options: EvaluationOptions) -> Path | None:
    """Return the path of a pair's Learn2Reg field; an existing one is refused before any work is done."""
    if options.learn2reg_folder is None:
        return None
    path = options.learn2reg_folder / learn2reg.submission_name(files.fixed, files.moving)
    if path.exists() and not options.overwrite:
        raise RegistrationError(f"the output must not exist yet (or --overwrite must be given), got {path}")
    return path


def _read_truth(files: PairFiles, fixed: sitk.Image, moving: sitk.Image, frame: str) -> Truth:
    for kind in ("labels", "landmarks"):
        given = [bool(getattr(files, f"{side}_{kind}")) for side in ("fixed", "moving")]
        if given[0] != given[1]:
            raise RegistrationError(f"{kind} must be given for both images or for none, got only one")
    known: dict[str, Any] = {}
    for side, image in (("fixed", fixed), ("moving", moving)):
        labels, landmarks = getattr(files, f"{side}_labels"), getattr(files, f"{side}_landmarks")
        if labels:
            known[f"{side}_labels"] = scoring.load_labels(labels, f"{side} labels")
        if landmarks:
            known[f"{side}_landmarks_lps"] = scoring.load_landmarks(landmarks, frame, image, f"{side} landmarks")
    return Truth(fixed, **known)


def _summarise(evaluated: list[dict[str, Any]]) -> dict[str, dict[str, float]]:
    summary = {}
    for name in NUMBERS:
        known = [pair["after"][name] for pair in evaluated if pair.get("after", {}).get(name) is not None]
        values = np.array(known, dtype=float)
        values = values[~np.isnan(values)]
        if values.size:
            summary[name] = {"n": int(values.size), "mean": float(values.mean()), "std": float(values.std())}
    return summary
