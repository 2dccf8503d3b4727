"""A transform judged on its pair: labels and landmarks brought over, regularity measured on the fixed grid.

SimpleITK and numpy only. The measures themselves are `metrics` (numpy) and `surface`.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from typing import Any

import numpy as np
import SimpleITK as sitk

from LDRCore import geometry
from LDRCore.errors import RegistrationError
from LDRCore.evaluation import metrics, surface
from LDRCore.io import images
from LDRCore.io.images import ImageLike

MEASURES = ("overlap", "surface", "landmarks", "regularity", "ndv")
NUMBERS = (  # what `score` can find of a pair, one number each, in the order of columns
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
MAX_LABEL = 65535
_MASK_VALUE, _MASK_THRESHOLD = 255.0, 128.0  # of the linear-threshold protocol


@dataclass(frozen=True)
class Truth:
    """What is known about a pair beside its transform. Landmarks are (N, 3) LPS mm, in the same order in both images.

    Attributes:
        fixed: the fixed image; regularity is measured on its grid.
        fixed_labels, moving_labels: integer label maps in their own image's space.
        fixed_landmarks_lps, moving_landmarks_lps: corresponding points.
    """

    fixed: sitk.Image
    fixed_labels: sitk.Image | None = None
    moving_labels: sitk.Image | None = None
    fixed_landmarks_lps: np.ndarray | None = None
    moving_landmarks_lps: np.ndarray | None = None


def load_labels(source: ImageLike, name: str) -> sitk.Image:
    """A label map as int32, held to the rules.

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


FRAMES = ("lps", "ras", "voxel")


def landmarks_lps(points: np.ndarray, frame: str, image: sitk.Image, name: str) -> np.ndarray:
    """Landmarks of any frame in LPS mm, checked to lie in their image.

    Args:
        points: (N, 3): mm along x, y, z, or for "voxel" indices along the image's axes.
        frame: "lps", "ras" or "voxel".
        image: where the landmarks were set.
        name: what they are to the user ("fixed landmarks"), for messages.

    Raises:
        RegistrationError: another frame, or a landmark outside.
    """
    if frame not in FRAMES:
        raise RegistrationError(f"the frame of {name} must be one of {list(FRAMES)}, got {frame!r}")
    points = np.asarray(points, dtype=float)
    if frame == "voxel":
        matrix = geometry.index_to_lps(image)
        points = points[:, ::-1] @ matrix[:3, :3].T + matrix[:3, 3]
    elif frame == "ras":
        points = points @ geometry.RAS_TO_LPS[:3, :3]
    check_landmarks(points, image, name)
    return points


def check_landmarks(points_lps: np.ndarray, image: sitk.Image, name: str) -> None:
    """Refuse landmarks that do not lie in their image.

    Raises:
        RegistrationError: a point is more than half a voxel outside.
    """
    back = np.linalg.inv(geometry.index_to_lps(image))
    index = np.asarray(points_lps) @ back[:3, :3].T + back[:3, 3]
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
    """({label: Dice}, {label: Jaccard}) over the labels of the fixed map; a label that the moving one lacks counts 0.

    Args:
        moving_labels, fixed_labels: integer label maps.
        transform: fixed -> moving.
        protocol: "nearest" (labels warped with nearest neighbours), or "linear-threshold", the protocol of the
            recursive cascade's and the paper's LPBA figures: every label as a mask times 255, warped linearly, and
            counted where it is above 128.

    Raises:
        RegistrationError: another protocol, or no label in common.
    """
    if protocol not in PROTOCOLS:
        raise RegistrationError(f"protocol must be one of {list(PROTOCOLS)}, got {protocol!r}")
    truth = sitk.GetArrayFromImage(fixed_labels)
    _check_common(truth, sitk.GetArrayViewFromImage(moving_labels))
    if protocol == "nearest":
        warped = sitk.Resample(moving_labels, fixed_labels, transform, sitk.sitkNearestNeighbor, 0)
        found = sitk.GetArrayFromImage(warped)
        return metrics.dice_per_label(found, truth), metrics.jaccard_per_label(found, truth)
    field = sitk.Cast(geometry.displacement_field_image(transform, fixed_labels), sitk.sitkVectorFloat64)
    sampled = sitk.DisplacementFieldTransform(
        field
    )  # on the fixed grid: the same at its voxels, quicker for many masks
    dice, jaccard = {}, {}
    for label in np.unique(truth[truth > 0]).tolist():
        mask = sitk.Cast(moving_labels == label, sitk.sitkFloat32) * _MASK_VALUE
        warped = sitk.Resample(mask, fixed_labels, sampled, sitk.sitkLinear, 0.0)
        found = (sitk.GetArrayViewFromImage(warped) > _MASK_THRESHOLD).astype(np.uint8)
        one = (truth == label).astype(np.uint8)
        dice[label] = metrics.dice_per_label(found, one)[1]
        jaccard[label] = metrics.jaccard_per_label(found, one)[1]
    return dice, jaccard


