"""Measures of a registration: overlap of labels, errors of landmarks, regularity of a displacement. numpy only.

Distances between surfaces need distance maps and live in `surface`; `scoring` applies a transform and calls these.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

LEARN2REG_OFFSET = 3.0  # what Learn2Reg adds to the determinant before its logarithm
LEARN2REG_BORDER = 2  # voxels that Learn2Reg leaves out on every side
_SLAB_VOXELS = 2_000_000  # of a slab that `non_diffeomorphic` works on at once


def dice_per_label(warped: np.ndarray, fixed: np.ndarray) -> dict[int, float]:
    """Compute the Dice coefficient (paper, Eq. 12) of every label above 0 of the fixed map.

    Computes 2 |W and F| / (|W| + |F|) over the voxels W and F of a label in the two maps.

    >>> dice_per_label(np.array([0, 1, 2, 2]), np.array([1, 1, 2, 2]))
    {1: 0.6666666666666666, 2: 1.0}

    Args:
        warped, fixed: integer label maps of one shape, 0 is background.

    Raises:
        ValueError: the shapes differ.
    """
    labels, in_both, in_warped, in_fixed = _count_voxels(warped, fixed)
    return dict(zip(labels.tolist(), (2 * in_both / (in_warped + in_fixed)).tolist(), strict=True))


def jaccard_per_label(warped: np.ndarray, fixed: np.ndarray) -> dict[int, float]:
    """Compute the Jaccard coefficient (paper, Eq. 13) of every label above 0 of the fixed map.

    Computes |W and F| / |W or F| over the voxels W and F of a label in the two maps.

    >>> jaccard_per_label(np.array([0, 1, 2, 2]), np.array([1, 1, 2, 2]))
    {1: 0.5, 2: 1.0}

    Args:
        warped, fixed: integer label maps of one shape, 0 is background.

    Raises:
        ValueError: the shapes differ.
    """
    labels, in_both, in_warped, in_fixed = _count_voxels(warped, fixed)
    return dict(zip(labels.tolist(), (in_both / (in_warped + in_fixed - in_both)).tolist(), strict=True))


def mean_dice(warped: np.ndarray, fixed: np.ndarray) -> float:
    """Average `dice_per_label` over the labels of the fixed map; NaN if it has none."""
    scores = dice_per_label(warped, fixed)
    return float(np.mean(list(scores.values()))) if scores else float("nan")


def _count_voxels(warped: np.ndarray, fixed: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Return the labels of `fixed` above 0, and the voxels of each in both maps, in `warped` and in `fixed`."""
    if warped.shape != fixed.shape:
        raise ValueError(f"label maps must have one shape, got {warped.shape} and {fixed.shape}")
    warped, fixed = (np.asarray(labels).astype(np.int64).ravel() for labels in (warped, fixed))
    n_labels = int(max(np.max(warped), np.max(fixed))) + 1
    in_both = np.bincount(warped[warped == fixed], minlength=n_labels)
    in_warped, in_fixed = (np.bincount(labels, minlength=n_labels) for labels in (warped, fixed))
    labels = np.flatnonzero(in_fixed)
    labels = labels[labels != 0]
    return labels, in_both[labels], in_warped[labels], in_fixed[labels]


def landmark_errors_mm(mapped_mm: np.ndarray, moving_mm: np.ndarray) -> np.ndarray:
    """Compute the target registration error of each landmark.

    >>> landmark_errors_mm([[0, 0, 0], [1, 1, 1]], [[3, 4, 0], [1, 1, 1]])
    array([5., 0.])

    Args:
        mapped_mm: (N, 3), the landmarks of the fixed image, mapped by the transform.
        moving_mm: (N, 3), the same landmarks as they were set in the moving image.

    Returns:
        (N,) Euclidean distances, mm.

    Raises:
        ValueError: not two lists of as many points.
    """
    mapped_mm, moving_mm = np.asarray(mapped_mm, dtype=float), np.asarray(moving_mm, dtype=float)
    if mapped_mm.shape != moving_mm.shape or mapped_mm.ndim != 2 or mapped_mm.shape[1] != 3:
        raise ValueError(f"landmarks must be two lists of shape (N, 3), got {mapped_mm.shape} and {moving_mm.shape}")
    return np.linalg.norm(mapped_mm - moving_mm, axis=1)


def folding(determinant: np.ndarray) -> tuple[int, float]:
    """Count voxels with a non-positive Jacobian determinant (paper, Table IV).

    >>> folding(np.array([1.0, 0.5, 0.0, -2.0]))
    (2, 0.5)

    Args:
        determinant: Jacobian determinants, any shape.

    Returns:
        Their number, and their fraction of all voxels.
    """
    count = int(np.count_nonzero(determinant <= 0))
    return count, count / determinant.size


def sd_log_jacobian(determinant: np.ndarray) -> float:
    """Compute the standard deviation of the logarithm of the Jacobian determinant.

    Folding voxels have no logarithm and are left out, so read it beside `folding`. NaN where every voxel folds.

    >>> sd_log_jacobian(np.array([1.0, np.e**2, -1.0]))
    1.0

    Args:
        determinant: Jacobian determinants, any shape.
    """
    positive = determinant[determinant > 0]
    return float(np.log(positive, dtype=np.float64).std()) if positive.size else float("nan")


