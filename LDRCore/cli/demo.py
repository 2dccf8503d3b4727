"""The demo pair: two real, skull-stripped brains of different people, oblique and of different spacing, with labels.

Data and licences lie in `LDRCore/bundled/demo`.
"""

from __future__ import annotations

import argparse
from typing import Any

import numpy as np
import SimpleITK as sitk

from LDRCore.cli.files import Outcome
from LDRCore.errors import RegistrationError
from LDRCore.evaluation.metrics import mean_dice
from LDRCore.models.weights import BUNDLED
from LDRCore.registration import warp_image
from LDRCore.result import RegistrationResult

FOLDER = BUNDLED / "demo"


def pair() -> dict[str, Any]:
    """Paths of `fixed`, `moving`, `fixed_labels`, `moving_labels`, and `n_labels` of the fixed one."""
    paths: dict[str, Any] = {
        name: str(FOLDER / f"{name}.nii.gz") for name in ("fixed", "moving", "fixed_labels", "moving_labels")
    }
    for name in paths:
        if not (FOLDER / f"{name}.nii.gz").is_file():
            raise RegistrationError(f"the demo pair must lie in {FOLDER}, got no {name}.nii.gz")
    paths["n_labels"] = len(np.unique(sitk.GetArrayFromImage(sitk.ReadImage(paths["fixed_labels"])))) - 1
    return paths


def scores(paths: dict[str, Any], result: RegistrationResult) -> dict[str, float]:
    """Mean Dice of the labels with nothing done, with the affine part alone, and with the whole transform."""
    fixed, moving = sitk.ReadImage(paths["fixed_labels"]), sitk.ReadImage(paths["moving_labels"])
    steps = {
        "nothing": sitk.Transform(3, sitk.sitkIdentity),
        "affine": result.affine,
        "deformable": result.transform,
    }
    return {name: warped_dice(moving, t, fixed) for name, t in steps.items()}


def warped_dice(moving_labels: sitk.Image, transform: sitk.Transform, fixed_labels: sitk.Image) -> float:
    """Mean Dice of labels brought onto the fixed grid (nearest neighbour) over the labels found there."""
    warped = warp_image(moving_labels, transform, fixed_labels, "nearest")
    return mean_dice(sitk.GetArrayFromImage(warped), sitk.GetArrayFromImage(fixed_labels))


def run(options: argparse.Namespace) -> Outcome:
    """Register the bundled pair and score it with its labels."""
    from LDRCore.cli.register import register_and_save, summary

    options.overwrite = True
    paths = pair()
    result, files = register_and_save(options, paths["fixed"], paths["moving"], "the demo pair", inverse=True)
    dice = scores(paths, result)
    table = "\n".join(
        f"  {name:<22}{value:.3f}"
        for name, value in zip(("nothing", "affine only", "deformable"), dice.values(), strict=True)
    )
    text = (
        summary(result.report, files)
        + f"\nmean Dice over {paths['n_labels']} brain structures (automatic DLMUSE labels):\n{table}"
        + f"\nlook at {options.out / 'overview.png'}"
    )
    return {"report": result.report, "files": files, "dice": dice}, text
