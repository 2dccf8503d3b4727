"""The loops of `compiled_layers`: how the sums of a layer are computed, and where they are put.

Every layer, arranged as `compiled_layers` says, is the same sum: for each output along a row, over some rows of its
inputs, over neighbouring numbers of such a row. `_product_of` computes it, with the processor's matrix unit (AMX) for
bfloat16, with its vectors for float32 and, where there is no matrix unit, for pairs of bfloat16; with vectors
`_dots_of` does it for three outputs. Which rows is told by tables of addresses, so nothing here may outlive the tensors
of a call. `run` goes through the layers of a network. The matrix unit is left as it was found. Importing this file
imports numba.
"""

from __future__ import annotations

import functools
from typing import Any

import numpy as np
import torch
from llvmlite import ir
from numba.core import cgutils, types
from numba.extending import intrinsic
from numba.np.numpy_support import carray

from LDRCore import compiling, turns

LANES = compiling.LANES  # outputs (channels) of a vector, and of a tile
USABLE = compiling.has("avx512f") or (compiling.has("avx2") and compiling.has("fma"))
# numbers of 4 bytes, a float32 or two bfloat16, that the inputs of an output come in: of a tile's row, for vectors
TILE_ELEMENTS, VECTOR_ELEMENTS = 16, 8
BEHIND = 2 * LANES  # numbers behind the last row of features that may be read
_TILE_ROWS = 16
_MOST_ENTRIES = 32  # of the tables of a product: 4x4 rows of two inputs
_MOST_ROWS = 32  # outputs along a row at once, at most

# what a number of this type asks `_product` for
_FLOATS, _PAIRS, _TILES = np.float32(0), np.uint16(0), np.uint8(0)


class _BFloat(ir.Type):
    """LLVM's bfloat, which llvmlite does not know."""

    def _to_string(self) -> str:
        return "bfloat"

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _BFloat)

    def __hash__(self) -> int:
        return hash(_BFloat)


_I8, _I32, _I64 = ir.IntType(8), ir.IntType(32), ir.IntType(64)
_FLOAT_VECTOR, _WHOLE_VECTOR = ir.VectorType(ir.FloatType(), LANES), ir.VectorType(_I32, LANES)
_POINTER = _I8.as_pointer()


def _call(builder: Any, name: str, *arguments: Any, returns: Any = None) -> Any:
    """An instruction of the processor by LLVM's name."""
    kind = ir.FunctionType(returns or ir.VoidType(), [a.type for a in arguments])
    return builder.call(cgutils.get_or_insert_function(builder.module, kind, f"llvm.x86.{name}"), arguments)


def _data(context: Any, builder: Any, signature: Any, arguments: Any, number: int) -> Any:
    """Where an array's numbers lie."""
    return context.make_array(signature.args[number])(context, builder, arguments[number]).data


def _tiles_instruction(name: str) -> Any:
    """A function of (unit, array) that is this instruction with the array where `unit` asks for tiles."""

    def typed(typing, unit, array):  # type: ignore[no-untyped-def]
        def generate(context, builder, signature, arguments):  # type: ignore[no-untyped-def]
            if unit == types.uint8:
                place = _data(context, builder, signature, arguments, 1)
                _call(builder, name, builder.bitcast(place, _POINTER))
            return context.get_dummy_value()

        return types.void(unit, array), generate

    return intrinsic(typed)


_configure, _configuration = _tiles_instruction("ldtilecfg"), _tiles_instruction("sttilecfg")


def _product_of(large: bool, groups: int) -> Any:
    """A function that computes outputs at once: many of them or few, one or two groups of LANES channels each."""

    def product(typing, unit, tables, count, at, group, scratch):  # type: ignore[no-untyped-def]
        """scratch[m * 2 LANES + c] = sum over t < count and over numbers e of ``input * weight``.

        Column t of the tables is (start, step, amount, place): inputs of output `at` + m are `amount` times as many
        numbers as come at once, from address start + step (at + m) on, weights those of channel group `group` at
        address `place`, as `compiled_layers` arranges them.
        """
        signature: Any = types.void(unit, tables, count, at, group, scratch)
        write: Any = _write_tiles if unit == types.uint8 else _write_vectors

        def generate(context, builder, sig, arguments):  # type: ignore[no-untyped-def]
            tables = builder.inttoptr(arguments[1], _I64.as_pointer())
            scratch = builder.inttoptr(arguments[5], ir.FloatType().as_pointer())
            write(builder, unit, tables, *arguments[2:5], scratch, large, groups)
            return context.get_dummy_value()

        return signature, generate

    return intrinsic(product)


