"""Which backend computes the steps of an iteration."""

from __future__ import annotations

from typing import Protocol

import torch

from LDRCore import sampling
from LDRCore.refinement import torch_ops


class Correlation(Protocol):
    """Squared local correlation with one fixed image: `torch_ops.Correlation` or one that equals it."""

    def __init__(self, fixed: torch.Tensor, window: int, epsilon: float) -> None: ...

    def gradient(
        self,
        warped: torch.Tensor,
        mask: torch.Tensor | None = None,
        out: torch.Tensor | None = None,
        windows: torch.Tensor | None = None,
    ) -> tuple[torch.Tensor, float]:
        """See `torch_ops.Correlation`."""

    def force(self, warped: torch.Tensor) -> tuple[float, torch.Tensor]:
        """See `torch_ops.Correlation`."""


class Operations(Protocol):
    """What a backend offers. Images are (D, H, W), displacements (3, D, H, W) in voxels, float32."""

    Correlation: type[Correlation]

    def smooth(
        self, displacement: torch.Tensor, sigma: float, out: torch.Tensor | None = None
    ) -> tuple[torch.Tensor, float]:
        """(smoothed by a Gaussian of `sigma` voxels, length of the longest vector)."""


def operations(image: torch.Tensor) -> Operations:
    """Return `numba_loops` for images of a kind that `sampling` uses numba for, else `torch_ops`."""
    if sampling.backend_name(image) == "numba":
        from LDRCore.refinement import numba_loops

        return numba_loops  # type: ignore[return-value]
    return torch_ops  # type: ignore[return-value]
