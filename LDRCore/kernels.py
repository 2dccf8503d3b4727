"""The loops of `sampling` as compiled code, used where the package numba is installed. Nothing here is needed.

Each point is looked up once, field and image in one pass, without coordinates in memory: several times faster than
`sampling` with torch alone, the same values to within rounding. Importing this file imports numba; only `sampling`
does, and goes on without it where that fails. What compilers do not make of such loops by themselves is written with
their vectors in `_spread`, `_vector_at` and `_two`.

Arrays are C-contiguous float32, coordinates voxels along array axes (z, y, x); a coordinate that is not a number counts
as 0, so that no index can leave an array.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from llvmlite import ir
from numba.core import cgutils, types
from numba.extending import intrinsic

from LDRCore import compiling

_PADDINGS = {"zeros": 0, "border": 1, "half": 2}  # what lies outside, see `sampling.Sampler`
BORDER, HALF = _PADDINGS["border"], _PADDINGS["half"]
_LANES = compiling.LANES
_PERMUTES = compiling.has("avx512f") or compiling.has("avx2")


@compiling.inline
def _clamped(at, top):  # type: ignore[no-untyped-def]
    """The nearest coordinate of 0 ... top; 0 for what is not a number."""
    at = at if at > np.float32(0) else np.float32(0)
    return at if at < top else top


@compiling.inline
def _share_left(beyond, padding):  # type: ignore[no-untyped-def]
    """How much of an image is left so far beyond its last voxel centre, along one axis."""
    if padding == HALF:
        return np.float32(1) if beyond <= np.float32(0.5) else np.float32(0)
    return np.float32(1) - min(beyond, np.float32(1))


@compiling.loop
def _locate(z, y, x, shape, padding, index, left):  # type: ignore[no-untyped-def]
    """Turn a row of coordinates into weights of the upper neighbours, in place.

    `index` becomes the lower corner's place in the flat image, `left` how much of the image is left there. Only
    arithmetic on whole rows, which compilers make vector instructions of.
    """
    compiling.wide()
    depth, height, width = shape
    row, plane = np.int32(width), np.int32(height * width)
    tz, ty, tx = np.float32(depth - 1), np.float32(height - 1), np.float32(width - 1)
    lz, ly, lx = np.int32(max(depth - 2, 0)), np.int32(max(height - 2, 0)), np.int32(max(width - 2, 0))
    for i in range(len(z)):
        cz, cy, cx = _clamped(z[i], tz), _clamped(y[i], ty), _clamped(x[i], tx)
        z0, y0, x0 = min(np.int32(cz), lz), min(np.int32(cy), ly), min(np.int32(cx), lx)
        if padding != BORDER:
            a, b, c = abs(z[i] - cz), abs(y[i] - cy), abs(x[i] - cx)
            left[i] = _share_left(a, padding) * _share_left(b, padding) * _share_left(c, padding)
        z[i], y[i], x[i] = cz - np.float32(z0), cy - np.float32(y0), cx - np.float32(x0)
        index[i] = np.int32(np.int32(z0 * plane) + np.int32(y0 * row)) + x0


def _two_floats(typing, flat, index, out, place):  # type: ignore[no-untyped-def]
    """Copy flat[index] and the number after it to out[place] and the place after it, as one."""

    def generate(context, builder, signature, arguments):  # type: ignore[no-untyped-def]
        kind = ir.IntType(64).as_pointer()

        def pointer(number, at):  # type: ignore[no-untyped-def]
            data = context.make_array(signature.args[number])(context, builder, arguments[number]).data
            return builder.bitcast(builder.gep(data, [at]), kind)

        read = builder.load(pointer(0, arguments[1]))
        read.align = 4
        builder.store(read, pointer(2, arguments[3])).align = 4
        return context.get_dummy_value()

    return types.void(flat, index, out, place), generate


_copy_two: Any = intrinsic(_two_floats)


@compiling.loop
def _pick(flat, shape, index, wz, wy, wx, room, out):  # type: ignore[no-untyped-def]
    """Linear interpolation of a flat image at a row of places that `_locate` found; `room` for 8 numbers a place."""
    compiling.wide()
    depth, height, width = shape
    along = np.uintp(1 if width > 1 else 0)
    across = np.uintp(width if height > 1 else 0)
    down = np.uintp(height * width if depth > 1 else 0)
    count = len(out)
    near, far, low, lower = room[: 2 * count], room[2 * count :], room[4 * count :], room[6 * count :]
    for i in range(count):
        p, two = np.uintp(index[i]), np.uintp(2 * i)
        q = p + down
        if along:
            _copy_two(flat, p, near, two)
            _copy_two(flat, p + across, far, two)
            _copy_two(flat, q, low, two)
            _copy_two(flat, q + across, lower, two)
        else:
            near[two] = near[two + np.uintp(1)] = flat[p]
            far[two] = far[two + np.uintp(1)] = flat[p + across]
            low[two] = low[two + np.uintp(1)] = flat[q]
            lower[two] = lower[two + np.uintp(1)] = flat[q + across]
    for i in range(count):
        a, b, c, d = near[2 * i], far[2 * i], low[2 * i], lower[2 * i]
        a += wx[i] * (near[2 * i + 1] - a)
        b += wx[i] * (far[2 * i + 1] - b)
        c += wx[i] * (low[2 * i + 1] - c)
        d += wx[i] * (lower[2 * i + 1] - d)
        a += wy[i] * (b - a)
        c += wy[i] * (d - c)
        out[i] = a + wz[i] * (c - a)


@compiling.loop
def _fade(out, left, outside):  # type: ignore[no-untyped-def]
    """Replace what is not left of an image by `outside`."""
    compiling.wide()
    for i in range(len(out)):
        out[i] = left[i] * out[i] if left[i] > np.float32(0) else outside


@compiling.loop
def _at_points(image, where, out, begin, end, padding):  # type: ignore[no-untyped-def]
    """out[:, n] = image at where[:, n] for the blocks begin ... end of 512 points."""
    compiling.wide()
    shape = image.shape[1:]
    flat, size = image.ravel(), shape[0] * shape[1] * shape[2]
    index, left, at = np.empty(512, np.int32), np.empty(512, np.float32), np.empty((3, 512), np.float32)
    room = np.empty(8 * 512, np.float32)
    for block in range(begin, end):
        first = 512 * block
        count = min(512, where.shape[1] - first)
        for i in range(count):
            at[0, i], at[1, i], at[2, i] = where[0, first + i], where[1, first + i], where[2, first + i]
        z, y, x = at[0, :count], at[1, :count], at[2, :count]
        _locate(z, y, x, shape, padding, index, left)
        for c in range(image.shape[0]):
            row = out[c, first : first + count]
            _pick(flat[c * size :], shape, index, z, y, x, room, row)
            if padding != BORDER:
                _fade(row, left, np.float32(0))


@compiling.inline
def _shifted(displacement, k, j, z, y, x):  # type: ignore[no-untyped-def]
    """The coordinates x + u(x) of a row of the grid."""
    uz, uy, ux = displacement[0, k, j], displacement[1, k, j], displacement[2, k, j]
    for i in range(len(z)):
        z[i] = np.float32(k) + uz[i]
        y[i] = np.float32(j) + uy[i]
        x[i] = np.float32(np.int32(i)) + ux[i]


@compiling.loop
def _displaced(image, displacement, out, begin, end, padding):  # type: ignore[no-untyped-def]
    """Out = image at x + u(x), for the rows begin ... end of the grid."""
    compiling.wide()
    height, width = out.shape[2], out.shape[3]
    shape = image.shape[1:]
    flat, size = image.ravel(), shape[0] * shape[1] * shape[2]
    index, left = np.empty(width, np.int32), np.empty(width, np.float32)
    room = np.empty(8 * width, np.float32)
    z, y, x = np.empty(width, np.float32), np.empty(width, np.float32), np.empty(width, np.float32)
    for row in range(begin, end):
        k, j = row // height, row % height
        _shifted(displacement, k, j, z, y, x)
        _locate(z, y, x, shape, padding, index, left)
        for c in range(image.shape[0]):
            found = out[c, k, j]
            _pick(flat[c * size :], shape, index, z, y, x, room, found)
            if padding != BORDER:
                _fade(found, left, np.float32(0))


def _look_up_vector(typing, field, index, across, down, wz, wy, wx):  # type: ignore[no-untyped-def]
    """The three components of a field of `_packed` vectors at a place that `_locate` found; strides in vectors.

    Neighbours along x are read and mixed as one.
    """

    def generate(context, builder, signature, arguments):  # type: ignore[no-untyped-def]
        two = ir.VectorType(ir.FloatType(), 8)
        data = context.make_array(signature.args[0])(context, builder, arguments[0]).data
        index, across, down = arguments[1:4]

        def load(*steps):  # type: ignore[no-untyped-def]
            place = index
            for step in steps:
                place = builder.add(place, step)
            place = builder.shl(place, place.type(2))
            found = builder.load(builder.bitcast(builder.gep(data, [place]), two.as_pointer()))
            found.align = 4
            return found

        def part(vector, numbers):  # type: ignore[no-untyped-def]
            order = ir.Constant(ir.VectorType(ir.IntType(32), len(numbers)), numbers)
            return builder.shuffle_vector(vector, ir.Constant(vector.type, ir.Undefined), order)

        def mix(a, b, weight):  # type: ignore[no-untyped-def]
            one = builder.insert_element(ir.Constant(a.type, ir.Undefined), weight, ir.IntType(32)(0))
            rise = builder.fmul(part(one, [0] * a.type.count), builder.fsub(b, a), flags=("contract",))
            return builder.fadd(a, rise, flags=("contract",))

        z, y, x = arguments[4:]
        found = mix(mix(load(), load(across), y), mix(load(down), load(down, across), y), z)
        found = mix(part(found, [0, 1, 2, 3]), part(found, [4, 5, 6, 7]), x)
        parts = [builder.extract_element(found, ir.IntType(32)(c)) for c in range(3)]
        return context.make_tuple(builder, signature.return_type, parts)

    strides = types.UniTuple(types.uintp, 3)
    weights = types.UniTuple(types.float32, 3)
    return types.UniTuple(types.float32, 3)(field, *strides, *weights), generate


_vector_at: Any = intrinsic(_look_up_vector)


@compiling.loop
def _pack(field, out, begin, end):  # type: ignore[no-untyped-def]
    """A field (3, D, H, W) as vectors of four numbers, the last one zero, (D, H, W, 4), for its rows begin ... end."""
    compiling.wide()
    height = field.shape[2]
    for row in range(begin, end):
        k, j = row // height, row % height
        z, y, x, found = field[0, k, j], field[1, k, j], field[2, k, j], out[k, j]
        for i in range(len(z)):
            found[i, 0], found[i, 1], found[i, 2], found[i, 3] = z[i], y[i], x[i], np.float32(0)


@compiling.inline
def _pick_vectors(packed, index, wz, wy, wx, out):  # type: ignore[no-untyped-def]
    """Linear interpolation of a packed field at a row of places that `_locate` found, (3, n)."""
    depth, height, width, _ = packed.shape
    flat = packed.ravel()
    across = np.uintp(width if height > 1 else 0)
    down = np.uintp(height * width if depth > 1 else 0)
    for i in range(len(wz)):
        p = np.uintp(index[i])
        out[0, i], out[1, i], out[2, i] = _vector_at(flat, p, across, down, wz[i], wy[i], wx[i])


@compiling.loop
def _compose(packed, displacement, out, begin, end):  # type: ignore[no-untyped-def]
    """Out = u(x) + first at x + u(x), which continues at its edge value, for the rows begin ... end of the grid."""
    compiling.wide()
    height, width = out.shape[2], out.shape[3]
    index, left, found = np.empty(width, np.int32), np.empty(width, np.float32), np.empty((3, width), np.float32)
    z, y, x = np.empty(width, np.float32), np.empty(width, np.float32), np.empty(width, np.float32)
    for row in range(begin, end):
        k, j = row // height, row % height
        _shifted(displacement, k, j, z, y, x)
        _locate(z, y, x, packed.shape[:3], BORDER, index, left)
        _pick_vectors(packed, index, z, y, x, found)
        for c in range(3):
            own, target = displacement[c, k, j], out[c, k, j]
            for i in range(width):
                target[i] = own[i] + found[c, i]


@compiling.inline
def _straight(matrix, k, j, z, y, x):  # type: ignore[no-untyped-def]
    """The coordinates M (k, j, i) of a row."""
    az = np.float32(matrix[0, 0] * k + matrix[0, 1] * j + matrix[0, 3])
    ay = np.float32(matrix[1, 0] * k + matrix[1, 1] * j + matrix[1, 3])
    ax = np.float32(matrix[2, 0] * k + matrix[2, 1] * j + matrix[2, 3])
    dz, dy, dx = np.float32(matrix[0, 2]), np.float32(matrix[1, 2]), np.float32(matrix[2, 2])
    for i in range(len(z)):
        n = np.float32(np.int32(i))
        z[i] = az + n * dz
        y[i] = ay + n * dy
        x[i] = ax + n * dx


@compiling.loop
def _affine(image, matrix, out, first, begin, end, padding, outside):  # type: ignore[no-untyped-def]
    """Out = image at M x for the rows begin ... end of a slab whose first slice is `first`."""
    compiling.wide()
    height, width = out.shape[1], out.shape[2]
    flat = image.ravel()
    index, left = np.empty(width, np.int32), np.empty(width, np.float32)
    room = np.empty(8 * width, np.float32)
    z, y, x = np.empty(width, np.float32), np.empty(width, np.float32), np.empty(width, np.float32)
    for row in range(begin, end):
        k, j = row // height, row % height
        _straight(matrix, first + k, j, z, y, x)
        _locate(z, y, x, image.shape, padding, index, left)
        _pick(flat, image.shape, index, z, y, x, room, out[k, j])
        if padding != BORDER:
            _fade(out[k, j], left, outside)


def _spread_block(typing, line, first, within, weight, at, out, place):  # type: ignore[no-untyped-def]
    """out[place + n] = line linearly interpolated at first + within[at + n] + weight[at + n], for n < _LANES."""

    def generate(context, builder, signature, arguments):  # type: ignore[no-untyped-def]
        ints, floats = ir.VectorType(ir.IntType(32), _LANES), ir.VectorType(ir.FloatType(), _LANES)

        def place(number, vector, *steps):  # type: ignore[no-untyped-def]
            array = context.make_array(signature.args[number])(context, builder, arguments[number])
            return builder.bitcast(builder.gep(array.data, [*steps]), vector.as_pointer())

        def load(*where):  # type: ignore[no-untyped-def]
            found = builder.load(place(*where))
            found.align = 4
            return found

        first, at = arguments[1], arguments[4]
        name = "llvm.x86.avx512.permvar.sf.512" if _LANES == 16 else "llvm.x86.avx2.permps"
        kind = ir.FunctionType(floats, [floats, ints])
        permute = cgutils.get_or_insert_function(builder.module, kind, name)
        order = load(2, ints, at)
        low = builder.call(permute, [load(0, floats, first), order])
        high = builder.call(permute, [load(0, floats, builder.add(first, first.type(1))), order])
        rise = builder.fmul(load(3, floats, at), builder.fsub(high, low), flags=("contract",))
        builder.store(builder.fadd(low, rise, flags=("contract",)), place(5, floats, arguments[6])).align = 4
        return context.get_dummy_value()

    return types.void(line, first, within, weight, at, out, place), generate


_spread: Any = intrinsic(_spread_block)


@compiling.inline
def _room(field, width):  # type: ignore[no-untyped-def]
    """What `_hold` works in: `held`, `line` and `lines`."""
    padded = -(-width // _LANES) * _LANES
    line = np.zeros(field.shape[3] + _LANES + 1, np.float32)
    return np.full(3, -1), line, np.empty((2, 3, padded), np.float32)


@compiling.loop
def _hold(flat, shape, zs, ys, xs, k, j, held, line, result, padded):  # type: ignore[no-untyped-def]
    """Have the field's two rows about row j of a lattice's slice k, as long as the lattice's rows.

    Args:
        flat, shape: the field, (3, d, h, w).
        zs, ys, xs: how the lattice lies in it along each axis, as `_typed` prepared it.
        k, j: the lattice's row.
        held: which rows are there now (even, odd), and of which slice; -1 where none.
        line: room for a row of the field, with zeros behind it.
        result: (2, 3, padded), flat: the even and the odd row.
        padded: the length of a row there.
    """
    _, depth, height, width = shape
    firsts, within, weight, narrow = xs
    if k != held[2]:
        held[0], held[1], held[2] = -1, -1, k
    for q in (ys[0][j], ys[1][j]):
        if held[q % 2] == q:
            continue
        held[q % 2] = q
        share = zs[2][k]
        for c in range(3):
            low = np.uintp(((c * depth + zs[0][k]) * height + q) * width)
            high = np.uintp(((c * depth + zs[1][k]) * height + q) * width)
            for i in range(width):
                a, b = flat[low + np.uintp(i)], flat[high + np.uintp(i)]
                line[i] = a + share * (b - a)
            place = (q % 2 * 3 + c) * padded
            for block in range(len(firsts)):
                at, first = block * _LANES, firsts[block]
                if _PERMUTES and narrow:
                    _spread(line, first, within, weight, at, result, place + at)
                else:
                    for i in range(_LANES):
                        n = np.uintp(first + within[at + i])
                        result[place + at + i] = line[n] + weight[at + i] * (line[n + np.uintp(1)] - line[n])


@compiling.loop
def _along(image, matrix, field, zs, ys, xs, out, first, begin, end, padding, outside):  # type: ignore[no-untyped-def]
    """Out = image at M x + u(x) where the lattice runs along the field's axes.

    zs, ys, xs: how the lattice lies in the field along each axis, as `_typed` prepared it.
    """
    compiling.wide()
    height, width = out.shape[1], out.shape[2]
    flat = image.ravel()
    index, left = np.empty(width, np.int32), np.empty(width, np.float32)
    room = np.empty(8 * width, np.float32)
    z, y, x = np.empty(width, np.float32), np.empty(width, np.float32), np.empty(width, np.float32)
    held, line, lines = _room(field, width)
    flat_field, flat_lines, padded = field.ravel(), lines.ravel(), lines.shape[2]
    for row in range(begin, end):
        k, j = row // height, row % height
        _hold(flat_field, field.shape, zs, ys, xs, first + k, j, held, line, flat_lines, padded)
        near, far, weight = lines[ys[0][j] % 2], lines[ys[1][j] % 2], ys[2][j]
        _straight(matrix, first + k, j, z, y, x)
        for i in range(width):
            z[i] += near[0, i] + weight * (far[0, i] - near[0, i])
            y[i] += near[1, i] + weight * (far[1, i] - near[1, i])
            x[i] += near[2, i] + weight * (far[2, i] - near[2, i])
        _locate(z, y, x, image.shape, padding, index, left)
        _pick(flat, image.shape, index, z, y, x, room, out[k, j])
        if padding != BORDER:
            _fade(out[k, j], left, outside)


@compiling.loop
def _oblique(image, matrix, packed, to_field, out, first, begin, end, padding, outside):  # type: ignore[no-untyped-def]
    """Out = image at M x + u(F x), u packed."""
    compiling.wide()
    height, width = out.shape[1], out.shape[2]
    flat = image.ravel()
    index, left = np.empty(width, np.int32), np.empty(width, np.float32)
    room = np.empty(8 * width, np.float32)
    z, y, x = np.empty(width, np.float32), np.empty(width, np.float32), np.empty(width, np.float32)
    fz, fy, fx = np.empty(width, np.float32), np.empty(width, np.float32), np.empty(width, np.float32)
    moved = np.empty((3, width), np.float32)
    for row in range(begin, end):
        k, j = row // height, row % height
        _straight(to_field, first + k, j, fz, fy, fx)
        _locate(fz, fy, fx, packed.shape[:3], BORDER, index, left)
        _pick_vectors(packed, index, fz, fy, fx, moved)
        _straight(matrix, first + k, j, z, y, x)
        for i in range(width):
            z[i] += moved[0, i]
            y[i] += moved[1, i]
            x[i] += moved[2, i]
        _locate(z, y, x, image.shape, padding, index, left)
        _pick(flat, image.shape, index, z, y, x, room, out[k, j])
        if padding != BORDER:
            _fade(out[k, j], left, outside)


def _load_two(typing, array, index):  # type: ignore[no-untyped-def]
    """array[index] and array[index + 1] of numbers of 16 bits as one number, the second one times 65536."""

    def generate(context, builder, signature, arguments):  # type: ignore[no-untyped-def]
        values = context.make_array(signature.args[0])(context, builder, arguments[0])
        place = builder.gep(values.data, [arguments[1]])
        read = builder.load(builder.bitcast(place, ir.IntType(32).as_pointer()))
        read.align = 2
        return read

    return types.uint32(array, index), generate


_two: Any = intrinsic(_load_two)


@compiling.loop
def _as_bytes(image, low, scale, out, begin, end):  # type: ignore[no-untyped-def]
    """An image as bytes (v - low) scale, for rows begin ... end of out, each with the byte of the next row above it.

    One voxel of zeros (of the image) lies around it; the last row is only above the one before.
    """
    compiling.wide()
    depth, height, width = image.shape
    half = np.float32(0.5)
    nothing = np.int32(half - low * scale)
    for row in range(begin, end):
        k, j = row // (height + 1), row % (height + 1)
        found = out[k, j]
        found[:] = np.uint16(nothing * 257)
        if k == 0 or k > depth:
            continue
        if j == 0 or j == height:
            source, lower, upper = image[k - 1, max(j - 1, 0)], np.int32(j > 0), np.int32(j == 0)
            rest = nothing * (lower * 256 + upper)
            for i in range(width):
                found[i + 1] = np.uint16(np.int32((source[i] - low) * scale + half) * (lower + upper * 256) + rest)
        else:
            source, above = image[k - 1, j - 1], image[k - 1, j]
            for i in range(width):
                a, b = np.int32((source[i] - low) * scale + half), np.int32((above[i] - low) * scale + half)
                found[i + 1] = np.uint16(a | (b << 8))


@compiling.inline
def _to_blocks(line, bits, out, k, j, number):  # type: ignore[no-untyped-def]
    """Put row (k, j) of image `number` into blocks; line: a zero, the row, a zero; bits: the same memory.

    out: the blocks of a `cpu_layout.ImagePair`, (D / 2 + 1, H / 2 + 1, W / 2 + 1, n) numbers of 4 bytes, n = 8 where
    each holds two bfloat16, 16 where one float32.
    """
    target = out[(k + 1) // 2, (j + 1) // 2]
    first = ((k + 1) % 2 * 2 + (j + 1) % 2) * 2 + number
    count = len(line) // 2
    if target.shape[1] == 8:
        one, sixteen, almost_half = np.uint32(1), np.uint32(16), np.uint32(32767)
        for i in range(len(line)):
            bits[i] = (bits[i] + ((bits[i] >> sixteen) & one) + almost_half) >> sixteen
        for i in range(count):
            target[i, first] = bits[2 * i] | (bits[2 * i + 1] << sixteen)
    else:
        for i in range(count):
            target[i, 2 * first] = bits[2 * i]
            target[i, 2 * first + 1] = bits[2 * i + 1]


@compiling.loop
def _into_blocks(image, out, number, begin, end):  # type: ignore[no-untyped-def]
    """Put rows begin ... end of an image into blocks, see `_to_blocks`."""
    compiling.wide()
    height, width = image.shape[1], image.shape[2]
    line = np.zeros(width + 2, np.float32)
    bits = line.view(np.uint32)
    for row in range(begin, end):
        k, j = row // height, row % height
        for i in range(width):  # one array put into another takes seconds to compile
            line[i + 1] = image[k, j, i]
        line[0] = line[width + 1] = 0
        _to_blocks(line, bits, out, k, j, number)


@compiling.loop
def _pull_bytes(image, low, step, field, ratio, zs, ys, xs, out, begin, end):  # type: ignore[no-untyped-def]
    """Out = image at x + ratio u(x), for rows begin ... end, zero outside; u on a coarser grid.

    `out` is an image or, with four axes, blocks that it is the moving image in (see `_to_blocks`).

    `image` as `_as_bytes` made it: what a row needs stays in the fastest cache, and two numbers hold all eight
    neighbours of a point. zs, ys, xs as in `_along`.
    """
    compiling.wide()
    depth, height, width = image.shape[0] - 2, image.shape[1] - 1, image.shape[2] - 2
    flat = image.ravel()
    tz, ty, tx = np.float32(depth + 1), np.float32(height + 1), np.float32(width + 1)
    lz, ly, lx = np.int32(depth), np.int32(height), np.int32(width)
    row_length, plane = np.int32(width + 2), np.int32((width + 2) * (height + 1))
    down = np.uintp(plane)
    held, line, lines = _room(field, width)
    flat_field, flat_lines, padded = field.ravel(), lines.ravel(), lines.shape[2]
    index, above, below = np.empty(width, np.int32), np.empty(width, np.uint32), np.empty(width, np.uint32)
    wz, wy, wx = np.empty(width, np.float32), np.empty(width, np.float32), np.empty(width, np.float32)
    byte, eight, sixteen, most = np.uint32(255), np.uint32(8), np.uint32(16), np.uint32(24)
    target = np.zeros(width + 2, np.float32)
    bits = target.view(np.uint32)
    for row in range(begin, end):
        k, j = row // height, row % height
        _hold(flat_field, field.shape, zs, ys, xs, k, j, held, line, flat_lines, padded)
        near, far, weight = lines[ys[0][j] % 2], lines[ys[1][j] % 2], ys[2][j]
        for i in range(width):
            z = np.float32(k + 1) + ratio[0] * (near[0, i] + weight * (far[0, i] - near[0, i]))
            y = np.float32(j + 1) + ratio[1] * (near[1, i] + weight * (far[1, i] - near[1, i]))
            x = np.float32(np.int32(i + 1)) + ratio[2] * (near[2, i] + weight * (far[2, i] - near[2, i]))
            z, y, x = _clamped(z, tz), _clamped(y, ty), _clamped(x, tx)
            z0, y0, x0 = min(np.int32(z), lz), min(np.int32(y), ly), min(np.int32(x), lx)
            index[i] = np.int32(np.int32(z0 * plane) + np.int32(y0 * row_length)) + x0
            wz[i], wy[i], wx[i] = z - np.float32(z0), y - np.float32(y0), x - np.float32(x0)
        for i in range(width):
            p = np.uintp(index[i])
            above[i], below[i] = _two(flat, p), _two(flat, p + down)
        for i in range(width):
            m, n = above[i], below[i]
            a, b = np.float32(np.int32(m & byte)), np.float32(np.int32((m >> sixteen) & byte))
            c, d = np.float32(np.int32((m >> eight) & byte)), np.float32(np.int32(m >> most))
            a += wx[i] * (b - a)
            c += wx[i] * (d - c)
            a += wy[i] * (c - a)
            e, b = np.float32(np.int32(n & byte)), np.float32(np.int32((n >> sixteen) & byte))
            c, d = np.float32(np.int32((n >> eight) & byte)), np.float32(np.int32(n >> most))
            e += wx[i] * (b - e)
            c += wx[i] * (d - c)
            e += wy[i] * (c - e)
            target[i + 1] = low + step * (a + wz[i] * (e - a))
        if out.ndim == 3:
            for i in range(width):
                out[k, j, i] = target[i + 1]
        else:
            target[0] = target[width + 1] = 0
            _to_blocks(target, bits, out, k, j, 0)


@compiling.loop
def _averaged(image, zs, ys, xs, out, begin, end):  # type: ignore[no-untyped-def]
    """Out = weighted sums along all three axes, for the rows begin ... end of the result.

    zs, ys, xs are (first of the voxels that count, their weights) for every index of the result along an axis.
    """
    compiling.wide()
    height, width = out.shape[1], out.shape[2]
    line = np.empty(image.shape[2], np.float32)
    x_first, x_weights = xs
    for row in range(begin, end):
        k, j = row // height, row % height
        line[:] = 0
        for a in range(zs[1].shape[1]):
            for b in range(ys[1].shape[1]):
                weight = zs[1][k, a] * ys[1][j, b]
                if weight != 0:
                    source = image[zs[0][k] + a, ys[0][j] + b]
                    for q in range(len(line)):
                        line[q] += weight * source[q]
        found = out[k, j]
        for i in range(width):
            total, first = np.float32(0), np.uintp(x_first[i])
            for c in range(x_weights.shape[1]):
                total += x_weights[i, c] * line[first + np.uintp(c)]
            found[i] = total


def at_points(image: torch.Tensor, where: torch.Tensor, padding: str) -> torch.Tensor:
    """(C, n) values of an image (C, D, H, W) at points (3, n)."""
    count = where.shape[1]
    out = torch.empty(image.shape[0], count)
    arrays = compiling.array(image), compiling.array(where), out.numpy()
    compiling.share(-(-count // 512), lambda begin, end: _at_points(*arrays, begin, end, _PADDINGS[padding]))
    return out


def displaced(image: torch.Tensor, displacement: torch.Tensor, padding: str) -> torch.Tensor:
    """``image(x + u(x))``, (C, D, H, W)."""
    out = torch.empty_like(image, memory_format=torch.contiguous_format)
    arrays = compiling.array(image), compiling.array(displacement), out.numpy()
    rows = image.shape[1] * image.shape[2]
    compiling.share(rows, lambda begin, end: _displaced(*arrays, begin, end, _PADDINGS[padding]))
    return out


def composed(first: torch.Tensor, second: torch.Tensor) -> torch.Tensor:
    """``u2(x) + u1(x + u2(x))`` of two displacements (3, D, H, W), the first one continued at its edge value."""
    out = torch.empty_like(second, memory_format=torch.contiguous_format)
    arrays = _packed(first), compiling.array(second), out.numpy()
    compiling.share(out.shape[1] * out.shape[2], lambda begin, end: _compose(*arrays, begin, end))
    return out


def _packed(field: torch.Tensor) -> np.ndarray:
    """A field (3, D, H, W) as vectors of four numbers, (D, H, W, 4), with a vector behind that may be read."""
    values = np.empty((field[0].numel() + 1, 4), np.float32)
    values[-1] = 0
    source, out = compiling.array(field), values[:-1].reshape(*field.shape[1:], 4)
    compiling.share(out.shape[0] * out.shape[1], lambda begin, end: _pack(source, out, begin, end))
    return out


def averaged(image: torch.Tensor, weights: Sequence[torch.Tensor]) -> torch.Tensor:
    """See `sampling.averaged`."""
    out = torch.empty([len(w) for w in weights])
    arguments = compiling.array(image), *(_banded(w.numpy()) for w in weights), out.numpy()
    compiling.share(out.shape[0] * out.shape[1], lambda begin, end: _averaged(*arguments, begin, end))
    return out


def into_blocks(image: torch.Tensor, values: torch.Tensor, number: int) -> None:
    """Put an image (D, H, W) into blocks: `values` of an entry of a `cpu_layout.ImagePair`; 0: as the moving image."""
    source, out = compiling.array(image.float()), _words(values)
    compiling.share(source.shape[0] * source.shape[1], lambda begin, end: _into_blocks(source, out, number, begin, end))


def _words(values: torch.Tensor) -> np.ndarray:
    """Blocks as `_to_blocks` takes them."""
    return values.flatten(3).view(torch.int32).numpy().view(np.uint32)


def _banded(weights: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(first column that counts, the weights from there on) of every row, as many columns for each."""
    used = weights != 0
    first = used.argmax(1)
    last = weights.shape[1] - 1 - used[:, ::-1].argmax(1)
    columns = int((last - first).max()) + 1
    first = np.minimum(first, weights.shape[1] - columns)
    return first, np.ascontiguousarray(np.take_along_axis(weights, first[:, None] + np.arange(columns), 1), np.float32)


