"""Linear sampling with torch alone: as fast as it allows on a CPU, with bounded memory.

On a CPU torch's sampler of volumes takes one point after the other, while its sampler of pictures uses the vector
units but shares only whole batch entries out between threads. So a volume is sampled here as a tall picture, its
slices one below the other, two neighbouring slices and all components at once (of a single image nothing is copied),
with one batch entry a thread, and slab by slab, so that temporaries stay in the cache. On other devices torch's sampler
of volumes does the same.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

import numpy as np
import torch
import torch.nn.functional as F

from LDRCore.sampling import lattice
from LDRCore.sampling.lattice import Block

SLAB_POINTS = 1 << 19  # sampled at once: about 20 MB of temporaries
_SLICES_AT_ONCE = 4  # of a field, interpolated to the rows and columns of a lattice
_BAND = 8  # slices of a lattice that are interpolated together from the few slices of a field about them

Bounds = Sequence[tuple[float, float]]
"""For x, y and z: no point is lower, no point is higher."""


class SliceSampler:
    """An image prepared for sampling at slabs of points."""

    def __init__(self, image: torch.Tensor, padding: str = "border", fill: float = 0.0) -> None:
        """Prepare.

        Args:
            image: (C, D, H, W) float32.
            padding, fill: see `LDRCore.sampling`.
        """
        self._margin = int(padding == "zeros")  # a shell of zeros, whose border padding is then what lies outside
        self.image = F.pad(image, (1,) * 6) if self._margin else image.contiguous()
        self._padding, self._fill = padding, fill
        self._last = [float(n - 1) for n in image.shape[:0:-1]]  # x, y, z
        on_cpu = image.device.type == "cpu"
        self._parts = torch.get_num_threads() if on_cpu else 1
        self._pairs = self._with_next_slices() if on_cpu else self.image
        self._buffer = torch.empty(0, dtype=torch.float32, device=image.device)

    def _with_next_slices(self) -> torch.Tensor:
        """Channels and, as further channels, the slice above each: (2 C, D or D - 1, H, W); of one image a view."""
        channels, depth, height, width = self.image.shape
        if depth == 1:
            return self.image.expand(2, -1, -1, -1, -1).flatten(0, 1)
        if channels == 1:
            strides = height * width, height * width, width, 1
            return self.image.as_strided((2, depth - 1, height, width), strides, self.image.storage_offset())
        return torch.cat((self.image[:, :-1], self.image[:, 1:]))

    def buffer(self, count: int) -> torch.Tensor:
        """Return a buffer for the (x, y, z) coordinates of `count` points, (3, count), to fill before `sample`."""
        size = -(-count // self._parts) * self._parts  # every thread gets as many
        if self._buffer.numel() != 3 * size:
            self._buffer = torch.empty(3, size, dtype=torch.float32, device=self.image.device)
        return self._buffer[:, :count]

    def sample(self, count: int, bounds: Bounds | None = None) -> torch.Tensor:
        """Sample at the points in the buffer, whose coordinates are overwritten.

        Args:
            count: as given to `buffer`.
            bounds: of the points; computed if not given. NaN where a point is not a number.

        Returns:
            (C, count).
        """
        xyz = self._buffer
        xyz[:, count:] = xyz[:, count - 1 : count]
        if bounds is None:
            bounds = [(float(low), float(high)) for low, high in (axis.aminmax() for axis in xyz)]
        inside = self._inside(xyz, bounds) if self._padding == "half" else None
        if any(math.isnan(end) for ends in bounds for end in ends):
            xyz.nan_to_num_(nan=-float(self._margin), posinf=float("inf"), neginf=-float("inf"))
            bounds = [(-float("inf"), float("inf"))] * 3
        values = self._by_slices(xyz, *bounds[2]) if xyz.device.type == "cpu" else self._by_volume(xyz)
        if inside is not None:
            torch.lerp(values.new_tensor(self._fill).expand_as(values), values, inside, out=values)
        return values[:, :count]

    def _inside(self, xyz: torch.Tensor, bounds: Bounds) -> torch.Tensor | None:
        """1 for points at most half a voxel beyond the last voxel centres, 0 for others, (n,); None if all are within.

        Comparing to numbers is several times faster than to truth values.
        """
        inside: torch.Tensor | None = None
        for axis, last, (lowest, highest) in zip(xyz, self._last, bounds, strict=True):
            if not (lowest >= -0.5 and highest <= last + 0.5):  # true also for what is not a number
                within = axis.clamp(-0.5, last + 0.5).eq_(axis)
                inside = within if inside is None else inside.mul_(within)
        return inside

    def _by_volume(self, xyz: torch.Tensor) -> torch.Tensor:
        """(C, n) by torch's sampler of volumes. Overwrites `xyz`."""
        for axis, size in zip(xyz, self.image.shape[:0:-1], strict=True):
            scale = 2 / max(size - 1, 1)
            axis.mul_(scale).add_(self._margin * scale - 1)
        grid = xyz.T[None, None, None]
        return F.grid_sample(self.image[None], grid, padding_mode="border", align_corners=True)[0].flatten(1)

    def _by_slices(self, xyz: torch.Tensor, z_lowest: float, z_highest: float) -> torch.Tensor:
        """(C, n) at points moved to the nearest point inside. Overwrites `xyz`; every operation counts here."""
        x, y, z = xyz
        margin = self._margin
        channels, depth, height, width = self.image.shape
        top = float(np.nextafter(np.float32(depth - 1), np.float32(0))) - margin  # so that there is a slice above
        first, last = (int(np.floor(min(max(e, -margin), top))) + margin for e in (z_lowest, z_highest))
        below = z.clamp_(-margin, top).floor()
        z.sub_(below)  # from here on the weight of the slice above
        # slices first..last as one picture, slice under slice; rows do not mix, as y ends at the last row
        rows = (last - first + 1) * height
        scale = 2 / max(rows - 1, 1)
        start = below.new_tensor(((margin - first) * height + margin) * scale - 1)
        torch.add(start, below, alpha=height * scale, out=below)
        torch.add(below, y.clamp_(-margin, height - 1 - margin), alpha=scale, out=y)
        scale = 2 / max(width - 1, 1)
        torch.add(x.new_tensor(margin * scale - 1), x, alpha=scale, out=x)
        parts = xyz.view(3, self._parts, -1)
        grid = parts[:2].permute(1, 2, 0)[:, None]
        picture = self._pairs[:, first]
        strides = 0, self._pairs.stride(0), width, 1
        picture = picture.as_strided((self._parts, 2 * channels, rows, width), strides, picture.storage_offset())
        values = F.grid_sample(picture, grid, padding_mode="border", align_corners=True)
        low, high = values.view(self._parts, 2, channels, -1).unbind(1)
        result = values.new_empty(channels, *parts.shape[1:])
        torch.lerp(low, high, parts[2][:, None], out=result.transpose(0, 1))
        return result.flatten(1)


