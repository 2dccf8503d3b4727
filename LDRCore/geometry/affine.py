"""Linear maps: 4x4 matrices in LPS mm, as SimpleITK transforms, fitted to points."""

from __future__ import annotations

import numpy as np
import SimpleITK as sitk

from LDRCore.geometry.grids import Grid

RAS_TO_LPS = np.diag([-1.0, -1.0, 1.0, 1.0])
"""4x4 from RAS to LPS mm, and back: the same flip of x and y."""

SINGULAR = 1e-6
"""A linear map with a smaller determinant counts as not invertible."""


def tensor_affine_to_lps(matrix: np.ndarray, translation_vox: np.ndarray, grid: Grid) -> np.ndarray:
    """Return ``x -> c + A (x - c) + b`` of an isotropic grid, c its centre, as a 4x4 in LPS mm.

    Args:
        matrix: A, (3, 3), in tensor-axis order.
        translation_vox: b, (3,), voxels along the tensor axes.
        grid: isotropic.
    """
    out = np.eye(4)
    out[:3, :3] = np.asarray(matrix, dtype=float)[::-1, ::-1]
    shift = np.asarray(translation_vox, dtype=float)[::-1] * np.array(grid.spacing_mm)[::-1]
    out[:3, 3] = grid.centre_lps + shift - out[:3, :3] @ grid.centre_lps
    return out


def affine_transform(matrix_lps: np.ndarray) -> sitk.AffineTransform:
    """Make a SimpleITK transform of a 4x4 in LPS mm."""
    transform = sitk.AffineTransform(3)
    transform.SetMatrix(np.asarray(matrix_lps)[:3, :3].ravel().tolist())
    transform.SetTranslation(np.asarray(matrix_lps)[:3, 3].tolist())
    return transform


def rigid_transform(matrix_lps: np.ndarray) -> sitk.Euler3DTransform:
    """Make a SimpleITK transform of 6 parameters of a rigid 4x4 in LPS mm."""
    transform = sitk.Euler3DTransform()
    transform.SetMatrix(np.asarray(matrix_lps)[:3, :3].ravel().tolist())
    transform.SetTranslation(np.asarray(matrix_lps)[:3, 3].tolist())
    return transform


def linear_matrix(transform: sitk.Transform) -> np.ndarray | None:
    """Return the 4x4 in LPS mm of a linear SimpleITK transform, None if the transform is not linear."""
    if not transform.IsLinear():
        return None
    origin = np.array(transform.TransformPoint((0.0, 0.0, 0.0)))
    out = np.eye(4)
    for axis in range(3):
        unit = [0.0, 0.0, 0.0]
        unit[axis] = 1.0
        out[:3, axis] = np.array(transform.TransformPoint(unit)) - origin
    out[:3, 3] = origin
    return out


def is_singular(matrix: np.ndarray) -> bool:
    """Return whether a 4x4 cannot be inverted: its determinant is `SINGULAR` or less, or not finite."""
    return not abs(np.linalg.det(matrix[:3, :3])) > SINGULAR


def fit_affine(points: np.ndarray, moved: np.ndarray, weights: np.ndarray | None = None) -> np.ndarray:
    """Fit the affine map that takes points nearest to their images, by (weighted) least squares.

    More than some 20,000 points are subsampled regularly.

    Args:
        points, moved: (N, 3), any unit.
        weights: (N,), multiply the residuals; all 1 if None.

    Returns:
        4x4.
    """
    stride = max(1, len(points) // 20_000)
    factor = np.ones((len(points), 1)) if weights is None else weights[:, None]
    design = np.concatenate([points, np.ones((len(points), 1))], axis=1) * factor
    solution, *_ = np.linalg.lstsq(design[::stride], (moved * factor)[::stride], rcond=None)
    out = np.eye(4)
    out[:3] = solution.T
    return out