def _typed(lines: Sequence[Any]) -> list[tuple[Any, ...]]:
    """How a lattice lies in a field as `_hold` reads it, from (lower neighbour, upper neighbour, weight of the upper).

    The same along z and y, in the types that the loops are compiled for; along x by `_blocks`.
    """
    z, y = ((a.astype(np.int64), b.astype(np.int64), w.astype(np.float32)) for a, b, w in lines[:2])
    return [z, y, _blocks(lines[2][0], lines[2][2])]


def _blocks(low: np.ndarray, weight: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray, bool]:
    """Lower neighbours and weights by blocks of _LANES places: (first neighbour of each, within, weight, narrow).

    `within` counts neighbours from the block's first; narrow: they and it are at most so many as a vector has numbers.
    """
    extra = -len(low) % _LANES
    low = np.pad(low, (0, extra), mode="edge").reshape(-1, _LANES)
    firsts = low.min(1)
    within = (low - firsts[:, None]).astype(np.int32).ravel()
    return firsts.astype(np.int64), within, np.pad(weight, (0, extra)).astype(np.float32), bool(within.max() < _LANES)


class Bytes:
    """An image (D, H, W) in 8 bits, to be pulled through coarse displacements for networks in bfloat16.

    One part in 508 of the image's range at most is lost, as much as bfloat16 loses of a number near 1; nothing of zero.
    """

    def __init__(self, image: torch.Tensor, low: float, high: float) -> None:
        """`low` and `high` are the image's range."""
        low = min(low, 0.0)
        self._step = np.float32(max(high - low, 1e-12) / 254)
        self._low = self._step * np.float32(round(low / self._step))  # so that zero is one of the steps
        depth, height, width = image.shape
        self._image = np.empty((depth + 2, height + 1, width + 2), np.uint16)
        arguments = compiling.array(image), self._low, np.float32(1 / self._step), self._image
        compiling.share((depth + 2) * (height + 1), lambda begin, end: _as_bytes(*arguments, begin, end))

    def pull(self, displacement: torch.Tensor, ratio: Sequence[float], lines: Sequence[Any], out: torch.Tensor) -> None:
        """Fill `out` with ``image(x + ratio u(x))``.

        Args:
            displacement: u, (3, d, h, w).
            ratio: of its voxels to the image's along each axis.
            lines: as in `Lattice`.
            out: (D, H, W) float32, contiguous.
        """
        self._pull(displacement, ratio, lines, out.numpy())

    def pull_into_blocks(
        self, displacement: torch.Tensor, ratio: Sequence[float], lines: Sequence[Any], values: torch.Tensor
    ) -> None:
        """The same for the moving image of blocks, see `into_blocks`."""
        self._pull(displacement, ratio, lines, _words(values))

    def _pull(self, displacement: torch.Tensor, ratio: Sequence[float], lines: Sequence[Any], out: np.ndarray) -> None:
        field, ends = compiling.array(displacement), (self._low, self._step)
        arguments = self._image, *ends, field, np.array(ratio, np.float32), *_typed(lines), out
        rows = (self._image.shape[0] - 2) * (self._image.shape[1] - 1)
        compiling.share(rows, lambda begin, end: _pull_bytes(*arguments, begin, end))


