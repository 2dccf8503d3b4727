"""The loops of `sampling` as compiled code, used where the package numba is installed. Nothing here is needed.

Each point is looked up once, field and image in one pass, without coordinates in memory: several times faster than
`sampling` with torch alone, the same values to within rounding. Importing this file imports numba; only `sampling`
does, and goes on without it where that fails. The loops release the interpreter and are shared out between as many
threads as torch may use; numba's own threads are never started.

Arrays are C-contiguous float32, coordinates voxels along array axes (z, y, x); a coordinate that is not a number counts
as 0, so that no index can leave an array.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numba
import numpy as np
import torch
from llvmlite import ir
from numba.core import types
from numba.extending import intrinsic

_PADDINGS = {"zeros": 0, "border": 1, "half": 2}  # what lies outside, see `sampling.Sampler`
BORDER, HALF = _PADDINGS["border"], _PADDINGS["half"]
_PIECES = 4  # of the work for each thread, so that none waits long for another
_FAST = {"contract", "reassoc", "nsz", "arcp"}  # no promise that every number is finite


def _compiled(function: Callable[..., Any]) -> Callable[..., Any]:
    try:
        return numba.njit(nogil=True, fastmath=_FAST, cache=True)(function)
    except RuntimeError:  # no folder that compiled code could be kept in
        return numba.njit(nogil=True, fastmath=_FAST)(function)


def _inlined(function: Callable[..., Any]) -> Callable[..., Any]:
    return numba.njit(inline="always", fastmath=_FAST)(function)


@_inlined
def _clamped(at, top):  # type: ignore[no-untyped-def]
    """The nearest coordinate of 0 ... top; 0 for what is not a number."""
    at = at if at > np.float32(0) else np.float32(0)
    return at if at < top else top


@_inlined
def _share_left(beyond, padding):  # type: ignore[no-untyped-def]
    """How much of an image is left so far beyond its last voxel centre, along one axis."""
    if padding == HALF:
        return np.float32(1) if beyond <= np.float32(0.5) else np.float32(0)
    return np.float32(1) - min(beyond, np.float32(1))


@_compiled
def _locate(z, y, x, shape, padding, index, left):  # type: ignore[no-untyped-def]
    """Turn a row of coordinates into weights of the upper neighbours, in place.

    `index` becomes the lower corner's place in the flat image, `left` how much of the image is left there. Only
    arithmetic on whole rows, which compilers make vector instructions of.
    """
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


@_compiled
def _pick(flat, shape, index, wz, wy, wx, out):  # type: ignore[no-untyped-def]
    """Linear interpolation of a flat image at a row of places that `_locate` found."""
    depth, height, width = shape
    along = np.uintp(1 if width > 1 else 0)
    across = np.uintp(width if height > 1 else 0)
    down = np.uintp(height * width if depth > 1 else 0)
    for i in range(len(out)):
        p = np.uintp(index[i])
        q = p + down
        a, b, c, d = flat[p], flat[p + across], flat[q], flat[q + across]
        a += wx[i] * (flat[p + along] - a)
        b += wx[i] * (flat[p + across + along] - b)
        c += wx[i] * (flat[q + along] - c)
        d += wx[i] * (flat[q + across + along] - d)
        a += wy[i] * (b - a)
        c += wy[i] * (d - c)
        out[i] = a + wz[i] * (c - a)


@_compiled
def _fade(out, left, outside):  # type: ignore[no-untyped-def]
    """Replace what is not left of an image by `outside`."""
    for i in range(len(out)):
        out[i] = left[i] * out[i] if left[i] > np.float32(0) else outside


@_compiled
def _at_points(image, where, out, begin, end, padding):  # type: ignore[no-untyped-def]
    """out[:, n] = image at where[:, n] for the blocks begin ... end of 512 points."""
    shape = image.shape[1:]
    index, left, at = np.empty(512, np.int32), np.empty(512, np.float32), np.empty((3, 512), np.float32)
    for block in range(begin, end):
        first = 512 * block
        count = min(512, where.shape[1] - first)
        at[:, :count] = where[:, first : first + count]
        z, y, x = at[0, :count], at[1, :count], at[2, :count]
        _locate(z, y, x, shape, padding, index, left)
        for c in range(image.shape[0]):
            row = out[c, first : first + count]
            _pick(image[c].ravel(), shape, index, z, y, x, row)
            if padding != BORDER:
                _fade(row, left, np.float32(0))


@_compiled
def _displaced(image, displacement, out, begin, end, padding, add):  # type: ignore[no-untyped-def]
    """Out = image at x + u(x), plus u where `add`, for the rows begin ... end of the grid."""
    height, width = out.shape[2], out.shape[3]
    shape = image.shape[1:]
    index, left = np.empty(width, np.int32), np.empty(width, np.float32)
    z, y, x = np.empty(width, np.float32), np.empty(width, np.float32), np.empty(width, np.float32)
    for row in range(begin, end):
        k, j = row // height, row % height
        uz, uy, ux = displacement[0, k, j], displacement[1, k, j], displacement[2, k, j]
        for i in range(width):
            z[i] = np.float32(k) + uz[i]
            y[i] = np.float32(j) + uy[i]
            x[i] = np.float32(np.int32(i)) + ux[i]
        _locate(z, y, x, shape, padding, index, left)
        for c in range(image.shape[0]):
            found = out[c, k, j]
            _pick(image[c].ravel(), shape, index, z, y, x, found)
            if padding != BORDER:
                _fade(found, left, np.float32(0))
            if add:
                own = displacement[c, k, j]
                for i in range(width):
                    found[i] += own[i]


@_inlined
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


@_compiled
def _affine(image, matrix, out, first, begin, end, padding, outside):  # type: ignore[no-untyped-def]
    """Out = image at M x for the rows begin ... end of a slab whose first slice is `first`."""
    height, width = out.shape[1], out.shape[2]
    flat = image.ravel()
    index, left = np.empty(width, np.int32), np.empty(width, np.float32)
    z, y, x = np.empty(width, np.float32), np.empty(width, np.float32), np.empty(width, np.float32)
    for row in range(begin, end):
        k, j = row // height, row % height
        _straight(matrix, first + k, j, z, y, x)
        _locate(z, y, x, image.shape, padding, index, left)
        _pick(flat, image.shape, index, z, y, x, out[k, j])
        if padding != BORDER:
            _fade(out[k, j], left, outside)


@_inlined
def _mixed(a, b, weight, out):  # type: ignore[no-untyped-def]
    for i in range(len(out)):
        out[i] = a[i] + weight * (b[i] - a[i])


@_inlined
def _stretched(line, low, high, weight, out):  # type: ignore[no-untyped-def]
    """Linear interpolation of a row at places given by neighbours and weights."""
    for i in range(len(out)):
        a = line[np.uintp(low[i])]
        out[i] = a + weight[i] * (line[np.uintp(high[i])] - a)


@_compiled
def _hold(field, zs, ys, xs, k, j, held, line, lines):  # type: ignore[no-untyped-def]
    """Have in `lines` the field's two rows about row j of a lattice's slice k, as long as the lattice's rows.

    `held`: which rows those are now (even, odd), and of which slice; -1 where none. `line` is room for one row.
    """
    if k != held[2]:
        held[0], held[1], held[2] = -1, -1, k
    for q in (ys[0][j], ys[1][j]):
        if held[q % 2] != q:
            held[q % 2] = q
            for c in range(3):
                _mixed(field[c, zs[0][k], q], field[c, zs[1][k], q], zs[2][k], line)
                _stretched(line, xs[0], xs[1], xs[2], lines[q % 2, c])


@_compiled
def _along(image, matrix, field, zs, ys, xs, out, first, begin, end, padding, outside):  # type: ignore[no-untyped-def]
    """Out = image at M x + u(x) where the lattice runs along the field's axes.

    zs, ys, xs are (lower neighbour, upper neighbour, weight of the upper) of every lattice index along an axis.
    """
    height, width = out.shape[1], out.shape[2]
    flat = image.ravel()
    index, left = np.empty(width, np.int32), np.empty(width, np.float32)
    z, y, x = np.empty(width, np.float32), np.empty(width, np.float32), np.empty(width, np.float32)
    line, lines = np.empty(field.shape[3], np.float32), np.empty((2, 3, width), np.float32)
    held = np.full(3, -1)
    for row in range(begin, end):
        k, j = row // height, row % height
        _hold(field, zs, ys, xs, first + k, j, held, line, lines)
        near, far, weight = lines[ys[0][j] % 2], lines[ys[1][j] % 2], ys[2][j]
        _straight(matrix, first + k, j, z, y, x)
        for i in range(width):
            z[i] += near[0, i] + weight * (far[0, i] - near[0, i])
            y[i] += near[1, i] + weight * (far[1, i] - near[1, i])
            x[i] += near[2, i] + weight * (far[2, i] - near[2, i])
        _locate(z, y, x, image.shape, padding, index, left)
        _pick(flat, image.shape, index, z, y, x, out[k, j])
        if padding != BORDER:
            _fade(out[k, j], left, outside)


@_compiled
def _oblique(image, matrix, field, to_field, out, first, begin, end, padding, outside):  # type: ignore[no-untyped-def]
    """Out = image at M x + u(F x)."""
    height, width = out.shape[1], out.shape[2]
    flat, shape = image.ravel(), field.shape[1:]
    index, left = np.empty(width, np.int32), np.empty(width, np.float32)
    z, y, x = np.empty(width, np.float32), np.empty(width, np.float32), np.empty(width, np.float32)
    fz, fy, fx = np.empty(width, np.float32), np.empty(width, np.float32), np.empty(width, np.float32)
    moved = np.empty((3, width), np.float32)
    for row in range(begin, end):
        k, j = row // height, row % height
        _straight(to_field, first + k, j, fz, fy, fx)
        _locate(fz, fy, fx, shape, BORDER, index, left)
        for c in range(3):
            _pick(field[c].ravel(), shape, index, fz, fy, fx, moved[c])
        _straight(matrix, first + k, j, z, y, x)
        for i in range(width):
            z[i] += moved[0, i]
            y[i] += moved[1, i]
            x[i] += moved[2, i]
        _locate(z, y, x, image.shape, padding, index, left)
        _pick(flat, image.shape, index, z, y, x, out[k, j])
        if padding != BORDER:
            _fade(out[k, j], left, outside)


def _load_two(typing, array, index):  # type: ignore[no-untyped-def]
    """array[index] and array[index + 1] of bytes as one number, the second one times 256."""

    def generate(context, builder, signature, arguments):  # type: ignore[no-untyped-def]
        values = context.make_array(signature.args[0])(context, builder, arguments[0])
        place = builder.gep(values.data, [arguments[1]])
        read = builder.load(builder.bitcast(place, ir.IntType(16).as_pointer()))
        read.align = 1
        return read

    return types.uint16(array, index), generate


_two_bytes: Any = intrinsic(_load_two)


@_compiled
def _as_bytes(image, low, scale, out, begin, end):  # type: ignore[no-untyped-def]
    """An image as bytes (v - low) scale, one voxel of zeros (of the image) around it, for rows begin ... end of out."""
    depth, height, width = image.shape
    half = np.float32(0.5)
    nothing = np.uint8(np.int32(half - low * scale))
    for row in range(begin, end):
        k, j = row // (height + 2), row % (height + 2)
        found = out[k, j]
        found[0] = found[width + 1] = nothing
        if k == 0 or j == 0 or k > depth or j > height:
            found[:] = nothing
            continue
        source = image[k - 1, j - 1]
        for i in range(width):
            found[i + 1] = np.uint8(np.int32((source[i] - low) * scale + half))


@_compiled
def _pull_bytes(image, low, step, field, ratio, zs, ys, xs, out, begin, end):  # type: ignore[no-untyped-def]
    """Out = image at x + ratio u(x) as bfloat16, for rows begin ... end, zero outside; u on a coarser grid.

    `image` as `_as_bytes` made it: a byte for a voxel, so that what a row needs stays in the fastest cache. zs, ys, xs
    as in `_along`.
    """
    depth, height, width = out.shape
    flat = image.ravel()
    tz, ty, tx = np.float32(depth + 1), np.float32(height + 1), np.float32(width + 1)
    lz, ly, lx = np.int32(depth), np.int32(height), np.int32(width)
    row_length, plane = np.int32(width + 2), np.int32((width + 2) * (height + 2))
    across, down = np.uintp(row_length), np.uintp(plane)
    line, lines = np.empty(field.shape[3], np.float32), np.empty((2, 3, width), np.float32)
    held = np.full(3, -1)
    index, above, below = np.empty(width, np.int32), np.empty(width, np.uint32), np.empty(width, np.uint32)
    wz, wy, wx = np.empty(width, np.float32), np.empty(width, np.float32), np.empty(width, np.float32)
    found = np.empty(width, np.float32)
    bits = found.view(np.uint32)
    byte, eight, sixteen, most = np.uint32(255), np.uint32(8), np.uint32(16), np.uint32(24)
    for row in range(begin, end):
        k, j = row // height, row % height
        _hold(field, zs, ys, xs, k, j, held, line, lines)
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
            above[i] = np.uint32(_two_bytes(flat, p)) | np.uint32(np.uint32(_two_bytes(flat, p + across)) << sixteen)
            p += down
            below[i] = np.uint32(_two_bytes(flat, p)) | np.uint32(np.uint32(_two_bytes(flat, p + across)) << sixteen)
        for i in range(width):
            m, n = above[i], below[i]
            a, b = np.float32(np.int32(m & byte)), np.float32(np.int32((m >> eight) & byte))
            c, d = np.float32(np.int32((m >> sixteen) & byte)), np.float32(np.int32(m >> most))
            a += wx[i] * (b - a)
            c += wx[i] * (d - c)
            a += wy[i] * (c - a)
            e, b = np.float32(np.int32(n & byte)), np.float32(np.int32((n >> eight) & byte))
            c, d = np.float32(np.int32((n >> sixteen) & byte)), np.float32(np.int32(n >> most))
            e += wx[i] * (b - e)
            c += wx[i] * (d - c)
            e += wy[i] * (c - e)
            found[i] = low + step * (a + wz[i] * (e - a))
        target = out[k, j]
        for i in range(width):  # to the nearest, ties to even
            up = np.uint32(32767) + ((bits[i] >> sixteen) & np.uint32(1))
            target[i] = np.uint16((bits[i] + up) >> sixteen)


@_compiled
def _averaged(image, zs, ys, xs, out, begin, end):  # type: ignore[no-untyped-def]
    """Out = weighted sums along all three axes, for the rows begin ... end of the result.

    zs, ys, xs are (first of the voxels that count, their weights) for every index of the result along an axis.
    """
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
    arrays = _array(image), _array(where), out.numpy()
    _share(-(-count // 512), lambda begin, end: _at_points(*arrays, begin, end, _PADDINGS[padding]))
    return out


def displaced(image: torch.Tensor, displacement: torch.Tensor, padding: str, add: bool = False) -> torch.Tensor:
    """``image(x + u(x))``, (C, D, H, W); with `add` (and three channels) plus ``u(x)``: the composition of fields."""
    out = torch.empty_like(image, memory_format=torch.contiguous_format)
    arrays = _array(image), _array(displacement), out.numpy()
    rows = image.shape[1] * image.shape[2]
    _share(rows, lambda begin, end: _displaced(*arrays, begin, end, _PADDINGS[padding], add))
    return out


def averaged(image: torch.Tensor, weights: Sequence[torch.Tensor]) -> torch.Tensor:
    """See `sampling.averaged`."""
    out = torch.empty([len(w) for w in weights])
    arguments = _array(image), *(_banded(w.numpy()) for w in weights), out.numpy()
    _share(out.shape[0] * out.shape[1], lambda begin, end: _averaged(*arguments, begin, end))
    return out


def _banded(weights: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(first column that counts, the weights from there on) of every row, as many columns for each."""
    used = weights != 0
    first = used.argmax(1)
    last = weights.shape[1] - 1 - used[:, ::-1].argmax(1)
    columns = int((last - first).max()) + 1
    first = np.minimum(first, weights.shape[1] - columns)
    return first, np.ascontiguousarray(np.take_along_axis(weights, first[:, None] + np.arange(columns), 1), np.float32)


