"""What a teacher or labels say: differences to a teacher's displacement, overlap of labels. Torch only."""

from __future__ import annotations

import torch


def distillation(student: torch.Tensor, teacher: torch.Tensor, gradient_weight: float = 1.0) -> torch.Tensor:
    """Mean squared difference of two displacements, plus that of their forward differences.

    Args:
        student, teacher: (B, 3, D, H, W), voxels of one grid.
        gradient_weight: weight of the differences' differences; 0 compares values alone.
    """
    off = student - teacher
    total = off.square().mean()
    if gradient_weight:
        total = total + gradient_weight * torch.stack([off.diff(dim=a).square().mean() for a in (2, 3, 4)]).mean()
    return total


def label_overlap(
    coordinates_vox: torch.Tensor,
    moving_labels: torch.Tensor,
    fixed_labels: torch.Tensor,
    stride: int = 1,
    *,
    n_labels: int,
) -> torch.Tensor:
    """1 - mean soft Dice over all labels of the fixed points, the moving labels sampled linearly as one-hot maps.

    The one-hot maps are never built: each point adds its eight corner weights to the labels found there, so the cost
    does not depend on the number of labels.

    Args:
        coordinates_vox: (3, N) positions in the moving label volume, voxels (differentiable).
        moving_labels: (D, H, W) integer, 0 is background.
        fixed_labels: (N,) int64, the label at each point.
        stride: read the moving labels on a grid this much coarser: larger values pull from farther away.
        n_labels: larger than every label value.
    """
    size = n_labels
    position = coordinates_vox / stride
    base = position.detach().floor()
    fraction = position - base
    intersection = coordinates_vox.new_zeros(size)
    moving_mass = coordinates_vox.new_zeros(size)
    depth, height, width = moving_labels.shape
    flat = moving_labels.reshape(-1)
    for corner in range(8):
        offset = [(corner >> axis) & 1 for axis in range(3)]
        weight = torch.ones_like(fraction[0])
        index = []
        for axis, (o, n) in enumerate(zip(offset, (depth, height, width), strict=True)):
            weight = weight * (fraction[axis] if o else 1 - fraction[axis])
            index.append(((base[axis] + o) * stride).long().clamp_(0, n - 1))
        label = flat[(index[0] * height + index[1]) * width + index[2]].long()
        moving_mass = moving_mass.index_add(0, label, weight)
        intersection = intersection.index_add(0, label, weight * (label == fixed_labels))
    fixed_mass = torch.bincount(fixed_labels, minlength=size).to(weight.dtype)
    dice = 2 * intersection / (fixed_mass + moving_mass).clamp_min(1e-6)
    present = fixed_mass > 0
    present[0] = False
    return 1 - dice[present].mean()
