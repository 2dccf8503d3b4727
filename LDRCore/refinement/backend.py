"""Which backend computes the steps of an iteration."""

from __future__ import annotations

from typing import Protocol

import torch

from LDRCore import sampling
from LDRCore.refinement import torch_ops


class Operations(Protocol):
    """What a backend offers. Images are (D, H, W), displacements (3, D, H, W) in voxels, float32."""

    def correlation_gradient(
        self,
        warped: torch.Tensor,
        fixed: torch.Tensor,
        fixed_mean: torch.Tensor,
        fixed_variance: torch.Tensor,
        *,
        window: int,
        epsilon: float,
        mask: torch.Tensor | None,
    ) -> tuple[torch.Tensor, float]:
        """See `torch_ops.correlation_gradient`."""

    def mean_correlation_force(
        self,
        warped: torch.Tensor,
        fixed: torch.Tensor,
        fixed_mean: torch.Tensor,
        fixed_variance: torch.Tensor,
        window: int,
        epsilon: float,
    ) -> tuple[float, torch.Tensor]:
        """See `torch_ops.mean_correlation_force`."""

    def smooth(self, displacement: torch.Tensor, sigma: float) -> tuple[torch.Tensor, float]:
        """(smoothed by a Gaussian of `sigma` voxels, length of the longest vector)."""


def operations(image: torch.Tensor) -> Operations:
    """Return `numba_loops` for images of a kind that `sampling` uses numba for, else `torch_ops`."""
    if sampling.backend_name(image) == "numba":
        from LDRCore.refinement import numba_loops

        return numba_loops  # type: ignore[return-value]
    return torch_ops  # type: ignore[return-value]
