"""What a registration reports: seconds per stage, similarity, regularity, and warnings a careful reader would want."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import numpy as np
import torch

from LDRCore import inference, spatial
from LDRCore.inference import DenseField
from LDRCore.preprocess import PreparedImage

Progress = Callable[[float, str], None]
"""Called with (fraction done, what comes now); an exception raised in it cancels the registration."""


class Clock:
    """Seconds per stage, and progress for the user.

    Attributes:
        times_s: seconds of every finished stage; the first is "import", from `began_s` until now.
    """

    def __init__(self, progress: Progress | None, began_s: float) -> None:
        self._progress = progress
        self._began, self._last = began_s, time.perf_counter()
        self.times_s = {"import": round(self._last - began_s, 4)}
        self._stage = ""

    def start(self, stage: str, fraction: float, message: str) -> None:
        """End the stage before and begin a new one; tells `progress` the fraction done and what comes."""
        self.stop()
        self._stage = stage
        if self._progress is not None:
            self._progress(fraction, message)
        self._last = time.perf_counter()

    def stop(self) -> None:
        """End the current stage."""
        if self._stage:
            self.times_s[self._stage] = round(time.perf_counter() - self._last, 4)
        self._stage = ""

    def finish(self) -> dict[str, float]:
        """End everything and return `times_s` with the total."""
        self.stop()
        self.times_s["total"] = round(time.perf_counter() - self._began, 4)
        if self._progress is not None:
            self._progress(1.0, "done")
        return self.times_s


def similarity(
    f: PreparedImage, m: PreparedImage, dense: DenseField, start: np.ndarray, bent: bool
) -> dict[str, float]:
    """Correlation (paper, Eq. 10) on the field's grid at each stage, of images averaged to about its spacing."""
    fixed = f.coarse.on(dense.grid)
    aligned = m.coarse.on(dense.grid, dense.affine_lps)
    stages = {
        "before": m.coarse.on(dense.grid, start if bent else None),
        "initial": m.coarse.on(dense.grid, start),
        "affine": aligned,
        "after": spatial.warp(aligned, dense.displacement_vox),
    }
    return {name: round(float(inference.ncc(moved, fixed)), 5) for name, moved in stages.items()}


def regularity(dense: DenseField) -> dict[str, Any]:
    """Jacobian statistics of the whole transform on the field's own grid."""
    determinant = spatial.jacobian_determinant(dense.displacement_vox)
    whole = determinant * float(np.linalg.det(dense.affine_lps[:3, :3]))
    spacing = torch.tensor(dense.grid.spacing_mm, device=determinant.device).view(3, 1, 1, 1)
    length = (dense.displacement_vox[0] * spacing).square_().sum(0).sqrt_()
    return {
        "folding_fraction": float((whole <= 0).float().mean()),
        "folding_count": int((whole <= 0).sum()),
        "jacobian_determinant": {"min": round(float(whole.min()), 5), "max": round(float(whole.max()), 5)},
        "dense_displacement_mm": {
            "mean": round(float(length.mean()), 4),
            "max": round(float(length.max()), 4),
        },
    }


def warnings(card: dict[str, Any], f: PreparedImage, m: PreparedImage, similarity: dict[str, float]) -> list[str]:
    """What a careful reader would want to be told about this pair and this model."""
    found = []
    made_for = card.get("made_for", "other images")
    for name, image in (("fixed", f), ("moving", m)):
        if card.get("expects_nonnegative") and image.low < -200:
            found.append(
                f"the {name} image looks like CT (background {image.low:.0f}, as in Hounsfield units), "
                f"but the model {card['name']} was made for {made_for}"
            )
    if similarity["after"] < max(similarity["initial"], similarity["before"]):
        found.append(
            f"the images correlate less after registration ({similarity['after']:.3f}) than before "
            f"({max(similarity['initial'], similarity['before']):.3f}): look at the result before you use it"
        )
    elif similarity["after"] < 0.5:
        found.append(
            f"the images correlate only {similarity['after']:.3f} after registration: look at the result before you "
            "use it"
        )
    return found
