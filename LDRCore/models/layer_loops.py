"""The loops of `compiled_layers`: how the sums of a layer are computed, and where they are put.

Every layer, arranged as `compiled_layers` says, is the same sum: for each output along a row, over some rows of its
inputs, over neighbouring numbers of such a row. `_product_of` computes it, with the processor's matrix unit (AMX) for
bfloat16, with its vectors for float32 and, where there is no matrix unit, for pairs of bfloat16; with vectors
`_dots_of` does it for three outputs. Which rows is told by tables of addresses, so nothing here may outlive the tensors
of a call. While rows are computed, what the next ones write is fetched, and where it pays what they read.
The matrix unit is so fast that everything else has to go on beside it. It takes two rows of outputs at once where
weights would have to be fetched again for the second one, and the sums of a product wait (`_WAITING`) until the next
product is computed: some of them are put after each of its entries.
`run` goes through the layers of a network. The matrix unit is left as it was found. Importing this file imports numba.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

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
_MOST_ROWS = 2  # of outputs at once, at most
_LONGEST = 32  # outputs along a row at once, at most
_LINE = 64  # bytes that memory is fetched by
_MOST_LINES = 2  # that are fetched with an entry's vectors
_FIRST_CACHE = 48 << 10  # bytes
_NOWHERE = 0  # an address that nothing lies at
_MOST_LOOKED_AHEAD = 4  # entries of a product by the matrix unit that fetches

# an entry of the tables: see `_product_of`, and by how much the starts of rows differ from those of the rows before
_STEP, _AMOUNT, _WEIGHTS, _FETCH, _ON, _STARTS = range(6)
_ENTRY = _STARTS + _MOST_ROWS

# sums of the matrix unit that wait to be put: number of records, how many vectors or squares these are in all, bytes
# from output to output, or 0 where they are of a field, and bytes to what is put next; then records, see `_note`, and
# room for the places of a field's squares, of the rows before as well
_RECORDS, _AMOUNT_WAITING, _BYTES_ON, _LATER, _FIRST_RECORD = range(5)
_RECORD = 5  # numbers
_MOST_RECORDS = 4 * _LONGEST // LANES  # squares of all outputs of a product
_PLACES = _FIRST_RECORD + _MOST_RECORDS * _RECORD
_SOME_PLACES = 4 * LANES // 2  # of all rows and groups of a turn
_WAITING = _PLACES + 2 * _SOME_PLACES

_int = np.int64  # of a number written down, for which a function would else be compiled once more
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


def _load(builder: Any, place: Any, kind: Any) -> Any:
    """What lies at a pointer, numbers of 4 bytes that need not begin at a multiple of more."""
    found = builder.load(builder.bitcast(place, kind.as_pointer()))
    found.align = 4
    return found


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


def _product_of(rows: int, many: bool, groups: int) -> Any:
    """A function that computes outputs at once: many or few of each of some rows, one or two groups of channels."""

    def product(typing, unit, tables, count, at, few, group, fetched, scratch, waiting):  # type: ignore[no-untyped-def]
        """scratch[r, m, c] = sum over t < count and over numbers e of ``input * weight``, of shape (rows, 32, 2 LANES).

        Entry t of the tables is (step, amount, weights, fetch, -, start of each row): inputs of output `at` + m of row
        r are `amount` times as many numbers as come at once, from address start + step (at + m) on, weights those of
        channel group `group` at address `weights`, as `compiled_layers` arranges them; a group is LANES channels.

        For tiles, `few` is how many outputs of a row one has, and what waits is put before scratch changes. From
        address `fetch` on, which moves on, `fetched` lines are fetched that will be read later.
        """
        signature: Any = types.void(unit, tables, count, at, few, group, fetched, scratch, waiting)

        def generate(context, builder, sig, arguments):  # type: ignore[no-untyped-def]
            _, tables, count, at, few, group, fetched, scratch, waiting = arguments
            tables, waiting = (builder.inttoptr(address, _I64.as_pointer()) for address in (tables, waiting))
            scratch = builder.inttoptr(scratch, ir.FloatType().as_pointer())
            if unit == types.uint8:
                sizes = rows, many, groups
                _write_tiles(builder, tables, count, at, few, group, fetched, scratch, waiting, *sizes)
            elif rows == 1:  # vectors take no more, see `means`
                _write_vectors(builder, unit, tables, count, at, group, fetched, scratch, many, groups)
            return context.get_dummy_value()

        return signature, generate

    return intrinsic(product)


def _addresses(builder: Any, tables: Any, t: Any, at: Any, group: Any, elements: int, rows: int = 1) -> tuple[Any, ...]:
    """Of entry t: step between outputs, amount, where weights lie, bytes of a group's, where inputs of each row lie."""

    def number(n: int) -> Any:
        return builder.load(_number_of(builder, tables, t, n))

    step, amount = number(_STEP), number(_AMOUNT)
    size = builder.mul(amount, _I64(elements * LANES * 4))
    weights = builder.add(number(_WEIGHTS), builder.mul(group, size))
    along = builder.mul(step, at)
    return step, amount, weights, size, [builder.add(number(_STARTS + row), along) for row in range(rows)]


def _number_of(builder: Any, tables: Any, t: Any, n: int) -> Any:
    """Where a number of entry t lies."""
    return builder.gep(tables, [builder.add(builder.mul(t, _I64(_ENTRY)), _I64(n))])


def _fetch(builder: Any, place: Any, write: bool) -> None:
    """Tell the processor that the line at a pointer will be read, or written."""
    kind = ir.FunctionType(ir.VoidType(), [_POINTER, _I32, _I32, _I32])
    function = cgutils.get_or_insert_function(builder.module, kind, "llvm.prefetch.p0i8")
    builder.call(function, [builder.bitcast(place, _POINTER), _I32(int(write)), _I32(3), _I32(1)])


def _fetch_lines(builder: Any, start: Any, lines: Any) -> None:
    """Tell the processor that so many lines from an address on will be read."""
    with cgutils.for_range(builder, lines) as numbers:
        address = builder.add(start, builder.mul(numbers.index, _I64(_LINE)))
        _fetch(builder, builder.inttoptr(address, _POINTER), False)


def _fetch_some(builder: Any, tables: Any, t: Any, lines: Any) -> None:
    """Fetch so many lines from where entry t says, and have it say what lies behind them."""
    place = _number_of(builder, tables, t, _FETCH)
    start = builder.load(place)
    _fetch_lines(builder, start, lines)
    builder.store(builder.add(start, builder.mul(lines, _I64(_LINE))), place)


