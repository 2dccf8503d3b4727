"""VoxelMorph as a base network, in the layout that RCN and the authors' release use."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import nn

from LDRCore.models.base import DenseNetwork, check_pair, initialise_flow


class VoxelMorph(DenseNetwork):
    """Encoder 16, 32, 32, 32 (3x3x3, stride 2); decoder 32, 32, 32, 32, 32, 16, 16, 3; LeakyReLU(0.1).

    0.30 M parameters; with the VTN affine stem 14.47 M, the figure of the paper's Table I. Decoder: nearest-neighbour
    x2 and skips; the last two convolutions and the flow layer work at full size, beside the two input images.
    """

    def __init__(
        self, encoder: Sequence[int] = (16, 32, 32, 32), decoder: Sequence[int] = (32, 32, 32, 32, 32, 16, 16)
    ) -> None:
        """`encoder`: channels of four levels; `decoder`: of three levels, two half-size and two full-size layers."""
        super().__init__()

        def conv(c_in: int, c_out: int, stride: int = 1) -> nn.Conv3d:
            return nn.Conv3d(c_in, c_out, kernel_size=3, stride=stride, padding=1)

        e, d = list(encoder), list(decoder)
        self.encoder = nn.ModuleList(conv(c_in, c_out, 2) for c_in, c_out in zip([2, *e], e, strict=False))
        self.decoder = nn.ModuleList([conv(e[3], d[0]), conv(d[0] + e[2], d[1]), conv(d[1] + e[1], d[2])])
        self.half_size = nn.ModuleList([conv(d[2] + e[0], d[3]), conv(d[3], d[4])])
        self.full_size = nn.ModuleList([conv(d[4] + 2, d[5]), conv(d[5], d[6])])
        self.flow = conv(d[6], 3)
        initialise_flow(self.flow)

    def predict(self, moving: torch.Tensor, fixed: torch.Tensor) -> torch.Tensor:
        """See `DenseNetwork.predict`."""
        check_pair(moving, fixed, self.multiple)
        images = torch.cat((moving, fixed), dim=1)
        features, skips = images, []
        for layer in self.encoder:
            features = F.leaky_relu(layer(features), 0.1)
            skips.append(features)
        features = skips.pop()
        for layer in self.decoder:
            features = F.interpolate(F.leaky_relu(layer(features), 0.1), scale_factor=2, mode="nearest")
            features = torch.cat((features, skips.pop()), dim=1)
        for layer in self.half_size:
            features = F.leaky_relu(layer(features), 0.1)
        features = torch.cat((F.interpolate(features, scale_factor=2, mode="nearest"), images), dim=1)
        for layer in self.full_size:
            features = F.leaky_relu(layer(features), 0.1)
        return self.flow(features)
