"""Warping with derivatives by the displacement, for training on a CPU: the same as in `spatial`."""

from __future__ import annotations

from typing import Any

import torch

from LDRCore import sampling


def can_take(image: torch.Tensor, displacement: torch.Tensor) -> bool:
    """Return whether `warp` takes a batch: compiled loops, one channel, and only the displacement has a gradient."""
    wanted = torch.is_grad_enabled() and displacement.requires_grad and not image.requires_grad
    plain = displacement.dtype == torch.float32 and image.shape[1] == 1 and image.shape[0] == displacement.shape[0]
    return wanted and plain and sampling.backend_name(image) == "numba"


def warp(image: torch.Tensor, displacement: torch.Tensor) -> torch.Tensor:
    """Warp as `spatial.warp` does, with zeros outside.

    Args:
        image: (B, 1, D, H, W) float32.
        displacement: (B, 3, D, H, W), voxels of the same grid.
    """
    return _Warp.apply(image, displacement)  # type: ignore[no-any-return,no-untyped-call]


class _Warp(torch.autograd.Function):
    """Keeps the derivative by the displacement, and no coordinates."""

    @staticmethod
    def forward(ctx: Any, image: torch.Tensor, displacement: torch.Tensor) -> torch.Tensor:
        from LDRCore.sampling.numba_slopes import displaced_with_slopes

        pairs = zip(image[:, 0], displacement, strict=True)
        warped, slopes = zip(*(displaced_with_slopes(i, u) for i, u in pairs), strict=True)
        ctx.save_for_backward(torch.stack(slopes))
        return torch.stack(warped)[:, None]

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[None, torch.Tensor]:
        (slopes,) = ctx.saved_tensors
        return None, slopes * gradient
