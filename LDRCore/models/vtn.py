"""The volume tweening network: the large base network and affine stem of VTN and RCN (teachers)."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn

from LDRCore.models.affine import PooledStem
from LDRCore.models.base import DenseNetwork, check_pair, initialise_flow

WIDTHS = (16, 32, 64, 128, 256, 512)
_DOUBLED_FROM = 64  # levels from this width on have a second, stride-1 convolution


class Encoder(nn.Module):
    """Stride-2 3x3x3 convolutions 16, 32, 64 (+64), 128 (+128), 256 (+256), 512 (+512), LeakyReLU(0.1).

    `width` scales all channels: 0.5 is a quarter of the parameters, for teachers that must be trained on a CPU.
    """

    def __init__(self, width: float = 1.0) -> None:
        super().__init__()
        self.widths = [round(width * c) for c in WIDTHS]
        if min(self.widths) < 1:
            raise ValueError(f"width must leave at least one channel a level, got {width}")
        self.levels = nn.ModuleList()
        c_in = 2
        for c_out, reference in zip(self.widths, WIDTHS, strict=True):
            layers = [nn.Conv3d(c_in, c_out, 3, stride=2, padding=1), nn.LeakyReLU(0.1)]
            if reference >= _DOUBLED_FROM:
                layers += [nn.Conv3d(c_out, c_out, 3, padding=1), nn.LeakyReLU(0.1)]
            self.levels.append(nn.Sequential(*layers))
            c_in = c_out

    def forward(self, images: torch.Tensor) -> list[torch.Tensor]:
        """Compute the features of every level, finest first, of two images (B, 2, D, H, W)."""
        features = []
        for level in self.levels:
            images = level(images)
            features.append(images)
        return features


class VTN(DenseNetwork):
    """Dense network of VTN and RCN in the release's layout, 28.25 M parameters (paper, Table III).

    At each level of the decoder a 3-channel flow is predicted, up-sampled by a learned 4x4x4 transposed convolution and
    concatenated with the deconvolved features and the skip. The output is 20 times the last transposed convolution (the
    cascade's multiplier comes on top). Grids must be multiples of 64: at 128^3 the bottom is 2^3.
    """

    multiple = 64

    def __init__(self, width: float = 1.0) -> None:
        super().__init__()
        self.encoder = Encoder(width)
        self.predictions, self.upsamplers, self.deconvolutions = nn.ModuleList(), nn.ModuleList(), nn.ModuleList()
        c_in = self.encoder.widths[-1]
        for c_out in reversed(self.encoder.widths[:-1]):
            self.predictions.append(nn.Conv3d(c_in, 3, 3, padding=1))
            self.upsamplers.append(nn.ConvTranspose3d(3, 3, 4, stride=2, padding=1))
            self.deconvolutions.append(nn.ConvTranspose3d(c_in, c_out, 4, stride=2, padding=1))
            c_in = 2 * c_out + 3
        self.flow = nn.ConvTranspose3d(c_in, 3, 4, stride=2, padding=1)
        initialise_flow(self.flow)

    def predict(self, moving: torch.Tensor, fixed: torch.Tensor) -> torch.Tensor:
        """See `DenseNetwork.predict`."""
        check_pair(moving, fixed, self.multiple)
        skips = self.encoder(torch.cat((moving, fixed), dim=1))
        features = skips.pop()
        for predict, up, deconvolve in zip(self.predictions, self.upsamplers, self.deconvolutions, strict=True):
            flow = up(predict(features))
            features = torch.cat((skips.pop(), F.leaky_relu(deconvolve(features), 0.1), flow), dim=1)
        return 20.0 * self.flow(features)


class AffineVTN(PooledStem):
    """Affine stem of VTN and RCN: the same encoder, then heads over the whole last map; 14.17 M parameters.

    Deviation: where the last map is not 2^3 (grids other than 128^3) it is averaged to 2^3, so other grids will do.
    """

    multiple = 64

    def __init__(self, width: float = 1.0) -> None:
        """`width`: see `Encoder`."""
        encoder = Encoder(width)
        super().__init__(encoder, encoder.widths[-1], pool=2)

    def encode(self, images: torch.Tensor) -> torch.Tensor:
        """See `PooledStem.encode`."""
        return self.encoder(images)[-1]