@contextlib.contextmanager
def _while(builder: Any, condition: Callable[[], Any]) -> Iterator[None]:
    """What is written inside is repeated as long as a condition holds, which is asked before."""
    ask, inside, behind = (builder.append_basic_block(f"while.{name}") for name in ("ask", "inside", "behind"))
    builder.branch(ask)
    builder.position_at_end(ask)
    builder.cbranch(condition(), inside, behind)
    builder.position_at_end(inside)
    yield
    builder.branch(ask)
    builder.position_at_end(behind)


class _Waiting:
    """Instructions that put sums that wait, some at a time; between them it is kept in registers where they are."""

    def __init__(self, builder: Any, waiting: Any) -> None:
        self._builder, self._waiting = builder, waiting
        self._step, self._later = self._number(_I64(_BYTES_ON)), self._number(_I64(_LATER))
        self._records = cgutils.alloca_once_value(builder, self._number(_I64(_RECORDS)))
        self._next = cgutils.alloca_once_value(builder, _I64(_FIRST_RECORD))
        # of the record that is being put: outputs that are left, where the next one's sums lie and where it belongs
        self._left, self._source, self._target = (cgutils.alloca_once_value(builder, _I64(0)) for _ in range(3))
        self._bias = cgutils.alloca_once(builder, _FLOAT_VECTOR)
        self._mask = cgutils.alloca_once(builder, _I64)

    def _number(self, n: Any) -> Any:
        return self._builder.load(self._builder.gep(self._waiting, [n]))

    def shared_by(self, count: Any) -> Any:
        """How many vectors or squares are to be put each time, that all are put after so many times."""
        amount = self._builder.add(self._number(_I64(_AMOUNT_WAITING)), self._builder.sub(count, _I64(1)))
        return self._builder.sdiv(amount, count)

    def some(self, number: Any) -> None:
        """Put so many vectors or squares, or what is left."""
        builder = self._builder
        with builder.if_else(builder.icmp_signed("==", self._step, _I64(0))) as (of_a_field, of_features):
            with of_a_field:
                self._repeat(number, self._put_square)
            with of_features:
                self._repeat(number, self._put_vector)

    def _repeat(self, number: Any, put: Callable[[], None]) -> None:
        """While some of so many, and records or outputs of one, are left."""
        builder = self._builder
        rest = cgutils.alloca_once(builder, _I64)
        builder.store(number, rest)
        with _while(builder, lambda: self._goes_on(rest)):
            put()
            builder.store(builder.sub(builder.load(rest), _I64(1)), rest)

    def _goes_on(self, rest: Any) -> Any:
        builder = self._builder
        some = builder.or_(builder.load(self._records), builder.load(self._left))
        return builder.and_(*(builder.icmp_signed(">", n, _I64(0)) for n in (some, builder.load(rest))))

    def _take_record(self) -> list[Any]:
        """The numbers of the next one."""
        builder = self._builder
        place = builder.load(self._next)
        builder.store(builder.add(place, _I64(_RECORD)), self._next)
        builder.store(builder.sub(builder.load(self._records), _I64(1)), self._records)
        return [self._number(builder.add(place, _I64(n))) for n in range(_RECORD)]

    def _put_vector(self) -> None:
        builder = self._builder
        with builder.if_then(builder.icmp_signed("==", builder.load(self._left), _I64(0)), likely=False):
            source, bias, target, count, mask = self._take_record()
            rooms = self._source, self._target, self._left, self._mask
            for value, room in zip((source, target, count, mask), rooms, strict=True):
                builder.store(value, room)
            builder.store(_load(builder, builder.inttoptr(bias, _POINTER), _FLOAT_VECTOR), self._bias)
        source, target = builder.load(self._source), builder.load(self._target)
        sums = _load(builder, builder.inttoptr(source, _POINTER), _FLOAT_VECTOR)
        value = _as_bfloat16(builder, _rectified(builder, builder.fadd(sums, builder.load(self._bias))))
        there = builder.inttoptr(target, _POINTER)
        _store_some(builder, value, there, builder.load(self._mask))
        _fetch(builder, builder.gep(there, [self._later]), True)
        builder.store(builder.add(source, _I64(2 * LANES * 4)), self._source)
        builder.store(builder.add(target, self._step), self._target)
        builder.store(builder.sub(builder.load(self._left), _I64(1)), self._left)

    def _put_square(self) -> None:
        source, bias, places, first, mask = self._take_record()
        _write_square(self._builder, source, bias, places, first, mask, self._later)


def _write_tiles(
    builder: Any,
    tables: Any,
    count: Any,
    at: Any,
    few: Any,
    group: Any,
    fetched: Any,
    scratch: Any,
    waiting: Any,
    rows: int,
    many: bool,
    groups: int,
) -> None:
    """The product by the matrix unit: tiles 0 to 3 are sums, 4 and 5 inputs, 6 and 7 weights."""
    parts, size = [(row, part) for row in range(rows) for part in range(1 + many)], _I64(TILE_ELEMENTS * LANES * 4)
    sums = {(*part, n): m * groups + n for m, part in enumerate(parts) for n in range(groups)}

    def pointer(address):  # type: ignore[no-untyped-def]
        return builder.inttoptr(address, _POINTER)

    put = _Waiting(builder, waiting)
    share = put.shared_by(count)
    for tile in sums.values():
        _call(builder, "tilezero", _I8(tile))
    with cgutils.for_range(builder, count) as entries:
        found = _addresses(builder, tables, entries.index, at, group, TILE_ELEMENTS, rows)
        step, amount, first, second, starts = found
        further = builder.mul(step, few)
        _fetch_some(builder, tables, entries.index, fetched)
        with cgutils.for_range(builder, amount) as pieces:
            along = builder.mul(pieces.index, _I64(TILE_ELEMENTS * 4))
            weights = builder.add(first, builder.mul(pieces.index, size))
            for n in range(groups):
                _call(builder, "tileloadd64", _I8(6 + n), pointer(weights), _I64(LANES * 4))
                weights = builder.add(weights, second)
            for m, (row, part) in enumerate(parts):
                start = builder.add(starts[row], along)
                start = builder.add(start, further) if part else start
                _call(builder, "tileloadd64", _I8(4 + m % 2), pointer(start), step)
                for n in range(groups):
                    _call(builder, "tdpbf16ps", _I8(sums[row, part, n]), _I8(4 + m % 2), _I8(6 + n))
        put.some(share)
    for (row, part, n), tile in sums.items():
        output = builder.add(few if part else _I64(0), _I64(row * _LONGEST))
        place = builder.gep(scratch, [builder.add(builder.mul(output, _I64(2 * LANES)), _I64(n * LANES))])
        _call(builder, "tilestored64", _I8(tile), builder.bitcast(place, _POINTER), _I64(2 * LANES * 4))