def _addresses(builder: Any, tables: Any, t: Any, at: Any, group: Any, elements: int) -> tuple[Any, Any, Any, Any, Any]:
    """Of entry t of the tables: where inputs lie, step between outputs, amount, where weights lie, their bytes."""
    entries = (builder.add(t, _I64(n * _MOST_ENTRIES)) for n in range(4))
    start, step, amount, place = (builder.load(builder.gep(tables, [entry])) for entry in entries)
    source = builder.add(start, builder.mul(step, at))
    size = builder.mul(amount, _I64(elements * LANES * 4))
    return source, step, amount, builder.add(place, builder.mul(group, size)), size


def _write_tiles(
    builder: Any, _: Any, tables: Any, count: Any, at: Any, group: Any, scratch: Any, large: bool, groups: int
) -> None:
    """The product by the matrix unit: tiles 0 to 3 are sums, 4 and 5 inputs, 6 and 7 weights."""
    parts, size = range(1 + large), _I64(TILE_ELEMENTS * LANES * 4)
    sums = {(m, n): 2 * m + n for m in parts for n in range(groups)}

    def pointer(address):  # type: ignore[no-untyped-def]
        return builder.inttoptr(address, _POINTER)

    for tile in sums.values():
        _call(builder, "tilezero", _I8(tile))
    with cgutils.for_range(builder, count) as rows:
        source, step, amount, place, second = _addresses(builder, tables, rows.index, at, group, TILE_ELEMENTS)
        further = builder.mul(step, _I64(_TILE_ROWS))
        with cgutils.for_range(builder, amount) as pieces:
            here = builder.add(source, builder.mul(pieces.index, _I64(TILE_ELEMENTS * 4)))
            weights = builder.add(place, builder.mul(pieces.index, size))
            for n in range(groups):
                _call(builder, "tileloadd64", _I8(6 + n), pointer(weights), _I64(LANES * 4))
                weights = builder.add(weights, second)
            for m in parts:
                _call(builder, "tileloadd64", _I8(4 + m), pointer(here), step)
                here = builder.add(here, further)
                for n in range(groups):
                    _call(builder, "tdpbf16ps", _I8(sums[m, n]), _I8(4 + m), _I8(6 + n))
    for (m, n), tile in sums.items():
        place = builder.gep(scratch, [_I64(m * _TILE_ROWS * 2 * LANES + n * LANES)])
        _call(builder, "tilestored64", _I8(tile), builder.bitcast(place, _POINTER), _I64(2 * LANES * 4))


def _rows_of_vectors(large: bool, groups: int) -> int:
    """How many outputs fit into the registers."""
    return (8 if LANES == 16 or groups == 1 else 4) if large else 1


def _add_product(builder: Any, unit: Any, total: Any, a: Any, b: Any) -> Any:
    """Total + a b for vectors of float32, or of pairs of bfloat16 whose products are added."""
    if unit != types.uint16:
        return builder.fadd(builder.fmul(a, b, flags=("contract",)), total, flags=("contract",))
    halves = ir.VectorType(_BFloat(), 2 * LANES)
    name = f"avx512bf16.dpbf16ps.{32 * LANES}"
    return _call(builder, name, total, builder.bitcast(a, halves), builder.bitcast(b, halves), returns=total.type)


