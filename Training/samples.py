"""What a network trains on: one pair with its targets, labels and teacher, or a batch of such pairs."""

from __future__ import annotations

import dataclasses

import numpy as np
import torch

from LDRCore.evaluation import metrics
from LDRCore.transforms import spatial
from Training.window_geometry import deform_points, sample_labels, transform_points, warped_grid


@dataclasses.dataclass
class Sample:
    """One pair, or with `collate` a batch.

    Attributes:
        fixed, moving: (B, 1, *shape) as the network sees them.
        fixed_target, moving_target: (B, 1, *loss shape), without intensity augmentation, for the loss.
        labels: for every pair its label maps, or None.
        teacher: (B, 3, *field shape) the teacher's displacement after the same initial transform, voxels of that grid;
            or None.
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
        moving_from_window: 4x4, window voxel -> moving scan voxel.
        free_form: (1, 3, *shape) deformation of the moving scan after the initial transform, window voxels; or None.
    """

    fixed: torch.Tensor
    fixed_loss: torch.Tensor
    moving: torch.Tensor
    moving_from_window: np.ndarray
    free_form: torch.Tensor | None

    def positions(self, displacement: torch.Tensor) -> torch.Tensor:
        """Find where the points of a displacement (1, 3, d, h, w) lie in the moving scan; it may be coarse.

        Differentiable by the displacement.

        Returns:
            (3, N), voxels of the moving scan.
        """
        points = deform_points(warped_grid(displacement, self.fixed.shape), self.free_form)
        return transform_points(self.moving_from_window, points).reshape(3, -1)

    def dice(self, displacement: torch.Tensor | None) -> float:
        """Mean Dice over the window's labels (nearest neighbour), moving labels warped by a displacement."""
        if displacement is None:
            displacement = torch.zeros(1, 3, *self.fixed.shape, device=self.fixed.device)
        full = spatial.upsample(displacement, self.fixed.shape)
        warped = sample_labels(self.moving, self.positions(full))
        return metrics.mean_dice(warped.cpu().numpy(), self.fixed.reshape(-1).cpu().numpy())


def collate(samples: list[Sample]) -> Sample:
    """Put several samples into one batch."""
    names = ("fixed", "moving", "fixed_target", "moving_target")
    tensors = [torch.cat([getattr(sample, name) for sample in samples]) for name in names]
    teachers = [sample.teacher for sample in samples if sample.teacher is not None]
    teacher = torch.cat(teachers) if teachers else None
    return Sample(*tensors, [sample.labels[0] for sample in samples], teacher, [sample.keys[0] for sample in samples])