def _check_common(truth: np.ndarray, moving: np.ndarray) -> None:
    ours, theirs = (np.unique(v[v > 0]) for v in (truth, moving))
    if not np.intersect1d(ours, theirs).size:
        shown = [v[:5].tolist() for v in (ours, theirs)]
        raise RegistrationError(
            f"fixed and moving labels must have a structure in common, got {shown[0]} and {shown[1]} (first values)"
        )


def regularity(transform: sitk.Transform, fixed: sitk.Image, *, ndv: bool = True) -> dict[str, Any]:
    """Folding and smoothness of a transform at the voxels of the fixed image.

    Args:
        transform: fixed -> moving.
        fixed: the grid.
        ndv: also the non-diffeomorphic voxels and volume.

    Returns:
        folding_count, folding_fraction, sdlogj, sdlogj_learn2reg, and with `ndv` non_diffeomorphic_voxels and
        ndv_percent.
    """
    matrix = geometry.linear_matrix(transform)
    if matrix is not None:  # the same determinant everywhere: nothing to sample
        folded = bool(np.linalg.det(matrix[:3, :3]) <= 0)
        count = int(np.prod(fixed.GetSize())) if folded else 0
        found: dict[str, Any] = {"folding_count": count, "folding_fraction": float(folded)}
        found |= {"sdlogj": float("nan") if folded else 0.0, "sdlogj_learn2reg": 0.0}
        inner = int(np.prod([n - 2 for n in fixed.GetSize()]))
        volume = 100 * max(0.0, -float(np.linalg.det(matrix[:3, :3])))
        return found | ({"non_diffeomorphic_voxels": inner * folded, "ndv_percent": volume} if ndv else {})
    field = geometry.displacement_field_image(transform, fixed)
    determinant = sitk.GetArrayFromImage(geometry.jacobian_determinant_image(field))
    count, fraction = metrics.folding(determinant)
    found = {"folding_count": count, "folding_fraction": fraction, "sdlogj": metrics.sd_log_jacobian(determinant)}
    wide = min(determinant.shape) > 2 * metrics.LEARN2REG_BORDER
    found["sdlogj_learn2reg"] = metrics.learn2reg_sd_log_jacobian(determinant) if wide else float("nan")
    if ndv:
        measured = metrics.non_diffeomorphic(geometry.field_in_voxels(field))
        found |= {"non_diffeomorphic_voxels": measured.voxels, "ndv_percent": measured.volume_percent}
    return found


def inverse_consistency_mm(transform: sitk.Transform, inverse: sitk.Transform, fixed: sitk.Image) -> dict[str, float]:
    """How far points of the fixed grid end from where they began after `transform` and then `inverse`.

    Returns:
        mean, p95 and max in mm over all voxels of the fixed grid. (Where the transform leaves the region in which the
        inverse is known, as at the rim of a field of view, the distance says so.)
    """
    both = sitk.CompositeTransform(3)
    both.AddTransform(inverse)
    both.AddTransform(transform)  # applied first
    length = np.linalg.norm(sitk.GetArrayFromImage(geometry.displacement_field_image(both, fixed)), axis=-1)
    return {"mean": float(length.mean()), "p95": float(np.percentile(length, 95)), "max": float(length.max())}


