"""Scores of a transform on its pair: labels are warped, landmarks mapped, regularity is measured on the fixed grid.

SimpleITK and numpy only. The measures themselves are `metrics` (numpy) and `surface`.
"""

from __future__ import annotations

import os
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import SimpleITK as sitk

from LDRCore import geometry
from LDRCore.errors import RegistrationError
from LDRCore.evaluation import metrics, surface
from LDRCore.io import images
from LDRCore.io.images import ImageLike
from LDRCore.io.points import read_points

MEASURES = ("overlap", "surface", "landmarks", "regularity", "ndv")
NUMBERS = (  # what `score` can measure of a pair as one number each, in the order of columns
    "dice_mean",
    "jaccard_mean",
    "hd95_mm",
    "surface_mm",
    "structures_lost",
    "tre_mm",
    "tre_max_mm",
    "landmarks",
    "folding_count",
    "folding_fraction",
    "sdlogj",
    "sdlogj_learn2reg",
    "non_diffeomorphic_voxels",
    "ndv_percent",
)
PROTOCOLS = ("nearest", "linear-threshold")
FRAMES = ("lps", "ras", "voxel")
MAX_LABEL = 65535
_MASK_VALUE, _MASK_THRESHOLD = 255.0, 128.0  # of the linear-threshold protocol


@dataclass(frozen=True)
class Truth:
    """Ground truth of a pair, by which a transform is scored.

    Attributes:
        fixed: the fixed image; regularity is measured on its grid.
        fixed_labels, moving_labels: integer label maps in their own image's space.
        fixed_landmarks_lps, moving_landmarks_lps: corresponding points (N, 3), LPS mm, in the same order.
    """

    fixed: sitk.Image
    fixed_labels: sitk.Image | None = None
    moving_labels: sitk.Image | None = None
    fixed_landmarks_lps: np.ndarray | None = None
    moving_landmarks_lps: np.ndarray | None = None


def check_choice(name: str, value: str, allowed: Collection[str]) -> None:
    """Refuse a value that is not one of those allowed.

    Raises:
        RegistrationError: the message names the values and what came.
    """
    if value not in allowed:
        raise RegistrationError(f"{name} must be one of {list(allowed)}, got {value!r}")


def load_labels(source: ImageLike, name: str) -> sitk.Image:
    """Read a label map and check it.

    Args:
        source: a path, a sitk.Image, or (array, affine).
        name: what it is to the user ("fixed labels"), for messages.

    Returns:
        An int32 image.

    Raises:
        RegistrationError: unreadable, not 3D, values that are not whole numbers from 0 to 65535, or no label above 0.
    """
    image = images.three_dimensional(images.read(source, name), name)
    values = sitk.GetArrayViewFromImage(image)
    low, high = values.min(), values.max()
    if not (low >= 0 and high <= MAX_LABEL) or (values.dtype.kind == "f" and (values % 1).any()):
        raise RegistrationError(
            f"{name} must hold whole numbers from 0 to {MAX_LABEL}, got values from {low:g} to {high:g}"
        )
    if high == 0:
        raise RegistrationError(f"{name} must hold a label above 0, got only background")
    return sitk.Cast(image, sitk.sitkInt32)


def load_landmarks(path: str | os.PathLike[str], frame: str, image: sitk.Image, name: str) -> np.ndarray:
    """Read landmarks and convert them to LPS mm, (N, 3).

    Args:
        path: of a file that `read_points` knows.
        frame, image, name: see `landmarks_lps`.

    Raises:
        RegistrationError: unreadable, another frame, or a landmark outside its image.
    """
    return landmarks_lps(read_points(Path(path), frame), frame, image, name)


def landmarks_lps(points: np.ndarray, frame: str, image: sitk.Image, name: str) -> np.ndarray:
    """Convert landmarks of any frame to LPS mm, and check that they lie in their image.

    Args:
        points: (N, 3): mm along x, y, z, or for "voxel" indices along the image's axes.
        frame: "lps", "ras" or "voxel".
        image: where the landmarks were set.
        name: what they are to the user ("fixed landmarks"), for messages.

    Raises:
        RegistrationError: another frame, or a landmark outside.
    """
    check_choice(f"the frame of {name}", frame, FRAMES)
    points = np.asarray(points, dtype=float)
    if frame == "voxel":
        lps_from_index = geometry.index_to_lps(image)
        points = points[:, ::-1] @ lps_from_index[:3, :3].T + lps_from_index[:3, 3]
    elif frame == "ras":
        points = points @ geometry.RAS_TO_LPS[:3, :3]
    check_landmarks(points, image, name)
    return points


def check_landmarks(points_lps: np.ndarray, image: sitk.Image, name: str) -> None:
    """Refuse landmarks that do not lie in their image.

    Args:
        points_lps: (N, 3), LPS mm.
        image: where the landmarks were set.
        name: what they are to the user, for messages.

    Raises:
        RegistrationError: a point is more than half a voxel outside.
    """
    index_from_lps = np.linalg.inv(geometry.index_to_lps(image))
    index = np.asarray(points_lps) @ index_from_lps[:3, :3].T + index_from_lps[:3, 3]
    outside = ((index < -0.5) | (index > np.array(image.GetSize()[::-1]) - 0.5)).any(axis=1)
    if outside.any():
        first = np.round(np.asarray(points_lps)[outside][0], 2).tolist()
        raise RegistrationError(
            f"{name} must lie inside their image, got {int(outside.sum())} of {len(outside)} outside (the first at "
            f"{first} mm LPS)"
        )


