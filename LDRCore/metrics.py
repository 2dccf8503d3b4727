"""Agreement of label maps. numpy only.

(Surface distances, landmark errors and regularity measures belong here as well.)
"""

from __future__ import annotations

import numpy as np


def dice_per_label(found: np.ndarray, truth: np.ndarray) -> dict[int, float]:
    """Dice coefficient (paper, Eq. 12) of every label above 0 that `truth` holds.

    Args:
        found, truth: integer label maps of one shape, 0 is background.

    Raises:
        ValueError: the shapes differ.
    """
    if found.shape != truth.shape:
        raise ValueError(f"label maps must have one shape, got {found.shape} and {truth.shape}")
    x, y = (np.asarray(a).astype(np.int64).ravel() for a in (found, truth))
    size = int(max(x.max(), y.max())) + 1
    both = np.bincount(x[x == y], minlength=size)
    in_truth = np.bincount(y, minlength=size)
    total = np.bincount(x, minlength=size) + in_truth
    return {int(k): float(2 * both[k] / total[k]) for k in np.flatnonzero(in_truth) if k != 0}


def mean_dice(found: np.ndarray, truth: np.ndarray) -> float:
    """Mean of `dice_per_label` over the labels of `truth`; NaN if it has none."""
    scores = dice_per_label(found, truth)
    return float(np.mean(list(scores.values()))) if scores else float("nan")
