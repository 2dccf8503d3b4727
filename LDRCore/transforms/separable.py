"""Resampling of images and displacements by one matrix product an axis. Differentiable.

Corner voxels of two resolutions of a grid coincide, as in `spatial`.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache

import numpy as np
import torch
import torch.nn.functional as F


def interpolate(values: torch.Tensor, shape: Sequence[int]) -> torch.Tensor:
    """Interpolate (B, C, d, h, w) linearly on a finer or coarser grid (D, H, W).

    On a CPU the products take half as long as torch's trilinear interpolation, and their derivative less than that.
    """
    if values.device.type != "cpu" or values.dtype != torch.float32:
        return F.interpolate(values, size=tuple(shape), mode="trilinear", align_corners=True)
    return _along_axes(values, [_linear(n, m) for n, m in zip(values.shape[2:], shape, strict=True)])


def shrink(image: torch.Tensor, shape: Sequence[int]) -> torch.Tensor:
    """Resample an image on a coarser grid with the same corners, averaged over boxes of the coarser grid's voxels.

    Args:
        image: (B, C, D, H, W).
        shape: (d, h, w), no larger.

    Returns:
        (B, C, d, h, w).
    """
    if tuple(image.shape[2:]) == tuple(shape):
        return image
    return _along_axes(image, [_box_average(n, m) for n, m in zip(image.shape[2:], shape, strict=True)])


def _along_axes(values: torch.Tensor, weights: Sequence[np.ndarray]) -> torch.Tensor:
    """Multiply by a matrix (m, n) along each axis of (B, C, D, H, W)."""
    z, y, x = (torch.from_numpy(w).to(values) for w in weights)
    with torch.autocast(values.device.type, enabled=False):
        rows = y @ (values @ x.T)
        return (z @ rows.flatten(3)).view(*values.shape[:2], *(len(w) for w in weights))


@lru_cache(maxsize=32)
def _linear(n: int, m: int) -> np.ndarray:
    """Return the weights (m, n) by which m points with the same ends are interpolated linearly between n."""
    position = np.linspace(0, n - 1, m)[:, None]
    return np.maximum(0, 1 - np.abs(position - np.arange(n)))


@lru_cache(maxsize=32)
def _box_average(n: int, m: int) -> np.ndarray:
    """Return the weights (m, n) by which m points average boxes as wide as their distance, cut at the border."""
    width = (n - 1) / (m - 1)
    middle = np.linspace(0, n - 1, m)[:, None]
    voxel = np.arange(n)[None]
    high = np.minimum(middle + width / 2, voxel + 0.5)
    weights = (high - np.maximum(middle - width / 2, voxel - 0.5)).clip(0)
    return weights / weights.sum(1, keepdims=True)
