"""Supervision losses: difference from a teacher's displacement, overlap of labels. Torch only."""

from __future__ import annotations

from typing import Any

import torch

from LDRCore import sampling
from LDRCore.losses.regularity import mean_squared_difference


def distillation(student: torch.Tensor, teacher: torch.Tensor, gradient_weight: float = 1.0) -> torch.Tensor:
    """Compute the mean squared error of a displacement, plus that of its forward differences.

    >>> teacher = torch.zeros(1, 3, 4, 4, 4)
    >>> distillation(teacher + 2, teacher)
    tensor(4.)

    Args:
        student, teacher: (B, 3, D, H, W), voxels of one grid.
        gradient_weight: weight of the forward differences; 0 compares values alone.
    """
    error = student - teacher
    total = error.square().mean()
    if gradient_weight:
        total = total + gradient_weight * mean_squared_difference(error)
    return total


def label_overlap(
    coordinates_vox: torch.Tensor,
    moving_labels: torch.Tensor,
    fixed_labels: torch.Tensor,
    stride: int = 1,
    *,
    n_labels: int,
) -> torch.Tensor:
    """Compute 1 - mean soft Dice over the labels above 0 of the fixed points.

    The moving labels are sampled linearly as one-hot maps. The maps are never built: each point adds the weights of
    its eight neighbouring voxels to their labels, so the cost does not depend on the number of labels.

    Args:
        coordinates_vox: (3, N) coordinates in the moving label volume, voxels (differentiable).
        moving_labels: (D, H, W) integer, 0 is background.
        fixed_labels: (N,) int64, the label at each point.
        stride: sample the moving labels on a grid this much coarser: with larger values the gradient reaches farther.
        n_labels: larger than every label value.
    """
    known = moving_labels.device.type == "cpu" and fixed_labels.dtype == torch.int64
    if known and coordinates_vox.dtype == torch.float32 and sampling.backend_name(coordinates_vox) == "numba":
        return _Overlap.apply(coordinates_vox, moving_labels, fixed_labels, stride, n_labels)  # type: ignore[no-any-return,no-untyped-call]
    position = coordinates_vox / stride
    base = position.detach().floor()
    fraction = position - base
    intersection = coordinates_vox.new_zeros(n_labels)
    moving_mass = coordinates_vox.new_zeros(n_labels)
    depth, height, width = moving_labels.shape
    flat_labels = moving_labels.reshape(-1)
    for corner in range(8):
        weight = torch.ones_like(fraction[0])
        index = []
        for axis, size in enumerate((depth, height, width)):
            offset = (corner >> axis) & 1
            weight = weight * (fraction[axis] if offset else 1 - fraction[axis])
            index.append(((base[axis] + offset) * stride).long().clamp_(0, size - 1))
        label = flat_labels[(index[0] * height + index[1]) * width + index[2]].long()
        moving_mass = moving_mass.index_add(0, label, weight)
        intersection = intersection.index_add(0, label, weight * (label == fixed_labels))
    fixed_mass = torch.bincount(fixed_labels, minlength=n_labels).to(weight.dtype)
    dice = 2 * intersection / (fixed_mass + moving_mass).clamp_min(1e-6)
    present = fixed_mass > 0
    present[0] = False
    return 1 - dice[present].mean()


class _Overlap(torch.autograd.Function):
    """`label_overlap` by compiled loops, with its gradient in closed form."""

    @staticmethod
    def forward(
        ctx: Any, coordinates: torch.Tensor, moving: torch.Tensor, fixed: torch.Tensor, stride: int, n_labels: int
    ) -> torch.Tensor:
        from LDRCore.losses import numba_loops

        loss, slopes = numba_loops.overlap(coordinates, moving, fixed, stride, n_labels)
        ctx.save_for_backward(slopes)
        return coordinates.new_tensor(loss)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor, None, None, None, None]:
        (slopes,) = ctx.saved_tensors
        return slopes * gradient, None, None, None, None
