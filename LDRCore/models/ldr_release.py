"""The light student with the layer sizes of the authors' release, which Table I's parameter counts fit."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn

from LDRCore.models.blocks import DenseNetwork, check_pair, initialise_flow


class LDRRelease(DenseNetwork):
    """About 0.28 M parameters a network (paper, Table I: 0.56 / 0.84 / 1.12 M for stem + 1 / 2 / 3 networks).

    Encoder: 3x3x3 stride-2 convolutions 32, 32, 32, 16. Decoder: nearest-neighbour x2, skip, 3x3x3 convolutions
    32, 32, 32, 32, 16; then at full size, beside the two input images, 16, 16 and a 3-channel flow layer.
    LeakyReLU(0.1). The full-size convolutions cost about 15 times the arithmetic of `LDR`: fewer parameters do
    not mean less time.
    """

    def __init__(self) -> None:
        super().__init__()

        def conv(c_in: int, c_out: int, stride: int = 1) -> nn.Conv3d:
            return nn.Conv3d(c_in, c_out, kernel_size=3, stride=stride, padding=1)

        self.encoder = nn.ModuleList([conv(2, 32, 2), conv(32, 32, 2), conv(32, 32, 2), conv(32, 16, 2)])
        self.decoder = nn.ModuleList([conv(16, 32), conv(64, 32), conv(64, 32), conv(64, 32)])
        self.half_size = conv(32, 16)
        self.full = nn.ModuleList([conv(18, 16), conv(16, 16)])
        self.flow = conv(16, 3)
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
        for layer in self.decoder[:-1]:
            features = F.interpolate(F.leaky_relu(layer(features), 0.1), scale_factor=2, mode="nearest")
            features = torch.cat((features, skips.pop()), dim=1)
        features = F.leaky_relu(self.decoder[-1](features), 0.1)
        features = F.interpolate(F.leaky_relu(self.half_size(features), 0.1), scale_factor=2, mode="nearest")
        features = torch.cat((features, images), dim=1)
        for layer in self.full:
            features = F.leaky_relu(layer(features), 0.1)
        return self.flow(features)