def learn2reg_sd_log_jacobian(determinant: np.ndarray) -> float:
    """Compute SDlogJ as the Learn2Reg challenge prints it.

    Computes the standard deviation of log(clip(J + 3, 1e-9, 1e9)) without the two outer voxels of every side. The
    offset hides folding and makes the values small: compare them with the challenge's own tables only.

    Args:
        determinant: (D, H, W), central differences.

    Raises:
        ValueError: an axis has fewer than 5 voxels.
    """
    if determinant.ndim != 3 or min(determinant.shape) <= 2 * LEARN2REG_BORDER:
        raise ValueError(f"Learn2Reg's SDlogJ needs at least 5 voxels along each of 3 axes, got {determinant.shape}")
    inner = determinant[(slice(LEARN2REG_BORDER, -LEARN2REG_BORDER),) * 3].astype(np.float64)
    return float(np.log((inner + LEARN2REG_OFFSET).clip(1e-9, 1e9)).std())


@dataclass(frozen=True)
class NonDiffeomorphic:
    """How far a displacement is from a digital diffeomorphism (see `non_diffeomorphic`).

    Attributes:
        voxels: number of inner voxels where one of the eight one-sided Jacobian determinants is not positive.
        volume_vox: non-diffeomorphic volume (NDV), in voxels: the volume of tetrahedra that are turned inside out.
        inner_voxels: number of voxels that are not on the border, where there are no neighbours on both sides.
    """

    voxels: int
    volume_vox: float
    inner_voxels: int

    @property
    def volume_percent(self) -> float:
        """NDV in percent of the inner voxels' volume, as LUMIR prints it."""
        return 100 * self.volume_vox / self.inner_voxels

    @property
    def voxels_fraction(self) -> float:
        """Fraction of the inner voxels, 0 to 1."""
        return self.voxels / self.inner_voxels


def non_diffeomorphic(displacement_vox: np.ndarray) -> NonDiffeomorphic:
    """Measure non-diffeomorphic voxels and volume of a displacement that is linear on tetrahedra between voxels.

    Around each voxel stand eight corner tetrahedra, spanned by the forward or backward neighbour along each axis, and
    two that fill what is left of a cell, one for each of the two ways to cut cells into five. A map keeps orientation
    on a tetrahedron where its determinant is positive; a negative determinant is six times the volume that is turned
    inside out, and the two ways are averaged. Stricter than central differences, which miss checkerboard folding.

    Source: Y. Liu, J. Chen, S. Wei, A. Carass, J. Prince, "On finite difference Jacobian computation in deformable
    image registration" (2024).

    Args:
        displacement_vox: (3, D, H, W), component c along tensor axis c, in voxels.

    Raises:
        ValueError: another shape, or an axis of fewer than 3 voxels.
    """
    if displacement_vox.ndim != 4 or displacement_vox.shape[0] != 3 or min(displacement_vox.shape[1:]) < 3:
        raise ValueError(
            f"displacement must have shape (3, D, H, W) with at least 3 voxels an axis, got {displacement_vox.shape}"
        )
    depth, height, width = displacement_vox.shape[1:]
    slab = max(1, _SLAB_VOXELS // (height * width))
    voxels, volume = 0, 0.0
    for start in range(1, depth - 1, slab):
        stop = min(start + slab, depth - 1)
        slab_voxels, slab_volume = _measure_slab(displacement_vox[:, start - 1 : stop + 1])
        voxels, volume = voxels + slab_voxels, volume + slab_volume
    return NonDiffeomorphic(voxels, volume, (depth - 2) * (height - 2) * (width - 2))


_MIDDLE_TETRAHEDRA = (  # neighbours that span the middle tetrahedron of a cell, with determinant 2 for the identity
    ((-1, -1, 0), (-1, 0, -1), (0, -1, -1)),
    ((1, 1, 0), (0, 1, 1), (1, 0, 1)),
)


def _measure_slab(u: np.ndarray) -> tuple[int, float]:
    """Return (voxels, volume) of the inner voxels of a displacement u (3, D, H, W)."""
    inner = tuple(n - 2 for n in u.shape[1:])

    def neighbour(offset: tuple[int, ...]) -> np.ndarray:
        k, j, i = (slice(1 + o, 1 + o + n) for o, n in zip(offset, inner, strict=True))
        return u[:, k, j, i]

    centre = neighbour((0, 0, 0))

    def edge(offset: tuple[int, ...]) -> np.ndarray:
        return neighbour(offset) - centre + np.array(offset, dtype=u.dtype)[:, None, None, None]

    def unit(axis: int, sign: int) -> tuple[int, ...]:
        return tuple(sign if a == axis else 0 for a in range(3))

    # one-sided derivative along each axis: forward f(x + e) - f(x), backward f(x) - f(x - e)
    sides = [[sign * edge(unit(axis, sign)) for sign in (1, -1)] for axis in range(3)]
    folds = np.zeros(inner, dtype=bool)
    negative_sum = 0.0  # of determinants below 0: six times the inverted volume, once for each of the two ways
    for second in sides[1]:
        for third in sides[2]:
            normal = np.cross(second, third, axis=0)
            for first in sides[0]:
                determinant = (first * normal).sum(0)
                folds |= determinant <= 0
                negative_sum += float(np.minimum(determinant, 0).sum(dtype=np.float64))
    for offsets in _MIDDLE_TETRAHEDRA:
        first, second, third = (edge(offset) for offset in offsets)
        determinant = (first * np.cross(second, third, axis=0)).sum(0)
        negative_sum += float(np.minimum(determinant, 0).sum(dtype=np.float64))
    return int(np.count_nonzero(folds)), -negative_sum / 12
