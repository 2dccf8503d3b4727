"""Similarity losses: correlation of two images over the grid, and in a moving window. Torch only."""

from __future__ import annotations

from typing import Any

import torch

from LDRCore.refinement.backend import operations


def correlation_coefficient(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """Compute the Pearson correlation coefficient of each pair (paper, Eq. 10).

    >>> image = torch.arange(8.0).view(1, 1, 2, 2, 2)
    >>> correlation_coefficient(image, 5 - 2 * image)
    tensor([-1.])

    Args:
        a, b: (B, 1, D, H, W); one of the two may have a batch of 1.

    Returns:
        (B,), -1 to 1; 0 where one of the images is constant.
    """
    x, y = (t.flatten(1) - t.flatten(1).mean(1, keepdim=True) for t in (a, b))
    # Use sum: it is pairwise; a matrix product accumulates in order and loses precision.
    norm = (x.square().sum(1) * y.square().sum(1)).clamp_min(1e-18).sqrt()  # clamped first: sqrt has no gradient at 0
    return torch.where(norm > 1e-9, (x * y).sum(1) / norm, 0.0)


def correlation(warped: torch.Tensor, fixed: torch.Tensor) -> torch.Tensor:
    """Compute 1 - Pearson correlation over the grid, averaged over pairs (paper, Eq. 9-11).

    Args:
        warped, fixed: (B, 1, D, H, W).

    Returns:
        0 (equal but for gain and offset) to 2; 1 for a pair with a constant image, which has no gradient.
    """
    return (1 - correlation_coefficient(warped, fixed)).mean()


def local_ncc(warped: torch.Tensor, fixed: torch.Tensor, window: int = 7, epsilon: float = 1e-4) -> torch.Tensor:
    """Compute 1 - squared normalised cross-correlation in a box about every voxel, averaged over voxels.

    Computes 1 - cov(a, b)^2 / ((var(a) + e) (var(b) + e)) with means over the box, in which voxels outside count as
    zero. The gradient is in closed form (`refinement.torch_ops.correlation_force`).

    Args:
        warped, fixed: (B, 1, D, H, W), intensities about 0 to 1.
        window: odd box edge, voxels.
        epsilon: e; well below it a box counts as constant.

    Returns:
        0 (equal but for gain and offset, in every box) to 1.
    """
    return _LocalCorrelation.apply(warped, fixed, window, epsilon)  # type: ignore[no-any-return,no-untyped-call]


class _LocalCorrelation(torch.autograd.Function):
    """Computes the gradient along with the value, as both need the same sums."""

    @staticmethod
    def forward(ctx: Any, warped: torch.Tensor, fixed: torch.Tensor, window: int, epsilon: float) -> torch.Tensor:
        value, by_warped = _mean_and_gradient(warped, fixed, window, epsilon)
        by_fixed = _mean_and_gradient(fixed, warped, window, epsilon)[1] if ctx.needs_input_grad[1] else None
        ctx.save_for_backward(by_warped, by_fixed)
        return warped.new_tensor(1 - value)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor | None, None, None]:
        by_warped, by_fixed = ctx.saved_tensors
        return by_warped * -gradient, None if by_fixed is None else by_fixed * -gradient, None, None


def _mean_and_gradient(
    images: torch.Tensor, others: torch.Tensor, window: int, epsilon: float
) -> tuple[float, torch.Tensor]:
    """Mean similarity of two batches (B, 1, D, H, W), and its gradient by the first."""
    correlation = operations(images).Correlation
    with torch.autocast(images.device.type, enabled=False):
        pairs = list(zip(images[:, 0], others[:, 0], strict=True))
        found = [correlation(b, window, epsilon).force(a) for a, b in pairs]
        mean = sum(value for value, _ in found) / len(found)
        return mean, torch.stack([force for _, force in found])[:, None] / images.numel()
