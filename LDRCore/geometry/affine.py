"""Linear maps: 4x4 matrices in LPS mm, as SimpleITK transforms, fitted to points."""

from __future__ import annotations

import numpy as np
import SimpleITK as sitk

from LDRCore.geometry.grids import Grid


def tensor_affine_to_lps(matrix: np.ndarray, translation_vox: np.ndarray, grid: Grid) -> np.ndarray:
    """``x -> c + A (x - c) + b`` of an isotropic grid (A in tensor-axis order, b in voxels) as a 4x4 in LPS mm."""
    out = np.eye(4)
    out[:3, :3] = np.asarray(matrix, dtype=float)[::-1, ::-1]
    shift = np.asarray(translation_vox, dtype=float)[::-1] * np.array(grid.spacing_mm)[::-1]
    out[:3, 3] = grid.centre_lps + shift - out[:3, :3] @ grid.centre_lps
    return out


def affine_transform(matrix_lps: np.ndarray) -> sitk.AffineTransform:
    """A 4x4 in LPS mm as a SimpleITK transform."""
    transform = sitk.AffineTransform(3)
    transform.SetMatrix(np.asarray(matrix_lps)[:3, :3].ravel().tolist())
    transform.SetTranslation(np.asarray(matrix_lps)[:3, 3].tolist())
    return transform


def linear_matrix(transform: sitk.Transform) -> np.ndarray | None:
    """The 4x4 in LPS mm of a linear SimpleITK transform, None if the transform is not linear."""
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


def fit_affine(points: np.ndarray, moved: np.ndarray, weights: np.ndarray | None = None) -> np.ndarray:
    """The affine map (4x4) that takes points (N, 3) nearest to their images (N, 3), by (weighted) least squares.

    More than some 20,000 points are subsampled regularly. `weights` (N,) multiply the residuals.
    """
    every = max(1, len(points) // 20_000)
    factor = np.ones((len(points), 1)) if weights is None else weights[:, None]
    design = np.concatenate([points, np.ones((len(points), 1))], axis=1) * factor
    solution, *_ = np.linalg.lstsq(design[::every], (moved * factor)[::every], rcond=None)
    out = np.eye(4)
    out[:3] = solution.T
    return out
