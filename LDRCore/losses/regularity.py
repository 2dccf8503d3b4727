"""How smooth a displacement is, and how near to a rotation a matrix. Torch only."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from LDRCore.transforms import spatial


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
