"""Linear sampling as compiled loops, used where numba is installed: the same interface as `torch_cpu`.

Each point is sampled once, displacement and image in one pass, without coordinates in memory. Importing this file
imports numba; only `numba_check` does.

Arrays are C-contiguous float32; coordinates are voxels along array axes (z, y, x). A point p = (z, y, x) is moved to
the nearest point of the grid, then interpolated between the eight voxels about it; a coordinate that is not a number
counts as 0, so that no index can leave an array. `padding` and `fill` say what lies outside, see `LDRCore.sampling`.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import torch

from LDRCore.sampling import lattice
from LDRCore.sampling.numba_support import array, inline, loop, share
from LDRCore.sampling.precise import PrecisePoints

SLAB_POINTS = 1 << 21  # sampled at once: 8 MB of values, no temporaries
_PADDINGS = {"zeros": 0, "border": 1, "half": 2}
BORDER, HALF = _PADDINGS["border"], _PADDINGS["half"]
_BLOCK = 512  # of scattered points


@inline
def _clamped(value, top):  # type: ignore[no-untyped-def]
    """The nearest coordinate of 0 ... top; 0 for what is not a number."""
    value = value if value > np.float32(0) else np.float32(0)
    return value if value < top else top


@inline
def _share_inside(distance, padding, band):  # type: ignore[no-untyped-def]
    """How much of the image counts at this distance from its last voxel centre, along one axis: 1 inside, 0 outside.

    With "half" padding 0.5 where the distance is half a voxel to within `band`.
    """
    if padding == HALF:
        near = np.float32(1) if distance <= np.float32(0.5) - band else np.float32(0.5)
        return near if distance <= np.float32(0.5) + band else np.float32(0)
    return np.float32(1) - min(distance, np.float32(1))


@loop
def _locate(z, y, x, shape, padding, band, index, inside):  # type: ignore[no-untyped-def]
    """Turn a row of coordinates into weights of the upper neighbours, in place.

    `index` becomes the index of the lower corner in the flat image, `inside` how much of the image counts there (see
    `_share_inside`). Only arithmetic on whole rows, which the compiler makes vector instructions of.
    """
    depth, height, width = shape
    row, plane = np.int32(width), np.int32(height * width)
    top_z, top_y, top_x = np.float32(depth - 1), np.float32(height - 1), np.float32(width - 1)
    last_z, last_y, last_x = np.int32(max(depth - 2, 0)), np.int32(max(height - 2, 0)), np.int32(max(width - 2, 0))
    for i in range(len(z)):
        cz, cy, cx = _clamped(z[i], top_z), _clamped(y[i], top_y), _clamped(x[i], top_x)
        z0, y0, x0 = min(np.int32(cz), last_z), min(np.int32(cy), last_y), min(np.int32(cx), last_x)
        if padding != BORDER:
            dz, dy, dx = abs(z[i] - cz), abs(y[i] - cy), abs(x[i] - cx)
            share_z, share_y = _share_inside(dz, padding, band), _share_inside(dy, padding, band)
            inside[i] = share_z * share_y * _share_inside(dx, padding, band)
        z[i], y[i], x[i] = cz - np.float32(z0), cy - np.float32(y0), cx - np.float32(x0)
        index[i] = np.int32(np.int32(z0 * plane) + np.int32(y0 * row)) + x0


@inline
def _trilinear(flat, corner, step_z, step_y, step_x, wz, wy, wx):  # type: ignore[no-untyped-def]
    """Interpolate between eight voxels, of which `corner` is the lowest; steps to the next ones, weights of these."""
    p = np.uintp(corner)
    q, r, s = p + step_y, p + step_z, p + step_y + step_z
    a = flat[p] + wx * (flat[p + step_x] - flat[p])
    b = flat[q] + wx * (flat[q + step_x] - flat[q])
    c = flat[r] + wx * (flat[r + step_x] - flat[r])
    d = flat[s] + wx * (flat[s + step_x] - flat[s])
    a += wy * (b - a)
    c += wy * (d - c)
    return a + wz * (c - a)


@inline
def _steps(shape, stride):  # type: ignore[no-untyped-def]
    """Distance to the next voxel along z, y and x in a flat array of `stride` values a voxel; 0 along axes of one."""
    depth, height, width = shape
    step_z = np.uintp(height * width * stride if depth > 1 else 0)
    return step_z, np.uintp(width * stride if height > 1 else 0), np.uintp(stride if width > 1 else 0)


@loop
def _interpolate(flat, shape, index, wz, wy, wx, inside, padding, fill, out):  # type: ignore[no-untyped-def]
    """Interpolate a flat image at a row of points that `_locate` prepared."""
    step_z, step_y, step_x = _steps(shape, 1)
    for i in range(len(out)):
        out[i] = _trilinear(flat, index[i], step_z, step_y, step_x, wz[i], wy[i], wx[i])
    if padding == HALF:
        for i in range(len(out)):
            out[i] = out[i] if inside[i] > np.float32(0) else fill
    elif padding != BORDER:
        for i in range(len(out)):
            out[i] = inside[i] * out[i] if inside[i] > np.float32(0) else fill


@inline
def _mark(inside, count, padding, edge, k, j, first):  # type: ignore[no-untyped-def]
    """Mark which of the `count` points of a row, from `first` on, were sampled although they may lie outside.

    edge: (band, rows, points): how wrong coordinates may be; of each row and of each point whether it is marked.
    """
    _, rows, points = edge
    if padding == HALF:
        unsure = np.float32(0)
        for i in range(count):
            unsure += inside[i] - inside[i] * inside[i]  # 0 where it is 0 or 1
        if unsure > np.float32(0):
            rows[k, j] = True
            for i in range(count):
                points[k, j, first + i] = (inside[i] > np.float32(0)) & (inside[i] < np.float32(1))


@loop
def _interpolate_vectors(flat, shape, index, wz, wy, wx, out):  # type: ignore[no-untyped-def]
    """Interpolate a flat field of interleaved vectors, (D, H, W, 3), at a row of points: (3, n)."""
    step_z, step_y, step_x = _steps(shape, 3)
    for i in range(len(wz)):
        corner = np.uintp(3 * np.int64(index[i]))
        for c in range(3):
            out[c, i] = _trilinear(flat, corner + np.uintp(c), step_z, step_y, step_x, wz[i], wy[i], wx[i])


@loop
def _at_points(image, coordinates, out, begin, end, padding):  # type: ignore[no-untyped-def]
    """out[:, n] = image at coordinates[:, n], for the blocks begin ... end of `_BLOCK` points."""
    shape = image.shape[1:]
    flat, size = image.ravel(), shape[0] * shape[1] * shape[2]
    index, inside = np.empty(_BLOCK, np.int32), np.empty(_BLOCK, np.float32)
    points = np.empty((3, _BLOCK), np.float32)
    for block in range(begin, end):
        first = _BLOCK * block
        count = min(_BLOCK, coordinates.shape[1] - first)
        points[:, :count] = coordinates[:, first : first + count]
        z, y, x = points[0, :count], points[1, :count], points[2, :count]
        _locate(z, y, x, shape, padding, np.float32(0), index, inside)
        for c in range(image.shape[0]):
            row = out[c, first : first + count]
            _interpolate(flat[c * size :], shape, index, z, y, x, inside, padding, np.float32(0), row)


@inline
def _displaced_row(displacement, k, j, z, y, x):  # type: ignore[no-untyped-def]
    """The coordinates x + u(x) of a row of the grid."""
    uz, uy, ux = displacement[0, k, j], displacement[1, k, j], displacement[2, k, j]
    for i in range(len(z)):
        z[i] = np.float32(k) + uz[i]
        y[i] = np.float32(j) + uy[i]
        x[i] = np.float32(np.int32(i)) + ux[i]


@loop
def _displaced(image, displacement, out, begin, end, padding):  # type: ignore[no-untyped-def]
    """out(x) = image(x + u(x)), for the rows begin ... end of the grid."""
    height, width = out.shape[2], out.shape[3]
    shape = image.shape[1:]
    flat, size = image.ravel(), shape[0] * shape[1] * shape[2]
    index, inside = np.empty(width, np.int32), np.empty(width, np.float32)
    z, y, x = np.empty(width, np.float32), np.empty(width, np.float32), np.empty(width, np.float32)
    for row in range(begin, end):
        k, j = row // height, row % height
        _displaced_row(displacement, k, j, z, y, x)
        _locate(z, y, x, shape, padding, np.float32(0), index, inside)
        for c in range(image.shape[0]):
            _interpolate(flat[c * size :], shape, index, z, y, x, inside, padding, np.float32(0), out[c, k, j])


@loop
def _interleave(field, out, begin, end):  # type: ignore[no-untyped-def]
    """A field (3, D, H, W) as interleaved vectors (D, H, W, 3), for its rows begin ... end."""
    height = field.shape[2]
    for row in range(begin, end):
        k, j = row // height, row % height
        for i in range(field.shape[3]):
            out[k, j, i, 0], out[k, j, i, 1], out[k, j, i, 2] = field[0, k, j, i], field[1, k, j, i], field[2, k, j, i]


@inline
def _affine_row(matrix, k, j, first, z, y, x):  # type: ignore[no-untyped-def]
    """The coordinates M (k, j, i) of a row, i from `first` on."""
    az = np.float32(matrix[0, 0] * k + matrix[0, 1] * j + matrix[0, 2] * first + matrix[0, 3])
    ay = np.float32(matrix[1, 0] * k + matrix[1, 1] * j + matrix[1, 2] * first + matrix[1, 3])
    ax = np.float32(matrix[2, 0] * k + matrix[2, 1] * j + matrix[2, 2] * first + matrix[2, 3])
    dz, dy, dx = np.float32(matrix[0, 2]), np.float32(matrix[1, 2]), np.float32(matrix[2, 2])
    for i in range(len(z)):
        n = np.float32(np.int32(i))
        z[i] = az + n * dz
        y[i] = ay + n * dy
        x[i] = ax + n * dx


@loop
def _affine(image, matrix, out, start, span_first, span_stop, edge, begin, end, padding, fill):  # type: ignore[no-untyped-def]
    """out(x) = image(M x), for the rows begin ... end of a slab whose first slice is `start`, within their spans."""
    height, width = out.shape[1], out.shape[2]
    flat = image.ravel()
    index, inside, points = np.empty(width, np.int32), np.empty(width, np.float32), np.empty((3, width), np.float32)
    for row in range(begin, end):
        k, j = row // height, row % height
        a, b = span_first[start + k, j], span_stop[start + k, j]
        target = out[k, j]
        target[:a] = fill
        target[b:] = fill
        if a >= b:
            continue
        z, y, x = points[0, : b - a], points[1, : b - a], points[2, : b - a]
        _affine_row(matrix, start + k, j, a, z, y, x)
        _locate(z, y, x, image.shape, padding, edge[0], index, inside)
        _interpolate(flat, image.shape, index, z, y, x, inside, padding, fill, target[a:b])
        _mark(inside, b - a, padding, edge, k, j, a)


@loop
def _parallel(image, matrix, field, zs, ys, out, start, span_first, span_stop, edge, begin, end, padding, fill):  # type: ignore[no-untyped-def]
    """out(x) = image(M x + u(x)) where the lattice is parallel to the field's axes.

    field: (3, d, h, W), already interpolated along the lattice's rows; zs, ys: (lower neighbour, upper neighbour,
    weight of the upper) along the other two axes of the lattice.
    """
    height, width = out.shape[1], out.shape[2]
    flat = image.ravel()
    index, inside, points = np.empty(width, np.int32), np.empty(width, np.float32), np.empty((3, width), np.float32)
    for row in range(begin, end):
        k, j = row // height, row % height
        a, b = span_first[start + k, j], span_stop[start + k, j]
        target = out[k, j]
        target[:a] = fill
        target[b:] = fill
        if a >= b:
            continue
        z, y, x = points[0, : b - a], points[1, : b - a], points[2, : b - a]
        _affine_row(matrix, start + k, j, a, z, y, x)
        low_z, high_z, wz = zs[0][start + k], zs[1][start + k], zs[2][start + k]
        low_y, high_y, wy = ys[0][j], ys[1][j], ys[2][j]
        for c in range(3):
            point = points[c]
            near, far = field[c, low_z, low_y, a:b], field[c, high_z, low_y, a:b]
            low, lower = field[c, low_z, high_y, a:b], field[c, high_z, high_y, a:b]
            for i in range(b - a):
                upper = near[i] + wz * (far[i] - near[i])
                point[i] += upper + wy * (low[i] + wz * (lower[i] - low[i]) - upper)
        _locate(z, y, x, image.shape, padding, edge[0], index, inside)
        _interpolate(flat, image.shape, index, z, y, x, inside, padding, fill, target[a:b])
        _mark(inside, b - a, padding, edge, k, j, a)


@loop
def _oblique(image, matrix, field, to_field, out, start, span_first, span_stop, edge, begin, end, padding, fill):  # type: ignore[no-untyped-def]
    """out(x) = image(M x + u(F x)), u interleaved, with border padding."""
    height, width = out.shape[1], out.shape[2]
    flat, flat_field = image.ravel(), field.ravel()
    index, inside, points = np.empty(width, np.int32), np.empty(width, np.float32), np.empty((3, width), np.float32)
    moved = np.empty((3, width), np.float32)
    for row in range(begin, end):
        k, j = row // height, row % height
        a, b = span_first[start + k, j], span_stop[start + k, j]
        target = out[k, j]
        target[:a] = fill
        target[b:] = fill
        if a >= b:
            continue
        z, y, x = points[0, : b - a], points[1, : b - a], points[2, : b - a]
        _affine_row(to_field, start + k, j, a, z, y, x)
        _locate(z, y, x, field.shape[:3], BORDER, np.float32(0), index, inside)
        _interpolate_vectors(flat_field, field.shape[:3], index, z, y, x, moved)
        _affine_row(matrix, start + k, j, a, z, y, x)
        for i in range(b - a):
            z[i] += moved[0, i]
            y[i] += moved[1, i]
            x[i] += moved[2, i]
        _locate(z, y, x, image.shape, padding, edge[0], index, inside)
        _interpolate(flat, image.shape, index, z, y, x, inside, padding, fill, target[a:b])
        _mark(inside, b - a, padding, edge, k, j, a)


def at_points(image: torch.Tensor, coordinates: torch.Tensor, padding: str) -> torch.Tensor:
    """See `sampling.at_points`; coordinates (3, n), result (C, n)."""
    out = torch.empty(image.shape[0], coordinates.shape[1], dtype=torch.float32, device="cpu")
    arrays = array(image, 4), array(coordinates, 2), out.numpy()
    share(-(-out.shape[1] // _BLOCK), lambda begin, end: _at_points(*arrays, begin, end, _PADDINGS[padding]))
    return out


def displaced(
    image: torch.Tensor, displacement: torch.Tensor, padding: str, out: torch.Tensor | None = None
) -> torch.Tensor:
    """See `sampling.displaced`."""
    _check_field(displacement, image.shape[1:])
    if out is None:
        out = torch.empty_like(image, memory_format=torch.contiguous_format)
    arrays = array(image, 4), array(displacement, 4), array(out, 4)
    share(out.shape[1] * out.shape[2], lambda begin, end: _displaced(*arrays, begin, end, _PADDINGS[padding]))
    return out


def slabs(
    image: torch.Tensor,
    shape: Sequence[int],
    matrix: np.ndarray,
    displacement: torch.Tensor | None,
    to_field: np.ndarray | None,
    padding: str,
    fill: float,
    spans: lattice.Spans | None,
    precise: PrecisePoints | None,
) -> Iterator[tuple[lattice.Block, torch.Tensor]]:
    """See `sampling.slabs_on_lattice`."""
    depth, height, width = shape
    arguments: tuple[Any, ...] = (array(image, 3), np.ascontiguousarray(matrix[:3], np.float64))
    kernel = _affine
    if displacement is not None and to_field is not None:
        _check_field(displacement, displacement.shape[1:])
        interpolated = interpolated_rows(displacement, to_field, shape)
        if interpolated is None:
            kernel = _oblique
            arguments += (_interleaved(displacement), np.ascontiguousarray(to_field[:3], np.float64))
        else:
            kernel = _parallel
            arguments += interpolated
    spans = lattice.whole_rows(shape) if spans is None else spans
    rows = np.ascontiguousarray(spans.first), np.ascontiguousarray(spans.stop)
    slab = max(1, SLAB_POINTS // (height * width))
    for start in range(0, depth, slab):
        values = torch.empty(min(slab, depth - start), height, width, dtype=torch.float32, device="cpu")
        marked = tuple(np.zeros(values.shape[:n] if precise else (0,) * n, np.bool_) for n in (2, 3))
        edge = np.float32(precise.band(shape) if precise else 0), *marked
        _fill(kernel, (*arguments, values.numpy(), start, *rows, edge), len(values) * height, _PADDINGS[padding], fill)
        if precise is not None:
            _decide(precise, image.shape, start, marked, values.numpy(), fill)
        yield (slice(start, start + len(values)), slice(0, height), slice(0, width)), values


def _decide(
    precise: PrecisePoints, shape: Sequence[int], start: int, marked: Sequence[np.ndarray], out: np.ndarray, fill: float
) -> None:
    """Write the fill value where a marked point of a slab lies outside of an image of this shape."""
    rows, points = marked
    k, j = rows.nonzero()
    row, i = points[k, j].nonzero()
    k, j = k[row], j[row]
    outside = ~precise.inside(np.stack((start + k, j, i)), shape)
    out[k[outside], j[outside], i[outside]] = fill


def interpolated_rows(displacement: torch.Tensor, to_field: np.ndarray, shape: Sequence[int]) -> Any:
    """Interpolate a field (3, d, h, w) along the rows of a lattice that is parallel to its axes.

    Returns:
        (field, zs, ys) as `_parallel` takes them; None where the lattice is oblique.
    """
    axes = lattice.parallel_axes(to_field, shape)
    if axes is None:
        return None
    z, y, x = lattice.interpolation_lines(displacement.shape[1:], to_field, shape, axes)
    field = displacement.permute(0, *(1 + a for a in axes))
    if not x.is_identity(field.shape[3]):
        low, high = (field[..., torch.from_numpy(index)] for index in (x.low, x.high))
        field = torch.lerp(low, high, torch.from_numpy(x.weight.astype(np.float32)))
    return array(field, 4), *((n.low, n.high, n.weight.astype(np.float32)) for n in (z, y))


def _fill(kernel: Any, arguments: tuple[Any, ...], rows: int, padding: int, fill: float) -> None:
    """Run a kernel over the rows of a slab."""
    share(rows, lambda begin, end: kernel(*arguments, begin, end, padding, np.float32(fill)))


def _check_field(field: torch.Tensor, shape: Sequence[int]) -> None:
    if field.ndim != 4 or tuple(field.shape) != (3, *shape):
        raise ValueError(f"a displacement must have shape {(3, *shape)}, got {tuple(field.shape)}")


def _interleaved(field: torch.Tensor) -> np.ndarray:
    """A field (3, D, H, W) as (D, H, W, 3)."""
    source = array(field, 4)
    out = np.empty((*source.shape[1:], 3), np.float32)
    share(out.shape[0] * out.shape[1], lambda begin, end: _interleave(source, out, begin, end))
    return out
