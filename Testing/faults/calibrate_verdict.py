"""Registers good pairs and made failures, and says how often the verdict is right; docs/verdict.md reports a run.

    python Testing/faults/calibrate_verdict.py --data IXI --split train --pairs 20 --seed 1 --out verdict-train.jsonl
    python Testing/faults/calibrate_verdict.py --data IXI --list Training/configs/pairs/ixi-test-40.csv --good

IXI is the folder with manifest.csv. Every line of the output holds a case, its Dice and what the report measured;
`--table` counts the lines of files that were written before, by the verdict's present bounds. A result is right or
wrong by its Dice (labels of 30 voxels and more, within the moving image's field of view) relative to that of the same
pair unchanged, registered in the same way: above .8 it is good, below .5 it failed, between the two any word is right.
"""

from __future__ import annotations

import argparse
import collections
import csv
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import SimpleITK as sitk
import torch

import LDRCore
from LDRCore.pipeline import verdict

Labelled = tuple[sitk.Image, Any]
Case = Callable[[sitk.Image, sitk.Image, np.random.Generator], Labelled]
MODELS: dict[str, dict[str, Any]] = {
    "default": {},
    "default+fast": {"refine": "fast"},
    "none": {"model": "none"},
    "none+fast": {"model": "none", "refine": "fast"},
    "affine": {"kind": "affine", "model": "none"},
    "rigid": {"kind": "rigid"},
}
GOOD, FAILED = 0.8, 0.5  # Dice relative to that of the unchanged pair


def like(values: np.ndarray, image: sitk.Image) -> sitk.Image:
    """Return an image of other values at the same place."""
    made = sitk.GetImageFromArray(values.astype(np.float32))
    made.CopyInformation(image)
    return made


def bright(values: np.ndarray) -> float:
    """Return a bright tissue's value."""
    return float(np.percentile(values[values > 0.1 * values.max()], 99))


def by_values(change: Callable[[np.ndarray, np.ndarray, np.random.Generator], np.ndarray]) -> Case:
    """Make a case that changes values: (values, labels, rng) -> values."""
    get = sitk.GetArrayFromImage
    return lambda image, labels, rng: (like(change(get(image), get(labels), rng), image), labels)


def noise(level: float) -> Case:
    """Make a case that adds noise of some times a bright tissue's value."""
    return by_values(lambda v, _, rng: v + rng.normal(0, level * bright(v), v.shape))


def inverted_head(values: np.ndarray, _: np.ndarray, __: np.random.Generator) -> np.ndarray:
    """Turn the contrast round within the head alone."""
    top = bright(values)
    return np.where(values > 0.15 * top, 1.15 * top - np.minimum(values, top), values)


