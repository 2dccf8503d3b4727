"""Geometry of training windows: sampling grids, points, and displacements without or with the initial transform.

A window is the grid that the networks work on. Points and displacements are in voxels of the window or of a scan
(tensor-axis order); 4x4 matrices lead between them and are named target first, as `moving_from_window`. No data set is
read here.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
import torch.nn.functional as F

from LDRCore.transforms import spatial


def sampling_grid(shape: tuple[int, ...], points: tuple[int, ...], device: Any = None) -> torch.Tensor:
    """Return a coarser grid with the corners of the grid `shape`: (1, 3, *points), in voxels of `shape`."""
    return spatial.identity_grid(points, device=device) * _edge_ratio(points, shape, device)


def warped_grid(displacement: torch.Tensor, shape: tuple[int, ...]) -> torch.Tensor:
    """Move the points of a displacement's own grid by it.

    Args:
        displacement: (1, 3, d, h, w), voxels of its grid.
        shape: the grid with the same corners that the result is in voxels of.

    Returns:
        (1, 3, d, h, w).
    """
    points = tuple(displacement.shape[2:])
    grid = sampling_grid(tuple(shape), points, displacement.device)
    return grid + displacement * _edge_ratio(points, shape, displacement.device)


def _edge_ratio(points: tuple[int, ...], shape: tuple[int, ...], device: Any) -> torch.Tensor:
    """(1, 3, 1, 1, 1): edge of a voxel of the grid `points`, in voxels of the grid `shape` with the same corners."""
    ratio = [(n - 1) / (p - 1) for n, p in zip(shape, points, strict=True)]
    return torch.tensor(ratio, device=device).view(1, 3, 1, 1, 1)


def deform_points(points: torch.Tensor, free_form: torch.Tensor | None) -> torch.Tensor:
    """Move window points by a free-form deformation of the moving scan; None leaves them where they are."""
    return points if free_form is None else points + spatial.sample(free_form, points, padding="border")


def transform_points(matrix: np.ndarray, points: torch.Tensor) -> torch.Tensor:
    """Apply a 4x4 matrix to points (1, 3, d, h, w)."""
    m = torch.from_numpy(matrix[:3]).to(points)
    flat = m[:, :3] @ points.reshape(3, -1) + m[:, 3:]
    return flat.reshape(points.shape)


def sample_labels(labels: torch.Tensor, points: torch.Tensor) -> torch.Tensor:
    """Look up the nearest label at voxel positions.

    Args:
        labels: (D, H, W) integer.
        points: (3, N), voxels of `labels`.

    Returns:
        (N,) int64; 0 outside the volume.
    """
    index = points.round().long()
    size = torch.tensor(labels.shape, device=labels.device).view(3, 1)
    inside = ((index >= 0) & (index < size)).all(0)
    index = index.clamp_min(0).minimum(size - 1)
    return torch.where(inside, labels[index[0], index[1], index[2]].long(), 0)


def sample_scan(
    image: torch.Tensor, scan_from_window: np.ndarray, points: torch.Tensor, stride: int = 1
) -> torch.Tensor:
    """Sample a scan at window points that lie `stride` apart.

    Where that distance is two or more voxels of the scan, the scan is averaged first.

    Args:
        image: (1, 1, D, H, W).
        scan_from_window: 4x4.
        points: (1, 3, d, h, w), window voxels.
        stride: distance of neighbouring points, window voxels.

    Returns:
        (1, 1, d, h, w).
    """
    if np.linalg.norm(scan_from_window[:3, 0]) * stride >= 1.9:
        image = F.avg_pool3d(image, 2)
        scan_from_window = np.vstack([scan_from_window[:3] / 2, scan_from_window[3:]])
        scan_from_window[:3, 3] -= 0.25
    return spatial.sample(image, transform_points(scan_from_window, points))


def pose_about_centre(centre: np.ndarray, pose_mm: np.ndarray, spacing_mm: float) -> np.ndarray:
    """Turn a pose in mm about a window's centre (3,) into a 4x4 map of window voxels."""
    out = np.eye(4)
    out[:3, :3] = pose_mm[:3, :3]
    out[:3, 3] = centre - pose_mm[:3, :3] @ centre + pose_mm[:3, 3] / spacing_mm
    return out


def remove_initial(
    stored: torch.Tensor, shape: tuple[int, ...], points: tuple[int, ...], window_from_canonical: np.ndarray
) -> torch.Tensor:
    """Take the initial transform out of a stored deformation: what is left for the networks to find.

    Args:
        stored: (1, 3, d, h, w) between canonical windows, voxels of its own grid.
        shape: the window.
        points: grid of the result, the same corners.
        window_from_canonical: 4x4, moving canonical window voxel -> window voxel before the initial transform.

    Returns:
        (1, 3, *points), voxels of that grid.
    """
    moved = transform_points(window_from_canonical, warped_grid(spatial.upsample(stored, points), shape))
    return (moved - sampling_grid(shape, points, stored.device)) * _edge_ratio(shape, points, stored.device)


def include_initial(
    displacement: torch.Tensor, shape: tuple[int, ...], canonical_from_window: np.ndarray
) -> torch.Tensor:
    """Put the initial transform into a displacement, on its own grid: what the store holds. Reverses `remove_initial`.

    Args:
        displacement: (1, 3, d, h, w) after the initial transform, voxels of its grid.
        shape: the window.
        canonical_from_window: 4x4, window voxel before the initial transform -> moving canonical window voxel.
    """
    points = tuple(displacement.shape[2:])
    moved = transform_points(canonical_from_window, warped_grid(displacement, shape))
    return (moved - sampling_grid(shape, points, moved.device)) * _edge_ratio(shape, points, moved.device)
