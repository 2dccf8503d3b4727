"""`ldr demo`: register the bundled pair and score it with its labels.

The pair is two real, skull-stripped brains of different people, oblique and of different spacing. Data and licences
lie in `LDRCore/bundled/demo`.
"""

from __future__ import annotations

import argparse
from typing import Any

import numpy as np
import SimpleITK as sitk

from LDRCore.cli.output import CommandOutput
from LDRCore.cli.register import describe_report, register_and_save
from LDRCore.errors import RegistrationError
from LDRCore.evaluation.metrics import mean_dice
from LDRCore.models.weights import BUNDLED
from LDRCore.registration import warp_image
from LDRCore.result import RegistrationResult

FOLDER = BUNDLED / "demo"
IMAGES = ("fixed", "moving", "fixed_labels", "moving_labels")


def run(options: argparse.Namespace) -> CommandOutput:
    """Register the bundled pair, save the result and score it with its labels. An earlier result is replaced."""
    paths = find_pair()
    result, files = register_and_save(
        options, paths["fixed"], paths["moving"], "the demo pair", overwrite=True, inverse=True
    )
    dice = score(paths, result)
    names = {"nothing": "nothing", "affine": "affine only", "deformable": "deformable"}
    lines = [
        describe_report(result.report, files),
        f"mean Dice over {paths['n_labels']} brain structures (automatic DLMUSE labels):",
        *(f"  {names[stage]:<22}{value:.3f}" for stage, value in dice.items()),
        f"look at {options.out / 'overview.png'}",
    ]
    return CommandOutput({"report": result.report, "files": files, "dice": dice}, "\n".join(lines))


def find_pair() -> dict[str, Any]:
    """Find the demo pair's files.

    Returns:
        Paths under the names of `IMAGES`, and `n_labels`, the number of structures in the fixed labels.

    Raises:
        RegistrationError: a file is missing.
    """
    paths: dict[str, Any] = {name: str(FOLDER / f"{name}.nii.gz") for name in IMAGES}
    for name in IMAGES:
        if not (FOLDER / f"{name}.nii.gz").is_file():
            raise RegistrationError(f"the demo pair must lie in {FOLDER}, got no {name}.nii.gz")
    paths["n_labels"] = len(np.unique(sitk.GetArrayFromImage(sitk.ReadImage(paths["fixed_labels"])))) - 1
    return paths


def score(paths: dict[str, Any], result: RegistrationResult) -> dict[str, float]:
    """Measure the mean Dice of the labels with nothing done, with the affine part alone, and with the transform.

    Args:
        paths: as from `find_pair`.
        result: of registering that pair.
    """
    fixed_labels, moving_labels = sitk.ReadImage(paths["fixed_labels"]), sitk.ReadImage(paths["moving_labels"])
    transforms = {
        "nothing": sitk.Transform(3, sitk.sitkIdentity),
        "affine": result.affine,
        "deformable": result.transform,
    }
    return {name: warped_dice(moving_labels, transform, fixed_labels) for name, transform in transforms.items()}


def warped_dice(moving_labels: sitk.Image, transform: sitk.Transform, fixed_labels: sitk.Image) -> float:
    """Warp labels onto the fixed grid (nearest neighbour) and measure the mean Dice over the fixed labels."""
    warped = warp_image(moving_labels, transform, fixed_labels, "nearest")
    return mean_dice(sitk.GetArrayFromImage(warped), sitk.GetArrayFromImage(fixed_labels))
