"""The light student as the paper's text describes it (III-C, Fig. 3)."""

from __future__ import annotations

import torch
from torch import nn

from LDRCore.models.base import DenseNetwork, check_pair, encode_and_decode, initialise_flow

HEADS = ("deconv", "half")


class LDR(DenseNetwork):
    """Four 4x4x4 stride-2 convolutions (ReLU; 16, 32, 64, 128), three transposed convolutions with skips.

    Source: paper section III-C and Fig. 3. Features of the same resolution are concatenated before each
    transposed convolution. The three transposed convolutions end at half size; the paper does not say how the
    last factor 2 is reached, so both ways are offered:

    - ``head="deconv"``: a 4x4x4 stride-2 transposed convolution to 3 channels at full size (1.549 M parameters);
    - ``head="half"``: a 3x3x3 convolution to 3 channels at half size, up-sampled linearly by `forward` and kept
      at half size by a cascade (1.545 M parameters, half the time).

    Deviation: the flow layer starts at N(0, 1e-5), as in the authors' release.
    """

    def __init__(
        self,
        head: str = "deconv",
        channels: tuple[int, int, int, int] = (16, 32, 64, 128),
        up: tuple[int, int, int] | None = None,
    ) -> None:
        """Build the network.

        Args:
            head: "deconv" or "half", see above.
            channels: of the four convolutions, finest first.
            up: channels of the three transposed convolutions, coarsest first; by default those of the skips that they
                are concatenated with.
        """
        super().__init__()
        if head not in HEADS:
            raise ValueError(f"head must be one of {HEADS}, got {head!r}")
        self.field_stride = 1 if head == "deconv" else 2
        c1, c2, c3, c4 = channels
        u3, u2, u1 = up or (c3, c2, c1)

        def down(c_in: int, c_out: int) -> nn.Conv3d:
            return nn.Conv3d(c_in, c_out, kernel_size=4, stride=2, padding=1)

        def transposed(c_in: int, c_out: int) -> nn.ConvTranspose3d:
            return nn.ConvTranspose3d(c_in, c_out, kernel_size=4, stride=2, padding=1)

        self.encoder = nn.ModuleList([down(2, c1), down(c1, c2), down(c2, c3), down(c3, c4)])
        self.decoder = nn.ModuleList([transposed(c4, u3), transposed(u3 + c3, u2), transposed(u2 + c2, u1)])
        self.flow: nn.Conv3d | nn.ConvTranspose3d = (
            transposed(u1 + c1, 3) if head == "deconv" else nn.Conv3d(u1 + c1, 3, kernel_size=3, padding=1)
        )
        initialise_flow(self.flow)

    def predict(self, moving: torch.Tensor, fixed: torch.Tensor) -> torch.Tensor:
        """See `DenseNetwork.predict`."""
        check_pair(moving, fixed, self.multiple)
        return self.flow(encode_and_decode(torch.cat((moving, fixed), dim=1), self.encoder, self.decoder))
