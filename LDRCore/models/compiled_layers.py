"""LDR's layers as compiled code, used where the package numba is installed and the processor has long vectors.

Nothing here is needed: `cpu_layout` does the same with torch. Here layers and their weights are arranged so that the
loops of `layer_loops` can compute them all alike. A network is written down once as a `Program`, and run as one call,
so that threads go from layer to layer without the interpreter. Importing this file imports numba.

Arrangement, channels last:

- features: (D, H, W + 2, channels), a voxel of zeros at both ends of a row, so that the inputs of an output are
  neighbours in memory;
- two images: blocks of 2x2x2 voxels, (D / 2 + 1, H / 2 + 1, W / 2 + 1 or one more, 16), block b of an axis holding
  voxels 2 b - 1 (parity 0) and 2 b (parity 1); numbers of a block by parity of z, y, image (moving first), parity of x;
- gaps, the result of a transposed convolution to few channels: as `cpu_layout.transposed_gaps` says.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import nn

from LDRCore import turns
from LDRCore.models import cpu_layout, layer_loops
from LDRCore.models.layer_loops import BEHIND, LANES, TILE_ELEMENTS, VECTOR_ELEMENTS, takes

__all__ = ["Features", "Program", "program_of", "takes"]

_OWN, _RESULT, _GIVEN = range(3)  # what an address counts from: a program's own memory, the field, the first input
_ALIGNMENT = 64  # bytes
_spare: list[torch.Tensor] = []  # one program's own memory, for the next one: new memory costs as much as the layers


def _memory(size: int) -> torch.Tensor:
    """So many bytes or more, for one run of a program."""
    with contextlib.suppress(IndexError):  # nothing is spare
        memory = _spare.pop()
        if len(memory) >= size:
            return memory
    return torch.empty(size, dtype=torch.uint8)


@dataclass(frozen=True)
class Features:
    """Where numbers of voxels lie while a program runs.

    Attributes:
        shape: voxels along each axis.
        channels: numbers of a voxel.
        itemsize: bytes of a number.
        base, offset: address, in bytes from one of the above.
        ends: voxels of zeros at either end of a row.
        spare: voxels behind it.
    """

    shape: tuple[int, int, int]
    channels: int
    itemsize: int
    base: int
    offset: int
    ends: int = 1
    spare: int = 0

    @property
    def row(self) -> int:
        """Bytes from row to row."""
        return (self.shape[2] + 2 * self.ends + self.spare) * self.channels * self.itemsize

    @property
    def bytes(self) -> int:
        """Of all rows, and of zeros behind the last one, which loops may read."""
        return self.shape[0] * self.shape[1] * self.row + BEHIND * self.itemsize


@dataclass(frozen=True)
class _Input:
    """What a layer reads of some features.

    Attributes:
        features: these.
        scale, first: for output i along an axis (z, y, x), voxels from scale * i + first on.
        kernel: so many, along z and y.
        weights: as `_arranged`: pieces, entries of the tables, groups, amount and so on.
        twos: where two pieces of weights are for even and for odd slices of outputs, of which both of two then count as
            one output: 0 if an even slice goes with the next one, 1 if with the one before; else None.
    """

    features: Features
    scale: tuple[int, int, int]
    first: int
    kernel: tuple[int, int]
    weights: torch.Tensor
    twos: int | None = None

    def plan(self, zeros: int) -> list[int]:
        """Numbers for `layer_loops._list_rows`: address from the base of the features, distances in bytes, which base.

        `zeros` is the address of a row of them.
        """
        given, weights = self.features, self.weights
        twos = -1 if self.twos is None else self.twos
        voxel = given.channels * given.itemsize
        *scale, step = self.scale
        start = given.offset + (self.first + given.ends) * voxel
        plan = [start, *given.shape[:2], given.row, step * voxel, *scale, self.first, *self.kernel]
        size = weights.stride(1) * weights.itemsize
        return [*plan, weights.shape[3], weights.data_ptr(), size, zeros, twos, given.base]


def _bias(layer: nn.Conv3d | nn.ConvTranspose3d, repeats: int = 1, order: torch.Tensor | None = None) -> torch.Tensor:
    bias = cpu_layout.bias_of(layer, repeats).detach().float()
    bias = bias if order is None else bias[order]
    return nn.functional.pad(bias, (0, -len(bias) % LANES)).contiguous()


class Program:
    """Layers one after the other, for inputs of fixed sizes. `finish` it, then `run` it; it may run on many threads.

    Layers are to be called in order; each returns where its result will be, for those that follow.

    Attributes:
        precision: of weights and features.
    """

    def __init__(self, precision: torch.dtype) -> None:
        self.precision = precision
        self._tiled = layer_loops.has_tiles() and precision == torch.bfloat16
        self._steps: list[tuple[list[int], np.ndarray]] = []  # numbers, tiles
        self._inputs: list[_Input] = []
        self._kept: list[torch.Tensor] = []  # that steps have addresses of
        self._bytes = 0
        self._given = 0
        self._last: Features | None = None
        self._field: tuple[int, int, int] | None = None

    def given(self, shape: Sequence[int], channels: int, ends: int = 1, spare: int = 0) -> Features:
        """The next input of `run`, (B, D, H, W + 2 ends + spare, channels) contiguous; D, H, W are `shape`.

        Rows are ended by zeros, and the last one is followed by BEHIND of them.
        """
        depth, height, width = shape
        self._given += 1
        base = _GIVEN + self._given - 1
        return Features((depth, height, width), channels, self.precision.itemsize, base, 0, ends, spare)

    def images(self, shape: Sequence[int]) -> Features:
        """The next input of `run`: an entry of a `cpu_layout.ImagePair` of images (D, H, W), `shape`."""
        blocks = [n // 2 + 1 for n in shape]
        return self.given(blocks, 16, 0, cpu_layout.blocks_of_row(shape[2]) - blocks[2])

    def finish(self) -> None:
        """No more layers follow."""
        self._table = np.array([step for step, _ in self._steps], np.int64)
        self._tiles = np.array([tiles for _, tiles in self._steps])
        longest = max(one.features.row + BEHIND * one.features.itemsize for one in self._inputs)
        zeros = torch.zeros(longest, dtype=torch.uint8)
        self._kept.append(zeros)
        self._plan = np.array([one.plan(zeros.data_ptr()) for one in self._inputs], np.int64)

    def run(self, *given: torch.Tensor) -> torch.Tensor:
        """The result of the last layer.

        Args:
            given: what `given` and `images` announced, in their order.

        Returns:
            The displacement (B, 3, D, H, W) float32, or features (1, channels, D, H, W), not contiguous, of the last of
            the batch.
        """
        # few words: after a network of whole images the interpreter finds nothing of its own in the caches
        batch, unit = len(given[0]), layer_loops.unit_of(self.precision)
        own = _memory(self._bytes)
        result = torch.empty(batch, 3, *(self._field or (0, 0, 0)))
        for n in range(batch):
            others = [one.data_ptr() + n * one.stride(0) * one.itemsize for one in (result, *given)]
            arguments = unit, self._table, self._plan, self._tiles, np.array([own.data_ptr(), *others], np.int64)
            turns.take_turns(len(self._table), lambda *thread, given=arguments: layer_loops.run(*given, *thread))
        if self._field is None:
            return self._tensor(own)[None]
        _spare[:] = [own]
        return result

    def _tensor(self, own: torch.Tensor) -> torch.Tensor:
        assert self._last is not None
        (depth, height, width), ends, channels = self._last.shape, self._last.ends, self._last.channels
        values = own[self._last.offset :].view(self.precision)[: depth * height * (width + 2 * ends) * channels]
        values = values.view(depth, height, width + 2 * ends, channels)[:, :, ends : ends + width]
        return values.permute(3, 0, 1, 2)

    def _room(self, shape: Sequence[int], channels: int, ends: int = 1) -> Features:
        """Room for the result of a layer."""
        depth, height, width = shape
        itemsize = self.precision.itemsize
        self._last = Features((depth, height, width), channels, itemsize, _OWN, self._bytes, ends)
        self._bytes += -(-self._last.bytes // _ALIGNMENT) * _ALIGNMENT
        return self._last

    def _add(
        self,
        kind: int,
        rows: tuple[int, int],
        inputs: Sequence[_Input],
        result: Features | None,
        bias: torch.Tensor,
        width: int,
        shape: Sequence[int],
    ) -> None:
        """A step, see `layer_loops.STEP`.

        Args:
            kind: of `layer_loops`.
            rows: of outputs, along z and y.
            inputs: of the layer.
            result: None for the field.
            bias: of the layer.
            width: number of outputs of a row.
            shape: what the loops of this kind say.
        """
        groups = inputs[0].weights.shape[2]
        weights = sum(one.weights[0].nbytes for one in inputs)
        tiles, at_once = layer_loops.means(self.precision, width, groups, weights)
        fetched = 0, 0
        if kind == layer_loops.FIELD_BY_VOXEL:
            at_once = layer_loops.AtOnce(layer_loops.places_of_dots(True), 0, 1)
        else:
            entries = sum(one.kernel[0] * one.kernel[1] for one in inputs)
            size = sum(one.scale[0] * one.scale[1] * at_once.rows * one.features.row for one in inputs)
            fetched = layer_loops.fetched(self.precision, width, groups, at_once, entries, size)
        turns = rows[0] * -(-rows[1] // at_once.rows)
        base, offset = (result.base, result.offset) if result else (_RESULT, 0)
        step = [kind, turns, len(self._inputs), len(inputs), offset, base, bias.data_ptr(), *at_once, *fetched, *shape]
        self._steps.append(([*step, *[0] * (layer_loops.STEP - len(step))], tiles))
        self._inputs += inputs
        self._kept += [bias, *(one.weights for one in inputs)]

    def _add_features(
        self,
        inputs: Sequence[_Input],
        bias: torch.Tensor,
        result: Features,
        *,
        parities: bool = False,
        twos: int = 1,
    ) -> Features:
        """`twos`: so many outputs of a row are channels of one."""
        depth, height, width = result.shape
        groups = inputs[0].weights.shape[2]
        shape = depth, height, width // twos, result.ends * result.channels, result.channels * twos, groups
        if parities:
            kind, rows = layer_loops.FEATURES_BY_PARITY, (depth, height // 2 + 1)
        else:
            kind, rows = layer_loops.FEATURES if result.ends else layer_loops.GAPS, (depth, height)
        self._add(kind, rows, inputs, result, bias, width // (2 if parities else twos), shape)
        return result

    def first(self, layer: nn.Conv3d, blocks: Features) -> Features:
        """A 4x4x4, stride 2, padding 1 convolution of two images (`images`) to a multiple of 8 channels, rectified."""
        # outputs of a row by twos, where one alone leaves half a vector empty; for tiles numbers come in whole lines
        twos = 2 if layer.out_channels == 8 < LANES else 1
        wide = 2 * twos if self._tiled else twos + 1

        def make() -> tuple[torch.Tensor, torch.Tensor]:
            # (out, image, block, parity, block, parity, block, parity)
            weight = cpu_layout.by_twos(layer.weight).permute(0, 3, 5, 1, 7, 2, 4, 6).flatten(1, 4)
            weight = torch.cat([nn.functional.pad(weight, (n, wide - 2 - n)) for n in range(twos)])
            return self._arranged(weight[None]), _bias(layer, twos)

        weights, bias = self._weights(layer, "of blocks", make)
        result = self._room([n - 1 for n in blocks.shape], layer.out_channels)
        return self._add_features([_Input(blocks, (1, 1, twos), 0, (2, 2), weights)], bias, result, twos=twos)

    def down(self, layer: nn.Conv3d, features: Features) -> Features:
        """A 4x4x4, stride 2, padding 1 convolution of features, rectified."""

        def make() -> tuple[torch.Tensor, torch.Tensor]:
            return self._arranged(layer.weight[None]), _bias(layer)

        weights, bias = self._weights(layer, "down", make)
        result = self._room([n // 2 for n in features.shape], layer.out_channels)
        return self._add_features([_Input(features, (2, 2, 2), -1, (4, 4), weights)], bias, result)

    def up(self, layer: nn.ConvTranspose3d, inputs: Sequence[Features]) -> Features:
        """A 4x4x4, stride 2, padding 1 transposed convolution of features of one size, one after the other, rectified.

        Its result stays in gaps where neither its channels nor those of two voxels fill what is put at once, and
        before the matrix unit, which has no use for so few channels by voxel.
        """
        whole = layer.out_channels % LANES == 0
        two = not self._tiled and 2 * layer.out_channels in (8, LANES)
        sizes = [one.channels for one in inputs]

        def make() -> tuple[torch.Tensor, ...]:
            pieces = [cpu_layout.by_parity(weight) for weight in layer.weight.split(sizes)]
            if whole:  # (pz; px, py, channel)
                pieces = [piece.unflatten(0, (2, 2, 2)).transpose(1, 2).flatten(1, 3) for piece in pieces]
            else:  # (pz, py, px, channel), with `two` both voxels in their order
                pieces = [piece.unflatten(0, (4, 2)).flip(1).flatten(0, 1) if two else piece for piece in pieces]
                pieces = [piece.flatten(0, 1)[None] for piece in pieces]
            return *(self._arranged(piece) for piece in pieces), _bias(layer, 1 if whole else 8)

        *weights, bias = self._weights(layer, f"up {sizes}", make)
        twos = 1 if whole else None
        given = [_Input(one, (1, 1, 1), -1, (2, 2), weight, twos) for one, weight in zip(inputs, weights, strict=True)]
        size, count = [2 * n for n in inputs[0].shape], [n + 1 for n in inputs[0].shape]
        if whole:
            return self._add_features(given, bias, self._room(size, layer.out_channels), parities=True)
        if two:
            result = self._room(size, layer.out_channels)
            shape = *result.shape, result.channels
            self._add(layer_loops.FEATURES_ABOUT_GAPS, (count[0], count[1]), given, result, bias, count[2], shape)
        else:
            result = self._add_features(given, bias, self._room(count, 8 * layer.out_channels, 0))
        return result

    def flow(self, layer: nn.Conv3d | nn.ConvTranspose3d, inputs: Sequence[Features]) -> None:
        """The displacement by LDR's last layer, either head; the first inputs may be gaps."""
        depth, height, width = inputs[-1].shape
        if isinstance(layer, nn.ConvTranspose3d):
            self._field = 2 * depth, 2 * height, 2 * width
            self._flow_at_full_size(layer, inputs)
            return
        self._field = depth, height, width
        if not self._tiled and all(one.ends for one in inputs):
            self._flow_by_voxel(layer, inputs)
        else:
            self._flow_by_blocks(layer, inputs)

    def _flow_by_voxel(self, layer: nn.Conv3d, inputs: Sequence[Features]) -> None:
        """By vectors; the inputs of three voxels are filled up to whole ones."""
        sizes = [one.channels for one in inputs]
        numbers = LANES * 4 // self.precision.itemsize

        def make() -> tuple[torch.Tensor, ...]:
            pieces = []
            for weight in layer.weight.detach().split(sizes, 1):
                rows = weight.permute(2, 3, 0, 4, 1).flatten(3)  # (kz, ky, outputs, kx inputs)
                rows = nn.functional.pad(rows, (0, -rows.shape[3] % numbers)).flatten(0, 1).unflatten(2, (-1, numbers))
                pieces.append(rows.transpose(1, 2)[None, :, None].to(self.precision).contiguous())
            return *pieces, cpu_layout.bias_of(layer).detach().float().contiguous()

        *weights, bias = self._weights(layer, f"flow by voxel {sizes}", make)
        given = [_Input(one, (1, 1, 1), -1, (3, 3), weight) for one, weight in zip(inputs, weights, strict=True)]
        depth, height, width = shape = inputs[0].shape
        self._add(layer_loops.FIELD_BY_VOXEL, (depth, height), given, None, bias, width, shape)

    def _flow_by_blocks(self, layer: nn.Conv3d, inputs: Sequence[Features]) -> None:
        """Blocks of 1x2x2 voxels: fewer zeros among the weights than with 2x2x2."""
        sizes = [one.channels if one.ends else one.channels // 8 for one in inputs]
        order = _by_component(12)

        def make() -> tuple[torch.Tensor, ...]:
            pieces = []
            for one, weight in zip(inputs, layer.weight.split(sizes, 1), strict=True):
                if one.ends:
                    pieces.append(self._arranged(cpu_layout.by_blocks(weight)[:12, :, :3][order][None]))
                else:
                    pieces.append(self._arranged(cpu_layout.by_gaps(weight).unflatten(0, (2, 12))[:, order]))
            return *pieces, _bias(layer, 4, order)

        *weights, bias = self._weights(layer, f"flow by blocks {[(one.channels, one.ends) for one in inputs]}", make)
        given = []
        for one, weight in zip(inputs, weights, strict=True):
            if one.ends:
                given.append(_Input(one, (1, 2, 2), -1, (3, 4), weight))
            else:
                given.append(_Input(one, (1, 1, 1), 0, (2, 2), weight, 0))
        depth, height, width = inputs[-1].shape
        self._add_field(given, bias, (depth, height // 2, width // 2), 1, len(order))

    def _flow_at_full_size(self, layer: nn.ConvTranspose3d, inputs: Sequence[Features]) -> None:
        sizes = [one.channels for one in inputs]
        order = _by_component(24, backwards=True)

        def make() -> tuple[torch.Tensor, ...]:
            pieces = [cpu_layout.by_parity(weight).flatten(0, 1)[order] for weight in layer.weight.split(sizes)]
            return *(self._arranged(piece[None]) for piece in pieces), _bias(layer, 8, order)

        *weights, bias = self._weights(layer, f"flow at full size {sizes}", make)
        given = [_Input(one, (1, 1, 1), -1, (2, 2), weight) for one, weight in zip(inputs, weights, strict=True)]
        self._add_field(given, bias, [n + 1 for n in inputs[0].shape], -1, len(order))

    def _add_field(
        self, given: Sequence[_Input], bias: torch.Tensor, count: Sequence[int], sign: int, channels: int
    ) -> None:
        assert self._field is not None
        shape = *self._field, count[1], count[2], sign, channels
        self._add(layer_loops.FIELD, (count[0], count[1]), given, None, bias, count[2], shape)

    def _arranged(self, weight: torch.Tensor) -> torch.Tensor:
        """Weights (pieces, outputs, inputs, kz, ky, kx) as the loops read them.

        (pieces, kz * ky, groups, amount, elements, LANES, 1, or 2 for bfloat16); outputs are filled up with zeros to
        groups of LANES. kx times inputs must be a multiple of what as many elements of 4 bytes hold.
        """
        per = 4 // self.precision.itemsize
        elements = TILE_ELEMENTS if self._tiled else VECTOR_ELEMENTS
        weight = nn.functional.pad(weight.detach(), [0] * 8 + [0, -weight.shape[1] % LANES])
        pieces, _, _, kz, ky, _ = weight.shape
        rows = weight.permute(0, 3, 4, 1, 5, 2).reshape(pieces, kz * ky, -1, LANES, weight.shape[5] * weight.shape[2])
        rows = rows.unflatten(4, (-1, elements, per)).permute(0, 1, 2, 4, 5, 3, 6)
        return rows.to(self.precision).contiguous()

    def _weights(
        self, layer: nn.Conv3d | nn.ConvTranspose3d, form: str, make: Callable[[], tuple[torch.Tensor, ...]]
    ) -> tuple[torch.Tensor, ...]:
        return cpu_layout.kept(layer, f"{form}, {self.precision}", make)


def _by_component(channels: int, *, backwards: bool = False) -> torch.Tensor:
    """Order of channels from (pz, py, px, component) to (pz, py, component, voxel along x)."""
    order = torch.arange(channels).view(-1, 2, 3)
    return (order.flip(1) if backwards else order).transpose(1, 2).flatten()


def program_of(
    network: nn.Module, precision: torch.dtype, shape: Sequence[int], write: Callable[[Program, Features], Any]
) -> Program:
    """A network's program for two images, kept until its weights or the images' size change.

    Args:
        network: whose layers these are.
        precision: of `Program`.
        shape: of the images.
        write: calls the layers of the program, given it and the images.
    """

    def make() -> Program:
        program = Program(precision)
        write(program, program.images(shape))
        program.finish()
        return program

    return cpu_layout.kept(network, f"program, {precision}", make, tuple(shape))
