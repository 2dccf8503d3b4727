"""What a registration is judged by: overlap of labels, distance of landmarks, regularity of a displacement. numpy only.

Distances between surfaces need distance maps and live in `surface`; `scoring` brings a transform to these functions.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

LEARN2REG_OFFSET = 3.0  # what Learn2Reg adds to the determinant before its logarithm
LEARN2REG_BORDER = 2  # voxels that Learn2Reg leaves out on every side
_SLAB_VOXELS = 2_000_000  # looked at once by `non_diffeomorphic`


def _overlap(found: np.ndarray, truth: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """(labels of `truth` above 0, voxels in both, in `found`, in `truth`), one entry a label."""
    if found.shape != truth.shape:
        raise ValueError(f"label maps must have one shape, got {found.shape} and {truth.shape}")
    x, y = (np.asarray(a).astype(np.int64).ravel() for a in (found, truth))
    size = int(max(np.max(x), np.max(y))) + 1
    in_truth = np.bincount(y, minlength=size)
    labels = np.flatnonzero(in_truth)
    labels = labels[labels != 0]
    both, in_found = np.bincount(x[x == y], minlength=size), np.bincount(x, minlength=size)
    return labels, both[labels], in_found[labels], in_truth[labels]


def dice_per_label(found: np.ndarray, truth: np.ndarray) -> dict[int, float]:
    """Dice coefficient (paper, Eq. 12) of every label above 0 that `truth` holds.

    Args:
        found, truth: integer label maps of one shape, 0 is background.

    Raises:
        ValueError: the shapes differ.
    """
    labels, both, in_found, in_truth = _overlap(found, truth)
    return dict(zip(labels.tolist(), (2 * both / (in_found + in_truth)).tolist(), strict=True))


def jaccard_per_label(found: np.ndarray, truth: np.ndarray) -> dict[int, float]:
    """Jaccard coefficient (paper, Eq. 13) of every label above 0 that `truth` holds; arguments as `dice_per_label`."""
    labels, both, in_found, in_truth = _overlap(found, truth)
    return dict(zip(labels.tolist(), (both / (in_found + in_truth - both)).tolist(), strict=True))


def mean_dice(found: np.ndarray, truth: np.ndarray) -> float:
    """Mean of `dice_per_label` over the labels of `truth`; NaN if it has none."""
    scores = dice_per_label(found, truth)
    return float(np.mean(list(scores.values()))) if scores else float("nan")


def landmark_errors_mm(found_mm: np.ndarray, truth_mm: np.ndarray) -> np.ndarray:
    """Target registration error of each landmark.

    Args:
        found_mm: (N, 3), where the transform takes the landmarks of the fixed image.
        truth_mm: (N, 3), where they really are in the moving image.

    Returns:
        (N,) Euclidean distances.

    Raises:
        ValueError: not two lists of as many points.
    """
    found_mm, truth_mm = np.asarray(found_mm, dtype=float), np.asarray(truth_mm, dtype=float)
    if found_mm.shape != truth_mm.shape or found_mm.ndim != 2 or found_mm.shape[1] != 3:
        raise ValueError(f"landmarks must be two lists of shape (N, 3), got {found_mm.shape} and {truth_mm.shape}")
    return np.linalg.norm(found_mm - truth_mm, axis=1)


def folding(determinant: np.ndarray) -> tuple[int, float]:
    """(number, fraction) of voxels with a non-positive Jacobian determinant (paper, Table IV).

    Args:
        determinant: Jacobian determinants, any shape.
    """
    count = int(np.count_nonzero(determinant <= 0))
    return count, count / determinant.size


def sd_log_jacobian(determinant: np.ndarray) -> float:
    """Standard deviation of the logarithm of the Jacobian determinant.

    Folding voxels have no logarithm and are left out, so read it beside `folding`. NaN where every voxel folds.
    """
    positive = determinant[determinant > 0]
    return float(np.log(positive, dtype=np.float64).std()) if positive.size else float("nan")


def learn2reg_sd_log_jacobian(determinant: np.ndarray) -> float:
    """SDlogJ as the Learn2Reg challenge prints it: std of log(clip(J + 3, 1e-9, 1e9)) without two border voxels.

    The offset hides folding and makes the values small: only to be compared with the challenge's own tables.

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
        volume_vox: non-diffeomorphic volume (NDV), in voxels: what tetrahedra that are turned inside out span.
        inner_voxels: number of voxels looked at (the border has no one-sided differences on both sides).
    """

    voxels: int
    volume_vox: float
    inner_voxels: int

    @property
    def volume_percent(self) -> float:
        """NDV in percent of the volume looked at, as LUMIR prints it."""
        return 100 * self.volume_vox / self.inner_voxels

    @property
    def voxels_fraction(self) -> float:
        """Share of the voxels looked at, 0 to 1."""
        return self.voxels / self.inner_voxels


def non_diffeomorphic(displacement_vox: np.ndarray) -> NonDiffeomorphic:
    """Non-diffeomorphic voxels and volume of a displacement that is linear on tetrahedra between voxels.

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
        folded, turned = _non_diffeomorphic_slab(displacement_vox[:, start - 1 : stop + 1])
        voxels, volume = voxels + folded, volume + turned
    return NonDiffeomorphic(voxels, volume, (depth - 2) * (height - 2) * (width - 2))


_TWISTED = (  # neighbours that span the middle tetrahedron of a cell, with determinant 2 for the identity
    ((-1, -1, 0), (-1, 0, -1), (0, -1, -1)),
    ((1, 1, 0), (0, 1, 1), (1, 0, 1)),
)


def _non_diffeomorphic_slab(u: np.ndarray) -> tuple[int, float]:
    """(voxels, volume) of the inner voxels of (3, D, H, W)."""
    inner = tuple(n - 2 for n in u.shape[1:])

    def neighbour(offset: tuple[int, ...]) -> np.ndarray:
        k, j, i = (slice(1 + o, 1 + o + n) for o, n in zip(offset, inner, strict=True))
        return u[:, k, j, i]

    here = neighbour((0, 0, 0))

    def edge(offset: tuple[int, ...]) -> np.ndarray:
        return neighbour(offset) - here + np.array(offset, dtype=u.dtype)[:, None, None, None]

    def unit(axis: int, sign: int) -> tuple[int, ...]:
        return tuple(sign if a == axis else 0 for a in range(3))

    # one-sided derivative along each axis: forward f(x + e) - f(x), backward f(x) - f(x - e)
    sides = [[sign * edge(unit(axis, sign)) for sign in (1, -1)] for axis in range(3)]
    folded = np.zeros(inner, dtype=bool)
    turned = 0.0
    for second in sides[1]:
        for third in sides[2]:
            normal = np.cross(second, third, axis=0)
            for first in sides[0]:
                determinant = (first * normal).sum(0)
                folded |= determinant <= 0
                turned += float(np.minimum(determinant, 0).sum(dtype=np.float64))
    for offsets in _TWISTED:
        first, second, third = (edge(offset) for offset in offsets)
        determinant = (first * np.cross(second, third, axis=0)).sum(0)
        turned += float(np.minimum(determinant, 0).sum(dtype=np.float64))
    return int(np.count_nonzero(folded)), -turned / 12
