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
    """How far two surfaces are apart.

    Attributes:
        hd95_mm: the larger of the two directions' 95th percentile.
        mean_mm: mean over the surface voxels of both.
        hausdorff_mm: the largest distance.
    """

    hd95_mm: float
    mean_mm: float
    hausdorff_mm: float


def surface_distances(
    found: np.ndarray, truth: np.ndarray, spacing_mm: Sequence[float]
) -> dict[int, SurfaceDistance | None]:
    """Surface distances of every label above 0 that `truth` holds; None where `found` lost the structure.

    Args:
        found, truth: integer label maps (D, H, W), 0 is background.
        spacing_mm: voxel edge along the tensor axes (D, H, W).

    Raises:
        ValueError: the shapes differ or are not 3D.
    """
    if found.shape != truth.shape or found.ndim != 3:
        raise ValueError(f"label maps must be 3D and of one shape, got {found.shape} and {truth.shape}")
    boxes = [_bounding_boxes(values) for values in (found, truth)]
    result: dict[int, SurfaceDistance | None] = {}
    for label in boxes[1]:
        if label not in boxes[0]:
            result[label] = None
            continue
        low = np.minimum(boxes[0][label][0], boxes[1][label][0])
        high = np.maximum(boxes[0][label][1], boxes[1][label][1])
        cut = tuple(slice(int(a), int(b)) for a, b in zip(low, high, strict=True))
        result[label] = _distance(found[cut] == label, truth[cut] == label, spacing_mm)
    return result


def _bounding_boxes(values: np.ndarray) -> dict[int, tuple[np.ndarray, np.ndarray]]:
    """{label: (first, last + 1) index of its box}, labels above 0 in rising order."""
    statistics = sitk.LabelShapeStatisticsImageFilter()
    statistics.ComputePerimeterOff()
    statistics.Execute(sitk.GetImageFromArray(values.astype(np.int32)))
    boxes = {}
    for label in statistics.GetLabels():
        start, size = np.split(np.array(statistics.GetBoundingBox(label)), 2)
        boxes[int(label)] = (start[::-1], (start + size)[::-1])
    return boxes


def _distance(found: np.ndarray, truth: np.ndarray, spacing_mm: Sequence[float]) -> SurfaceDistance:
    edges = [_surface(np.pad(mask, 1)) for mask in (found, truth)]
    there = _distance_map(edges[1], spacing_mm)[edges[0]]
    back = _distance_map(edges[0], spacing_mm)[edges[1]]
    return SurfaceDistance(
        hd95_mm=float(max(np.percentile(there, 95), np.percentile(back, 95))),
        mean_mm=float(np.concatenate([there, back]).mean()),
        hausdorff_mm=float(max(there.max(), back.max())),
    )


def _surface(mask: np.ndarray) -> np.ndarray:
    """Voxels of a mask (that does not touch the array's border) with a face neighbour outside it."""
    inside = mask.copy()
    for axis in range(3):
        inside &= np.roll(mask, 1, axis) & np.roll(mask, -1, axis)
    return mask & ~inside


def _distance_map(edge: np.ndarray, spacing_mm: Sequence[float]) -> np.ndarray:
    """Distance in mm of every voxel to the nearest voxel of an edge."""
    image = sitk.GetImageFromArray(edge.astype(np.uint8))
    image.SetSpacing([float(s) for s in spacing_mm[::-1]])
    signed = sitk.SignedMaurerDistanceMap(image, insideIsPositive=False, squaredDistance=False, useImageSpacing=True)
    return sitk.GetArrayFromImage(signed).clip(min=0)
