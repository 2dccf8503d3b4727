"""U-Net and U-Net++ as base networks or students (paper, Table III)."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn

from LDRCore.models.base import DenseNetwork, check_pair, initialise_flow
from LDRCore.models.vtn import WIDTHS, Encoder


class UNet(DenseNetwork):
    """Encoder of VTN, decoder of 4x4x4 stride-2 transposed convolutions with skips, the last one to the flow.

    28.08 M parameters. The paper gives 28.28 M and no layout; this one is VTN without the flow predictions at every
    level. LeakyReLU(0.1). Grids must be multiples of 64.
    """

    multiple = 64

    def __init__(self) -> None:
        super().__init__()
        self.encoder = Encoder()
        self.decoder = nn.ModuleList()
        c_in = WIDTHS[-1]
        for width in reversed(WIDTHS[:-1]):
            self.decoder.append(nn.ConvTranspose3d(c_in, width, 4, stride=2, padding=1))
            c_in = 2 * width
        self.flow = nn.ConvTranspose3d(c_in, 3, 4, stride=2, padding=1)
        initialise_flow(self.flow)

    def predict(self, moving: torch.Tensor, fixed: torch.Tensor) -> torch.Tensor:
        """See `DenseNetwork.predict`."""
        check_pair(moving, fixed, self.multiple)
        skips = self.encoder(torch.cat((moving, fixed), dim=1))
        features = skips.pop()
        for layer in self.decoder:
            features = torch.cat((skips.pop(), F.leaky_relu(layer(features), 0.1)), dim=1)
        return self.flow(features)


class UNetPlusPlus(DenseNetwork):
    """U-Net with nested, dense skips: a node takes all earlier nodes of its level and the node below, up-sampled.

    24.52 M parameters. The paper gives 29.31 M and no layout. Here: the encoder of VTN; at each node the node below is
    up-sampled (nearest), concatenated with the level's earlier nodes, and reduced to the level's width by one 3x3x3
    convolution; a transposed convolution predicts the flow. LeakyReLU(0.1). Grids must be multiples of 64.
    """

    multiple = 64

    def __init__(self) -> None:
        super().__init__()
        self.encoder = Encoder()
        depth = len(WIDTHS)
        self.nodes = nn.ModuleDict()
        for column in range(1, depth):
            for level in range(depth - column):
                c_in = column * WIDTHS[level] + WIDTHS[level + 1]
                self.nodes[f"{level}_{column}"] = nn.Conv3d(c_in, WIDTHS[level], 3, padding=1)
        self.flow = nn.ConvTranspose3d(WIDTHS[0], 3, 4, stride=2, padding=1)
        initialise_flow(self.flow)

    def predict(self, moving: torch.Tensor, fixed: torch.Tensor) -> torch.Tensor:
        """See `DenseNetwork.predict`."""
        check_pair(moving, fixed, self.multiple)
        levels = [[features] for features in self.encoder(torch.cat((moving, fixed), dim=1))]
        for column in range(1, len(levels)):
            for level in range(len(levels) - column):
                below = F.interpolate(levels[level + 1][column - 1], scale_factor=2, mode="nearest")
                node = self.nodes[f"{level}_{column}"]
                levels[level].append(F.leaky_relu(node(torch.cat((*levels[level], below), dim=1)), 0.1))
        return self.flow(levels[0][-1])
