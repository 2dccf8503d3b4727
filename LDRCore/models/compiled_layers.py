"""LDR's first layer and the end of its last one as compiled code, used where the package numba is installed.

Nothing here is needed: `cpu_layout` does the same with torch. A matrix unit works on many channels at once; for two
channels in, and for three out, it mostly waits. The first layer here holds eight channels of a few outputs in
registers while it goes through their inputs. Importing this file imports numba.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from llvmlite import ir
from numba.core import types
from numba.extending import intrinsic

from LDRCore import compiling

LANES = compiling.LANES  # outputs of a row at once: a row must have at least so many
GROUP = 8  # channels at once: a layer must have a multiple of so many
_TAPS = 4  # along x


def _outputs_of(vectors: int) -> Any:
    """A function that computes so many vectors of outputs of a row at once, GROUP channels each, at stride 2."""

    def block(typing, rows, starts, weights, places, count, bias, lowest, at, out, room):  # type: ignore[no-untyped-def]
        """Output n, channel c: the sum of rows[starts[t] + 2 (at + n) + tap] * weights[places[t] + GROUP tap + c] over
        t < count and tap < _TAPS, plus bias[c], at least `lowest`. Kept in out[room + n * (out's channels) + c], as
        bfloat16 if `out` holds whole numbers.
        """
        signature = types.void(rows, starts, weights, places, count, bias, lowest, at, out, room)
        return signature, lambda context, builder, sig, given: _write_block(context, builder, sig, given, vectors)

    return intrinsic(block)


def _write_block(context: Any, builder: Any, signature: Any, arguments: Any, vectors: int) -> Any:
    """The instructions of `_outputs_of`."""
    i32, i64, f32 = ir.IntType(32), ir.IntType(64), ir.FloatType()
    floats = ir.VectorType(f32, LANES)
    empty, zeros = ir.Constant(floats, ir.Undefined), ir.Constant(ir.VectorType(i32, LANES), [0] * LANES)

    def data(number):  # type: ignore[no-untyped-def]
        return context.make_array(signature.args[number])(context, builder, arguments[number])

    def everywhere(value):  # type: ignore[no-untyped-def]
        one = builder.insert_element(empty, value, i32(0))
        return builder.shuffle_vector(one, empty, zeros)

    def pick(a, b, numbers):  # type: ignore[no-untyped-def]
        return builder.shuffle_vector(a, b, ir.Constant(ir.VectorType(i32, len(numbers)), numbers))

    def item(base, *steps):  # type: ignore[no-untyped-def]
        place = steps[0]
        for step in steps[1:]:
            place = builder.add(place, step)
        return builder.load(builder.gep(base, [place]))

    image, first, weight, place = (data(k).data for k in range(4))
    count, lowest, at, room = (arguments[k] for k in (4, 6, 7, 9))
    biases = [everywhere(item(data(5).data, i64(c))) for c in range(GROUP)]
    start, loop, end = builder.block, *(builder.append_basic_block(name) for name in ("rows", "rows.end"))
    builder.branch(loop)
    builder.position_at_end(loop)
    t = builder.phi(i64)
    t.add_incoming(i64(0), start)
    sums = [[builder.phi(floats) for _ in range(GROUP)] for _ in range(vectors)]
    for vector in sums:
        for total, bias in zip(vector, biases, strict=True):
            total.add_incoming(bias, start)
    row = builder.gep(image, [builder.add(item(first, t), builder.shl(at, i64(1)))])
    base = item(place, t)
    totals = [list(vector) for vector in sums]
    for pair in range(_TAPS // 2):
        halves = []
        for half in range(2 * vectors):
            here = builder.gep(row, [i64(2 * pair + half * LANES)])
            halves.append(builder.load(builder.bitcast(here, floats.as_pointer())))
            halves[-1].align = 4
        for parity in range(2):
            order = [2 * n + parity for n in range(LANES)]
            inputs = [pick(halves[2 * v], halves[2 * v + 1], order) for v in range(vectors)]
            for c in range(GROUP):
                factor = everywhere(item(weight, base, i64(GROUP * (2 * pair + parity) + c)))
                for v in range(vectors):
                    product = builder.fmul(inputs[v], factor, flags=("contract",))
                    totals[v][c] = builder.fadd(product, totals[v][c], flags=("contract",))
    following = builder.add(t, i64(1))
    t.add_incoming(following, loop)
    for before, after in zip(sums, totals, strict=True):
        for total, now in zip(before, after, strict=True):
            total.add_incoming(now, loop)
    builder.cbranch(builder.icmp_signed("<", following, count), loop, end)
    builder.position_at_end(end)

    result = data(8)
    halved = isinstance(signature.args[8].dtype, types.Integer)
    size = 2 if halved else 4
    stride = builder.udiv(builder.extract_value(result.strides, 0), i64(size))
    target = ir.VectorType(result.data.type.pointee, GROUP).as_pointer()
    floor = everywhere(lowest)
    for v in range(vectors):
        channels = [builder.select(builder.fcmp_ordered("<", total, floor), floor, total) for total in totals[v]]
        if halved:
            channels = [_as_bfloat16(builder, values) for values in channels]
        while len(channels) > 1:  # from channel by channel to output by output
            half, length = len(channels) // 2, channels[0].type.count
            order = [n + side * length for n in range(length) for side in range(2)]
            channels = [pick(a, b, order) for a, b in zip(channels[:half], channels[half:], strict=True)]
        for n in range(LANES):
            piece = pick(channels[0], channels[0], list(range(GROUP * n, GROUP * (n + 1))))
            where = builder.add(room, builder.mul(stride, i64(v * LANES + n)))
            builder.store(piece, builder.bitcast(builder.gep(result.data, [where]), target)).align = size
    return context.get_dummy_value()


def _as_bfloat16(builder: Any, values: Any) -> Any:
    """A vector of float32 rounded to bfloat16, to the nearest, ties to even; their bits as whole numbers."""
    bits = ir.VectorType(ir.IntType(32), LANES)
    one, sixteen, almost_half = (ir.Constant(bits, [n] * LANES) for n in (1, 16, 32767))
    whole = builder.bitcast(values, bits)
    odd = builder.and_(builder.lshr(whole, sixteen), one)
    rounded = builder.lshr(builder.add(builder.add(whole, odd), almost_half), sixteen)
    return builder.trunc(rounded, ir.VectorType(ir.IntType(16), LANES))


_one_vector, _two_vectors = _outputs_of(1), _outputs_of(2)
_TWO = LANES == 16  # there are registers for two


@compiling.loop
def _first(rows, weights, bias, lowest, out, begin, end):  # type: ignore[no-untyped-def]
    """A convolution of two images, for rows begin ... end of out, (D / 2, H / 2, W / 2, channels).

    rows: (2, D, H, W + 2 or more). weights: (groups, kernel, kernel, 2, _TAPS, GROUP).
    """
    _, depth, height, length = rows.shape
    groups, size = weights.shape[0], weights.shape[1]
    width = out.shape[2]
    flat, flat_weights = rows.ravel(), weights.ravel()
    starts, places = np.empty(2 * size * size, np.int64), np.empty(2 * size * size, np.int64)
    for row in range(begin, end):
        k, j = row // out.shape[1], row % out.shape[1]
        count = 0
        for dz in range(size):
            z = 2 * k - 1 + dz
            for dy in range(size):
                y = 2 * j - 1 + dy
                if 0 <= z < depth and 0 <= y < height:
                    for image in range(2):
                        starts[count] = ((image * depth + z) * height + y) * length
                        places[count] = ((dz * size + dy) * 2 + image) * (_TAPS * GROUP)
                        count += 1
        for group in range(groups):
            some = flat_weights[group * (2 * size * size * _TAPS * GROUP) :]
            own, target = bias[group * GROUP :], out[k, j]
            at = 0
            while _TWO and at + 2 * LANES <= width:
                room = at * out.shape[3] + group * GROUP
                _two_vectors(flat, starts, some, places, count, own, lowest, at, target, room)
                at += 2 * LANES
            while at < width:
                at = min(at, width - LANES)
                room = at * out.shape[3] + group * GROUP
                _one_vector(flat, starts, some, places, count, own, lowest, at, target, room)
                at += LANES


def first_layer(
    rows: torch.Tensor, weights: torch.Tensor, bias: torch.Tensor, out: torch.Tensor, *, relu: bool
) -> None:
    """Fill `out` with a stride 2, padding 1 convolution of two images.

    Args:
        rows: both images, (2, D, H, W + 2 or more) float32: a zero, the W voxels of a row, a zero; W at least 2 LANES.
        weights: as `arranged` returns them.
        bias: (channels,) float32.
        out: (D / 2, H / 2, W / 2, channels), float32 or bfloat16.
        relu: rectify.
    """
    lowest = np.float32(0 if relu else -np.inf)
    target = (out.view(torch.uint16) if out.dtype == torch.bfloat16 else out).numpy()
    arguments = rows.numpy(), compiling.array(weights), compiling.array(bias), lowest, target
    compiling.share(target.shape[0] * target.shape[1], lambda begin, end: _first(*arguments, begin, end))


def arranged(weight: torch.Tensor) -> torch.Tensor:
    """Weights (channels, 2, k, k, k) of a convolution, k = 3 or 4, as `first_layer` reads them."""
    padded = torch.nn.functional.pad(weight.float(), (0, _TAPS - weight.shape[4]))
    return padded.unflatten(0, (-1, GROUP)).permute(0, 3, 4, 2, 5, 1).contiguous()


@compiling.loop
def _from_blocks(first, second, out, begin, end):  # type: ignore[no-untyped-def]
    """Out (3, 2 D, 2 H, 2 W) = first + second, (D, H, W, channels): blocks of 2x2x2, for rows begin ... end of these.

    Both hold bfloat16 by its bits. Channel 3 p + c is component c at parity p.
    """
    compiling.wide()
    depth, height, width, channels = first.shape
    count = width * channels
    one, other = np.empty(count, np.uint32), np.empty(count, np.uint32)
    total, more = one.view(np.float32), other.view(np.float32)
    flat_first, flat_second, flat = first.ravel(), second.ravel(), out.ravel()
    sixteen, step = np.uint32(16), np.uintp(channels)
    for row in range(begin, end):
        k, j = row // height, row % height
        here = np.uintp(row * count)
        for i in range(count):
            one[i] = np.uint32(flat_first[here + np.uintp(i)]) << sixteen
            other[i] = np.uint32(flat_second[here + np.uintp(i)]) << sixteen
        for i in range(count):
            total[i] += more[i]
        for p in range(4):
            for c in range(3):
                target = np.uintp(((2 * depth * c + 2 * k + p // 2) * 2 * height + 2 * j + p % 2) * 2 * width)
                even = np.uintp(6 * p + c)
                for i in range(width):
                    flat[target + np.uintp(2 * i)] = total[even + np.uintp(i) * step]
                    flat[target + np.uintp(2 * i + 1)] = total[even + np.uintp(3) + np.uintp(i) * step]


def from_blocks(first: torch.Tensor, second: torch.Tensor) -> torch.Tensor:
    """The displacement (3, 2 D, 2 H, 2 W) float32 that is the sum of two in blocks of 2x2x2.

    Args:
        first, second: (D, H, W, channels) bfloat16, contiguous; channel 3 p + c is component c at parity p of a block.
    """
    depth, height, width, _ = first.shape
    out = torch.empty(3, 2 * depth, 2 * height, 2 * width)
    arguments = first.view(torch.uint16).numpy(), second.view(torch.uint16).numpy(), out.numpy()
    compiling.share(depth * height, lambda begin, end: _from_blocks(*arguments, begin, end))
    return out
