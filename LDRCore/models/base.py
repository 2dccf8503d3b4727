"""What the networks share: the size rule, the interface of a dense network, and initialisation of flow heads."""

from __future__ import annotations

import torch
from torch import nn

from LDRCore.transforms import spatial


def check_pair(moving: torch.Tensor, fixed: torch.Tensor, multiple: int) -> None:
    """Refuse inputs that a network with `multiple`-fold down-sampling cannot take."""
    if moving.shape != fixed.shape or moving.ndim != 5 or moving.shape[1] != 1:
        raise ValueError(
            f"moving and fixed must both have shape (B, 1, D, H, W), got {tuple(moving.shape)} and {tuple(fixed.shape)}"
        )
    if any(n % multiple for n in moving.shape[2:]):
        raise ValueError(f"every axis must be a multiple of {multiple}, got {tuple(moving.shape[2:])}")


def initialise_flow(layer: nn.Conv3d | nn.ConvTranspose3d) -> None:
    """N(0, 1e-5) weights and zero bias, so that an untrained network predicts almost no displacement."""
    nn.init.normal_(layer.weight, 0.0, 1e-5)
    if layer.bias is not None:
        nn.init.zeros_(layer.bias)


class DenseNetwork(nn.Module):
    """A base network of a cascade: (moving, fixed) -> displacement.

    Subclasses implement `predict`, whose displacement may live on a coarser grid with the same corners:
    `field_stride` 2 means half the voxels along each axis. `multiple` is the size rule of the input.
    """

    multiple: int = 16
    field_stride: int = 1

    def predict(self, moving: torch.Tensor, fixed: torch.Tensor) -> torch.Tensor:
        """Displacement (B, 3, D / s, H / s, W / s) in voxels of its own grid, s = `field_stride`.

        Args:
            moving, fixed: (B, 1, D, H, W), intensities about 0 to 1.
        """
        raise NotImplementedError

    def forward(self, moving: torch.Tensor, fixed: torch.Tensor) -> torch.Tensor:
        """Displacement (B, 3, D, H, W) in voxels of the input grid."""
        return spatial.upsample(self.predict(moving, fixed), fixed.shape[2:])