class Lattice:
    """An image to be looked up at ``M x + u(F x)``, slab by slab; see `sampling.slabs_on_lattice`."""

    def __init__(
        self,
        image: torch.Tensor,
        matrix: np.ndarray,
        displacement: torch.Tensor | None = None,
        to_field: np.ndarray | None = None,
        axes: list[int] | None = None,
        lines: list[tuple[np.ndarray, np.ndarray, np.ndarray]] | None = None,
        padding: str = "zeros",
        outside: float = 0.0,
    ) -> None:
        """Prepare.

        Args:
            image: (D, H, W).
            matrix, displacement, to_field, padding, outside: as there.
            axes: the field axis that each lattice axis runs along, None where they are oblique to each other.
            lines: with `axes`, for every index along each lattice axis (lower neighbour, upper neighbour, weight of the
                upper) in the field.
        """
        self._ends = _PADDINGS[padding], np.float32(outside)
        rows = np.ascontiguousarray(matrix[:3], np.float64)
        self._arguments: tuple[Any, ...] = (compiling.array(image), rows)
        self._kernel = _affine
        if displacement is None or to_field is None:
            return
        if axes is None or lines is None:
            self._kernel = _oblique
            self._arguments += (_packed(displacement), np.ascontiguousarray(to_field[:3], np.float64))
            return
        self._kernel = _along
        field = compiling.array(displacement.permute(0, *(1 + a for a in axes)))
        self._arguments += (field, *_typed(lines))

    def write(self, start: int, out: torch.Tensor) -> None:
        """Fill `out`, (slices, H', W'), with the lattice's slices from `start` on."""
        array = out.numpy()

        def some(begin: int, end: int) -> None:
            self._kernel(*self._arguments, array, start, begin, end, *self._ends)

        compiling.share(out.shape[0] * out.shape[1], some)
