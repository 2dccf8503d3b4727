"""The Jacobian determinant of a displacement field image."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import numpy as np
import SimpleITK as sitk

from LDRCore.geometry.grids import index_to_lps

SLAB_VOXELS = 2_000_000  # of a Jacobian map made at once


def summarise_jacobian(slabs: Iterable[np.ndarray]) -> dict[str, Any]:
    """Count folding voxels of a Jacobian determinant that comes some slices at a time.

    Returns:
        folding_fraction and folding_count (determinants of 0 or less), jacobian_determinant: {"min", "max"}.
    """
    count = voxels = 0
    lowest, highest = np.inf, -np.inf
    for determinant in slabs:
        low, high = float(determinant.min()), float(determinant.max())
        if low <= 0:
            count += int(np.count_nonzero(determinant <= 0))
        voxels += determinant.size
        lowest, highest = min(lowest, low), max(highest, high)
    return {
        "folding_fraction": count / voxels,
        "folding_count": count,
        "jacobian_determinant": {"min": round(lowest, 5), "max": round(highest, 5)},
    }


def jacobian_determinant_image(field: sitk.Image) -> sitk.Image:
    """Compute det(I + du/dx) of a displacement field image, right on any direction, spacing and flip.

    Central differences of the vectors along the grid's axes (one-sided at the borders) are turned into derivatives
    along x, y, z by the inverse of the index -> LPS matrix. (SimpleITK's own filter ignores the direction.) Works in
    slabs: peak memory stays a small multiple of one slab.

    Args:
        field: 3-component vector image, mm LPS.

    Returns:
        float32 image on the same grid; below 1 shrinking, 0 or less folding.
    """
    vectors = sitk.GetArrayViewFromImage(field)
    index_from_lps = np.linalg.inv(index_to_lps(field)[:3, :3]).astype(np.float32)
    depth = vectors.shape[0]
    result = np.empty(vectors.shape[:3], dtype=np.float32)
    slab = max(2, SLAB_VOXELS // int(np.prod(vectors.shape[1:3])))
    for start in range(0, depth, slab):
        stop = min(start + slab, depth)
        low, high = max(start - 1, 0), min(stop + 1, depth)
        if high - low < 2:
            low = max(high - 2, 0)
        part = np.asarray(vectors[low:high], dtype=np.float32)
        by_index = np.gradient(part, axis=(0, 1, 2))  # each (..., 3): d u / d index
        rows = [[sum(by_index[a][..., r] * index_from_lps[a, c] for a in range(3)) for c in range(3)] for r in range(3)]
        for r in range(3):
            rows[r][r] = rows[r][r] + 1.0
        (a, b, c), (d, e, f), (g, h, i) = rows
        det = a * (e * i - f * h) - b * (d * i - f * g) + c * (d * h - e * g)
        result[start:stop] = det[start - low : stop - low]
    image = sitk.GetImageFromArray(result)
    image.CopyInformation(field)
    return image