def score(
    transform: sitk.Transform, truth: Truth, *, measures: Collection[str] = MEASURES, protocol: str = "nearest"
) -> dict[str, Any]:
    """Everything that can be measured about a transform, given what is known about its pair.

    Args:
        transform: fixed -> moving.
        truth: labels, landmarks and the fixed grid; what it lacks is not measured.
        measures: some of `MEASURES`. "surface" goes over every structure, "ndv" over every voxel ten times.
        protocol: see `overlaps`. Surface distances are always of nearest-neighbour labels.

    Returns:
        dice_mean, jaccard_mean, hd95_mm, surface_mm (means over structures; those that were lost are left out of the
        distances and counted in structures_lost), structures {label: {dice, jaccard, hd95_mm, surface_mm}}, tre_mm
        (mean), tre_max_mm, landmarks (their number), and what `regularity` returns.

    Raises:
        RegistrationError: an unknown measure or protocol, labels without a common structure, landmarks that do not
            correspond or lie outside.
    """
    unknown = sorted(set(measures) - set(MEASURES))
    if unknown:
        raise RegistrationError(f"measures must be some of {list(MEASURES)}, got {unknown[0]!r}")
    found: dict[str, Any] = {}
    if truth.fixed_labels is not None and truth.moving_labels is not None:
        if "overlap" in measures:
            dice, jaccard = overlaps(truth.moving_labels, transform, truth.fixed_labels, protocol)
            found["dice_mean"], found["jaccard_mean"] = (float(np.mean(list(d.values()))) for d in (dice, jaccard))
            found["structures"] = {k: {"dice": dice[k], "jaccard": jaccard[k]} for k in dice}
        if "surface" in measures:
            found = _with_surfaces(found, transform, truth.moving_labels, truth.fixed_labels)
    if "landmarks" in measures and truth.fixed_landmarks_lps is not None and truth.moving_landmarks_lps is not None:
        ours, theirs = truth.fixed_landmarks_lps, truth.moving_landmarks_lps
        if len(ours) != len(theirs):
            raise RegistrationError(f"landmarks must correspond one to one, got {len(ours)} and {len(theirs)}")
        errors = metrics.landmark_errors_mm(geometry.transform_points(ours, transform), theirs)
        found |= {"tre_mm": float(errors.mean()), "tre_max_mm": float(errors.max()), "landmarks": len(errors)}
    if "regularity" in measures or "ndv" in measures:
        found |= regularity(transform, truth.fixed, ndv="ndv" in measures)
    return found


def _with_surfaces(
    found: dict[str, Any], transform: sitk.Transform, moving_labels: sitk.Image, fixed_labels: sitk.Image
) -> dict[str, Any]:
    warped = sitk.Resample(moving_labels, fixed_labels, transform, sitk.sitkNearestNeighbor, 0)
    ours, theirs = (sitk.GetArrayFromImage(image) for image in (warped, fixed_labels))
    distances = surface.surface_distances(ours, theirs, fixed_labels.GetSpacing()[::-1])
    structures = found.get("structures") or {label: {} for label in distances}
    for label, d in distances.items():
        structures[label] |= {"hd95_mm": d.hd95_mm if d else None, "surface_mm": d.mean_mm if d else None}
    kept = [d for d in distances.values() if d]
    means = {
        "hd95_mm": float(np.mean([d.hd95_mm for d in kept])) if kept else float("nan"),
        "surface_mm": float(np.mean([d.mean_mm for d in kept])) if kept else float("nan"),
        "structures_lost": len(distances) - len(kept),
    }
    return found | means | {"structures": structures}
