"""Geometry of training windows: lattices, positions, displacements behind a starting map; samples and their batches.

Everything is in voxels of the window or of a scan (tensor-axis order), 4x4 matrices between them. No data set here.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F

from LDRCore.evaluation import metrics
from LDRCore.transforms import spatial


@dataclasses.dataclass
class Sample:
    """One pair, or with `collate` a batch.

    Attributes:
        fixed, moving: (B, 1, *shape) as the network sees them.
        fixed_target, moving_target: (B, 1, *loss shape), without intensity augmentation, for the loss.
        labels: for every pair its label maps, or None.
        teacher: (B, 3, *field shape) the teacher's displacement behind the same start, voxels of that grid; or None.
        keys: names of the pairs.
    """

    fixed: torch.Tensor
    moving: torch.Tensor
    fixed_target: torch.Tensor
    moving_target: torch.Tensor
    labels: list[LabelPair | None]
    teacher: torch.Tensor | None
    keys: list[str]


@dataclasses.dataclass
class LabelPair:
    """The labels of a fixed window, and where its points lie in the moving label map.

    Attributes:
        fixed: (*shape) int64 at the window's points; fixed_loss: (N,) int64 at the loss grid's points.
        moving: label volume of the moving scan.
        to_moving: 4x4, window voxel -> moving scan voxel.
        free_form: (1, 3, *shape) deformation of the moving scan behind the start, window voxels; or None.
    """

    fixed: torch.Tensor
    fixed_loss: torch.Tensor
    moving: torch.Tensor
    to_moving: np.ndarray
    free_form: torch.Tensor | None

    def positions(self, displacement: torch.Tensor) -> torch.Tensor:
        """(3, N) voxels of the moving scan under a displacement (1, 3, d, h, w), which may be coarser than the window.

        Differentiable by the displacement.
        """
        where = moved_lattice(displacement, self.fixed.shape)
        return apply(self.to_moving, through(where, self.free_form)).reshape(3, -1)

    def dice(self, displacement: torch.Tensor | None) -> float:
        """Mean Dice over the window's labels (nearest neighbour), moving labels pulled by a displacement."""
        if displacement is None:
            displacement = torch.zeros(1, 3, *self.fixed.shape, device=self.fixed.device)
        full = spatial.upsample(displacement, self.fixed.shape)
        pulled = nearest(self.moving, self.positions(full))
        return metrics.mean_dice(pulled.cpu().numpy(), self.fixed.reshape(-1).cpu().numpy())


def lattice(shape: tuple[int, ...], points: tuple[int, ...], device: Any = None) -> torch.Tensor:
    """(1, 3, *points): a coarser lattice with the same corners, in voxels of the grid `shape`."""
    scale = torch.tensor([(n - 1) / (p - 1) for n, p in zip(shape, points, strict=True)], device=device)
    return spatial.identity_grid(points, device=device) * scale.view(1, 3, 1, 1, 1)


def moved_lattice(displacement: torch.Tensor, shape: tuple[int, ...]) -> torch.Tensor:
    """Where the points of a displacement's own grid go, in voxels of the grid `shape` with the same corners."""
    points = tuple(displacement.shape[2:])
    scale = torch.tensor([(n - 1) / (p - 1) for n, p in zip(shape, points, strict=True)], device=displacement.device)
    return lattice(tuple(shape), points, displacement.device) + displacement * scale.view(1, 3, 1, 1, 1)


def through(where: torch.Tensor, free_form: torch.Tensor | None) -> torch.Tensor:
    """Window positions after a free-form deformation of the moving scan (None: the same positions)."""
    return where if free_form is None else where + spatial.sample(free_form, where, padding="border")


def apply(matrix: np.ndarray, where: torch.Tensor) -> torch.Tensor:
    """Positions (1, 3, d, h, w) through a 4x4 matrix."""
    m = torch.from_numpy(matrix[:3]).to(where)
    flat = m[:, :3] @ where.reshape(3, -1) + m[:, 3:]
    return flat.reshape(where.shape)


def nearest(labels: torch.Tensor, where: torch.Tensor) -> torch.Tensor:
    """(N,) int64 labels at voxel positions (3, N), 0 outside the volume."""
    index = where.round().long()
    size = torch.tensor(labels.shape, device=labels.device).view(3, 1)
    inside = ((index >= 0) & (index < size)).all(0)
    index = index.clamp_min(0).minimum(size - 1)
    return torch.where(inside, labels[index[0], index[1], index[2]].long(), 0)


def image_at(volume: torch.Tensor, to_scan: np.ndarray, where: torch.Tensor, stride: int = 1) -> torch.Tensor:
    """A scan at window positions that lie `stride` apart; averaged first where that is two or more of its voxels."""
    if np.linalg.norm(to_scan[:3, 0]) * stride >= 1.9:
        volume = F.avg_pool3d(volume, 2)
        to_scan = np.vstack([to_scan[:3] / 2, to_scan[3:]])
        to_scan[:3, 3] -= 0.25
    return spatial.sample(volume, apply(to_scan, where))


def about_middle(middle: np.ndarray, pose_mm: np.ndarray, spacing_mm: float) -> np.ndarray:
    """A pose in mm about the window's middle, as a map of window voxels."""
    out = np.eye(4)
    out[:3, :3] = pose_mm[:3, :3]
    out[:3, 3] = middle - pose_mm[:3, :3] @ middle + pose_mm[:3, 3] / spacing_mm
    return out


def behind(stored: torch.Tensor, shape: tuple[int, ...], points: tuple[int, ...], matrix: np.ndarray) -> torch.Tensor:
    """A stored deformation as what is left of it behind a start.

    Args:
        stored: (1, 3, d, h, w) between canonical windows, voxels of its own grid.
        shape: the window.
        points: grid of the result, the same corners.
        matrix: 4x4, moving canonical window voxel -> window voxel before the start.

    Returns:
        (1, 3, *points), voxels of that grid.
    """
    total = moved_lattice(spatial.upsample(stored, points), shape)
    left = apply(matrix, total) - lattice(shape, points, stored.device)
    scale = torch.tensor([(p - 1) / (n - 1) for n, p in zip(shape, points, strict=True)], device=stored.device)
    return left * scale.view(1, 3, 1, 1, 1)


def between(displacement: torch.Tensor, shape: tuple[int, ...], matrix: np.ndarray) -> torch.Tensor:
    """The reverse of `behind`, on the displacement's own grid: what the store holds.

    Args:
        displacement: (1, 3, d, h, w) behind a start, voxels of its grid.
        shape: the window.
        matrix: 4x4, window voxel behind the start -> moving canonical window voxel.
    """
    points = tuple(displacement.shape[2:])
    total = apply(matrix, moved_lattice(displacement, shape))
    scale = torch.tensor([(p - 1) / (n - 1) for n, p in zip(shape, points, strict=True)], device=total.device)
    return (total - lattice(shape, points, total.device)) * scale.view(1, 3, 1, 1, 1)


def collate(samples: list[Sample]) -> Sample:
    """One batch of several samples."""
    names = ("fixed", "moving", "fixed_target", "moving_target")
    tensors = [torch.cat([getattr(s, n) for s in samples]) for n in names]
    teachers = [s.teacher for s in samples if s.teacher is not None]
    teacher = torch.cat(teachers) if teachers else None
    return Sample(*tensors, [s.labels[0] for s in samples], teacher, [s.keys[0] for s in samples])