def _typed(lines: Sequence[Any]) -> list[tuple[np.ndarray, np.ndarray, np.ndarray]]:
    """Neighbours and weights along each axis in the types that the loops are compiled for."""
    return [(a.astype(np.int64), b.astype(np.int64), w.astype(np.float32)) for a, b, w in lines]


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
        self._image = np.empty((depth + 2, height + 2, width + 2), np.uint8)
        arguments = _array(image), self._low, np.float32(1 / self._step), self._image
        _share((depth + 2) * (height + 2), lambda begin, end: _as_bytes(*arguments, begin, end))

    def pull(self, displacement: torch.Tensor, ratio: Sequence[float], lines: Sequence[Any], out: torch.Tensor) -> None:
        """Fill `out`, (D, H, W) bfloat16 with any strides, with ``image(x + ratio u(x))``; `lines` as in `Lattice`."""
        field, target = _array(displacement), out.view(torch.uint16).numpy()
        arguments = self._image, self._low, self._step, field, np.array(ratio, np.float32), *_typed(lines), target
        _share(out.shape[0] * out.shape[1], lambda begin, end: _pull_bytes(*arguments, begin, end))


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
        self._arguments: tuple[Any, ...] = (_array(image), rows)
        self._kernel = _affine
        if displacement is None or to_field is None:
            return
        if axes is None or lines is None:
            self._kernel = _oblique
            self._arguments += (_array(displacement), np.ascontiguousarray(to_field[:3], np.float64))
            return
        self._kernel = _along
        field = _array(displacement.permute(0, *(1 + a for a in axes)))
        self._arguments += (field, *_typed(lines))

    def write(self, start: int, out: torch.Tensor) -> None:
        """Fill `out`, (slices, H', W'), with the lattice's slices from `start` on."""
        array = out.numpy()

        def some(begin: int, end: int) -> None:
            self._kernel(*self._arguments, array, start, begin, end, *self._ends)

        _share(out.shape[0] * out.shape[1], some)


def _array(tensor: torch.Tensor) -> np.ndarray:
    return tensor.detach().contiguous().numpy()


def _share(count: int, work: Callable[[int, int], Any]) -> None:
    """work(begin, end) for all of 0 ... count, in pieces on as many threads as torch may use."""
    threads = torch.get_num_threads()
    if threads == 1:
        work(0, count)
        return
    step = max(1, -(-count // (threads * _PIECES)))
    starts = list(range(0, count, step))

    def some() -> None:
        while True:
            try:
                begin = starts.pop()
            except IndexError:
                return
            work(begin, min(begin + step, count))

    helpers = [_pool(threads).submit(some) for _ in range(threads - 1)]
    try:
        some()
    finally:
        for helper in helpers:  # one that has not begun is not needed any more
            if not helper.cancel():
                helper.result()


@functools.lru_cache(maxsize=4)
def _pool(threads: int) -> ThreadPoolExecutor:
    return ThreadPoolExecutor(threads - 1, thread_name_prefix="ldr-sampling")
