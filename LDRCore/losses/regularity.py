"""Regularity losses: smoothness and folding of a displacement, deviation of a matrix from a rotation. Torch only."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from LDRCore.transforms import spatial


def smoothness(displacement: torch.Tensor) -> torch.Tensor:
    """Compute half the mean squared forward difference of a displacement (the regulariser of VTN and RCN).

    >>> ramp = torch.zeros(1, 3, 4, 4, 4)
    >>> ramp[:, 0] = 3 * torch.arange(4.0).view(4, 1, 1)  # derivative 3 in 1 of 9 places
    >>> smoothness(ramp)
    tensor(0.5000)

    Args:
        displacement: (B, 3, D, H, W), voxels.
    """
    return mean_squared_difference(displacement) / 2


def mean_squared_difference(displacement: torch.Tensor) -> torch.Tensor:
    """Compute the mean of the squared forward differences along the three axes.

    Args:
        displacement: (B, 3, D, H, W), voxels.
    """
    return torch.stack([displacement.diff(dim=axis).square().mean() for axis in (2, 3, 4)]).mean()


def folding_penalty(displacement: torch.Tensor, margin: float = 0.1) -> torch.Tensor:
    """Compute the mean of how far the Jacobian determinant falls below a margin: max(0, margin - J).

    >>> folding_penalty(torch.zeros(1, 3, 4, 4, 4), margin=1.5)  # J = 1 everywhere
    tensor(0.5000)

    Args:
        displacement: (B, 3, D, H, W), voxels.
        margin: determinants above it cost nothing.
    """
    return F.relu(margin - spatial.jacobian_determinant(displacement)).mean()


def affine_determinant(matrix: torch.Tensor) -> torch.Tensor:
    """Compute half the squared deviation of det A from 1, for affine stems (VTN; weight 0.1 there).

    >>> affine_determinant(torch.diag(torch.tensor([1.0, 1.0, 3.0]))[None])
    tensor(2.)

    Args:
        matrix: A, (B, 3, 3).
    """
    return ((torch.linalg.det(matrix) - 1) ** 2 / 2).mean()


def affine_orthogonality(matrix: torch.Tensor, epsilon: float = 1e-5) -> torch.Tensor:
    """Compute the sum of ``s + 1 / s`` over the eigenvalues s of A^T A, less 6 (VTN; weight 0.1 there).

    It is 0 for a rotation. The sums are traces of A^T A + epsilon and of its inverse, so no eigenvalue is computed.

    >>> affine_orthogonality(torch.diag(torch.tensor([1.0, 1.0, 2.0]))[None])  # 4 + 1 / 4 - 2
    tensor(2.2500)

    Args:
        matrix: A, (B, 3, 3).
        epsilon: added to every eigenvalue.
    """
    gram = matrix.transpose(1, 2) @ matrix + epsilon * torch.eye(3, device=matrix.device, dtype=matrix.dtype)
    traces = (gram + torch.linalg.inv(gram)).diagonal(dim1=1, dim2=2).sum(1)
    return (traces - 6).mean()