def overlaps(
    moving_labels: sitk.Image, transform: sitk.Transform, fixed_labels: sitk.Image, protocol: str = "nearest"
) -> tuple[dict[int, float], dict[int, float]]:
    """Warp labels onto the fixed grid and measure their overlap.

    Args:
        moving_labels, fixed_labels: integer label maps.
        transform: fixed -> moving.
        protocol: "nearest" (labels warped with nearest neighbours), or "linear-threshold", the protocol of the
            recursive cascade's and the paper's LPBA figures: every label as a mask times 255, warped linearly, and
            counted where it is above 128.

    Returns:
        {label: Dice} and {label: Jaccard} over the labels of the fixed map; a label that the moving one lacks has 0.

    Raises:
        RegistrationError: another protocol, or no label in common.
    """
    check_choice("protocol", protocol, PROTOCOLS)
    fixed_values = sitk.GetArrayFromImage(fixed_labels)
    _check_common(fixed_values, sitk.GetArrayViewFromImage(moving_labels))
    if protocol == "nearest":
        warped_values = _warp_nearest(moving_labels, transform, fixed_labels)
        dice = metrics.dice_per_label(warped_values, fixed_values)
        return dice, metrics.jaccard_per_label(warped_values, fixed_values)
    # a field on the fixed grid has the transform's values at its voxels, and is quicker for many masks
    field = sitk.Cast(geometry.displacement_field_image(transform, fixed_labels), sitk.sitkVectorFloat64)
    field_transform = sitk.DisplacementFieldTransform(field)
    dice, jaccard = {}, {}
    for label in np.unique(fixed_values[fixed_values > 0]).tolist():
        mask = sitk.Cast(moving_labels == label, sitk.sitkFloat32) * _MASK_VALUE
        warped = sitk.Resample(mask, fixed_labels, field_transform, sitk.sitkLinear, 0.0)
        warped_mask = (sitk.GetArrayViewFromImage(warped) > _MASK_THRESHOLD).astype(np.uint8)
        fixed_mask = (fixed_values == label).astype(np.uint8)
        dice[label] = metrics.dice_per_label(warped_mask, fixed_mask)[1]
        jaccard[label] = metrics.jaccard_per_label(warped_mask, fixed_mask)[1]
    return dice, jaccard


def _warp_nearest(moving_labels: sitk.Image, transform: sitk.Transform, fixed_labels: sitk.Image) -> np.ndarray:
    warped = sitk.Resample(moving_labels, fixed_labels, transform, sitk.sitkNearestNeighbor, 0)
    return sitk.GetArrayFromImage(warped)


def _check_common(fixed_values: np.ndarray, moving_values: np.ndarray) -> None:
    fixed_labels, moving_labels = (np.unique(values[values > 0]) for values in (fixed_values, moving_values))
    if not np.intersect1d(fixed_labels, moving_labels).size:
        raise RegistrationError(
            "fixed and moving labels must have a structure in common, "
            f"got {fixed_labels[:5].tolist()} and {moving_labels[:5].tolist()} (first values)"
        )


def regularity(transform: sitk.Transform, fixed: sitk.Image, *, ndv: bool = True) -> dict[str, Any]:
    """Measure folding and smoothness of a transform at the voxels of the fixed image.

    Args:
        transform: fixed -> moving.
        fixed: the grid.
        ndv: also measure non-diffeomorphic voxels and volume.

    Returns:
        folding_count, folding_fraction, sdlogj, sdlogj_learn2reg, and with `ndv` non_diffeomorphic_voxels and
        ndv_percent.
    """
    matrix_lps = geometry.linear_matrix(transform)
    if matrix_lps is not None:
        return _regularity_of_linear(float(np.linalg.det(matrix_lps[:3, :3])), fixed, ndv)
    field = geometry.displacement_field_image(transform, fixed)
    determinant = sitk.GetArrayFromImage(geometry.jacobian_determinant_image(field))
    count, fraction = metrics.folding(determinant)
    scores = {"folding_count": count, "folding_fraction": fraction, "sdlogj": metrics.sd_log_jacobian(determinant)}
    large_enough = min(determinant.shape) > 2 * metrics.LEARN2REG_BORDER
    scores["sdlogj_learn2reg"] = metrics.learn2reg_sd_log_jacobian(determinant) if large_enough else float("nan")
    if ndv:
        folding = metrics.non_diffeomorphic(geometry.field_in_voxels(field))
        scores |= {"non_diffeomorphic_voxels": folding.voxels, "ndv_percent": folding.volume_percent}
    return scores