def slab_points(device: torch.device) -> int:
    """Return how many points are sampled at once."""
    return SLAB_POINTS if device.type == "cpu" else 32 * SLAB_POINTS


def at_points(image: torch.Tensor, coordinates: torch.Tensor, padding: str) -> torch.Tensor:
    """See `sampling.at_points`; coordinates (3, n), result (C, n)."""
    sampler = SliceSampler(image, padding)
    result = image.new_empty(image.shape[0], coordinates.shape[1])
    slab = slab_points(image.device)
    for start in range(0, coordinates.shape[1], slab):
        part = coordinates[:, start : start + slab]
        buffer = sampler.buffer(part.shape[1])
        buffer[2], buffer[1], buffer[0] = part
        result[:, start : start + slab] = sampler.sample(part.shape[1])
    return result


def displaced(
    image: torch.Tensor, displacement: torch.Tensor, padding: str, out: torch.Tensor | None = None
) -> torch.Tensor:
    """See `sampling.displaced`."""
    depth, height, width = displacement.shape[1:]
    sampler, points = SliceSampler(image, padding), _OnGrid(np.eye(4), displacement, displacement.shape[1:])
    result = image.new_empty(len(image), depth, height, width) if out is None else out
    slab = max(1, slab_points(image.device) // (height * width))
    for start in range(0, depth, slab):
        block = slice(start, min(start + slab, depth)), slice(0, height), slice(0, width)
        size = block[0].stop - start, height, width
        points.write(block, sampler.buffer(math.prod(size)).view(3, *size))
        result[:, block[0]] = sampler.sample(math.prod(size), points.bounds(block)).view(-1, *size)
    return result


def slabs(
    image: torch.Tensor,
    shape: Sequence[int],
    matrix: np.ndarray,
    displacement: torch.Tensor | None,
    to_field: np.ndarray | None,
    padding: str,
    fill: float,
    spans: lattice.Spans | None,
) -> Iterator[tuple[Block, torch.Tensor]]:
    """See `sampling.slabs_on_lattice`."""
    depth, height, width = shape
    slab = max(1, slab_points(image.device) // (height * width))
    sampler = SliceSampler(image[None], padding, fill)
    points = points_of_lattice(matrix, displacement, to_field, shape, image.device)
    for start in range(0, depth, slab):
        stop = min(start + slab, depth)
        rows, columns = (slice(0, height), slice(0, width)) if spans is None else spans.window(start, stop)
        block = slice(start, stop), rows, columns
        size = [part.stop - part.start for part in block]
        count = size[0] * size[1] * size[2]
        if count == 0:
            continue
        if spans is None or isinstance(points, _Parallel | _OnGrid):
            points.write(block, sampler.buffer(count).view(3, *size))
            yield block, sampler.sample(count, points.bounds(block)).view(size)
            continue
        listed = _ListedPoints(spans, block, image.device)
        values = image.new_full((count,), fill)
        points.write_listed(block, listed, sampler.buffer(listed.count))
        values.index_copy_(0, listed.index, sampler.sample(listed.count, points.bounds(block))[0])
        yield block, values.view(size)


class _ListedPoints:
    """The points of a block that lie within their row's span, one after the other.

    Attributes:
        count: their number.
        row: of each point its row in the block, counted over all slices, (n,) int32.
        column: of each point its index along the lattice's last axis, (n,) float32.
        index: of each point its index in the flat block, (n,) int64.
    """

    def __init__(self, spans: lattice.Spans, block: Block, device: torch.device) -> None:
        slices, rows, columns = block
        first, stop = (ends[slices, rows].ravel() for ends in (spans.first, spans.stop))
        counts = stop - first
        ends = counts.cumsum()
        self.count = int(ends[-1])
        number = torch.arange(self.count, dtype=torch.int64, device=device)

        def repeated(values: np.ndarray) -> torch.Tensor:
            return torch.from_numpy(np.repeat(values, counts)).to(device)

        self.row = repeated(np.arange(len(counts), dtype=np.int32))
        to_column = first - (ends - counts)
        self.column = (number + repeated(to_column)).to(torch.float32)
        width = columns.stop - columns.start
        self.index = number + repeated(to_column - columns.start + width * np.arange(len(counts)))


def points_of_lattice(
    matrix: np.ndarray,
    displacement: torch.Tensor | None,
    to_field: np.ndarray | None,
    shape: Sequence[int],
    device: torch.device,
) -> _Affine | _OnGrid | _Parallel | _Oblique:
    """Return what writes the points ``M x + u(F x)`` of a lattice, components in the order x, y, z."""
    if displacement is None or to_field is None:
        return _Affine(matrix, shape, device)
    if displacement.shape[1:] == tuple(shape) and np.array_equal(to_field, np.eye(4)):
        return _OnGrid(matrix, displacement, shape)
    if lattice.parallel_axes(to_field, shape) is None:
        return _Oblique(matrix, displacement, to_field, shape)
    return _Parallel(matrix, displacement, to_field, shape)


def reversed_components(field: torch.Tensor) -> torch.Tensor:
    """Components in the order x, y, z; several times faster than torch's flip."""
    return torch.stack(field.unbind()[::-1])


def component_bounds(field: torch.Tensor) -> tuple[np.ndarray, np.ndarray]:
    """Return the smallest and the largest value of each component; several times faster than along an axis."""
    low, high = torch.stack([torch.stack(component.aminmax()) for component in field]).T.cpu().numpy().astype(float)
    return low, high


class _Affine:
    """The points ``M x`` of a lattice's slices."""

    def __init__(self, matrix: np.ndarray, shape: Sequence[int], device: torch.device) -> None:
        self._matrix = np.asarray(matrix[:3][::-1], dtype=float)  # rows in the order x, y, z
        rows = torch.from_numpy(np.ascontiguousarray(self._matrix)).to(device=device, dtype=torch.float32)
        j = torch.arange(shape[1], device=device, dtype=torch.float32)[:, None]
        i = torch.arange(shape[2], device=device, dtype=torch.float32)[None, :]
        self.plane = torch.stack([r[3] + j * r[1] + i * r[2] for r in rows])
        self._step = rows[:, 0]

    def step(self, start: int, stop: int) -> torch.Tensor:
        """What slices start to stop add to `plane`, (3, stop - start, 1, 1)."""
        k = torch.arange(start, stop, device=self.plane.device, dtype=torch.float32)
        return (self._step[:, None] * k)[:, :, None, None]

    def bounds(self, block: Block) -> Bounds:
        """Between which the points of a block lie; each axis of the lattice adds its extremes."""
        low, high = self._matrix[:, 3].copy(), self._matrix[:, 3].copy()
        for axis, part in enumerate(block):
            ends = self._matrix[:, axis] * part.start, self._matrix[:, axis] * (part.stop - 1)
            low += np.minimum(*ends)
            high += np.maximum(*ends)
        return _widened(low, high)

    def write(self, block: Block, out: torch.Tensor) -> None:
        slices, rows, columns = block
        torch.add(self.plane[:, None, rows, columns], self.step(slices.start, slices.stop), out=out)

    def write_listed(self, block: Block, listed: _ListedPoints, out: torch.Tensor) -> None:
        slices, rows, _ = block
        begins = self.plane[:, None, rows, 0] + self.step(slices.start, slices.stop)[..., 0]
        for component, begin, step in zip(out, begins.flatten(1), self._matrix[:, 2].tolist(), strict=True):
            torch.index_select(begin, 0, listed.row, out=component)
            component.add_(listed.column, alpha=step)


def _widened(low: np.ndarray, high: np.ndarray) -> Bounds:
    """Bounds a little wider, as single precision rounds."""
    slack = 1e-3 + 1e-6 * np.maximum(np.abs(low), np.abs(high))
    return list(zip((low - slack).tolist(), (high + slack).tolist(), strict=True))


class _Displaced:
    """The points ``M x + u(F x)``: what both ways to get u have in common."""

    def __init__(self, matrix: np.ndarray, displacement: torch.Tensor, shape: Sequence[int]) -> None:
        self._affine = _Affine(matrix, shape, displacement.device)
        low, high = component_bounds(displacement)
        self._reach = low[::-1], high[::-1]

    def bounds(self, block: Block) -> Bounds:
        """See `_Affine.bounds`."""
        low, high = np.array(self._affine.bounds(block)).T
        return _widened(low + self._reach[0], high + self._reach[1])


class _OnGrid(_Displaced):
    """The points ``M x + u(x)`` where the field lives on the lattice itself."""

    def __init__(self, matrix: np.ndarray, displacement: torch.Tensor, shape: Sequence[int]) -> None:
        super().__init__(matrix, displacement, shape)
        self._displacement = displacement

    def write(self, block: Block, out: torch.Tensor) -> None:
        self._affine.write(block, out)
        for component, u in zip(out, reversed(self._displacement.unbind()), strict=True):
            component += u[block]


class _Oblique(_Displaced):
    """The points ``M x + u(F x)`` where the axes of the lattice and of the field are not parallel."""

    def __init__(
        self, matrix: np.ndarray, displacement: torch.Tensor, to_field: np.ndarray, shape: Sequence[int]
    ) -> None:
        super().__init__(matrix, displacement, shape)
        self._in_field = _Affine(to_field, shape, displacement.device)
        self._field = SliceSampler(reversed_components(displacement))

    def write(self, block: Block, out: torch.Tensor) -> None:
        count = out[0].numel()
        self._in_field.write(block, self._field.buffer(count).view_as(out))
        self._affine.write(block, out)
        out += self._field.sample(count, self._in_field.bounds(block)).view_as(out)

    def write_listed(self, block: Block, listed: _ListedPoints, out: torch.Tensor) -> None:
        self._in_field.write_listed(block, listed, self._field.buffer(listed.count))
        self._affine.write_listed(block, listed, out)
        out += self._field.sample(listed.count, self._in_field.bounds(block))


class _Parallel(_Displaced):
    """The points ``M x + u(F x)`` where the field's axes are the lattice's, also permuted or flipped.

    Linear interpolation is done axis by axis, which is the same and faster, as products with matrices of mostly zeros:
    x for the whole small field, y for those of its slices that lie about some slabs, z for the slab.
    """

    def __init__(
        self, matrix: np.ndarray, displacement: torch.Tensor, to_field: np.ndarray, shape: Sequence[int]
    ) -> None:
        super().__init__(matrix, displacement, shape)
        axes = lattice.parallel_axes(to_field, shape)
        assert axes is not None
        values = reversed_components(displacement).permute(0, *(1 + a for a in axes))
        self._z, y, x = lattice.interpolation_lines(displacement.shape[1:], to_field, shape, axes)
        device = displacement.device
        self._values = values @ torch.from_numpy(x.matrix(values.shape[3])).to(device).T  # (3, d, h, W)
        self._y_weights = torch.from_numpy(y.matrix(values.shape[2])).to(device)
        self._step = self._affine.step(0, 2)[:, 1]
        self._rate, self._offset = float(to_field[axes[0], 0]), float(to_field[axes[0], 3])
        self._first, self._slices = 0, displacement.new_empty(3, 0, 0, 0)

    def _field_slices(self, low: int, high: int) -> torch.Tensor:
        """The points at the positions of the field's slices low to high, (3, high - low, H, W)."""
        if not self._first <= low <= high <= self._first + self._slices.shape[1]:
            count = max(high - low, _SLICES_AT_ONCE)  # with those that come next
            first = low if self._rate > 0 else max(high - count, 0)
            slices = self._y_weights @ self._values[:, first : first + count]
            slices += self._affine.plane[:, None]
            index = torch.arange(first, first + slices.shape[1], device=slices.device, dtype=torch.float32)
            slices += self._step[:, None] * ((index - self._offset) / self._rate)[:, None, None]
            self._first, self._slices = first, slices
        return self._slices[:, low - self._first : high - self._first]

    def write(self, block: Block, out: torch.Tensor) -> None:
        line = self._z.part(block[0].start, block[0].stop)
        low, high = int(line.low.min()), int(line.high.max()) + 1
        slices = self._field_slices(low, high)[:, :, block[1], block[2]]
        weights = torch.from_numpy(line.matrix(high - low, low)).to(out.device)
        # band by band, as most of the matrix is zero
        for first in range(0, len(line.low), _BAND):
            band = slice(first, first + _BAND)
            used = slice(int(line.low[band].min()) - low, int(line.high[band].max()) - low + 1)
            for component, component_slices in zip(out, slices, strict=True):
                torch.mm(weights[band, used], component_slices[used].flatten(1), out=component[band].flatten(1))
        for n in line.excess.nonzero()[0]:
            out[:, n] += self._step * float(line.excess[n])
