"""Networks rearranged for inference on a CPU: the same sums, without gradients, in objects of their own.

`arrange` copies the weights of a trained network into the form that oneDNN computes fastest. Nothing here is ever part
of a module that trains: a changed weight needs another call.

Convolutions of channels-last volumes work on blocks of 8 channels or more; two images in and three components out leave
most of a block empty. Neighbouring voxels, seen as channels of one, fill it better. Along a row that is, with channels
last, only another view of the same memory.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import nn

from LDRCore.cpu.convolution import LAST, Convolution
from LDRCore.models.affine import SLOPE, AffineLDR, AffineStem
from LDRCore.models.base import DenseNetwork, check_pair
from LDRCore.models.cascade import Cascade
from LDRCore.models.ldr import LDR
from LDRCore.models.ldr_gradient import LDRGradient, forms_of
from LDRCore.refinement.backend import operations

_PARITIES = [(a, b, c) for a in (0, 1) for b in (0, 1) for c in (0, 1)]


def arrange(cascade: Cascade, precision: torch.dtype) -> Cascade:
    """Return a cascade for inference on a CPU, whose networks keep their weights in the layout that is fastest there.

    Networks and stems of other kinds than LDR's run as they are, under autocast.

    Args:
        cascade: trained, on the CPU. Not changed, and not looked at again.
        precision: of the dense networks' convolutions. The stem stays in float32.
    """
    networks = [arrange_network(network, precision) for network in cascade.networks]
    arranged = Cascade(
        networks,
        None if cascade.stem is None else arrange_network(cascade.stem, precision),
        repeats=cascade.repeats,
        image_strides=cascade.image_strides,
        stem_stride=cascade.stem_stride,
        multiplier=cascade.multiplier,
        precision=precision,
    )
    return arranged.eval().requires_grad_(False)


def arrange_network(network: Any, precision: torch.dtype) -> Any:
    """Return a dense network or a stem in its layout for a CPU; the same object where there is none for its class."""
    if type(network) is LDR:
        return LDROnCPU(network, precision)
    if type(network) is LDRGradient:
        return LDRGradientOnCPU(network, precision)
    return AffineLDROnCPU(network) if type(network) is AffineLDR else network


class LDROnCPU(DenseNetwork):
    """LDR for inference on a CPU: convolutions of blocks of voxels, rectified as they are computed."""

    def __init__(self, network: LDR | LDRGradient, precision: torch.dtype) -> None:
        """Copy a network's weights.

        Args:
            network: not changed, and not looked at again.
            precision: of the convolutions.
        """
        super().__init__()
        self.multiple, self.field_stride, self.precision = network.multiple, network.field_stride, precision
        self.sigma_total = network.sigma_total
        first, *encoder = (cast(nn.Conv3d, layer) for layer in network.encoder)
        *decoder, last = (cast(nn.ConvTranspose3d, layer) for layer in network.decoder)
        self._first = pairs_convolution(first, precision, planes=isinstance(network, LDRGradient), relu=True)
        self._encoder = [
            Convolution.of(n.weight, n.bias, precision, stride=(2, 2, 2), padding=(1, 1, 1), relu=True) for n in encoder
        ]
        self._decoder = [subvoxel_convolution(layer, precision, relu=True) for layer in decoder]
        self._last = subvoxel_convolution(last, precision, relu=True)
        flow, mix = network.flow, network.mix if isinstance(network, LDRGradient) else None
        self._components = flow.out_channels
        self._mix = self._flow = None
        if mix is not None and isinstance(flow, nn.Conv3d):
            self._mix = Convolution.of(mix.weight, mix.bias, precision, padding=(1, 1, 1), relu=True)
            self._flow = quads_convolution(flow, precision)
        elif isinstance(flow, nn.Conv3d):
            self._from_subvoxels, self._from_skip = block_convolutions(flow, last.out_channels, precision)
        else:
            self._flow = subvoxel_convolution(flow, precision)

    def predict(self, moving: torch.Tensor, fixed: torch.Tensor) -> torch.Tensor:
        """See `DenseNetwork.predict`."""
        check_pair(moving, fixed, self.multiple)
        return self._flow_of(interleave(moving, fixed, self.precision))

    def _flow_of(self, pairs: torch.Tensor) -> torch.Tensor:
        """The result of the flow layer, in order, from pairs of voxels."""
        skips = [self._first(pairs)]
        for layer in self._encoder:
            skips.append(layer(skips[-1]))
        features = skips.pop()
        for layer in self._decoder:
            features = join(outside_zeroed(layer(features)), skips.pop())
        subvoxels, skip = outside_zeroed(self._last(features)), skips.pop()
        if self._mix is not None and self._flow is not None:
            return from_blocks(self._flow(self._mix(join(subvoxels, skip))), self._components, (1, 2, 2))
        if self._flow is not None:
            return from_subvoxels(self._flow(join(subvoxels, skip)))
        return from_blocks(self._from_skip(skip).add_(self._from_subvoxels(subvoxels)), self._components)


class LDRGradientOnCPU(LDROnCPU):
    """LDRGradient for inference on a CPU."""

    def __init__(self, network: LDRGradient, precision: torch.dtype) -> None:
        """See `LDROnCPU`."""
        super().__init__(network, precision)
        self._window, self._epsilon, self._sigma = network.window, network.epsilon, network.sigma
        self._gain = network.gain.detach().clone()
        self._fine_gain = None if network.fine_gain is None else network.fine_gain.detach().clone()

    def predict(self, moving: torch.Tensor, fixed: torch.Tensor) -> torch.Tensor:
        """See `DenseNetwork.predict`."""
        return self.predictor(fixed)(moving)

    def predictor(self, fixed: torch.Tensor) -> Callable[[torch.Tensor], torch.Tensor]:
        """See `DenseNetwork.predictor`; one moving image at a time."""
        images = fixed[:, 0].float()
        correlations = [operations(f).Correlation(f, self._window, self._epsilon) for f in images]
        *shape, width = images.shape
        planes = torch.zeros(5, *shape, width + 2, dtype=self.precision, device=fixed.device)
        voxels = planes[..., 1:-1]
        voxels[1] = images

        def predict(moving: torch.Tensor) -> torch.Tensor:
            check_pair(moving, fixed, self.multiple)
            with torch.autocast("cpu", enabled=False):
                warped = moving[:, 0].float()
                gradients = [c.gradient(w)[0] for c, w in zip(correlations, warped, strict=True)]
                given = forms_of(gradients, self._sigma)
            voxels[0] = warped
            voxels[2:] = given.limited.transpose(0, 1)
            return given.add_to(self._flow_of(pairs_of_planes(planes)).float(), self._gain, self._fine_gain)

        return predict


class AffineLDROnCPU(AffineStem):
    """The light brain stem for inference on a CPU, in float32."""

    def __init__(self, stem: AffineLDR) -> None:
        """Copy a stem's weights; it is not changed, and not looked at again."""
        super().__init__()
        first, *encoder = (cast(nn.Conv3d, layer) for layer in stem.encoder)
        self._first = pairs_convolution(first, torch.float32)
        self._encoder = [
            Convolution.of(n.weight, n.bias, torch.float32, stride=(2, 2, 2), padding=(1, 1, 1)) for n in encoder
        ]
        self._pool = stem.pool
        self._heads = [
            (head.weight.detach().clone(), head.bias.detach().clone()) for head in (stem.matrix, stem.translation)
        ]

    def predict(self, moving: torch.Tensor, fixed: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """See `AffineStem.predict`."""
        check_pair(moving, fixed, self.multiple)
        with torch.autocast("cpu", enabled=False):
            features = F.leaky_relu_(self._first(interleave(moving, fixed, torch.float32)), SLOPE)
            for layer in self._encoder:
                features = F.leaky_relu_(layer(features), SLOPE)
            features = F.adaptive_avg_pool3d(features, self._pool).flatten(1)
            matrix, translation = (F.linear(features, weight, bias) for weight, bias in self._heads)
            identity = torch.eye(3, device=features.device, dtype=features.dtype)
            return identity + matrix.view(-1, 3, 3), translation * (max(fixed.shape[2:]) / 2)


def interleave(moving: torch.Tensor, fixed: torch.Tensor, precision: torch.dtype) -> torch.Tensor:
    """Return two images (B, 1, D, H, W) as pairs of voxels: (B, 4, D, H, W / 2 + 1), channels last.

    The images' voxels take turns in memory, and a row has a voxel of zeros at both ends; a pair of neighbouring voxels
    is then four channels of one.
    """
    batch, _, depth, height, width = fixed.shape
    # two neighbouring numbers in memory are a complex one, which torch puts together in one pass
    rows = torch.empty(batch, depth, height, width + 2, dtype=torch.complex64, device=fixed.device)
    rows[..., 0] = rows[..., -1] = 0
    torch.complex(moving[:, 0].float(), fixed[:, 0].float(), out=rows[..., 1:-1])
    pairs = torch.view_as_real(rows).to(precision)
    return pairs.view(batch, depth, height, width // 2 + 1, 4).permute(0, 4, 1, 2, 3)


def pairs_of_planes(planes: torch.Tensor) -> torch.Tensor:
    """Return images as pairs of voxels.

    Args:
        planes: (C, B, D, H, W + 2), a voxel of zeros at both ends of a row.

    Returns:
        (B, 2 C, D, H, W / 2 + 1), channels last: the two voxels of the first image, those of the second ...
    """
    # two neighbouring numbers in memory are one of twice the size, which is moved at once
    pairs = planes.view({2: torch.int32, 4: torch.int64}[planes.element_size()])
    return pairs.permute(1, 2, 3, 4, 0).contiguous().view(planes.dtype).permute(0, 4, 1, 2, 3)


def pairs_convolution(
    layer: nn.Conv3d, precision: torch.dtype, *, planes: bool = False, relu: bool = False
) -> Convolution:
    """Return a 3x3x3 or 4x4x4, stride 2, padding 1 convolution of what `interleave` returns.

    Args:
        layer: as it was trained.
        precision: of the convolution.
        planes: whether of what `pairs_of_planes` returns instead.
        relu: see `Convolution`.
    """
    # four voxels of a row, seen as two pairs
    weight = F.pad(layer.weight, (0, layer.kernel_size[2] % 2)).unflatten(4, (2, 2))
    weight = weight.permute((0, 1, 5, 2, 3, 4) if planes else (0, 5, 1, 2, 3, 4)).flatten(1, 2)
    return Convolution.of(weight, layer.bias, precision, stride=(2, 2, 1), padding=(1, 1, 0), relu=relu)


def quads_convolution(layer: nn.Conv3d, precision: torch.dtype) -> Convolution:
    """Return a 3x3x3, padding 1 convolution to few channels that computes blocks of 1x2x2 outputs as channels of one.

    `from_blocks` puts them in order.
    """
    # output r of a block sees the voxels -1 + s (s = 0 ... 3) of the block by the weights s - r
    weight = torch.cat([F.pad(layer.weight, [*_shifts((b, c)), 0, 0]) for b in (0, 1) for c in (0, 1)])
    bias = None if layer.bias is None else _padded_outputs(layer.bias.repeat(4))
    return Convolution.of(_padded_outputs(weight), bias, precision, stride=(1, 2, 2), padding=(1, 1, 1))


def subvoxel_convolution(layer: nn.ConvTranspose3d, precision: torch.dtype, *, relu: bool = False) -> Convolution:
    """Return a 4x4x4, stride 2, padding 1 transposed convolution as a convolution to sub-voxels.

    Each output is a sum over 2x2x2 inputs, and the eight outputs (sub-voxels) between the same inputs are eight times
    as many channels of one. From (B, channels, D, H, W) the convolution makes (B, 8 c, D + 1, H + 1, W + 1), parities
    of the three axes slowest, then channels: index g of an axis holds the outputs 2 g (parity 0) and 2 g - 1 (parity
    1). `outside_zeroed` clears what lies outside of the result; `from_subvoxels` puts it in order.
    """
    # tap t of the output at parity p is number 2 t + p: the same voxels, seen from the sub-voxels between them
    weight = _split_axes(layer.weight.flip(2, 3, 4)).permute(3, 5, 7, 1, 0, 2, 4, 6).flatten(0, 2).flatten(0, 1)
    bias = None if layer.bias is None else layer.bias.repeat(8)
    return Convolution.of(weight, bias, precision, padding=(1, 1, 1), relu=relu)


def outside_zeroed(subvoxels: torch.Tensor) -> torch.Tensor:
    """Clear, in place, the sub-voxels beyond the ends of each axis (see `subvoxel_convolution`)."""
    parities = subvoxels.unflatten(1, (2, 2, 2, -1))
    for axis in range(3):
        for parity, end in ((1, 0), (0, -1)):
            parities.select(axis + 5, end).select(axis + 1, parity).zero_()
    return subvoxels


def from_subvoxels(subvoxels: torch.Tensor, out: torch.Tensor | None = None) -> torch.Tensor:
    """Return (B, c, 2 D, 2 H, 2 W) in order, from the result of `subvoxel_convolution`; written to `out` if given."""
    parities = subvoxels.unflatten(1, (2, 2, 2, -1))
    batch, _, _, _, channels, *shape = parities.shape
    depth, height, width = (n - 1 for n in shape)
    if out is None:
        out = subvoxels.new_empty(batch, channels, 2 * depth, 2 * height, 2 * width)
    for a, b, c in _PARITIES:
        part = parities[:, a, b, c, :, a : a + depth, b : b + height, c : c + width]
        out[..., a::2, b::2, c::2] = part
    return out


def join(subvoxels: torch.Tensor, skip: torch.Tensor) -> torch.Tensor:
    """Return ``cat((from_subvoxels(subvoxels), skip), 1)``, channels last."""
    c = subvoxels.shape[1] // 8
    shape = skip.shape[0], c + skip.shape[1], *skip.shape[2:]
    joined = torch.empty(shape, dtype=skip.dtype, device=skip.device, memory_format=LAST)
    from_subvoxels(subvoxels, joined[:, :c])
    joined[:, c:] = skip
    return joined


def block_convolutions(layer: nn.Conv3d, channels: int, precision: torch.dtype) -> tuple[Convolution, Convolution]:
    """Split a 3x3x3, padding 1 convolution of ``cat((from_subvoxels(x), skip), 1)``, so that neither is put together.

    Args:
        layer: to few channels.
        channels: of x in order.
        precision: of the convolutions.

    Returns:
        Two convolutions, of x as sub-voxels and of `skip`, whose sum `from_blocks` puts in order: they compute blocks
        of 2x2x2 outputs as channels of one, from two sub-voxel groups along each axis and four voxels of `skip`.
    """
    # output r of a block sees the voxels -1 + s (s = 0 ... 3) of the block by the weights s - r
    blocks = torch.cat([F.pad(layer.weight, _shifts(parity)) for parity in _PARITIES])  # (8 c, channels, 4, 4, 4)
    # the four voxels that a block sees are, group by group, parity 1 and parity 0
    subvoxels = _split_axes(blocks[:, :channels]).flip(3, 5, 7).permute(0, 3, 5, 7, 1, 2, 4, 6).flatten(1, 4)
    bias = layer.bias if layer.bias is not None else layer.weight.new_zeros(layer.out_channels)
    return (
        Convolution.of(_padded_outputs(subvoxels), None, precision),
        Convolution.of(
            _padded_outputs(blocks[:, channels:]),
            _padded_outputs(bias.repeat(8)),
            precision,
            stride=(2, 2, 2),
            padding=(1, 1, 1),
        ),
    )


def from_blocks(blocks: torch.Tensor, channels: int = 3, size: tuple[int, int, int] = (2, 2, 2)) -> torch.Tensor:
    """Return the outputs in order, (B, c, a D, b H, c W), of a convolution that computed blocks of them.

    Args:
        blocks: (B, n, D, H, W), channels slowest by the place in the block; more than there are count for nothing.
        channels: of one output.
        size: (a, b, c) of a block.
    """
    count = size[0] * size[1] * size[2]
    parts = blocks[:, : count * channels].unflatten(1, (*size, channels)).permute(0, 4, 5, 1, 6, 2, 7, 3)
    return parts.reshape(len(blocks), channels, *(n * m for n, m in zip(blocks.shape[2:], size, strict=True)))


def _padded_outputs(weights: torch.Tensor) -> torch.Tensor:
    """With outputs of zeros up to a multiple of 16, the numbers of a vector: 24 outputs take longer than 32."""
    return F.pad(weights, [0, 0] * (weights.ndim - 1) + [0, -len(weights) % 16])


def _split_axes(weight: torch.Tensor) -> torch.Tensor:
    """(a, b, 4, 4, 4) as (a, b, 2, 2, 2, 2, 2, 2)."""
    return weight.unflatten(4, (2, 2)).unflatten(3, (2, 2)).unflatten(2, (2, 2))


def _shifts(parity: Sequence[int]) -> list[int]:
    """Padding (last axis first) that brings three weights to their positions among four."""
    return [p for r in reversed(parity) for p in (r, 1 - r)]
