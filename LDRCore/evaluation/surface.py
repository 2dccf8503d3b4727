"""Distances between the surfaces of two label maps, in mm. SimpleITK and numpy only.

The surface of a structure is its voxels with a face neighbour outside. Distances go from voxel centre to voxel
centre, both ways.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import SimpleITK as sitk


@dataclass(frozen=True)
class SurfaceDistance:
    """Distances between two surfaces.

    Attributes:
        hd95_mm: the larger of the two directions' 95th percentile.
        mean_mm: mean over the surface voxels of both.
        hausdorff_mm: the largest distance.
    """

    hd95_mm: float
    mean_mm: float
    hausdorff_mm: float


def surface_distances(
    warped: np.ndarray, fixed: np.ndarray, spacing_mm: Sequence[float]
) -> dict[int, SurfaceDistance | None]:
    """Measure the surface distances of every label above 0 of the fixed map.

    Args:
        warped, fixed: integer label maps (D, H, W), 0 is background.
        spacing_mm: voxel edge along the tensor axes (D, H, W).

    Returns:
        {label: distances}; None where the warped map lacks the label.

    Raises:
        ValueError: the shapes differ or are not 3D.
    """
    if warped.shape != fixed.shape or warped.ndim != 3:
        raise ValueError(f"label maps must be 3D and of one shape, got {warped.shape} and {fixed.shape}")
    warped_boxes, fixed_boxes = _bounding_boxes(warped), _bounding_boxes(fixed)
    distances: dict[int, SurfaceDistance | None] = {}
    for label, (fixed_low, fixed_high) in fixed_boxes.items():
        if label not in warped_boxes:
            distances[label] = None
            continue
        warped_low, warped_high = warped_boxes[label]
        low, high = np.minimum(warped_low, fixed_low), np.maximum(warped_high, fixed_high)
        box = tuple(slice(int(a), int(b)) for a, b in zip(low, high, strict=True))
        distances[label] = _mask_distance(warped[box] == label, fixed[box] == label, spacing_mm)
    return distances


def _bounding_boxes(values: np.ndarray) -> dict[int, tuple[np.ndarray, np.ndarray]]:
    """Return {label: (first, last + 1) index (D, H, W) of its box}, labels above 0 in rising order."""
    statistics = sitk.LabelShapeStatisticsImageFilter()
    statistics.ComputePerimeterOff()
    statistics.Execute(sitk.GetImageFromArray(values.astype(np.int32)))
    boxes = {}
    for label in statistics.GetLabels():
        start, size = np.split(np.array(statistics.GetBoundingBox(label)), 2)
        boxes[int(label)] = (start[::-1], (start + size)[::-1])
    return boxes


def _mask_distance(warped: np.ndarray, fixed: np.ndarray, spacing_mm: Sequence[float]) -> SurfaceDistance:
    warped_surface, fixed_surface = (_mark_surface(np.pad(mask, 1)) for mask in (warped, fixed))
    warped_to_fixed = _distance_map(fixed_surface, spacing_mm)[warped_surface]
    fixed_to_warped = _distance_map(warped_surface, spacing_mm)[fixed_surface]
    return SurfaceDistance(
        hd95_mm=float(max(np.percentile(warped_to_fixed, 95), np.percentile(fixed_to_warped, 95))),
        mean_mm=float(np.concatenate([warped_to_fixed, fixed_to_warped]).mean()),
        hausdorff_mm=float(max(warped_to_fixed.max(), fixed_to_warped.max())),
    )


def _mark_surface(mask: np.ndarray) -> np.ndarray:
    """Mark the voxels of a mask (that does not touch the array's border) with a face neighbour outside it."""
    inside = mask.copy()
    for axis in range(3):
        inside &= np.roll(mask, 1, axis) & np.roll(mask, -1, axis)
    return mask & ~inside


def _distance_map(surface: np.ndarray, spacing_mm: Sequence[float]) -> np.ndarray:
    """Compute the distance in mm of every voxel to the nearest voxel of a surface."""
    image = sitk.GetImageFromArray(surface.astype(np.uint8))
    image.SetSpacing([float(s) for s in spacing_mm[::-1]])
    signed = sitk.SignedMaurerDistanceMap(image, insideIsPositive=False, squaredDistance=False, useImageSpacing=True)
    return sitk.GetArrayFromImage(signed).clip(min=0)