def _write_vectors(
    builder: Any, unit: Any, tables: Any, count: Any, at: Any, group: Any, scratch: Any, large: bool, groups: int
) -> None:
    """The product by vectors, one for each output and group, four elements of inputs a round."""
    rows, unrolled = _rows_of_vectors(large, groups), 4
    element, vector = (_I32, _WHOLE_VECTOR) if unit == types.uint16 else (ir.FloatType(), _FLOAT_VECTOR)
    zeros = ir.Constant(_WHOLE_VECTOR, [0] * LANES)

    def load(address, kind):  # type: ignore[no-untyped-def]
        found = builder.load(builder.inttoptr(address, kind.as_pointer()))
        found.align = 4
        return found

    def everywhere(value):  # type: ignore[no-untyped-def]
        one = builder.insert_element(ir.Constant(vector, ir.Undefined), value, _I32(0))
        return builder.shuffle_vector(one, ir.Constant(vector, ir.Undefined), zeros)

    sums = [[cgutils.alloca_once(builder, _FLOAT_VECTOR) for _ in range(groups)] for _ in range(rows)]
    for total in (total for row in sums for total in row):
        builder.store(ir.Constant(_FLOAT_VECTOR, [0.0] * LANES), total)
    with cgutils.for_range(builder, count) as entries:
        source, step, amount, place, second = _addresses(builder, tables, entries.index, at, group, VECTOR_ELEMENTS)
        with cgutils.for_range(builder, builder.mul(amount, _I64(VECTOR_ELEMENTS // unrolled))) as pieces:
            here = builder.add(source, builder.mul(pieces.index, _I64(unrolled * 4)))
            weights = builder.add(place, builder.mul(pieces.index, _I64(unrolled * LANES * 4)))
            for e in range(unrolled):
                first = builder.add(weights, _I64(e * LANES * 4))
                factors = [load(first, vector), load(builder.add(first, second), vector)][:groups]
                row = builder.add(here, _I64(4 * e))
                for m in range(rows):
                    value = everywhere(load(row, element))
                    row = builder.add(row, step)
                    for n in range(groups):
                        total = _add_product(builder, unit, builder.load(sums[m][n]), value, factors[n])
                        builder.store(total, sums[m][n])
    for m, row in enumerate(sums):
        for n, total in enumerate(row):
            place = builder.gep(scratch, [_I64(m * 2 * LANES + n * LANES)])
            builder.store(builder.load(total), builder.bitcast(place, _FLOAT_VECTOR.as_pointer())).align = 4


_large_one, _large_two, _small_one, _small_two = (_product_of(big, n) for big in (True, False) for n in (1, 2))


def _dots_of(many: bool) -> Any:
    """A function that computes three outputs of several places, or of one, with inputs in the lanes of vectors."""

    def dots(typing, unit, tables, count, at, bias, out, place, plane):  # type: ignore[no-untyped-def]
        """out[place + n * plane + m] = bias[n] + sum over t < count and over numbers e of ``input * weight``.

        Tables as in `_product_of`, by vectors: inputs are `amount` times 4 LANES bytes, their weights for n < 3 lie at
        `place`, such a vector for each n in turn.
        """
        signature: Any = types.void(unit, tables, count, at, bias, out, place, plane)

        def generate(context, builder, sig, arguments):  # type: ignore[no-untyped-def]
            tables, bias, out = (_data(context, builder, sig, arguments, n) for n in (1, 4, 5))
            _, _, count, at, _, _, place, plane = arguments
            _write_dots(builder, unit, tables, count, at, bias, out, place, plane, places_of_dots(many))
            return context.get_dummy_value()

        return signature, generate

    return intrinsic(dots)


def places_of_dots(many: bool) -> int:
    """Of how many places `_dots_of` computes outputs at once."""
    return (8 if LANES == 16 else 4) if many else 1


def _write_dots(
    builder: Any, unit: Any, tables: Any, count: Any, at: Any, bias: Any, out: Any, place: Any, plane: Any, rows: int
) -> None:
    """The instructions of `_dots_of`."""
    vector = _WHOLE_VECTOR if unit == types.uint16 else _FLOAT_VECTOR

    def load(address):  # type: ignore[no-untyped-def]
        found = builder.load(builder.inttoptr(address, vector.as_pointer()))
        found.align = 4
        return found

    sums = [[cgutils.alloca_once(builder, _FLOAT_VECTOR) for _ in range(3)] for _ in range(rows)]
    for total in (total for row in sums for total in row):
        builder.store(ir.Constant(_FLOAT_VECTOR, [0.0] * LANES), total)
    with cgutils.for_range(builder, count) as entries:
        source, step, amount, weights, _ = _addresses(builder, tables, entries.index, at, _I64(0), LANES)
        with cgutils.for_range(builder, amount) as pieces:
            row = builder.add(source, builder.mul(pieces.index, _I64(LANES * 4)))
            first = builder.add(weights, builder.mul(pieces.index, _I64(3 * LANES * 4)))
            factors = [load(builder.add(first, _I64(n * LANES * 4))) for n in range(3)]
            for row_sums in sums:
                value = load(row)
                row = builder.add(row, step)
                for total, factor in zip(row_sums, factors, strict=True):
                    builder.store(_add_product(builder, unit, builder.load(total), value, factor), total)
    for n in range(3):
        totals = _sums_of(builder, [builder.load(row_sums[n]) for row_sums in sums])
        start = builder.load(builder.gep(bias, [_I64(n)]))
        starts = builder.insert_element(ir.Constant(totals.type, ir.Undefined), start, _I32(0))
        starts = _chosen(builder, starts, starts, [0] * rows)
        here = builder.gep(out, [builder.add(place, builder.mul(plane, _I64(n)))])
        builder.store(builder.fadd(totals, starts), builder.bitcast(here, totals.type.as_pointer())).align = 4


def _chosen(builder: Any, first: Any, second: Any, numbers: list[int]) -> Any:
    """These numbers of two vectors, those of the second one counted on."""
    return builder.shuffle_vector(first, second, ir.Constant(ir.VectorType(_I32, len(numbers)), numbers))


def _sums_of(builder: Any, vectors: list[Any]) -> Any:
    """The sum of each of some vectors, of LANES numbers all, as a vector; how many there are is a power of two.

    Two vectors are put together by halves and added, so that each holds the sums of two, and so on.
    """
    count, parts = len(vectors), 1
    while parts < count or vectors[0].type.count > count:
        pairs = [vectors, vectors] if parts == count else [vectors[::2], vectors[1::2]]
        total = vectors[0].type.count
        half = total // parts // 2
        numbers = [k for k in range(total if parts == count else 2 * total) if k // half % 2 == 0]
        others = [k + half for k in numbers]
        vectors = [
            builder.fadd(_chosen(builder, a, b, numbers), _chosen(builder, a, b, others), flags=("reassoc",))
            for a, b in zip(*pairs, strict=True)
        ]
        parts = min(2 * parts, count)
    return vectors[0]


_many_dots, _one_dots = _dots_of(True), _dots_of(False)


def _settle_of(length: int) -> Any:
    """A function that keeps so many channels of an output."""

    def settle(typing, scratch, place, bias, channel, out, target):  # type: ignore[no-untyped-def]
        """out[target + c] = scratch[place + c] + bias[channel + c], or 0 where that is negative.

        As bfloat16 if `out` holds whole numbers.
        """

        def generate(context, builder, signature, arguments):  # type: ignore[no-untyped-def]
            vector = ir.VectorType(ir.FloatType(), length)

            def load(number, at):  # type: ignore[no-untyped-def]
                place = builder.gep(_data(context, builder, signature, arguments, number), [at])
                found = builder.load(builder.bitcast(place, vector.as_pointer()))
                found.align = 4
                return found

            value = builder.fadd(load(0, arguments[1]), load(2, arguments[3]))
            zeros = ir.Constant(vector, [0.0] * length)
            value = builder.select(builder.fcmp_ordered("<", value, zeros), zeros, value)
            halved = isinstance(signature.args[4].dtype, types.Integer)
            if halved:
                value = _as_bfloat16(builder, value)
            place = builder.gep(_data(context, builder, signature, arguments, 4), [arguments[5]])
            builder.store(value, builder.bitcast(place, value.type.as_pointer())).align = 2 if halved else 4
            return context.get_dummy_value()

        return types.void(scratch, place, bias, channel, out, target), generate

    return intrinsic(settle)


def _as_bfloat16(builder: Any, values: Any) -> Any:
    """A vector of float32 rounded to bfloat16, to the nearest, ties to even; their bits as whole numbers."""
    count = values.type.count
    return builder.bitcast(
        builder.fptrunc(values, ir.VectorType(_BFloat(), count)), ir.VectorType(ir.IntType(16), count)
    )


_settle, _settle_eight = _settle_of(LANES), _settle_of(8)


@compiling.inline
def _list_rows(plan, k, j, piece, tables):  # type: ignore[no-untyped-def]
    """Fill the tables of `_product` with the rows of inputs of output row (k, j); returns their number.

    Rows beyond an input's ends, which would be zeros, are left out. `piece` of the weights counts.
    """
    count = 0
    for s in range(len(plan)):
        address, depth, height, row, step, scale_z, scale_y, first, kernel_z, kernel_y, amount, weights, size = plan[s]
        for dz in range(kernel_z):
            z = scale_z * k + first + dz
            for dy in range(kernel_y):
                y = scale_y * j + first + dy
                if 0 <= z < depth and 0 <= y < height:
                    tables[0, count] = address + (z * height + y) * row
                    tables[1, count], tables[2, count] = step, amount
                    tables[3, count] = weights + ((piece * kernel_z + dz) * kernel_y + dy) * size
                    count += 1
    return count


@compiling.inline
def _outputs_from(at, width, large, small):  # type: ignore[no-untyped-def]
    """(first, how many) of the outputs of a row that are computed next when those before `at` are done.

    The last ones of a row overlap others, so that no input beyond a row is read.
    """
    if width - at > small and width >= large:
        return min(at, width - large), large
    return min(at, width - small), small


@compiling.loop
def _multiply(unit, tables, count, at, many, group, two, scratch):  # type: ignore[no-untyped-def]
    """The right one of the products; `tables` and `scratch` are where these lie."""
    if many and two:
        _large_two(unit, tables, count, at, group, scratch)
    elif many:
        _large_one(unit, tables, count, at, group, scratch)
    elif two:
        _small_two(unit, tables, count, at, group, scratch)
    else:
        _small_one(unit, tables, count, at, group, scratch)


def _two_numbers(typing, source, at, bias, channel, out, place):  # type: ignore[no-untyped-def]
    """out[place + p] = source[at + p] + bias[channel + p] for p < 2."""

    def generate(context, builder, signature, arguments):  # type: ignore[no-untyped-def]
        vector = ir.VectorType(ir.FloatType(), 2)

        def pointer(number, at):  # type: ignore[no-untyped-def]
            place = builder.gep(_data(context, builder, signature, arguments, number), [at])
            return builder.bitcast(place, vector.as_pointer())

        parts = [builder.load(pointer(n, arguments[n + 1])) for n in (0, 2)]
        for part in parts:
            part.align = 4
        builder.store(builder.fadd(*parts), pointer(4, arguments[5])).align = 4
        return context.get_dummy_value()

    return types.void(source, at, bias, channel, out, place), generate


_put_two: Any = intrinsic(_two_numbers)


def _pointer_to(number: Any) -> Any:
    """A function of (unit, address): where numbers lie, float32, or if `number` is None what `unit` stands for."""

    def pointer(typing, unit, address):  # type: ignore[no-untyped-def]
        kind = number or (types.float32 if unit == types.float32 else types.uint16)

        def generate(context, builder, signature, arguments):  # type: ignore[no-untyped-def]
            return builder.inttoptr(arguments[1], context.get_value_type(signature.return_type))

        return types.CPointer(kind)(unit, address), generate

    return intrinsic(pointer)


_floats, _results = _pointer_to(types.float32), _pointer_to(None)


# a step, a row of the first table of `run`: what it computes, of how many rows, from where in the table of inputs on,
# how many inputs, where the result and the bias lie, numbers at once (see `means`), and what the loops say
STEP = 17
KIND, ROWS, FIRST, INPUTS, OUT, BIAS, SIZES, SHAPE = 0, 1, 2, 3, 4, 5, 6, 9
FEATURES, FEATURES_BY_PARITY, FEATURES_ABOUT_GAPS, OUTSIDE, FIELD, FIELD_BY_VOXEL = range(6)


@compiling.inline
def _array(pointer, length):  # type: ignore[no-untyped-def]
    return carray(pointer, (length,))


@compiling.loop
def _features(unit, step, plan, tables, scratch, parities, begin, end):  # type: ignore[no-untyped-def]
    """Rows begin ... end of a layer's features; with parities, all rows of a slice about gaps begin ... end.

    Args:
        unit: as `unit_of` returns it.
        step: see STEP; `shape` is (depth, height, outputs along a row, zeros at either end of it, channels, groups of
            LANES channels; with parities those of even voxels of even rows, of odd rows, then of odd voxels).
        plan: of each input what `compiled_layers._Input.plan` returns.
        tables, scratch: room.
        parities: whether an output's parities say which of the weights count, and of which gap it is.
    """
    depth, height, width = step[SHAPE], step[SHAPE + 1], step[SHAPE + 2]
    edge, channels, groups = step[SHAPE + 3], step[SHAPE + 4], step[SHAPE + 5]
    stride = 2 if parities else 1
    length = width * channels + 2 * edge
    out = _array(_results(unit, step[OUT]), depth * height * length + BEHIND)
    own, count_x, count_y = groups // (stride * stride), width // stride, height // stride + parities
    bias = _array(_floats(unit, step[BIAS]), own * LANES)
    for row in range(begin, end):
        k, j = row // count_y, row % count_y
        count = _list_rows(plan, (k + 1) // 2, j, k % 2, tables) if parities else _list_rows(plan, k, j, 0, tables)
        group = 0
        while group < groups:
            two = group % (stride * own) + 1 < stride * own
            px = group // (stride * own)
            large = step[SIZES + 1] if two else step[SIZES]
            done = 0
            while done < count_x:
                at, rows = _outputs_from(done, count_x, large, step[SIZES + 2])
                _multiply(unit, tables.ctypes.data, count, at + px, rows == large, group, two, scratch.ctypes.data)
                for g in range(2 if two else 1):
                    y = stride * j - (group + g) // own % stride
                    if not 0 <= y < height:
                        continue
                    channel = (group + g) % own * LANES
                    place = (k * height + y) * length + edge + (at * stride + px) * channels + channel
                    if channels - channel < LANES:
                        for r in range(rows):
                            source = r * 2 * LANES + g * LANES
                            _settle_eight(scratch, source, bias, channel, out, place + r * stride * channels)
                    else:
                        for r in range(rows):
                            source = r * 2 * LANES + g * LANES
                            _settle(scratch, source, bias, channel, out, place + r * stride * channels)
                done = at + rows
            group += 2 if two else 1
        for y in range(max(stride * j - stride + 1, 0), min(stride * j + 1, height)):
            first = (k * height + y) * length
            last = first + length - edge
            for c in range(edge):
                out[first + c] = out[last + c] = 0
    if end == step[ROWS]:
        for c in range(BEHIND):
            out[depth * height * length + c] = 0


@compiling.loop
def _features_about_gaps(unit, step, plan, tables, scratch, begin, end):  # type: ignore[no-untyped-def]
    """Features of a transposed convolution to few channels, for rows of gaps begin ... end.

    About gap i of an axis lie the voxels 2 i (parity 0) and 2 i - 1 (parity 1). Those of a row are put at once:
    channels are by parity of z, of y, then the voxels in their order. `shape` is (depth, height, width, channels) of
    the result, the rest as in `_features`.
    """
    depth, height, width, channels = step[SHAPE], step[SHAPE + 1], step[SHAPE + 2], step[SHAPE + 3]
    count_x, count_y, pair, length = width // 2 + 1, height // 2 + 1, 2 * channels, (width + 2) * channels
    groups, large = 4 * pair // LANES, step[SIZES + 1]
    out = _array(_results(unit, step[OUT]), depth * height * length + BEHIND)
    bias = _array(_floats(unit, step[BIAS]), groups * LANES)
    for row in range(begin, end):
        k, j = row // count_y, row % count_y
        count = _list_rows(plan, k, j, 0, tables)
        for group in range(0, groups, 2):
            done = 0
            while done < count_x:
                at, rows = _outputs_from(done, count_x, large, step[SIZES + 2])
                _multiply(unit, tables.ctypes.data, count, at, rows == large, group, True, scratch.ctypes.data)
                for part in range(0, 2 * LANES, pair):
                    channel = group * LANES + part
                    z, y = 2 * k - channel // pair // 2, 2 * j - channel // pair % 2
                    if not (0 <= z < depth and 0 <= y < height):
                        continue
                    place = (z * height + y) * length + at * pair
                    for r in range(rows):
                        source, target = r * 2 * LANES + part, place + r * pair
                        if pair == LANES:
                            _settle(scratch, source, bias, channel, out, target)
                        else:
                            _settle_eight(scratch, source, bias, channel, out, target)
                done = at + rows
        for z in range(max(2 * k - 1, 0), min(2 * k + 1, depth)):
            for y in range(max(2 * j - 1, 0), min(2 * j + 1, height)):
                first = (z * height + y) * length
                for c in range(channels):  # what the first and the last gap put beyond the row
                    out[first + c] = out[first + length - channels + c] = 0
    if end == step[ROWS]:
        for c in range(BEHIND):
            out[depth * height * length + c] = 0


@compiling.loop
def _clear_outside(unit, step, begin, end):  # type: ignore[no-untyped-def]
    """Set to zero what of gaps lies outside of the result, for rows begin ... end; `shape` is that of gaps."""
    depth, height, width, channels = step[SHAPE], step[SHAPE + 1], step[SHAPE + 2], step[SHAPE + 3]
    out = _array(_results(unit, step[OUT]), depth * height * width * channels)
    part = channels // 8
    for row in range(begin, end):
        k, j = row // height, row % height
        for parity in range(8):
            outside = k == (0 if parity & 4 else depth - 1) or j == (0 if parity & 2 else height - 1)
            first, last = (0, 1) if parity & 1 else (width - 1, width)
            if outside:
                first, last = 0, width
            for i in range(first, last):
                place = (row * width + i) * channels + parity * part
                for c in range(part):
                    out[place + c] = 0


@compiling.loop
def _field(unit, step, plan, tables, scratch, begin, end):  # type: ignore[no-untyped-def]
    """A displacement (3, D, H, W), for rows begin ... end of blocks of 2x2x2 or 1x2x2.

    Along z and y the voxel of a block at a parity is 2 k + sign * parity; along x the first one of a block is voxel
    2 i where `sign` is 1, and 2 i - 1 where it is -1. Channel 6 (2 pz + py) + 2 c + p is component c at these parities
    of the p-th of the two. `shape` is (D, H, W, height and width of the blocks, sign, number of channels: 24, or 12
    where blocks are of one slice); the rest as in `_features`.
    """
    full_depth, full_height, full_width = step[SHAPE], step[SHAPE + 1], step[SHAPE + 2]
    height, width, sign, channels = step[SHAPE + 3], step[SHAPE + 4], step[SHAPE + 5], step[SHAPE + 6]
    groups = -(-channels // LANES)
    out = _array(_floats(unit, step[OUT]), 3 * full_depth * full_height * full_width)
    bias = _array(_floats(unit, step[BIAS]), groups * LANES)
    for row in range(begin, end):
        k, j = row // height, row % height
        count = _list_rows(plan, k, j, 0, tables)
        group = 0
        while group < groups:
            two = group + 1 < groups
            large = step[SIZES + 1] if two else step[SIZES]
            done = 0
            while done < width:
                at, rows = _outputs_from(done, width, large, step[SIZES + 2])
                _multiply(unit, tables.ctypes.data, count, at, rows == large, group, two, scratch.ctypes.data)
                for channel in range(group * LANES, min((group + 2 if two else group + 1) * LANES, channels), 2):
                    line, component = channel // 6, channel // 2 % 3
                    z, y = channels // 12 * k + sign * (line // 2), 2 * j + sign * (line % 2)
                    if not (0 <= z < full_depth and 0 <= y < full_height):
                        continue
                    place = ((component * full_depth + z) * full_height + y) * full_width + 2 * at
                    source = channel - group * LANES
                    if sign > 0:
                        for r in range(rows):
                            _put_two(scratch, r * 2 * LANES + source, bias, channel, out, place + 2 * r)
                        continue
                    first, last = 1 if at == 0 else 0, rows - 1 if at + rows == width else rows
                    if first:
                        out[place] = scratch[source + 1] + bias[channel + 1]
                    for r in range(first, last):
                        _put_two(scratch, r * 2 * LANES + source, bias, channel, out, place + 2 * r - 1)
                    if last < rows:
                        out[place + 2 * last - 1] = scratch[last * 2 * LANES + source] + bias[channel]
                done = at + rows
            group += 2 if two else 1


@compiling.loop
def _field_by_voxel(unit, step, plan, tables, begin, end):  # type: ignore[no-untyped-def]
    """The same voxel by voxel, for rows begin ... end; `shape` is (D, H, W)."""
    depth, height, width, many = step[SHAPE], step[SHAPE + 1], step[SHAPE + 2], step[SIZES]
    plane = depth * height * width
    out, bias = _array(_floats(unit, step[OUT]), 3 * plane), _array(_floats(unit, step[BIAS]), 3)
    for row in range(begin, end):
        k, j = row // height, row % height
        count = _list_rows(plan, k, j, 0, tables)
        done = 0
        while done < width:
            at, rows = _outputs_from(done, width, many, 1)
            if rows == many:
                _many_dots(unit, tables, count, at, bias, out, row * width + at, plane)
            else:
                _one_dots(unit, tables, count, at, bias, out, row * width + at, plane)
            done = at + rows


@compiling.loop
def run(unit, steps, plan, tiles, shared, own):  # type: ignore[no-untyped-def]
    """Compute the steps of a program, one after the other, together with other threads that are given the same.

    The rows of a step are shared out in as many ranges as there are threads. A thread computes its own range first,
    since what it reads of the step before it has mostly put itself, then what is left of others'. None begins a step
    before the last row of the step before is done, and none waits for a thread that has not begun.

    Args:
        unit: as `unit_of` returns it.
        steps: (n, STEP).
        plan: the same of all inputs of all steps.
        tiles: (n, 64), as `means` returns it.
        shared: see `turns.take_turns`.
        own: number of this thread.

    Returns:
        Whether all is done; if not, others take long, and this is to be called again.
    """
    saved = np.zeros(64, np.uint8)
    _configuration(unit, saved)
    tables = np.empty((4, _MOST_ENTRIES), np.int64)
    scratch = np.empty(_MOST_ROWS * 2 * LANES, np.float32)
    finished = True
    for s in range(len(steps)):
        step = steps[s]
        if turns.is_done(shared, s, step[ROWS]):
            continue
        _configure(unit, tiles[s])
        inputs = plan[step[FIRST] : step[FIRST] + step[INPUTS]]
        while True:
            begin, end = turns.next_piece(shared, s, step[ROWS], own)
            if begin == end:
                break
            if step[KIND] == FEATURES or step[KIND] == FEATURES_BY_PARITY:
                by_parity = step[KIND] == FEATURES_BY_PARITY
                _features(unit, step, inputs, tables, scratch, by_parity, begin, end)
            elif step[KIND] == FEATURES_ABOUT_GAPS:
                _features_about_gaps(unit, step, inputs, tables, scratch, begin, end)
            elif step[KIND] == OUTSIDE:
                _clear_outside(unit, step, begin, end)
            elif step[KIND] == FIELD:
                _field(unit, step, inputs, tables, scratch, begin, end)
            else:
                _field_by_voxel(unit, step, inputs, tables, begin, end)
            turns.finish(shared, s, end - begin)
        if not turns.wait(shared, s, step[ROWS]):
            finished = False
            break
    _configure(unit, saved)
    return finished


@functools.lru_cache(maxsize=1)
def has_tiles() -> bool:
    """Whether this process may use the matrix unit for bfloat16; asks the system for it."""
    if LANES != 16 or not (compiling.has("amx-tile") and compiling.has("amx-bf16")):
        return False
    start = getattr(torch.cpu, "_init_amx", None)
    return bool(start and start())


def takes(precision: torch.dtype) -> bool:
    """Whether layers compute in this precision here, bfloat16 as fast as the processor can."""
    if precision == torch.bfloat16:
        return has_tiles() or (LANES == 16 and compiling.has("avx512bf16"))
    return USABLE and precision == torch.float32


def unit_of(precision: torch.dtype) -> Any:
    """What `_product` is asked for."""
    if precision == torch.float32:
        return _FLOATS
    return _TILES if has_tiles() else _PAIRS


def means(precision: torch.dtype, width: int) -> tuple[np.ndarray, tuple[int, int, int]]:
    """What the matrix unit is told for rows of so many outputs, and numbers of outputs at once.

    The latter are: many with one group of channels, many with two, few.
    """
    tiles = np.zeros(64, np.uint8)
    if unit_of(precision) is _TILES:
        rows = min(_TILE_ROWS, width)
        tiles[0] = 1  # the kind of configuration
        tiles[16:32:2] = 64  # bytes of a row, for each of eight tiles
        tiles[48:56] = [rows] * 6 + [TILE_ELEMENTS] * 2
        return tiles, (2 * rows, 2 * rows, rows)
    return tiles, (_rows_of_vectors(True, 1), _rows_of_vectors(True, 2), 1)