def bias(values: np.ndarray, _: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Multiply by a bias field from about .55 to 1.8."""
    ramp = np.stack(np.meshgrid(*[np.linspace(-1, 1, n) for n in values.shape], indexing="ij"), -1)
    direction = rng.normal(size=3)
    return values * np.exp(0.6 * ramp @ (direction / np.linalg.norm(direction)))


def rotation(degrees: float, centre: Any, rng: np.random.Generator, shift_mm: float = 0.0) -> sitk.Transform:
    """Make a rigid transform about a random axis, with a shift of a random direction."""
    axis, direction = rng.normal(size=3), rng.normal(size=3)
    made = sitk.VersorRigid3DTransform()
    made.SetCenter(centre)
    made.SetRotation((axis / np.linalg.norm(axis)).tolist(), float(np.deg2rad(degrees)))
    made.SetTranslation((shift_mm * direction / np.linalg.norm(direction)).tolist())
    return made


def centre_of(image: sitk.Image) -> Any:
    """Return the middle of an image, LPS mm."""
    return image.TransformContinuousIndexToPhysicalPoint([(n - 1) / 2 for n in image.GetSize()])


def turned(low: float, high: float) -> Case:
    """Make a case of another pose, in the header."""

    def make(image: sitk.Image, labels: sitk.Image, rng: np.random.Generator) -> Labelled:
        map_ = rotation(rng.uniform(low, high), centre_of(image), rng, rng.uniform(0, 30))
        made = []
        for source in (image, labels):
            moved = sitk.Image(source)
            moved.SetOrigin(map_.TransformPoint(source.GetOrigin()))
            matrix = np.array(map_.GetMatrix()).reshape(3, 3) @ np.array(source.GetDirection()).reshape(3, 3)
            moved.SetDirection(matrix.ravel().tolist())
            made.append(moved)
        return made[0], made[1]

    return make


def cut(share: float, *, crop: bool) -> Case:
    """Make a case that lacks a share of the brain: zeroed, or beyond the end of the field of view."""

    def make(image: sitk.Image, labels: sitk.Image, rng: np.random.Generator) -> Labelled:
        axis, low = int(rng.integers(3)), bool(rng.random() < 0.5)
        index = np.argwhere(sitk.GetArrayViewFromImage(labels) > 0)[:, axis]
        at = int(np.quantile(index, share if low else 1 - share))
        part = [slice(None)] * 3
        part[2 - axis] = slice(at, None) if low else slice(0, at)
        if crop:
            return image[tuple(part)], labels[tuple(part)]
        gone = [slice(None)] * 3
        gone[axis] = slice(0, at) if low else slice(at, None)
        made = []
        for source in (image, labels):
            values = sitk.GetArrayFromImage(source)
            values[tuple(gone)] = 0
            changed = sitk.GetImageFromArray(values)
            changed.CopyInformation(source)
            made.append(changed)
        return made[0], made[1]

    return make


def spaced(*factors: float) -> Case:
    """Make a case with a wrong spacing."""

    def make(image: sitk.Image, labels: sitk.Image, _: np.random.Generator) -> Labelled:
        made = [sitk.Image(source) for source in (image, labels)]
        for changed in made:
            changed.SetSpacing([s * f for s, f in zip(changed.GetSpacing(), factors, strict=True)])
        return made[0], made[1]

    return make


def thick(image: sitk.Image, labels: sitk.Image, _: np.random.Generator) -> Labelled:
    """Average three slices into one."""
    return sitk.BinShrink(image, [1, 1, 3]), labels


def blobs(image: sitk.Image, _: sitk.Image, rng: np.random.Generator) -> Labelled:
    """An ellipsoid of smooth noise."""
    shape, radii = image.GetSize()[::-1], rng.uniform(0.5, 0.9, 3)
    values = sitk.GetImageFromArray(rng.normal(size=shape))
    values = sitk.GetArrayFromImage(sitk.SmoothingRecursiveGaussian(values, rng.uniform(2, 8)))
    index = np.stack(np.meshgrid(*[np.linspace(-1, 1, n) for n in shape], indexing="ij"), -1)
    inside = ((index / radii) ** 2).sum(-1) < 1
    return like(np.where(inside, 300 + 100 * values / values.std(), 0).clip(0), image), None


def finger(_: sitk.Image, __: sitk.Image, rng: np.random.Generator) -> Labelled:
    """A finger of three bones, 1 mm."""
    z, y, x = np.meshgrid(*[np.arange(n) - n / 2 + 0.5 for n in (60, 30, 30)], indexing="ij")
    radius = np.hypot(y, x)
    values = np.where(radius < 12, 120, 0) + np.where((radius < 6) & (np.abs(z % 20 - 10) > 2), 200, 0)
    return sitk.GetImageFromArray((values + 10 * rng.normal(size=z.shape) * (radius < 12)).astype(np.float32)), None


def stripes(image: sitk.Image, _: sitk.Image, rng: np.random.Generator) -> Labelled:
    """A box of waves in three directions: regular, as nothing in a body is."""
    index = np.stack(np.meshgrid(*[np.arange(n) for n in image.GetSize()[::-1]], indexing="ij"), -1)
    values = 300 + 200 * np.sin(index * rng.uniform(0.15, 0.5, 3)).prod(-1)
    middle = np.array(values.shape) / 2
    return like(np.where((np.abs(index - middle) < 0.7 * middle).all(-1), values, 0), image), None


ORDINARY: dict[str, Case] = {
    "turned up to 15 degrees": turned(0, 15),
    "turned 60 to 90 degrees": turned(60, 90),
    "turned 90 to 180 degrees": turned(90, 180),
    "bias field": by_values(bias),
    "gamma .5": by_values(lambda v, _, __: bright(v) * np.clip(v / bright(v), 0, 1.2) ** 0.5),
    "gamma 1.8": by_values(lambda v, _, __: bright(v) * np.clip(v / bright(v), 0, 1.2) ** 1.8),
    "noise 5 %": noise(0.05),
    "noise 10 %": noise(0.1),
    "noise 20 %": noise(0.2),
    "thick slices": thick,
}
FAULTY: dict[str, Case] = {
    "noise 100 %": noise(1.0),
    "noise 200 %": noise(2.0),
    "half zeroed": cut(0.5, crop=False),
    "a third zeroed": cut(0.33, crop=False),
    "half cropped": cut(0.5, crop=True),
    "two thirds cropped": cut(0.67, crop=True),
    "inverted": by_values(lambda v, _, __: bright(v) - v),
    "inverted head": by_values(inverted_head),
    "spacing x 0.5": spaced(0.5, 0.5, 0.5),
    "spacing x 0.7": spaced(0.7, 0.7, 0.7),
    "spacing x 1.5": spaced(1.5, 1.5, 1.5),
    "slices x 2": spaced(1, 1, 2),
    "two levels": by_values(lambda v, labels, _: 100.0 * (labels > 0)),
    "bright parts": by_values(lambda v, _, __: 100.0 * (v > 0.3 * bright(v))),
    "label map": by_values(lambda v, labels, _: labels),
    "noise alone": by_values(lambda v, _, rng: np.abs(rng.normal(0, 100, v.shape))),
    "blobs": blobs,
    "finger": finger,
    "stripes": stripes,
}
BOTH = ("half zeroed", "two levels", "bright parts", "label map")  # also with the fixed image changed
FORCED = {"turned 60 to 90": (60, 90, 0), "turned 25 to 40": (25, 40, 0), "shifted 40 mm": (0, 0, 40)}
WRONG_SPACING = ("spacing", "slices")  # to be told even where the affine part makes up for it


def dice(transform: sitk.Transform, fixed: sitk.Image, moving: sitk.Image) -> float:
    """Return the mean Dice of labels of 30 voxels and more, within the moving image's field of view."""
    warped = sitk.GetArrayFromImage(sitk.Resample(moving, fixed, transform, sitk.sitkNearestNeighbor, 0))
    inside = sitk.Image(moving.GetSize(), sitk.sitkUInt8) + 1
    inside.CopyInformation(moving)
    known = sitk.GetArrayFromImage(sitk.Resample(inside, fixed, transform, sitk.sitkNearestNeighbor, 0)) > 0
    own = np.where(known, sitk.GetArrayFromImage(fixed), 0)
    size = int(max(own.max(), warped.max())) + 1
    agreed, of_fixed, of_warped = (np.bincount(v.ravel(), minlength=size) for v in (own[own == warped], own, warped))
    scores = 2 * agreed / np.maximum(of_fixed + of_warped, 1)
    counted = (of_fixed >= 30) & (np.arange(size) > 0)
    return float(scores[counted].mean()) if counted.any() else 0.0


class Recorder:
    """Registers cases of one pair and writes a line for each."""

    def __init__(self, path: Path, name: str, *, stripped: bool) -> None:
        self._path, self._name, self._stripped = path, name, stripped
        self._reference: dict[str, float] = {}

    def reference(self, fixed: Labelled, moving: Labelled, model: str) -> float:
        """Return the Dice of the unchanged pair."""
        if model not in self._reference:
            result = LDRCore.register(fixed[0], moving[0], **MODELS[model])
            self._reference[model] = dice(result.transform, fixed[1], moving[1])
            self._write("unchanged", model, result, 1.0)
        return self._reference[model]

    def register(self, case: str, fixed: Labelled, moving: Labelled, model: str, whole: float, **extra: Any) -> None:
        """Register a case whose unchanged pair has the Dice `whole`."""
        try:
            result = LDRCore.register(fixed[0], moving[0], **(MODELS[model] | extra))
        except LDRCore.RegistrationError as error:
            print(f"{case}: refused ({error})", file=sys.stderr)
            return
        score = 0.0 if moving[1] is None else dice(result.transform, fixed[1], moving[1])
        self._write(case, model, result, score / whole)

    def _write(self, case: str, model: str, result: LDRCore.RegistrationResult, relative: float) -> None:
        facts = {"pair": self._name, "stripped": self._stripped, "case": case, "model": model, "relative": relative}
        facts |= {key: result.facts[key] for key in ("evidence", "verdict", "cascades")}
        with self._path.open("a", encoding="utf-8") as stream:
            stream.write(json.dumps(facts) + "\n")


def read_subject(root: Path, row: dict[str, str], *, stripped: bool) -> Labelled:
    """Read a head and its labels; stripped: what lies outside the labels is 0."""
    image, labels = (
        sitk.ReadImage(str(root / row["image"]), sitk.sitkFloat32),
        sitk.ReadImage(str(root / row["labels"])),
    )
    if stripped:
        image = like(np.where(sitk.GetArrayViewFromImage(labels) > 0, sitk.GetArrayViewFromImage(image), 0), image)
    return image, labels


def choose_pairs(options: argparse.Namespace) -> list[tuple[dict[str, str], dict[str, str], bool]]:
    """Return rows of the manifest for fixed and moving, and whether they are stripped."""
    with (options.data / "manifest.csv").open(encoding="utf-8") as stream:
        rows = {row["subject"]: row for row in csv.DictReader(stream)}
    if options.list:
        with options.list.open(encoding="utf-8") as stream:
            named = [(rows[r["fixed"]], rows[r["moving"]]) for r in csv.DictReader(stream)]
        return [(a, b, stripped) for a, b in named for stripped in (True, False)]
    names = [name for name, row in rows.items() if row["split"] == options.split]
    rng = np.random.default_rng(options.seed)
    drawn = [rng.choice(names, 2, replace=False) for _ in range(options.pairs)]
    return [(rows[a], rows[b], number % 2 == 1) for number, (a, b) in enumerate(drawn)]


def run(options: argparse.Namespace) -> None:
    """Register everything."""
    rng = np.random.default_rng(options.seed)
    for fixed_row, moving_row, stripped in choose_pairs(options):
        fixed = read_subject(options.data, fixed_row, stripped=stripped)
        moving = read_subject(options.data, moving_row, stripped=stripped)
        recorder = Recorder(options.out, f"{fixed_row['subject']} {moving_row['subject']}", stripped=stripped)
        if options.good:
            for model in options.models.split(","):
                recorder.reference(fixed, moving, model)
            continue
        chosen = iter(rng.choice(list(MODELS), 500, p=[0.5, 0.1, 0.12, 0.1, 0.09, 0.09]))
        for name, case in (ORDINARY | FAULTY).items():
            if rng.random() < options.share:
                model = str(next(chosen))
                whole = recorder.reference(fixed, moving, model)
                recorder.register(name, fixed, case(*moving, rng), model, whole)
        for name in BOTH:
            model = str(next(chosen))
            changed = FAULTY[name](*fixed, rng), FAULTY[name](*moving, rng)
            recorder.register(f"both: {name}", *changed, model, recorder.reference(fixed, moving, model))
        for name, (low, high, shift_mm) in FORCED.items():
            model = str(next(chosen))
            initial = rotation(rng.uniform(low, high), centre_of(fixed[0]), rng, shift_mm)
            whole = recorder.reference(fixed, moving, model)
            for affine in (True, False):
                case_name = f"start {name}" + ("" if affine else ", kept")
                recorder.register(case_name, fixed, moving, model, whole, initial=initial, affine=affine)
        print(fixed_row["subject"], moving_row["subject"], flush=True)


def tabulate(paths: list[Path]) -> None:
    """Print how the verdict judges what was registered, by its present bounds."""
    counts: dict[str, collections.Counter] = collections.defaultdict(collections.Counter)
    for line in (line for path in paths for line in path.read_text(encoding="utf-8").splitlines()):
        row = json.loads(line)
        said = verdict.judge(row["evidence"], one_contrast=row["cascades"] > 0)
        wrong = row["relative"] < FAILED or row["case"].startswith(WRONG_SPACING)
        truth = "failed" if wrong else "good" if row["relative"] > GOOD else "between"
        for name in (row["case"], "all", "all but changed" if row["case"] == "unchanged" else "all changed"):
            counts[name][truth, said["verdict"]] += 1
        if (truth, said["verdict"]) in (("failed", "trust"), ("good", "failed"), ("good", "look")):
            print(f"{row['case']} | {row['model']} | {row['relative']:.2f} | {said} | {json.dumps(row['evidence'])}")
    words = ("trust", "look", "failed")
    print(
        f"{'case':<28}"
        + "".join(f"{truth + '/' + word:>16}" for truth in ("good", "between", "failed") for word in words)
    )
    for name, found in counts.items():
        cells = (found[truth, word] for truth in ("good", "between", "failed") for word in words)
        print(f"{name:<28}" + "".join(f"{cell:>16}" for cell in cells))


def main() -> None:
    """Run, or print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path)
    parser.add_argument("--split", choices=("train", "val"), default="train")
    parser.add_argument("--list", type=Path, help="a CSV of pairs instead of a split")
    parser.add_argument("--pairs", type=int, default=20)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--share", type=float, default=1.0, help="of the cases that are drawn for each pair")
    parser.add_argument("--good", action="store_true", help="the unchanged pairs alone")
    parser.add_argument("--models", default="default,default+fast,none,none+fast,affine,rigid", help="with --good")
    parser.add_argument("--out", type=Path, default=Path("verdict.jsonl"))
    parser.add_argument("--table", type=Path, nargs="+", help="files that were written before")
    options = parser.parse_args()
    torch.set_num_threads(1)
    if not options.table:
        run(options)
    tabulate(options.table or [options.out])


if __name__ == "__main__":
    main()
