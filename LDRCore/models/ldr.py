"""The light student as the paper's text describes it (III-C, Fig. 3)."""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import nn

from LDRCore.models import cpu_layout
from LDRCore.models.blocks import DenseNetwork, check_pair, initialise_flow

HEADS = ("deconv", "half")


class LDR(DenseNetwork):
    """Four 4x4x4 stride-2 convolutions (ReLU; 16, 32, 64, 128), three transposed convolutions with skips.

    Source: paper section III-C and Fig. 3. Features of the same resolution are concatenated before each
    transposed convolution. The three transposed convolutions end at half size; the paper does not say how the
    last factor 2 is made, so both ways are offered:

    - ``head="deconv"``: a 4x4x4 stride-2 transposed convolution to 3 channels at full size (1.549 M parameters);
    - ``head="half"``: a 3x3x3 convolution to 3 channels at half size, up-sampled linearly by `forward` and kept
      at half size by a cascade (1.545 M parameters, half the time).

    Deviations from the text: the flow layer starts at N(0, 1e-5) (as in the authors' release).
    """

    side_by_side = True

    def __init__(
        self,
        head: str = "deconv",
        channels: tuple[int, int, int, int] = (16, 32, 64, 128),
        up: tuple[int, int, int] | None = None,
    ) -> None:
        """Build the network.

        Args:
            head: see above.
            channels: of the four convolutions.
            up: of the three transposed convolutions, coarsest first; by default those of the skips they meet.
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
        if cpu_layout.can_take(moving):
            pair = self.image_pair(fixed, cpu_layout.precision_of(moving.dtype))
            pair.put(moving)
            return self.predict_pair(pair)
        features = torch.cat((moving, fixed), dim=1)
        skips: list[torch.Tensor] = []
        for layer in self.encoder:
            features = torch.relu(layer(features))
            skips.append(features)
        features = skips.pop()
        for layer in self.decoder:
            features = torch.cat((torch.relu(layer(features)), skips.pop()), dim=1)
        return self.flow(features)

    def image_pair(self, fixed: torch.Tensor, precision: torch.dtype) -> cpu_layout.ImagePair:
        """See `DenseNetwork.image_pair`."""
        compiled = self._fits_compiled_layers() and cpu_layout.compiled_layers(precision)
        return cpu_layout.ImagePair(fixed, precision, blocks=bool(compiled))

    def _fits_compiled_layers(self) -> bool:
        """Whether every layer's inputs fill what compiled layers read at once."""
        first, *others = (cast(nn.Conv3d, layer).out_channels for layer in self.encoder)
        *ups, last = (cast(nn.ConvTranspose3d, layer).out_channels for layer in self.decoder)
        joined = (first, last) if self.field_stride == 1 else ()
        return first % 8 == 0 and last % 2 == 0 and all(n % 16 == 0 for n in (*others, *ups, *joined))

    def predict_pair(self, pair: cpu_layout.ImagePair) -> torch.Tensor:
        """See `DenseNetwork.predict_pair`."""
        layers = cpu_layout.compiled_layers(pair.values.dtype) if pair.blocks else None
        if layers:
            return layers.program_of(self, pair.values.dtype, pair.shape, self._write).run(pair.values)
        return self._predict_on_cpu(pair)

    def _write(self, program: Any, images: Any) -> None:
        """The layers as compiled code, see `compiled_layers.Program`."""
        first, *further = self.encoder
        skips = [program.first(first, images)]
        for layer in further:
            skips.append(program.down(layer, skips[-1]))
        features = [skips.pop()]
        for layer in self.decoder:
            features = [program.up(layer, features), skips.pop()]
        program.flow(self.flow, features)

    def _predict_on_cpu(self, pair: cpu_layout.ImagePair) -> torch.Tensor:
        """The same by torch, layers arranged as `cpu_layout` says."""
        encoder = [cast(nn.Conv3d, layer) for layer in self.encoder]
        skips = [cpu_layout.convolve_pair(encoder[0], pair, relu=True)]
        for convolution in encoder[1:]:
            skips.append(cpu_layout.convolve_half(convolution, skips[-1], relu=True))
        features = skips.pop()
        for layer in self.decoder[:-1]:
            features = torch.cat((layer(features).relu_(), skips.pop()), dim=1)
        gaps = cpu_layout.transposed_gaps(cast(nn.ConvTranspose3d, self.decoder[-1]), features, relu=True)
        if isinstance(self.flow, nn.Conv3d):
            return cpu_layout.convolve_gaps(self.flow, gaps, skips.pop())
        return cpu_layout.from_gaps(cpu_layout.transposed_gaps(self.flow, cpu_layout.join_gaps(gaps, skips.pop())))
