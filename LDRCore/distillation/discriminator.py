"""The discriminator of ALDK, which scores deformations (paper, Fig. 4)."""

from __future__ import annotations

import torch
from torch import nn

_WIDTHS = (16, 32, 64, 128, 256)


class Discriminator(nn.Module):
    """4x4x4 stride-2 convolutions 16, 32, 64, 128, 256 with ReLU; the mean of the last map is the score.

    Source: paper, Fig. 4 (128^3). Deviations: on smaller grids the last layers are left out, so that the last map has
    at least 2 voxels along each axis. The paper has a sigmoid after the last convolution; a critic's score (WGAN-GP)
    must not be bounded, so `sigmoid` is off by default.
    """

    def __init__(self, shape: tuple[int, int, int] = (128, 128, 128), *, sigmoid: bool = False) -> None:
        """Build the layers for deformations on a grid of `shape` (D, H, W)."""
        super().__init__()
        depth = min(len(_WIDTHS), min(shape).bit_length() - 2)
        if depth < 1:
            raise ValueError(f"every axis of the deformation's grid must have at least 4 voxels, got {shape}")
        widths = (3, *_WIDTHS[:depth])
        self.layers = nn.ModuleList(
            nn.Conv3d(widths[k], widths[k + 1], kernel_size=4, stride=2, padding=1) for k in range(depth)
        )
        self.sigmoid = sigmoid

    def forward(self, displacement: torch.Tensor) -> torch.Tensor:
        """Score displacements (B, 3, D, H, W), voxels: (B,)."""
        if displacement.ndim != 5 or displacement.shape[1] != 3:
            raise ValueError(f"displacement must have shape (B, 3, D, H, W), got {tuple(displacement.shape)}")
        features = displacement
        for layer in self.layers[:-1]:
            features = torch.relu(layer(features))
        features = self.layers[-1](features)
        features = torch.sigmoid(features) if self.sigmoid else features
        return features.flatten(1).mean(1)
