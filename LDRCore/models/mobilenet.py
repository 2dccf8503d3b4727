"""A MobileNet-like student of depthwise-separable convolutions (paper, Table III)."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn

from LDRCore.models.base import DenseNetwork, check_pair, initialise_flow

_WIDTHS = (32, 64, 128, 256, 512)


def _separable(c_in: int, c_out: int, stride: int = 1) -> nn.Sequential:
    """Make a 3x3x3 depthwise and a 1x1x1 pointwise convolution, each with LeakyReLU(0.1)."""
    return nn.Sequential(
        nn.Conv3d(c_in, c_in, 3, stride=stride, padding=1, groups=c_in),
        nn.LeakyReLU(0.1),
        nn.Conv3d(c_in, c_out, 1),
        nn.LeakyReLU(0.1),
    )


class MobileNet(DenseNetwork):
    """Five stride-2 levels 32, 64, 128, 256, 512 of separable convolutions, a separable decoder with skips.

    1.25 M parameters, as in the paper, which gives no layout. Here the first level is an ordinary convolution and every
    further level has three separable ones. The decoder up-samples (nearest), concatenates the skip and applies one
    separable convolution. The flow is predicted at half size and up-sampled linearly. Grids must be multiples of 32.
    """

    multiple = 32
    field_stride = 2

    def __init__(self) -> None:
        super().__init__()
        self.encoder = nn.ModuleList(
            [nn.Sequential(nn.Conv3d(2, _WIDTHS[0], 3, stride=2, padding=1), nn.LeakyReLU(0.1))]
        )
        for k in range(1, len(_WIDTHS)):
            self.encoder.append(
                nn.Sequential(
                    _separable(_WIDTHS[k - 1], _WIDTHS[k], 2),
                    _separable(_WIDTHS[k], _WIDTHS[k]),
                    _separable(_WIDTHS[k], _WIDTHS[k]),
                )
            )
        self.decoder = nn.ModuleList(
            _separable(_WIDTHS[k] + _WIDTHS[k - 1], _WIDTHS[k - 1]) for k in range(len(_WIDTHS) - 1, 0, -1)
        )
        self.flow = nn.Conv3d(_WIDTHS[0], 3, 3, padding=1)
        initialise_flow(self.flow)

    def predict(self, moving: torch.Tensor, fixed: torch.Tensor) -> torch.Tensor:
        """See `DenseNetwork.predict`."""
        check_pair(moving, fixed, self.multiple)
        features = torch.cat((moving, fixed), dim=1)
        skips = []
        for level in self.encoder:
            features = level(features)
            skips.append(features)
        features = skips.pop()
        for layer in self.decoder:
            upsampled = F.interpolate(features, scale_factor=2, mode="nearest")
            features = layer(torch.cat((upsampled, skips.pop()), dim=1))
        return self.flow(features)