def _outputs_of_vectors(many: bool, groups: int) -> int:
    """How many outputs fit into the registers."""
    return (8 if LANES == 16 or groups == 1 else 4) if many else 1


def _add_product(builder: Any, unit: Any, total: Any, a: Any, b: Any) -> Any:
    """Total + a b for vectors of float32, or of pairs of bfloat16 whose products are added."""
    if unit != types.uint16:
        return builder.fadd(builder.fmul(a, b, flags=("contract",)), total, flags=("contract",))
    halves = ir.VectorType(_BFloat(), 2 * LANES)
    name = f"avx512bf16.dpbf16ps.{32 * LANES}"
    return _call(builder, name, total, builder.bitcast(a, halves), builder.bitcast(b, halves), returns=total.type)


def _write_vectors(
    builder: Any,
    unit: Any,
    tables: Any,
    count: Any,
    at: Any,
    group: Any,
    fetched: Any,
    scratch: Any,
    many: bool,
    groups: int,
) -> None:
    """The product by vectors, one for each output and group, four elements of inputs a round."""
    rows, unrolled = _outputs_of_vectors(many, groups), 4
    element, vector = (_I32, _WHOLE_VECTOR) if unit == types.uint16 else (ir.FloatType(), _FLOAT_VECTOR)
    zeros = ir.Constant(_WHOLE_VECTOR, [0] * LANES)

    def everywhere(value):  # type: ignore[no-untyped-def]
        one = builder.insert_element(ir.Constant(vector, ir.Undefined), value, _I32(0))
        return builder.shuffle_vector(one, ir.Constant(vector, ir.Undefined), zeros)

    sums = [[cgutils.alloca_once(builder, _FLOAT_VECTOR) for _ in range(groups)] for _ in range(rows)]
    for total in (total for row in sums for total in row):
        builder.store(ir.Constant(_FLOAT_VECTOR, [0.0] * LANES), total)
    with cgutils.for_range(builder, count) as entries:
        found = _addresses(builder, tables, entries.index, at, group, VECTOR_ELEMENTS)
        step, amount, place, second, (source,) = found
        _fetch_some(builder, tables, entries.index, fetched)
        # distances that stay, so that no address has to be computed from the one before
        further = [builder.mul(step, _I64(m)) for m in range(rows)]
        place, source = (builder.inttoptr(address, _POINTER) for address in (place, source))
        with cgutils.for_range(builder, builder.mul(amount, _I64(VECTOR_ELEMENTS // unrolled))) as pieces:
            here = builder.gep(source, [builder.mul(pieces.index, _I64(unrolled * 4))])
            weights = builder.gep(place, [builder.mul(pieces.index, _I64(unrolled * LANES * 4))])
            starts = [builder.gep(here, [distance]) for distance in further]
            parts = [weights, builder.gep(weights, [second])][:groups]
            for e in range(unrolled):
                factors = [_load(builder, builder.gep(w, [_I64(e * LANES * 4)]), vector) for w in parts]
                for m in range(rows):
                    value = everywhere(_load(builder, builder.gep(starts[m], [_I64(4 * e)]), element))
                    for n in range(groups):
                        total = _add_product(builder, unit, builder.load(sums[m][n]), value, factors[n])
                        builder.store(total, sums[m][n])
    for m, row in enumerate(sums):
        for n, total in enumerate(row):
            place = builder.gep(scratch, [_I64(m * 2 * LANES + n * LANES)])
            builder.store(builder.load(total), builder.bitcast(place, _FLOAT_VECTOR.as_pointer())).align = 4


_many_two, _few_two, _many_one, _few_one = (_product_of(1, many, n) for n in (2, 1) for many in (True, False))
_two_rows_many_one, _two_rows_few_one = _product_of(2, True, 1), _product_of(2, False, 1)
_two_rows_few_two = _product_of(2, False, 2)


def _dots_of(many: bool) -> Any:
    """A function that computes three outputs of several places, or of one, with inputs in the lanes of vectors."""

    def dots(typing, unit, tables, count, at, bias, out, place, plane):  # type: ignore[no-untyped-def]
        """out[place + n * plane + m] = bias[n] + sum over t < count and over numbers e of ``input * weight``.

        Tables as in `_product_of`, by vectors: inputs are `amount` times 4 LANES bytes, their weights for n < 3 lie at
        `weights`, such a vector for each n in turn.
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
        return _load(builder, builder.inttoptr(address, _POINTER), vector)

    sums = [[cgutils.alloca_once(builder, _FLOAT_VECTOR) for _ in range(3)] for _ in range(rows)]
    for total in (total for row in sums for total in row):
        builder.store(ir.Constant(_FLOAT_VECTOR, [0.0] * LANES), total)
    with cgutils.for_range(builder, count) as entries:
        step, amount, weights, _, (source,) = _addresses(builder, tables, entries.index, at, _I64(0), LANES)
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
    """A function that keeps so many channels of some outputs."""

    def settle(typing, scratch, place, bias, channel, out, target, step, count, later):  # type: ignore[no-untyped-def]
        """out[target + step r + c] = scratch[place + 2 LANES r + c] + bias[channel + c], or 0 where that is negative.

        For r < count; as bfloat16 if `out` holds whole numbers. What is put `later` numbers further on is put next.
        """

        def generate(context, builder, signature, arguments):  # type: ignore[no-untyped-def]
            scratch, bias, out = (_data(context, builder, signature, arguments, n) for n in (0, 2, 4))
            _, place, _, channel, _, target, step, count, later = arguments
            vector, halved = ir.VectorType(ir.FloatType(), length), isinstance(signature.args[4].dtype, types.Integer)

            start = _load(builder, builder.gep(bias, [channel]), vector)
            source = cgutils.alloca_once_value(builder, builder.gep(scratch, [place]))
            target = cgutils.alloca_once_value(builder, builder.gep(out, [target]))
            with cgutils.for_range(builder, count):
                here, there = builder.load(source), builder.load(target)
                value = _rectified(builder, builder.fadd(_load(builder, here, vector), start))
                value = _as_bfloat16(builder, value) if halved else value
                builder.store(value, builder.bitcast(there, value.type.as_pointer())).align = 2 if halved else 4
                _fetch(builder, builder.gep(there, [later]), True)
                builder.store(builder.gep(here, [_I64(2 * LANES)]), source)
                builder.store(builder.gep(there, [step]), target)
            return context.get_dummy_value()

        return types.void(scratch, place, bias, channel, out, target, step, count, later), generate

    return intrinsic(settle)


def _rectified(builder: Any, values: Any) -> Any:
    """A vector of float32, 0 where it is negative."""
    zeros = ir.Constant(values.type, [0.0] * values.type.count)
    return builder.select(builder.fcmp_ordered("<", values, zeros), zeros, values)


def _as_bfloat16(builder: Any, values: Any) -> Any:
    """A vector of float32 rounded to bfloat16, to the nearest, ties to even; their bits as whole numbers."""
    count = values.type.count
    return builder.bitcast(
        builder.fptrunc(values, ir.VectorType(_BFloat(), count)), ir.VectorType(ir.IntType(16), count)
    )


def _store_some(builder: Any, values: Any, place: Any, mask: Any) -> None:
    """Put those numbers of a vector whose bits are set in a number of 64 bits."""
    count, size = values.type.count, 2 if values.type.element == ir.IntType(16) else 4
    bits = builder.bitcast(builder.trunc(mask, ir.IntType(count)), ir.VectorType(ir.IntType(1), count))
    place = builder.bitcast(place, values.type.as_pointer())
    kind = ir.FunctionType(ir.VoidType(), [values.type, place.type, _I32, bits.type])
    name = f"v{count}" + ("i16" if size == 2 else "f32")
    store = cgutils.get_or_insert_function(builder.module, kind, f"llvm.masked.store.{name}.p0{name}")
    builder.call(store, [values, place, _I32(size), bits])


def _zeros_of(length: int) -> Any:
    """A function that clears so many numbers."""

    def zeros(typing, out, place):  # type: ignore[no-untyped-def]
        """out[place + c] = 0."""

        def generate(context, builder, signature, arguments):  # type: ignore[no-untyped-def]
            number = context.get_data_type(signature.args[0].dtype)
            place = builder.gep(_data(context, builder, signature, arguments, 0), [arguments[1]])
            nothing = ir.Constant(ir.VectorType(number, length), None)
            builder.store(nothing, builder.bitcast(place, nothing.type.as_pointer())).align = 2
            return context.get_dummy_value()

        return types.void(out, place), generate

    return intrinsic(zeros)


_clear_eight, _clear_four = _zeros_of(8), _zeros_of(4)
_settle, _settle_eight = _settle_of(LANES), _settle_of(8)


@compiling.inline
def _slice_of(plan, s, k):  # type: ignore[no-untyped-def]
    """(what counts as slice k of outputs, by which piece of the weights), see `compiled_layers._Input.twos`."""
    twos = plan[s, 14]
    return (k, 0) if twos < 0 else ((k + twos) // 2, k % 2)


@compiling.loop
def _list_rows(plan, k, j, rows, tables):  # type: ignore[no-untyped-def]
    """Fill the tables with the rows of inputs of output rows (k, j ... j + rows - 1); returns the number of entries.

    Rows beyond an input's ends, which would be zeros, are left out if they are beyond them for all rows of outputs,
    else they are the zeros of the plan.
    """
    count = 0
    for s in range(len(plan)):
        address, depth, height, row, step, scale_z, scale_y, first, kernel_z, kernel_y = plan[s, :10]
        amount, weights, size, zeros = plan[s, 10:14]
        output, piece = _slice_of(plan, s, k)
        for dz in range(kernel_z):
            z = scale_z * output + first + dz
            for dy in range(kernel_y):
                y = scale_y * j + first + dy
                if not 0 <= z < depth or y + scale_y * (rows - 1) < 0 or y >= height:
                    continue
                entry = tables[count]
                entry[_STEP], entry[_AMOUNT], entry[_ON] = step, amount, scale_y * rows * row
                entry[_WEIGHTS] = weights + ((piece * kernel_z + dz) * kernel_y + dy) * size
                for r in range(rows):
                    entry[_STARTS + r] = address + (z * height + y) * row if 0 <= y < height else zeros
                    y += scale_y
                count += 1
    return count


@compiling.inline
def _inner_rows(plan, rows):  # type: ignore[no-untyped-def]
    """(first, last): output rows j ... j + rows - 1 need none beyond an input's ends for j = first ... last."""
    begin, end = _int(0), _int(1 << 30)
    for s in range(len(plan)):
        height, scale_y, first, kernel_y = plan[s, 2], plan[s, 6], plan[s, 7], plan[s, 9]
        begin = max(begin, -(first // scale_y))
        end = min(end, (height - kernel_y - first) // scale_y - rows + 1)
    return begin, end


@compiling.loop
def _list_further_rows(plan, k, j, rows, tables, count, inner):  # type: ignore[no-untyped-def]
    """What `_list_rows` does, faster for inner rows if the tables have `count` entries for the rows before."""
    if count == 0 or not inner[0] + rows <= j <= inner[1]:
        return _list_rows(plan, k, j, rows, tables)
    for t in range(count):
        for r in range(rows):
            tables[t, _STARTS + r] += tables[t, _ON]
    return count


@compiling.loop
def _look_ahead(plan, k, j, rows, size, tables, count):  # type: ignore[no-untyped-def]
    """Have the tables fetch what of the inputs of output rows (k, j ... j + rows - 1) those before them did not read.

    Each of the `count` entries fetches `size` bytes; what is more than that in all is not fetched.
    """
    t = 0
    for s in range(len(plan)):
        address, depth, height, row, _, scale_z, scale_y, first, kernel_z, kernel_y = plan[s, :10]
        end = min(scale_y * (j + rows - 1) + first + kernel_y, height)
        begin = max(end - scale_y * rows, 0) if j else 0
        after = scale_z * _slice_of(plan, s, k)[0] + first + kernel_z
        for z in range(max(after - scale_z, 0), min(after, depth)):
            start, last = address + (z * height + begin) * row, address + (z * height + end) * row
            while start < last and t < count:
                tables[t, _FETCH] = start
                start += size
                t += 1
    for n in range(t, count):
        tables[n, _FETCH] = tables[0, _STARTS]


@compiling.inline
def _outputs_from(at, width, many, few):  # type: ignore[no-untyped-def]
    """(first, how many) of the outputs of a row that are computed next when those before `at` are done.

    The last ones of a row overlap others, so that no input beyond a row is read.
    """
    if width - at > few and width >= many:
        return min(at, width - many), many
    return min(at, width - few), few


@compiling.loop
def _multiply(unit, tables, count, at, few, rows, many, group, two, fetched, scratch, waiting):  # type: ignore[no-untyped-def]
    """The right one of the products; `tables`, `scratch` and `waiting` are where these lie."""
    if rows == 2:
        if many:
            _two_rows_many_one(unit, tables, count, at, few, group, fetched, scratch, waiting)
        elif two:
            _two_rows_few_two(unit, tables, count, at, few, group, fetched, scratch, waiting)
        else:
            _two_rows_few_one(unit, tables, count, at, few, group, fetched, scratch, waiting)
    elif many and two:
        _many_two(unit, tables, count, at, few, group, fetched, scratch, waiting)
    elif many:
        _many_one(unit, tables, count, at, few, group, fetched, scratch, waiting)
    elif two:
        _few_two(unit, tables, count, at, few, group, fetched, scratch, waiting)
    else:
        _few_one(unit, tables, count, at, few, group, fetched, scratch, waiting)


def _write_square(builder: Any, source: Any, bias: Any, places: Any, first: Any, mask: Any, later: Any) -> None:
    """The instructions of `_put_square`."""
    count = LANES // 2
    twos = ir.VectorType(ir.DoubleType(), count)  # in its numbers nothing is computed

    def load(address):  # type: ignore[no-untyped-def]
        return _load(builder, builder.inttoptr(address, _POINTER), _FLOAT_VECTOR)

    start = load(bias)
    rows = [builder.fadd(load(builder.add(source, _I64(2 * LANES * 4 * r))), start) for r in range(count)]
    rows = [builder.bitcast(row, twos) for row in rows]
    bit = 1
    while bit < count:  # swap what has this bit in its row and not in its column with what has it only there
        low = [q + count - bit if q & bit else q for q in range(count)]
        for r in (r for r in range(count) if not r & bit):
            pair = rows[r], rows[r + bit]
            rows[r], rows[r + bit] = _chosen(builder, *pair, low), _chosen(builder, *pair, [q + bit for q in low])
        bit *= 2
    whole = builder.icmp_signed("==", mask, _I64((1 << LANES) - 1))
    places = builder.inttoptr(places, _I64.as_pointer())
    for q, row in enumerate(rows):
        place = builder.load(builder.gep(places, [_I64(q)]))
        with builder.if_then(builder.icmp_signed("!=", place, _I64(_NOWHERE))):
            there, row = builder.inttoptr(builder.add(place, first), _POINTER), builder.bitcast(row, _FLOAT_VECTOR)
            with builder.if_else(whole) as (yes, no):
                with yes:
                    builder.store(row, builder.bitcast(there, row.type.as_pointer())).align = 4
                with no:
                    _store_some(builder, row, there, mask)
            _fetch(builder, builder.gep(there, [later]), True)


def _square_of_twos(typing, source, bias, places, first, mask, later):  # type: ignore[no-untyped-def]
    """LANES voxels of each of LANES / 2 rows of a field, of as many outputs; all arguments are addresses or bytes.

    Output r at `source` + 8 LANES r, to which the numbers at `bias` are added, has two neighbours of each row q. These
    are put from places[q] + `first` on, neighbours as they come, but for those whose bit is not set in `mask`, and not
    where places[q] is NOWHERE. What is put `later` bytes further on is put next.
    """

    def generate(context, builder, signature, arguments):  # type: ignore[no-untyped-def]
        _write_square(builder, *arguments)
        return context.get_dummy_value()

    return types.void(*[types.int64] * 6), generate


_put_square: Any = intrinsic(_square_of_twos)


def _what_waits(typing, unit, waiting):  # type: ignore[no-untyped-def]
    """Put all sums that wait at an address; with vectors none do."""

    def generate(context, builder, signature, arguments):  # type: ignore[no-untyped-def]
        if unit == types.uint8:
            waiting = builder.inttoptr(arguments[1], _I64.as_pointer())
            _Waiting(builder, waiting).some(_I64(1 << 62))
            for n in (_RECORDS, _AMOUNT_WAITING):
                builder.store(_I64(0), builder.gep(waiting, [_I64(n)]))
        return context.get_dummy_value()

    return types.void(unit, types.int64), generate


_put_waiting: Any = intrinsic(_what_waits)


@compiling.loop
def _begin_to_wait(waiting, step, later):  # type: ignore[no-untyped-def]
    """What waited is put. What `_note` says from now on is `step` bytes from output to output, or 0 for a field."""
    waiting[_RECORDS] = waiting[_AMOUNT_WAITING] = 0
    waiting[_BYTES_ON], waiting[_LATER] = step, later


@compiling.loop
def _note(waiting, amount, source, bias, place, number, mask):  # type: ignore[no-untyped-def]
    """Have sums wait, `amount` vectors or squares of them.

    For features those of `number` outputs from address `source` on, in steps of 8 LANES; with the numbers at `bias`
    those channels are put from `place` on whose bits are set in `mask`. For a field a square, as `_put_square` is told.
    """
    first = _FIRST_RECORD + _RECORD * waiting[_RECORDS]
    waiting[first], waiting[first + 1], waiting[first + 2] = source, bias, place
    waiting[first + 3], waiting[first + 4] = number, mask
    waiting[_RECORDS] += 1
    waiting[_AMOUNT_WAITING] += amount


def _address(typing, array, place):  # type: ignore[no-untyped-def]
    """Of a number of an array."""

    def generate(context, builder, signature, arguments):  # type: ignore[no-untyped-def]
        place = builder.gep(_data(context, builder, signature, arguments, 0), [arguments[1]])
        return builder.ptrtoint(place, _I64)

    return types.int64(array, place), generate


def _whether_tiles(typing, unit):  # type: ignore[no-untyped-def]
    """Whether the matrix unit computes."""

    def generate(context, builder, signature, arguments):  # type: ignore[no-untyped-def]
        return ir.Constant(ir.IntType(1), int(unit == types.uint8))

    return types.boolean(unit), generate


_address_of: Any = intrinsic(_address)
_by_tiles: Any = intrinsic(_whether_tiles)


def _pointer_to(number: Any) -> Any:
    """A function of (unit, address): where numbers lie, float32, or if `number` is None what `unit` stands for."""

    def pointer(typing, unit, address):  # type: ignore[no-untyped-def]
        kind = number or (types.float32 if unit == types.float32 else types.uint16)

        def generate(context, builder, signature, arguments):  # type: ignore[no-untyped-def]
            return builder.inttoptr(arguments[1], context.get_value_type(signature.return_type))

        return types.CPointer(kind)(unit, address), generate

    return intrinsic(pointer)


_floats, _results = _pointer_to(types.float32), _pointer_to(None)


# a step, a row of the first table of `run`: what it computes, how many times, from where in the table of inputs on, how
# many inputs, where the result lies from which base, where the bias lies, what `means` and `fetched` return, and what
# the loops say
KIND, TURNS, FIRST, INPUTS, OUT, BASE, BIAS = range(7)
MANY_ONE, MANY_TWO, FEW, ROWS, GROUPS, FETCHED, FETCHED_BYTES, SHAPE = range(7, 15)
STEP = SHAPE + 7
FEATURES, FEATURES_BY_PARITY, FEATURES_ABOUT_GAPS, GAPS, FIELD, FIELD_BY_VOXEL = range(6)


@compiling.inline
def _array(pointer, length):  # type: ignore[no-untyped-def]
    return carray(pointer, (length,))


@compiling.inline
def _rows_of(turn, height, rows):  # type: ignore[no-untyped-def]
    """(k, j): the turn is that of rows j ... j + rows - 1 of slice k, which has `height`."""
    turns_of_slice = -(-height // rows)
    return turn // turns_of_slice, turn % turns_of_slice * rows


@compiling.loop
def _features(unit, step, plan, tables, scratch, waiting, parities, begin, end):  # type: ignore[no-untyped-def]
    """Some rows of a layer's features, turns begin ... end; with parities, all rows of a slice about gaps.

    Args:
        unit: as `unit_of` returns it.
        step: see STEP; `shape` is (depth, height, outputs along a row, zeros at either end of it, channels, groups of
            LANES channels; with parities those of even voxels of even rows, of odd rows, then of odd voxels).
        plan: of each input what `compiled_layers._Input.plan` returns.
        tables, scratch, waiting: room.
        parities: whether an output's parities say which of the weights count, and of which gap it is.
    """
    depth, height, width = step[SHAPE], step[SHAPE + 1], step[SHAPE + 2]
    edge, channels, groups = step[SHAPE + 3], step[SHAPE + 4], step[SHAPE + 5]
    few, rows, fetched = step[FEW], step[ROWS], step[FETCHED]
    stride = 2 if parities else 1
    length = width * channels + 2 * edge
    out = _array(_results(unit, step[OUT]), depth * height * length + BEHIND)
    own, count_x, count_y = groups // (stride * stride), width // stride, height // stride + parities
    bias = _array(_floats(unit, step[BIAS]), own * LANES)
    later = stride * rows * length
    inner, count, tiles = _inner_rows(plan, rows), _int(0), _by_tiles(unit)
    for turn in range(begin, end):
        k, j = _rows_of(turn, count_y, rows)
        count = _list_further_rows(plan, k, j, rows, tables, count, inner)
        if fetched:
            after, below = _rows_of(turn + 1, count_y, rows)
            _look_ahead(plan, after, below, rows, step[FETCHED_BYTES], tables, count)
        group = 0
        while group < groups:
            two = step[GROUPS] == 2 and group % (stride * own) + 1 < stride * own
            px = group // (stride * own)
            many = step[MANY_TWO] if two else step[MANY_ONE]
            done = 0
            while done < count_x:
                at, outputs = _outputs_from(done, count_x, many, few)
                sizes = few, rows, outputs == many, group, two, fetched
                _multiply(unit, tables.ctypes.data, count, at + px, *sizes, scratch.ctypes.data, waiting.ctypes.data)
                if tiles:
                    _begin_to_wait(waiting, 2 * stride * channels, 2 * later)
                for part in range(2 * rows if two else rows):
                    r, g = (part // 2, part % 2) if two else (part, 0)
                    y = stride * (j + r) - (group + g) // own % stride
                    if not 0 <= y < height:
                        continue
                    source, channel = (r * 2 * _LONGEST + g) * LANES, (group + g) % own * LANES
                    place = (k * height + y) * length + edge + (at * stride + px) * channels + channel
                    target = out, place, stride * channels, outputs, later
                    if tiles:
                        addresses = _address_of(scratch, source), _address_of(bias, channel), _address_of(out, place)
                        _note(waiting, outputs, *addresses, outputs, (1 << min(channels - channel, LANES)) - 1)
                    elif channels - channel < LANES:
                        _settle_eight(scratch, source, bias, channel, *target)
                    else:
                        _settle(scratch, source, bias, channel, *target)
                done = at + outputs
            group += 2 if two else 1
        for y in range(max(stride * (j - 1) + 1, 0), min(stride * (j + rows - 1) + 1, height)):
            first = (k * height + y) * length
            last = first + length - edge
            for c in range(0, edge, 8):
                _clear_eight(out, first + c)
                _clear_eight(out, last + c)
    _put_waiting(unit, waiting.ctypes.data)
    if end == step[TURNS]:
        for c in range(BEHIND):
            out[depth * height * length + c] = 0


@compiling.loop
def _features_about_gaps(unit, step, plan, tables, scratch, waiting, begin, end):  # type: ignore[no-untyped-def]
    """Features of a transposed convolution to few channels, for rows of gaps begin ... end.

    About gap i of an axis lie the voxels 2 i (parity 0) and 2 i - 1 (parity 1). Those of a row are put at once:
    channels are by parity of z, of y, then the voxels in their order. `shape` is (depth, height, width, channels) of
    the result, the rest as in `_features`.
    """
    depth, height, width, channels = step[SHAPE], step[SHAPE + 1], step[SHAPE + 2], step[SHAPE + 3]
    count_x, count_y, pair, length = width // 2 + 1, height // 2 + 1, 2 * channels, (width + 2) * channels
    groups, many, few, fetched = 4 * pair // LANES, step[MANY_TWO], step[FEW], step[FETCHED]
    out = _array(_results(unit, step[OUT]), depth * height * length + BEHIND)
    bias = _array(_floats(unit, step[BIAS]), groups * LANES)
    for row in range(begin, end):
        k, j = _rows_of(row, count_y, _int(1))
        count = _list_rows(plan, k, j, _int(1), tables)
        if fetched:
            after, below = _rows_of(row + 1, count_y, _int(1))
            _look_ahead(plan, after, below, _int(1), step[FETCHED_BYTES], tables, count)
        for group in range(0, groups, 2):
            done = 0
            while done < count_x:
                at, outputs = _outputs_from(done, count_x, many, few)
                sizes = few, 1, outputs == many, group, True, fetched
                _multiply(unit, tables.ctypes.data, count, at, *sizes, scratch.ctypes.data, waiting.ctypes.data)
                for part in range(0, 2 * LANES, pair):
                    channel = group * LANES + part
                    z, y = 2 * k - channel // pair // 2, 2 * j - channel // pair % 2
                    if not (0 <= z < depth and 0 <= y < height):
                        continue
                    target = out, (z * height + y) * length + at * pair, pair, outputs, 2 * length
                    if pair == LANES:
                        _settle(scratch, part, bias, channel, *target)
                    else:
                        _settle_eight(scratch, part, bias, channel, *target)
                done = at + outputs
        for z in range(max(2 * k - 1, 0), min(2 * k + 1, depth)):
            for y in range(max(2 * j - 1, 0), min(2 * j + 1, height)):
                first = (z * height + y) * length
                for c in range(channels):  # what the first and the last gap put beyond the row
                    out[first + c] = out[first + length - channels + c] = 0
    if end == step[TURNS]:
        for c in range(BEHIND):
            out[depth * height * length + c] = 0


@compiling.loop
def _clear_outside(unit, step, begin, end):  # type: ignore[no-untyped-def]
    """Set to zero what of gaps lies outside of the result, for turns begin ... end of `_features`."""
    depth, height, width, channels = step[SHAPE], step[SHAPE + 1], step[SHAPE + 2], step[SHAPE + 4]
    out = _array(_results(unit, step[OUT]), depth * height * width * channels)
    part, rows = channels // 8, step[ROWS]
    for turn in range(begin, end):
        k, j_first = _rows_of(turn, height, rows)
        for j in range(j_first, min(j_first + rows, height)):
            for parity in range(8):
                outside = k == (0 if parity & 4 else depth - 1) or j == (0 if parity & 2 else height - 1)
                first, last = (0, 1) if parity & 1 else (width - 1, width)
                if outside:
                    first, last = 0, width
                for i in range(first, last):
                    place = ((k * height + j) * width + i) * channels + parity * part
                    if part == 4:  # the usual number, for which a loop becomes a call
                        _clear_four(out, place)
                        continue
                    for c in range(part):
                        out[place + c] = 0


@compiling.loop
def _list_places(out, step, k, j, places):  # type: ignore[no-untyped-def]
    """Fill `places` with addresses that the first voxels of block rows (k, j ... ) of a field have, see `_field`.

    Places are of LANES / 2 channel pairs for each row of outputs, for each group of channels.
    """
    depth, height, width = step[SHAPE], step[SHAPE + 1], step[SHAPE + 2]
    sign, channels, rows = step[SHAPE + 5], step[SHAPE + 6], step[ROWS]
    groups = -(-channels // LANES)
    for part in range(rows * groups):
        for n in range(LANES // 2):
            pair = part % groups * (LANES // 2) + n
            parity, component = pair // 3, pair % 3
            z, y = channels // 12 * k + sign * (parity // 2), 2 * (j + part // groups) + sign * (parity % 2)
            places[part * (LANES // 2) + n] = _NOWHERE
            if 2 * pair < channels and 0 <= z < depth and 0 <= y < height:
                place = ((component * depth + z) * height + y) * width
                places[part * (LANES // 2) + n] = _address_of(out, place) - (4 if sign < 0 else 0)


@compiling.loop
def _field(unit, step, plan, tables, scratch, waiting, begin, end):  # type: ignore[no-untyped-def]
    """A displacement (3, D, H, W), for rows of blocks of 2x2x2 or 1x2x2, turns begin ... end.

    Along z and y the voxel of a block at a parity is 2 k + sign * parity; along x the first one of a block is voxel
    2 i where `sign` is 1, and 2 i - 1 where it is -1. Channel 6 (2 pz + py) + 2 c + p is component c at these parities
    of the p-th of the two. `shape` is (D, H, W, height and width of the blocks, sign, number of channels: 24, or 12
    where blocks are of one slice); the rest as in `_features`.
    """
    full_depth, full_height, full_width = step[SHAPE], step[SHAPE + 1], step[SHAPE + 2]
    height, width, sign, channels = step[SHAPE + 3], step[SHAPE + 4], step[SHAPE + 5], step[SHAPE + 6]
    few, rows, fetched, groups = step[FEW], step[ROWS], step[FETCHED], -(-channels // LANES)
    out = _array(_floats(unit, step[OUT]), 3 * full_depth * full_height * full_width)
    bias = _array(_floats(unit, step[BIAS]), groups * LANES)
    later = 4 * 2 * rows * full_width
    inner, count, tiles = _inner_rows(plan, rows), _int(0), _by_tiles(unit)
    before = 1 if sign < 0 else 0  # voxels of the first block that are before the row, and of the last one behind it
    old, places = waiting[_PLACES : _PLACES + _SOME_PLACES], waiting[_PLACES + _SOME_PLACES :]
    for turn in range(begin, end):
        k, j = _rows_of(turn, height, rows)
        count = _list_further_rows(plan, k, j, rows, tables, count, inner)
        if fetched:
            after, below = _rows_of(turn + 1, height, rows)
            _look_ahead(plan, after, below, rows, step[FETCHED_BYTES], tables, count)
        old, places = places, old
        if turn > begin and rows < j and 2 * (j + rows) <= full_height:
            for n in range(_SOME_PLACES):
                places[n] = old[n] + later if old[n] != _NOWHERE else _NOWHERE
        else:
            _list_places(out, step, k, j, places)
        group = 0
        while group < groups:
            two = step[GROUPS] == 2 and group + 1 < groups
            many = step[MANY_TWO] if two else step[MANY_ONE]
            done = 0
            while done < width:
                at, outputs = _outputs_from(done, width, many, few)
                sizes = few, rows, outputs == many, group, two, fetched
                _multiply(unit, tables.ctypes.data, count, at, *sizes, scratch.ctypes.data, waiting.ctypes.data)
                if tiles:
                    _begin_to_wait(waiting, _int(0), later)
                for part in range(2 * rows if two else rows):
                    r, g = (part // 2, part % 2) if two else (part, 0)
                    source, channel = (r * 2 * _LONGEST + g) * LANES, (group + g) * LANES
                    here = _address_of(places, (r * groups + group + g) * (LANES // 2))
                    for output in range(0, outputs, LANES // 2):
                        o = max(min(output, outputs - LANES // 2), 0)  # the last ones of a row are put twice
                        voxel, mask = 2 * (at + o) - before, _int((1 << LANES) - 1)
                        if voxel < 0 or voxel + LANES > full_width or outputs < LANES // 2:
                            behind = min(LANES, 2 * (outputs - o), full_width - voxel)
                            mask = (1 << behind) - (1 << max(-voxel, 0))
                        given = _address_of(scratch, source + 2 * LANES * o), _address_of(bias, channel)
                        if tiles:
                            _note(waiting, _int(1), *given, here, 8 * (at + o), mask)
                        else:
                            _put_square(*given, here, 8 * (at + o), mask, later)
                done = at + outputs
            group += 2 if two else 1
    _put_waiting(unit, waiting.ctypes.data)


def _whole_row(typing, address, lines):  # type: ignore[no-untyped-def]
    """Fetch so many lines from an address on."""

    def generate(context, builder, signature, arguments):  # type: ignore[no-untyped-def]
        _fetch_lines(builder, *arguments)
        return context.get_dummy_value()

    return types.void(types.int64, types.int64), generate


_fetch_row: Any = intrinsic(_whole_row)


@compiling.loop
def _field_by_voxel(unit, step, plan, tables, begin, end):  # type: ignore[no-untyped-def]
    """The same voxel by voxel, for rows begin ... end; `shape` is (D, H, W)."""
    depth, height, width, many = step[SHAPE], step[SHAPE + 1], step[SHAPE + 2], step[MANY_ONE]
    plane = depth * height * width
    out, bias = _array(_floats(unit, step[OUT]), 3 * plane), _array(_floats(unit, step[BIAS]), 3)
    for row in range(begin, end):
        k, j = row // height, row % height
        count = _list_rows(plan, k, j, _int(1), tables)
        if k + 1 < depth and j + 2 < height:  # the row of inputs that only the next row of outputs needs
            for s in range(len(plan)):
                start, length = plan[s, 0], plan[s, 3]
                _fetch_row(start + ((k + 1) * height + j + 2) * length, length // _LINE)
        done = 0
        while done < width:
            at, outputs = _outputs_from(done, width, many, 1)
            if outputs == many:
                _many_dots(unit, tables, count, at, bias, out, row * width + at, plane)
            else:
                _one_dots(unit, tables, count, at, bias, out, row * width + at, plane)
            done = at + outputs


@compiling.loop
def run(unit, steps, plan, tiles, bases, shared, own):  # type: ignore[no-untyped-def]
    """Compute the steps of a program, one after the other, together with other threads that are given the same.

    The turns of a step are shared out in as many ranges as there are threads. A thread computes its own range first,
    since what it reads of the step before it has mostly put itself, then what is left of others'. None begins a step
    before the last turn of the step before is done, and none waits for a thread that has not begun.

    Args:
        unit: as `unit_of` returns it.
        steps: (n, STEP).
        plan: the same of all inputs of all steps.
        tiles: (n, 64), as `means` returns it.
        bases: addresses that those of results and inputs count from.
        shared: see `turns.take_turns`.
        own: number of this thread.

    Returns:
        Whether all is done; if not, others take long, and this is to be called again.
    """
    saved = np.zeros(64, np.uint8)
    _configuration(unit, saved)
    tables = np.empty((_MOST_ENTRIES, _ENTRY), np.int64)
    room = np.empty(_MOST_ROWS * _LONGEST * 2 * LANES + _LINE // 4, np.float32)
    scratch = room[-room.ctypes.data % _LINE // 4 :]  # rows of tiles are put faster into lines than across
    waiting = np.zeros(_WAITING, np.int64)
    steps, plan = steps.copy(), plan.copy()
    for s in range(len(steps)):
        steps[s, OUT] += bases[steps[s, BASE]]
    for s in range(len(plan)):
        plan[s, 0] += bases[plan[s, -1]]
    finished = True
    for s in range(len(steps)):
        step = steps[s]
        if turns.is_done(shared, s, step[TURNS]):
            continue
        _configure(unit, tiles[s])
        inputs = plan[step[FIRST] : step[FIRST] + step[INPUTS]]
        while True:
            begin, end = turns.next_piece(shared, s, step[TURNS], own)
            if begin == end:
                break
            if step[KIND] == FIELD:
                _field(unit, step, inputs, tables, scratch, waiting, begin, end)
            elif step[KIND] == FIELD_BY_VOXEL:
                _field_by_voxel(unit, step, inputs, tables, begin, end)
            elif step[KIND] == FEATURES_ABOUT_GAPS:
                _features_about_gaps(unit, step, inputs, tables, scratch, waiting, begin, end)
            else:
                by_parity = step[KIND] == FEATURES_BY_PARITY
                _features(unit, step, inputs, tables, scratch, waiting, by_parity, begin, end)
                if step[KIND] == GAPS:
                    _clear_outside(unit, step, begin, end)
            turns.finish(shared, s, end - begin)
        if not turns.wait(shared, s, step[TURNS]):
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


class AtOnce(NamedTuple):
    """How many outputs a product computes.

    Attributes:
        many_one, many_two: of a row, with one group of LANES channels and with two; longer than a row if never so many.
        few: of a row, where so many are not left.
        rows: of outputs.
        groups: of channels, at most.
    """

    many_one: int
    many_two: int
    few: int
    rows: int = 1
    groups: int = 1


def means(precision: torch.dtype, width: int, groups: int, weights: int) -> tuple[np.ndarray, AtOnce]:
    """What the matrix unit is told for rows of so many outputs, and how many outputs come at once.

    Args:
        precision, width: of a layer and its rows.
        groups: of LANES channels.
        weights: bytes that a row's outputs need of them.
    """
    tiles = np.zeros(64, np.uint8)
    if unit_of(precision) is not _TILES:
        return tiles, AtOnce(_outputs_of_vectors(True, 1), _outputs_of_vectors(True, 2), 1, 1, 2)
    few = -(-width // -(-width // _TILE_ROWS))  # a row's outputs in as few tiles, of about one size
    tiles[0] = 1  # the kind of configuration
    tiles[16:32:2] = 64  # bytes of a row, for each of eight tiles
    tiles[48:56] = [few] * 6 + [TILE_ELEMENTS] * 2
    if few == width:
        return tiles, AtOnce(width + 1, width + 1, few, 2, 2)
    if groups == 1 or weights > _FIRST_CACHE:
        return tiles, AtOnce(2 * few, width + 1, few, 2, 1)
    return tiles, AtOnce(2 * few, 2 * few, few, 1, 2)


def fetched(
    precision: torch.dtype, width: int, groups: int, at_once: AtOnce, entries: int, size: int
) -> tuple[int, int]:
    """How many lines an entry of the tables fetches with each product of a turn, and how many bytes with all of them.

    By vectors none where there would be many: then inputs are long rows, which the processor fetches ahead by itself.
    By the matrix unit only with few entries: else it sees far enough ahead to read in time.

    Args:
        precision, width, groups: as in `means`.
        at_once: what `means` returns.
        entries: of the tables, for rows that are not at an end.
        size: bytes of inputs that the rows after these need and these do not.
    """
    many = at_once.many_two if min(groups, at_once.groups) == 2 else at_once.many_one
    products = -(-width // (many if many <= width else at_once.few)) * -(-groups // at_once.groups)
    lines = -(-size // (_LINE * products * entries))
    if entries > _MOST_LOOKED_AHEAD if unit_of(precision) is _TILES else lines > _MOST_LINES:
        return 0, 0
    return lines, lines * _LINE * products
