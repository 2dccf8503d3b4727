"""LDR's layers as compiled code, used where the package numba is installed and the processor has long vectors.

Nothing here is needed: `cpu_layout` does the same with torch. Here layers and their weights are arranged so that the
loops of `layer_loops` can compute them all alike. Importing this file imports numba.

Arrangement, channels last:

- features: (D, H, W + 2, channels), a voxel of zeros at both ends of a row, so that the inputs of an output are
  neighbours in memory;
- two images: blocks of 2x2x2 voxels, (D / 2 + 1, H / 2 + 1, W / 2 + 1, 16), block b of an axis holding voxels 2 b - 1
  (parity 0) and 2 b (parity 1); numbers of a block by parity of z, y, image (moving first), parity of x;
- gaps, the result of a transposed convolution to few channels: as `cpu_layout.transposed_gaps` says.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import nn

from LDRCore import compiling
from LDRCore.models import cpu_layout, layer_loops
from LDRCore.models.layer_loops import ELEMENTS, LANES, takes

__all__ = ["Features", "down", "first", "flow", "room", "takes", "up"]


@dataclass(frozen=True)
class Features:
    """The result of a layer.

    Attributes:
        values: (D, H, W + 2 ends, channels), float32 or bfloat16.
        ends: voxels of zeros at either end of a row.
    """

    values: torch.Tensor
    ends: int = 1

    @property
    def shape(self) -> tuple[int, int, int]:
        """Voxels along each axis."""
        depth, height, row, _ = self.values.shape
        return depth, height, row - 2 * self.ends

    @property
    def channels(self) -> int:
        """Numbers of a voxel."""
        return self.values.shape[3]

    def tensor(self) -> torch.Tensor:
        """(channels, D, H, W), not copied."""
        return self.values[:, :, self.ends : self.values.shape[2] - self.ends].permute(3, 0, 1, 2)


@dataclass(frozen=True)
class _Input:
    """What a layer reads of some features.

    Attributes:
        features: these.
        scale, first: for output i along an axis (z, y, x), voxels from scale * i + first on.
        kernel: so many, along z and y.
        weights: as `_arranged`: pieces, entries of the tables, groups, amount and so on.
    """

    features: Features
    scale: tuple[int, int, int]
    first: int
    kernel: tuple[int, int]
    weights: torch.Tensor

    def plan(self) -> list[int]:
        """Numbers for `layer_loops`: addresses and distances in bytes."""
        values = self.features.values
        depth, height, _, channels = values.shape
        voxel, row = channels * values.itemsize, values.stride(1) * values.itemsize
        start = values.data_ptr() + (self.first + self.features.ends) * voxel
        *scale, step = self.scale
        plan = [start, depth, height, row, step * voxel, *scale, self.first, *self.kernel]
        weights = self.weights
        return [*plan, weights.shape[3], weights.data_ptr(), weights.stride(1) * weights.itemsize]


def _arranged(weight: torch.Tensor, precision: torch.dtype) -> torch.Tensor:
    """Weights (pieces, outputs, inputs, kz, ky, kx) as the loops read them.

    (pieces, kz * ky, groups, amount, ELEMENTS, LANES, 1, or 2 for bfloat16); outputs are filled up with zeros to
    groups of LANES. kx times inputs must be a multiple of ELEMENTS of what 4 bytes hold.
    """
    per = 4 // precision.itemsize
    weight = nn.functional.pad(weight.detach(), [0] * 8 + [0, -weight.shape[1] % LANES])
    pieces, _, _, kz, ky, _ = weight.shape
    rows = weight.permute(0, 3, 4, 1, 5, 2).reshape(pieces, kz * ky, -1, LANES, weight.shape[5] * weight.shape[2])
    return rows.unflatten(4, (-1, ELEMENTS, per)).permute(0, 1, 2, 4, 5, 3, 6).to(precision).contiguous()


def _bias(layer: nn.Conv3d | nn.ConvTranspose3d, repeats: int = 1, order: torch.Tensor | None = None) -> torch.Tensor:
    bias = cpu_layout.bias_of(layer, repeats).detach().float()
    bias = bias if order is None else bias[order]
    return nn.functional.pad(bias, (0, -len(bias) % LANES)).contiguous()


def _plans(inputs: Sequence[_Input]) -> np.ndarray:
    return np.array([one.plan() for one in inputs], np.int64)


def _compute(
    inputs: Sequence[_Input],
    bias: torch.Tensor,
    slope: float,
    result: Features,
    *,
    parities: bool = False,
    twos: int = 1,
) -> Features:
    """Fill `result`; `twos`: so many outputs of a row are channels of one."""
    values = result.values
    depth, height, width = result.shape
    unit, tiles, sizes = layer_loops.means(values.dtype, width // (2 if parities else twos))
    plan = _plans(inputs)
    shape = height, width // twos, result.ends * result.channels, result.channels * twos
    groups = inputs[0].weights.shape[2]
    arguments = unit, tiles, sizes, plan, groups, shape, parities, bias.numpy(), np.float32(slope), _flat(values)
    rows = depth * (height // 2 + 1 if parities else height)
    compiling.share(rows, lambda begin, end: layer_loops.features(*arguments, begin, end))
    return result


def _compute_about_gaps(inputs: Sequence[_Input], bias: torch.Tensor, slope: float, result: Features) -> Features:
    """Fill `result`, the eight outputs about a gap at once."""
    depth, height, width = result.shape
    unit, tiles, sizes = layer_loops.means(result.values.dtype, width // 2 + 1)
    shape = depth, height, width, result.channels
    arguments = unit, tiles, sizes, _plans(inputs), shape, bias.numpy(), np.float32(slope), _flat(result.values)
    rows = (depth // 2 + 1) * (height // 2 + 1)
    compiling.share(rows, lambda begin, end: layer_loops.features_about_gaps(*arguments, begin, end))
    return result


def _flat(values: torch.Tensor) -> np.ndarray:
    """Numbers in a row, bfloat16 by their bits."""
    return (values.view(torch.uint16) if values.dtype == torch.bfloat16 else values).view(-1).numpy()


def room(shape: Sequence[int], channels: int, precision: torch.dtype, ends: int = 1) -> Features:
    """Features yet to be computed, of `shape` (D, H, W); what is read behind the last row is zero."""
    depth, height, width = shape
    size = depth, height, width + 2 * ends, channels
    values = torch.empty(math.prod(size) + LANES, dtype=precision)
    values[-LANES:] = 0
    return Features(values[:-LANES].view(size), ends)


def first(layer: nn.Conv3d, blocks: torch.Tensor, slope: float = 0.0) -> Features:
    """A stride 2, padding 1 convolution of two images, a 3x3x3 or 4x4x4 one.

    Args:
        layer: two channels to a multiple of 8.
        blocks: the images, see `cpu_layout.ImagePair`.
        slope: of negative results: 0 for ReLU, 1 for no change.
    """
    precision = blocks.dtype
    # outputs of a row by twos, where one alone leaves most of a vector empty
    twos = 2 if layer.out_channels == 8 < LANES and precision == torch.float32 else 1

    def make() -> tuple[torch.Tensor, torch.Tensor]:
        # (out, image, block, parity, block, parity, block, parity)
        taps = cpu_layout.by_twos(nn.functional.pad(layer.weight, [0, layer.kernel_size[0] % 2] * 3))
        weight = taps.permute(0, 3, 5, 1, 7, 2, 4, 6).flatten(1, 4)
        weight = torch.cat([nn.functional.pad(weight, (n, twos - 1 - n)) for n in range(twos)])
        return _arranged(weight[None], precision), _bias(layer, twos)

    weights, bias = cpu_layout.kept(layer, f"of blocks, {precision}", make)
    given = Features(blocks.flatten(3), 0)
    result = room([n - 1 for n in given.shape], layer.out_channels, precision)
    inputs = [_Input(given, (1, 1, twos), 0, (2, 2), weights)]
    return _compute(inputs, bias, slope, result, twos=twos)


def down(layer: nn.Conv3d, features: Features, slope: float = 0.0) -> Features:
    """A stride 2, padding 1 convolution, 3x3x3 or 4x4x4, of features; see `first`."""
    precision = features.values.dtype

    def make() -> tuple[torch.Tensor, torch.Tensor]:
        weight = nn.functional.pad(layer.weight, (0, layer.kernel_size[2] % 2))
        return _arranged(weight[None], precision), _bias(layer)

    weights, bias = cpu_layout.kept(layer, f"down, {precision}", make)
    result = room([n // 2 for n in features.shape], layer.out_channels, precision)
    kernel = layer.kernel_size[0], layer.kernel_size[1]
    return _compute([_Input(features, (2, 2, 2), -1, kernel, weights)], bias, slope, result)


def up(layer: nn.ConvTranspose3d, inputs: Sequence[Features], slope: float = 0.0) -> Features:
    """A 4x4x4, stride 2, padding 1 transposed convolution of features of one size, one after the other.

    Its result stays in gaps where neither its channels nor, in float32, those of two voxels fill what is put at once.
    """
    precision = inputs[0].values.dtype
    whole = layer.out_channels % LANES == 0
    two = precision == torch.float32 and 2 * layer.out_channels in (8, LANES)
    sizes = [one.channels for one in inputs]

    def make() -> tuple[torch.Tensor, ...]:
        pieces = [cpu_layout.by_parity(weight) for weight in layer.weight.split(sizes)]
        if whole:  # (pz; px, py, channel)
            pieces = [piece.unflatten(0, (2, 2, 2)).transpose(1, 2).flatten(1, 3) for piece in pieces]
        else:  # (pz, py, px, channel), with `two` both voxels in their order
            pieces = [piece.unflatten(0, (4, 2)).flip(1).flatten(0, 1) if two else piece for piece in pieces]
            pieces = [piece.flatten(0, 1)[None] for piece in pieces]
        return *(_arranged(piece, precision) for piece in pieces), _bias(layer, 1 if whole else 8)

    *weights, bias = cpu_layout.kept(layer, f"up {sizes}, {precision}", make)
    given = [_Input(one, (1, 1, 1), -1, (2, 2), weight) for one, weight in zip(inputs, weights, strict=True)]
    if whole or two:
        result = room([2 * n for n in inputs[0].shape], layer.out_channels, precision)
        if two:
            return _compute_about_gaps(given, bias, slope, result)
        return _compute(given, bias, slope, result, parities=True)
    result = room([n + 1 for n in inputs[0].shape], 8 * layer.out_channels, precision, 0)
    _compute(given, bias, slope, result)
    flat, shape = _flat(result.values), tuple(result.values.shape)
    compiling.share(shape[0] * shape[1], lambda begin, end: layer_loops.clear_outside(flat, shape, begin, end))
    return result


def _flow_by_voxel(layer: nn.Conv3d, inputs: Sequence[Features]) -> torch.Tensor:
    """`flow` at half size in float32; the inputs of three voxels are filled up to whole vectors."""
    sizes = [one.channels for one in inputs]

    def make() -> tuple[torch.Tensor, ...]:
        pieces = []
        for weight in layer.weight.detach().float().split(sizes, 1):
            rows = weight.permute(2, 3, 0, 4, 1).flatten(3)  # (kz, ky, outputs, kx inputs)
            rows = nn.functional.pad(rows, (0, -rows.shape[3] % LANES)).flatten(0, 1).unflatten(2, (-1, LANES))
            pieces.append(rows.transpose(1, 2)[None, :, None].contiguous())
        return *pieces, cpu_layout.bias_of(layer).detach().float().contiguous()

    *weights, bias = cpu_layout.kept(layer, f"flow by voxel {sizes}", make)
    given = [_Input(one, (1, 1, 1), -1, (3, 3), weight) for one, weight in zip(inputs, weights, strict=True)]
    depth, height, width = inputs[0].shape
    found = torch.empty(3, depth, height, width)
    plan = _plans(given)
    arguments = plan, bias.numpy(), found.numpy(), layer_loops.places_of_dots(True)
    compiling.share(depth * height, lambda begin, end: layer_loops.field_by_voxel(*arguments, begin, end))
    return found


def flow(layer: nn.Conv3d | nn.ConvTranspose3d, inputs: Sequence[Features]) -> torch.Tensor:
    """The displacement (3, D, H, W) float32 by LDR's last layer, either head; the first inputs may be gaps."""
    precision = inputs[0].values.dtype
    transposed = isinstance(layer, nn.ConvTranspose3d)
    sizes = [one.channels if one.ends else one.channels // 8 for one in inputs]
    if isinstance(layer, nn.Conv3d) and precision == torch.float32 and all(one.ends for one in inputs):
        return _flow_by_voxel(layer, inputs)
    flat = not transposed and all(one.ends for one in inputs)  # blocks of one slice: fewer zeros among the weights
    # from (pz, py, px, component) to (pz, py, component, voxel along x)
    order = torch.arange(12 if flat else 24).view(-1, 2, 3)
    order = (order.flip(1) if transposed else order).transpose(1, 2).flatten()

    def make() -> tuple[torch.Tensor, ...]:
        parts = layer.weight.split(sizes, 0 if transposed else 1)
        pieces = []
        for one, weight in zip(inputs, parts, strict=True):
            if transposed:
                piece = cpu_layout.by_parity(weight).flatten(0, 1)
            else:
                piece = cpu_layout.by_blocks(weight) if one.ends else cpu_layout.by_gaps(weight)
            piece = piece[:12, :, :3] if flat else piece
            pieces.append(_arranged(piece[order][None], precision))
        return *pieces, _bias(layer, 8, order)

    *weights, bias = cpu_layout.kept(layer, f"flow {sizes}, {precision}", make)
    given = []
    for one, weight in zip(inputs, weights, strict=True):
        if transposed:
            given.append(_Input(one, (1, 1, 1), -1, (2, 2), weight))
        elif one.ends:
            given.append(_Input(one, (1 if flat else 2, 2, 2), -1, (3 if flat else 4, 4), weight))
        else:
            given.append(_Input(one, (1, 1, 1), 0, (2, 2), weight))
    size = inputs[-1].shape
    count = [n + 1 if transposed else n // 2 for n in size]
    if flat:
        count[0] = size[0]
    found = torch.empty(3, *(2 * n if transposed else n for n in size))
    unit, tiles, rows = layer_loops.means(precision, count[2])
    plan = _plans(given)
    shape = count[1], count[2], len(order)
    sign = -1 if transposed else 1
    arguments = unit, tiles, rows, plan, weights[0].shape[2], shape, sign, bias.numpy(), found.numpy()
    compiling.share(count[0] * count[1], lambda begin, end: layer_loops.field(*arguments, begin, end))
    return found
