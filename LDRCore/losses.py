"""Similarity, regularity and label-overlap terms that a registration network is trained on. Torch only.

Every function returns a scalar to be minimised, averaged over the batch. Displacements are (B, 3, D, H, W) in voxels
of their grid; derivatives of a displacement are therefore unitless and do not depend on the resolution.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F

from LDRCore import spatial


def correlation(warped: torch.Tensor, fixed: torch.Tensor) -> torch.Tensor:
    """1 - Pearson correlation over the whole grid, per pair (paper, Eq. 9-11).

    Args:
        warped, fixed: (B, 1, D, H, W).
    """
    a = warped.flatten(1) - warped.flatten(1).mean(1, keepdim=True)
    b = fixed.flatten(1) - fixed.flatten(1).mean(1, keepdim=True)
    covariance = (a * b).mean(1)
    return (1 - covariance / (a.square().mean(1) * b.square().mean(1) + 1e-12).sqrt()).mean()


def local_ncc(warped: torch.Tensor, fixed: torch.Tensor, window: int = 7, epsilon: float = 1e-5) -> torch.Tensor:
    """1 - squared normalised cross-correlation in a moving box.

    Args:
        warped, fixed: (B, 1, D, H, W), intensities about 0 to 1.
        window: odd box edge, voxels.
        epsilon: variance below which a box counts as empty.
    """
    maps = torch.cat((warped, fixed, warped * warped, fixed * fixed, warped * fixed), dim=1)
    a, b, aa, bb, ab = _box_mean(maps, window).unbind(1)
    covariance = ab - a * b
    variance = (aa - a * a).clamp_min(0) * (bb - b * b).clamp_min(0)
    return 1 - (covariance.square() / (variance + epsilon**2)).clamp(max=1.0).mean()


def _box_mean(maps: torch.Tensor, window: int) -> torch.Tensor:
    """Mean over a box about every voxel, cut off at the border. (B, C, D, H, W).

    One product with a band matrix an axis: on a CPU many times faster than average pooling, forward and backward.
    """
    depth, height, width = (_band(n, window, maps) for n in maps.shape[2:])
    maps = height @ maps @ width.T
    return (depth @ maps.flatten(3)).view_as(maps)


def _band(n: int, window: int, like: torch.Tensor) -> torch.Tensor:
    """(n, n): row i averages the at most `window` neighbours of i."""
    index = torch.arange(n, device=like.device)
    near = ((index[:, None] - index[None]).abs() <= window // 2).to(like.dtype)
    return near / near.sum(1, keepdim=True)


def smoothness(displacement: torch.Tensor) -> torch.Tensor:
    """Half the mean squared forward difference of a displacement (the regulariser of VTN and RCN)."""
    terms = [displacement.diff(dim=axis).square().mean() for axis in (2, 3, 4)]
    return torch.stack(terms).mean() / 2


def folding_penalty(displacement: torch.Tensor, margin: float = 0.1) -> torch.Tensor:
    """Mean of how far the Jacobian determinant falls below `margin`."""
    return F.relu(margin - spatial.jacobian_determinant(displacement)).mean()


def affine_determinant(matrix: torch.Tensor) -> torch.Tensor:
    """Half the squared deviation of det A from 1, for affine stems (VTN; weight 0.1 there).

    Args:
        matrix: A, (B, 3, 3).
    """
    return ((torch.linalg.det(matrix) - 1) ** 2 / 2).mean()


def affine_orthogonality(matrix: torch.Tensor, epsilon: float = 1e-5) -> torch.Tensor:
    """Sum of ``s + 1 / s`` over the eigenvalues s of A^T A, less 6: 0 for a rotation (VTN; weight 0.1 there).

    The sums are traces of A^T A + epsilon and of its inverse, so no eigenvalue is computed.

    Args:
        matrix: A, (B, 3, 3).
        epsilon: added to every eigenvalue.
    """
    gram = matrix.transpose(1, 2) @ matrix + epsilon * torch.eye(3, device=matrix.device, dtype=matrix.dtype)
    both = gram + torch.linalg.inv(gram)
    return (both.diagonal(dim1=1, dim2=2).sum(1) - 6).mean()


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
