"""Affine stems: the first stage of a cascade, which predicts one affine map of the whole grid."""

from __future__ import annotations

from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import nn

from LDRCore.models.base import check_pair
from LDRCore.transforms import spatial

SLOPE = 0.1  # of negative features


class AffineStem(nn.Module):
    """First stage of a cascade: (moving, fixed) -> (A, b), the affine map ``x -> c + A (x - c) + b``.

    c is the grid's centre. Subclasses implement `predict`. `multiple` is the size rule of the images.
    """

    multiple: int = 16

    def predict(self, moving: torch.Tensor, fixed: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Predict the affine map that aligns the moving image with the fixed one.

        Args:
            moving, fixed: (B, 1, D, H, W), intensities about 0 to 1.

        Returns:
            Matrix A (B, 3, 3) in tensor-axis order and translation b (B, 3) in voxels.
        """
        raise NotImplementedError

    def forward(self, moving: torch.Tensor, fixed: torch.Tensor) -> torch.Tensor:
        """Predict the affine map as a displacement (B, 3, D, H, W), voxels."""
        return spatial.affine_to_displacement(*self.predict(moving, fixed), fixed.shape[2:])


class PooledStem(AffineStem):
    """A stem whose encoder's last map is averaged to a fixed size and read by two linear heads, for A - I and for b.

    b is predicted in units of half the grid's longest axis.
    """

    def __init__(self, encoder: nn.Module, channels: int, pool: int) -> None:
        """Build the heads, which start near the identity.

        Args:
            encoder: see `encode`.
            channels: of its last map.
            pool: voxels along each axis that the last map is averaged to.
        """
        super().__init__()
        self.encoder = encoder
        self.pool = pool
        self.matrix = nn.Linear(channels * pool**3, 9)
        self.translation = nn.Linear(channels * pool**3, 3)
        for head in (self.matrix, self.translation):
            nn.init.normal_(head.weight, 0.0, 1e-5)
            nn.init.zeros_(head.bias)

    def encode(self, images: torch.Tensor) -> torch.Tensor:
        """Compute the encoder's last map of two images (B, 2, D, H, W)."""
        raise NotImplementedError

    def predict(self, moving: torch.Tensor, fixed: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """See `AffineStem.predict`."""
        check_pair(moving, fixed, self.multiple)
        features = F.adaptive_avg_pool3d(self.encode(torch.cat((moving, fixed), dim=1)), self.pool).flatten(1)
        matrix = torch.eye(3, device=features.device, dtype=features.dtype) + self.matrix(features).view(-1, 3, 3)
        return matrix, self.translation(features) * (max(fixed.shape[2:]) / 2)


class AffineLDR(PooledStem):
    """The light brain stem: stride-2 3x3x3 convolutions 16, 32, 64, 128, average pooling, two linear heads.

    Source: the authors' release (brain). 0.333 M parameters. The heads give 9 numbers for A - I and 3 for b.
    Deviations: the last map is pooled to 3x3x3 (a rotation cannot be read from a global mean), so any grid whose
    axes are multiples of 16 is taken; b is predicted in units of half the grid's longest axis.
    """

    encoder: nn.ModuleList

    def __init__(self, pool: int = 3) -> None:
        """`pool`: voxels along each axis that the last map is averaged to."""
        widths = (2, 16, 32, 64, 128)
        encoder = nn.ModuleList(
            nn.Conv3d(c_in, c_out, kernel_size=3, stride=2, padding=1) for c_in, c_out in pairwise(widths)
        )
        super().__init__(encoder, widths[-1], pool)

    def encode(self, images: torch.Tensor) -> torch.Tensor:
        """See `PooledStem.encode`."""
        for layer in self.encoder:
            images = F.leaky_relu(layer(images), SLOPE)
        return images