def _regularity_of_linear(determinant: float, fixed: sitk.Image, ndv: bool) -> dict[str, Any]:
    """Measure `regularity` of a linear transform, whose Jacobian determinant is the same everywhere."""
    folds = determinant <= 0
    scores: dict[str, Any] = {
        "folding_count": int(np.prod(fixed.GetSize())) if folds else 0,
        "folding_fraction": float(folds),
        "sdlogj": float("nan") if folds else 0.0,
        "sdlogj_learn2reg": 0.0,
    }
    if ndv:
        inner_voxels = int(np.prod([n - 2 for n in fixed.GetSize()]))
        scores["non_diffeomorphic_voxels"] = inner_voxels if folds else 0
        scores["ndv_percent"] = 100 * max(0.0, -determinant)
    return scores


def inverse_consistency_mm(transform: sitk.Transform, inverse: sitk.Transform, fixed: sitk.Image) -> dict[str, float]:
    """Measure how far points of the fixed grid end from where they began after `transform` and then `inverse`.

    Returns:
        mean, p95 and max in mm over all voxels of the fixed grid. Where the transform leaves the region in which the
        inverse is known, as at the rim of a field of view, the distance is large.
    """
    round_trip = geometry.compose_transforms(inverse, transform)  # x -> inverse(transform(x))
    error_mm = np.linalg.norm(sitk.GetArrayFromImage(geometry.displacement_field_image(round_trip, fixed)), axis=-1)
    return {"mean": float(error_mm.mean()), "p95": float(np.percentile(error_mm, 95)), "max": float(error_mm.max())}


def score(
    transform: sitk.Transform, truth: Truth, *, measures: Collection[str] = MEASURES, protocol: str = "nearest"
) -> dict[str, Any]:
    """Measure a transform against the ground truth of its pair.

    Args:
        transform: fixed -> moving.
        truth: labels, landmarks and the fixed grid; what it lacks is not measured.
        measures: some of `MEASURES`. The slow ones are "surface" and "ndv".
        protocol: see `overlaps`. Surface distances are always of nearest-neighbour labels.

    Returns:
        dice_mean, jaccard_mean, hd95_mm, surface_mm (means over structures; those that were lost are left out of the
        distances and counted in structures_lost), structures {label: {dice, jaccard, hd95_mm, surface_mm}}, tre_mm
        (mean), tre_max_mm, landmarks (their number), and what `regularity` returns.

    Raises:
        RegistrationError: an unknown measure or protocol, labels without a common structure, landmarks that do not
            correspond or lie outside.
    """
    for measure in measures:
        check_choice("every measure", measure, MEASURES)
    scores: dict[str, Any] = {}
    if truth.fixed_labels is not None and truth.moving_labels is not None:
        structures: dict[int, dict[str, float | None]] = {}
        if "overlap" in measures:
            dice, jaccard = overlaps(truth.moving_labels, transform, truth.fixed_labels, protocol)
            scores["dice_mean"], scores["jaccard_mean"] = (float(np.mean(list(d.values()))) for d in (dice, jaccard))
            structures = {label: {"dice": dice[label], "jaccard": jaccard[label]} for label in dice}
        if "surface" in measures:
            scores |= _measure_surfaces(truth.moving_labels, transform, truth.fixed_labels, structures)
        if structures:
            scores["structures"] = structures
    if "landmarks" in measures and truth.fixed_landmarks_lps is not None and truth.moving_landmarks_lps is not None:
        scores |= _measure_landmarks(truth.fixed_landmarks_lps, transform, truth.moving_landmarks_lps)
    if "regularity" in measures or "ndv" in measures:
        scores |= regularity(transform, truth.fixed, ndv="ndv" in measures)
    return scores


def _measure_surfaces(
    moving_labels: sitk.Image,
    transform: sitk.Transform,
    fixed_labels: sitk.Image,
    structures: dict[int, dict[str, float | None]],
) -> dict[str, Any]:
    """Return the means of surface distances over structures, and add each structure's own to `structures`."""
    warped_values = _warp_nearest(moving_labels, transform, fixed_labels)
    fixed_values = sitk.GetArrayFromImage(fixed_labels)
    distances = surface.surface_distances(warped_values, fixed_values, fixed_labels.GetSpacing()[::-1])
    for label, d in distances.items():
        structures.setdefault(label, {}).update(hd95_mm=d.hd95_mm if d else None, surface_mm=d.mean_mm if d else None)
    kept = [d for d in distances.values() if d]
    return {
        "hd95_mm": float(np.mean([d.hd95_mm for d in kept])) if kept else float("nan"),
        "surface_mm": float(np.mean([d.mean_mm for d in kept])) if kept else float("nan"),
        "structures_lost": len(distances) - len(kept),
    }


def _measure_landmarks(fixed_lps: np.ndarray, transform: sitk.Transform, moving_lps: np.ndarray) -> dict[str, Any]:
    if len(fixed_lps) != len(moving_lps):
        raise RegistrationError(f"landmarks must correspond one to one, got {len(fixed_lps)} and {len(moving_lps)}")
    errors_mm = metrics.landmark_errors_mm(geometry.transform_points(fixed_lps, transform), moving_lps)
    return {"tre_mm": float(errors_mm.mean()), "tre_max_mm": float(errors_mm.max()), "landmarks": len(errors_mm)}
