"""The demo pair: two real, skull-stripped brains of different people, oblique and of different spacing, with labels.

Data and licences lie in `LDRCore/bundled/demo`.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import SimpleITK as sitk

from LDRCore.errors import RegistrationError
from LDRCore.registration import warp_image
from LDRCore.result import RegistrationResult
from LDRCore.weights import BUNDLED

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


def mean_dice(a: sitk.Image, b: sitk.Image) -> float:
    """Mean Dice over the labels of `b` (the fixed ones), both on one grid."""
    x, y = (sitk.GetArrayViewFromImage(i).astype(np.int64).ravel() for i in (a, b))
    size = int(max(x.max(), y.max())) + 1
    both = np.bincount(x[x == y], minlength=size)
    total = np.bincount(x, minlength=size) + np.bincount(y, minlength=size)
    present = np.bincount(y, minlength=size) > 0
    present[0] = False
    return float((2 * both[present] / total[present]).mean())


def scores(paths: dict[str, Any], result: RegistrationResult) -> dict[str, float]:
    """Mean Dice of the labels with nothing done, with the affine part alone, and with the whole transform."""
    fixed, moving = sitk.ReadImage(paths["fixed_labels"]), sitk.ReadImage(paths["moving_labels"])
    steps = {
        "nothing": sitk.Transform(3, sitk.sitkIdentity),
        "affine": result.affine,
        "deformable": result.transform,
    }
    return {name: mean_dice(warp_image(moving, t, fixed, "nearest"), fixed) for name, t in steps.items()}
