"""Measure a model on fixed pairs of a split through `register`, as a user would run it, and write it into its card.

    python -m Training.score_model --data DIR --model runs/export/brain-t1.pt --split val --pairs 24

Pairs are drawn once from the split with a fixed seed. Every pair is registered whole-head or skull-stripped, with the
moving image turned and shifted at random ("pose"), and scored by mean Dice over all labels of the fixed image
(nearest neighbour, DLMUSE automatic labels). Baselines in the same run: nothing (contents centred) and affine only.
"""

from __future__ import annotations

import argparse
import csv
import json
import time
from pathlib import Path

import numpy as np
import SimpleITK as sitk

import LDRCore
from LDRCore import demo, geometry
from Training.data.views import random_pose

SEED = 20
KINDS = ("stripped", "whole")


def draw_pairs(subjects: list[str], count: int) -> list[tuple[str, str]]:
    """`count` ordered pairs of different subjects, the same at every call."""
    rng = np.random.default_rng(SEED)
    every = [(a, b) for a in sorted(subjects) for b in sorted(subjects) if a != b]
    return [every[k] for k in rng.permutation(len(every))[:count]]


def posed(image: sitk.Image, seed: int) -> sitk.Image:
    """The image with a random pose written into its header: up to 15 degrees, 20 mm (no resampling)."""
    matrix = random_pose(np.random.default_rng(seed), 15, 20, 0.0)
    out = sitk.Image(image)
    centre = np.array(image.TransformContinuousIndexToPhysicalPoint([(n - 1) / 2 for n in image.GetSize()]))
    direction = np.array(image.GetDirection()).reshape(3, 3)
    turn = matrix[:3, :3]
    out.SetDirection((turn @ direction).ravel().tolist())
    out.SetOrigin((turn @ (np.array(image.GetOrigin()) - centre) + centre + matrix[:3, 3]).tolist())
    return out


def score_pair(
    fixed: dict, moving: dict, model: str, max_cascades: int, refine_steps: int
) -> dict[str, dict[str, float]]:
    """{system: {dice, folding, seconds}} of one pair of {image, labels}."""
    rows = {}
    for n in range(1, max_cascades + 1):
        began = time.perf_counter()
        result = LDRCore.register(fixed["image"], moving["image"], model=model, cascades=n, refine_steps=refine_steps)
        seconds = time.perf_counter() - began
        if n == 1:
            centred = _centring(fixed["image"], moving["image"])
            for name, transform in (("nothing", centred), ("affine", result.affine)):
                rows[name] = {
                    "dice": demo.warped_dice(moving["labels"], transform, fixed["labels"]),
                    "folding": 0.0,
                    "seconds": 0.0,
                }
            rows["affine"]["seconds"] = seconds - result.report["times_s"]["dense"]
        rows[f"{n} cascades"] = {
            "dice": demo.warped_dice(moving["labels"], result.transform, fixed["labels"]),
            "folding": result.report["folding_fraction"],
            "seconds": seconds,
        }
    return rows


def _centring(fixed: sitk.Image, moving: sitk.Image) -> sitk.Transform:
    from LDRCore import inference, preprocess

    f, m = (preprocess.prepare(i, None, fine_mm=2.0, coarse_mm=4.0) for i in (fixed, moving))
    return geometry.affine_transform(inference.centring_candidates(f, m)[0])


def main() -> None:
    """Score, print a table, and with --write put the result into the card."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="folder with manifest.csv")
    parser.add_argument("--model", required=True, help="a name, or a .pt file with its card")
    parser.add_argument("--split", choices=("val", "test"), required=True)
    parser.add_argument("--pairs", type=int, default=24)
    parser.add_argument("--refine", type=int, default=0, help="steps of instance optimisation (not with --write)")
    parser.add_argument("--write", action="store_true", help="store the result in the model's card (.json beside .pt)")
    a = parser.parse_args()
    if a.write and a.refine:
        parser.error("a card holds the model's own results: --write and --refine exclude each other")
    rows = {r["subject"]: r for r in csv.DictReader((a.data / "manifest.csv").open()) if r["split"] == a.split}
    pairs = draw_pairs(list(rows), a.pairs)
    max_cascades = LDRCore.load_model(a.model).max_cascades
    found: dict[str, dict[str, list[dict]]] = {kind: {} for kind in KINDS}
    for number, (f, m) in enumerate(pairs):
        for kind in KINDS:
            sides = []
            for subject, pose_seed in ((f, None), (m, number)):
                image = sitk.ReadImage(str(a.data / rows[subject]["image"]))
                labels = sitk.ReadImage(str(a.data / rows[subject]["labels"]))
                if kind == "stripped":
                    image = sitk.Mask(image, labels > 0)
                if pose_seed is not None:
                    image, labels = posed(image, pose_seed), posed(labels, pose_seed)
                sides.append({"image": image, "labels": labels})
            for system, row in score_pair(*sides, a.model, max_cascades, a.refine).items():
                found[kind].setdefault(system, []).append(row)
    results = {
        kind: {
            system: {
                "dice_mean": round(float(np.mean([r["dice"] for r in items])), 4),
                "dice_std": round(float(np.std([r["dice"] for r in items])), 4),
                "folding_percent": round(100 * float(np.mean([r["folding"] for r in items])), 4),
                "seconds_median": round(float(np.median([r["seconds"] for r in items])), 3),
            }
            for system, items in systems.items()
        }
        for kind, systems in found.items()
    }
    for kind, systems in results.items():
        print(f"\n{a.split}, {kind}, {len(pairs)} pairs, moving image posed at random")
        print("| system | Dice | folding % | seconds |\n|---|---|---|---|")
        for system, r in systems.items():
            print(
                f"| {system} | {r['dice_mean']:.3f} +- {r['dice_std']:.3f} | {r['folding_percent']:.3f} "
                f"| {r['seconds_median']:.2f} |"
            )
    if a.write:
        path = Path(a.model).with_suffix(".json")
        card = json.loads(path.read_text())
        card.setdefault("results", {})[a.split] = {
            "pairs": len(pairs),
            "labels": "mean over all DLMUSE automatic labels of the fixed image, nearest neighbour, 2 mm",
            "pose": "moving image turned up to 15 degrees and shifted up to 20 mm",
            "seconds": "register() from images in memory to the warped image, warm, 2 threads",
            "systems": results,
        }
        part = path.with_suffix(".part")
        part.write_text(json.dumps(card, indent=1) + "\n")
        part.replace(path)


if __name__ == "__main__":
    main()
