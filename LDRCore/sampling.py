"""Linear sampling at many points without gradients: as fast as plain torch allows, with bounded memory.

On a CPU torch's sampler of volumes takes one point after the other, while its sampler of pictures uses the vector
units but shares only whole batch entries out between threads. So a volume is looked up here as a tall picture, its
slices one below the other, two neighbouring slices and all components at once (of a single image nothing is copied),
with one batch entry a thread, and slab by slab, so that what is in between stays in the cache. The results are those
of torch's sampler of volumes to within the rounding of coordinates (some 1e-3 voxel at most); where gradients are
needed `spatial.sample` is the way. Where numba is installed its compiled loops (`kernels`) take over on a CPU;
LDR_NUMBA=0 in the environment forbids it.

Coordinates are voxels of the sampled image along tensor axes; nothing here knows millimetres.
"""

from __future__ import annotations

import functools
import itertools
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch
import torch.nn.functional as F

SLAB_POINTS = 1 << 19  # looked up at once: about 20 MB of temporaries
COMPILED_SLAB_POINTS = 1 << 21  # by the compiled loops, which have no temporaries: 8 MB of values
PADDINGS = ("zeros", "border", "half")
ENABLED = True  # False: torch's own sampler everywhere, to compare with
COMPILED = True  # False: no compiled loops, to compare with
_WORTH_POINTS = 1 << 15  # fewer are not worth the preparation
_SLICES_AT_ONCE = 4  # of a field, brought to the rows and columns of a lattice
VARIABLE = "LDR_NUMBA"

if TYPE_CHECKING:
    from types import ModuleType

    from LDRCore.kernels import Lattice


def compiled() -> ModuleType | None:
    """The compiled loops; None without numba, where it does not run here, or if it is forbidden."""
    return _kernels() if COMPILED else None


@functools.lru_cache(maxsize=1)
def _kernels() -> ModuleType | None:
    if os.environ.get(VARIABLE) == "0":
        return None
    try:
        from LDRCore import kernels
    except Exception:  # an optional package that is broken must not break a registration
        return None
    return kernels


def _loops_for(image: torch.Tensor) -> ModuleType | None:
    """The compiled loops where they can look up this image: float32 on a CPU, places that 32 bits count."""
    return compiled() if _is_plain(image) and image.numel() < 1 << 31 else None


def can_take(count: int, *tensors: torch.Tensor) -> bool:
    """Whether sampling at `count` points belongs here: many, float32 on a CPU, and nobody wants a gradient."""
    wanted = torch.is_grad_enabled() and any(t.requires_grad for t in tensors)
    return ENABLED and count >= _WORTH_POINTS and not wanted and all(_is_plain(t) for t in tensors)


def _is_plain(tensor: torch.Tensor) -> bool:
    return tensor.device.type == "cpu" and tensor.dtype == torch.float32


_Ends = Sequence[tuple[float, float]]  # of x, y and z of some points: none lower, none higher


class Sampler:
    """An image made ready to be looked up at slabs of points.

    What lies outside: "border" the nearest voxel's value; "zeros" a fall to zero within one voxel of the last centre,
    as torch has it; "half" ITK's rule, the nearest voxel's value up to half a voxel from the last centre and then
    `outside`.
    """

    def __init__(self, image: torch.Tensor, padding: str = "border", outside: float = 0.0) -> None:
        """`image` is (C, D, H, W) float32."""
        if padding not in PADDINGS:
            raise ValueError(f"padding must be one of {PADDINGS}, got {padding!r}")
        self._margin = int(padding == "zeros")  # a shell of zeros whose edge value is then what lies outside
        self.image = F.pad(image, (1,) * 6) if self._margin else image.contiguous()
        self.padding, self.outside = padding, outside
        self._last = [float(n - 1) for n in image.shape[:0:-1]]  # x, y, z
        on_cpu = image.device.type == "cpu"
        self._parts = torch.get_num_threads() if on_cpu else 1
        self._pairs = self._with_next_slices() if on_cpu else self.image
        self._buffer = torch.empty(0)

    def _with_next_slices(self) -> torch.Tensor:
        """Channels and, as further channels, what lies a slice above: (2 C, D or D - 1, H, W); of one image a view."""
        channels, depth, height, width = self.image.shape
        if depth == 1:
            return self.image.expand(2, -1, -1, -1, -1).flatten(0, 1)
        if channels == 1:
            strides = height * width, height * width, width, 1
            return self.image.as_strided((2, depth - 1, height, width), strides, self.image.storage_offset())
        return torch.cat((self.image[:, :-1], self.image[:, 1:]))

    def points(self, count: int) -> torch.Tensor:
        """Room for the (x, y, z) coordinates of `count` points, (3, count), to be filled and given to `look_up`."""
        room = -(-count // self._parts) * self._parts  # every thread gets as many
        if self._buffer.numel() != 3 * room:
            self._buffer = torch.empty(3, room, device=self.image.device)
        return self._buffer[:, :count]

    def look_up(self, count: int, ends: _Ends | None = None) -> torch.Tensor:
        """(C, count) values at the points that `points` gave room for; their coordinates are overwritten.

        Args:
            count: as given to `points`.
            ends: between which the points lie, found out if not given.
        """
        where = self._buffer
        where[:, count:] = where[:, count - 1 : count]
        if ends is None:
            ends = [(float(low), float(high)) for low, high in (axis.aminmax() for axis in where)]
        inside = self._inside(where, ends) if self.padding == "half" else None
        values = self._on_cpu(where, *ends[2]) if where.device.type == "cpu" else self._elsewhere(where)
        if inside is not None:
            torch.lerp(values.new_tensor(self.outside).expand_as(values), values, inside, out=values)
        return values[:, :count]

    def _inside(self, where: torch.Tensor, ends: _Ends) -> torch.Tensor | None:
        """1 for points at most half a voxel beyond the last voxel centres, 0 for others, (n,); None if all are within.

        Comparing to numbers is several times faster than to truth values.
        """
        found: torch.Tensor | None = None
        for axis, last, (lowest, highest) in zip(where, self._last, ends, strict=True):
            if lowest < -0.5 or highest > last + 0.5:
                within = axis.clamp(-0.5, last + 0.5).eq_(axis)
                found = within if found is None else found.mul_(within)
        return found

    def _elsewhere(self, where: torch.Tensor) -> torch.Tensor:
        """(C, n) by torch's sampler of volumes. Overwrites `where`."""
        for axis, size in zip(where, self.image.shape[:0:-1], strict=True):
            scale = 2 / max(size - 1, 1)
            axis.mul_(scale).add_(self._margin * scale - 1)
        grid = where.T[None, None, None]
        return F.grid_sample(self.image[None], grid, padding_mode="border", align_corners=True)[0].flatten(1)

    def _on_cpu(self, where: torch.Tensor, z_lowest: float, z_highest: float) -> torch.Tensor:
        """(C, n) at points moved to the nearest point inside. Overwrites `where`; every operation counts here."""
        x, y, z = where
        margin = self._margin
        channels, depth, height, width = self.image.shape
        top = float(np.nextafter(np.float32(depth - 1), np.float32(0))) - margin  # so that there is a slice above
        first, last = (int(np.floor(min(max(e, -margin), top))) + margin for e in (z_lowest, z_highest))
        below = z.clamp_(-margin, top).floor()
        z.sub_(below)  # from here on the weight of the slice above
        # the slices first..last as one picture, slice under slice; rows do not mix, as y ends at the last row
        rows = (last - first + 1) * height
        scale = 2 / max(rows - 1, 1)
        start = torch.tensor(((margin - first) * height + margin) * scale - 1)
        torch.add(start, below, alpha=height * scale, out=below)
        torch.add(below, y.clamp_(-margin, height - 1 - margin), alpha=scale, out=y)
        scale = 2 / max(width - 1, 1)
        torch.add(torch.tensor(margin * scale - 1), x, alpha=scale, out=x)
        parts = where.view(3, self._parts, -1)
        grid = parts[:2].permute(1, 2, 0)[:, None]
        picture = self._pairs[:, first]
        strides = 0, self._pairs.stride(0), width, 1
        picture = picture.as_strided((self._parts, 2 * channels, rows, width), strides, picture.storage_offset())
        values = F.grid_sample(picture, grid, padding_mode="border", align_corners=True)
        low, high = values.view(self._parts, 2, channels, -1).unbind(1)
        found = torch.empty(channels, *parts.shape[1:])
        torch.lerp(low, high, parts[2][:, None], out=found.transpose(0, 1))
        return found.flatten(1)


def _slab_points(device: torch.device) -> int:
    return SLAB_POINTS if device.type == "cpu" else 32 * SLAB_POINTS


def at_points(image: torch.Tensor, coordinates: torch.Tensor, padding: str = "zeros") -> torch.Tensor:
    """Sample an image at given points.

    Args:
        image: (C, D, H, W) float32.
        coordinates: (3, ...), voxels of `image`, component c along its tensor axis c.
        padding: see `Sampler`.

    Returns:
        (C, ...).
    """
    flat = coordinates.reshape(3, -1)
    if loops := _loops_for(image):
        return loops.at_points(image, flat, padding).view(-1, *coordinates.shape[1:])
    sampler = Sampler(image, padding)
    result = torch.empty(image.shape[0], flat.shape[1], device=image.device)
    slab = _slab_points(image.device)
    for start in range(0, flat.shape[1], slab):
        some = flat[:, start : start + slab]
        count = some.shape[1]
        where = sampler.points(count)
        for axis in range(3):
            where[2 - axis] = some[axis]
        result[:, start : start + count] = sampler.look_up(count)
    return result.view(-1, *coordinates.shape[1:])


def displaced(image: torch.Tensor, displacement: torch.Tensor, padding: str = "zeros") -> torch.Tensor | None:
    """``image(x + u(x))`` in one pass; None where there are no compiled loops.

    Args:
        image: (C, D, H, W) float32.
        displacement: u, (3, D, H, W), voxels.
        padding: "zeros" or "border".
    """
    loops = _loops_for(image)
    return loops.displaced(image, displacement, padding) if loops else None


def composed(first: torch.Tensor, second: torch.Tensor) -> torch.Tensor | None:
    """``u2(x) + u1(x + u2(x))``, u1 continued at its edge value; None where there are no compiled loops.

    Args:
        first, second: u1 and u2, (3, D, H, W) float32, voxels.
    """
    loops = _loops_for(first)
    return loops.composed(first, second) if loops else None


def averaged(image: torch.Tensor, weights: Sequence[torch.Tensor]) -> torch.Tensor:
    """An image (D, H, W) with each axis replaced by weighted sums along it.

    Args:
        image: float32.
        weights: for each axis (n', n), mostly zeros: row m holds what the n voxels add to the m-th of n'.

    Returns:
        (D', H', W').
    """
    if not torch.is_grad_enabled() and (loops := _loops_for(image)):
        return loops.averaged(image, weights)
    down, across, along = weights
    image = across @ (image @ along.T)
    return (down @ image.flatten(1)).view(down.shape[0], *image.shape[1:])


def on_lattice(
    image: torch.Tensor,
    shape: Sequence[int],
    matrix: np.ndarray,
    displacement: torch.Tensor | None = None,
    to_field: np.ndarray | None = None,
    out: torch.Tensor | None = None,
) -> torch.Tensor:
    """All slabs of `slabs_on_lattice` with padding "zeros" together, (D', H', W') float32; or `out`, filled."""
    result = torch.empty(tuple(shape), device=image.device) if out is None else out
    lattice = _compiled_lattice(image, shape, matrix, displacement, to_field)
    if lattice and _is_plain(result) and result.is_contiguous():
        lattice.write(0, result)
        return result
    for start, stop, values in slabs_on_lattice(image, shape, matrix, displacement, to_field):
        result[start:stop] = values
    return result


class Puller:
    """An image to be pulled through one coarse displacement after the other: ``image(x + up-sampled u(x))``.

    For networks in bfloat16 compiled loops look it up in 8 bits, which is as precise as what such networks see.
    """

    def __init__(self, image: torch.Tensor, precision: torch.dtype) -> None:
        """Prepare `image`, (D, H, W) float32, for networks of `precision`."""
        self._image = image
        self._bytes = None
        if precision == torch.bfloat16 and (loops := _loops_for(image)):
            low, high = (float(end) for end in image.aminmax())
            self._bytes = loops.Bytes(image, low, high) if np.isfinite(high - low) else None

    def write(self, displacement: torch.Tensor, out: torch.Tensor) -> None:
        """Fill `out`, (D, H, W) with any strides; u is (3, d, h, w) in voxels of its grid, which has the same corners.

        Outside the image lies zero.
        """
        ratio, to_field = self._how(displacement)
        if not self._bytes:
            scaled = displacement * torch.tensor(ratio, device=displacement.device).view(3, 1, 1, 1)
            on_lattice(self._image, self._image.shape, np.eye(4), scaled, to_field, out)
            return
        found = out if _is_plain(out) and out.is_contiguous() else torch.empty(self._image.shape)
        self._bytes.pull(displacement, ratio, self._lines(displacement, to_field), found)
        if found is not out:
            out.copy_(found)

    def write_blocks(self, displacement: torch.Tensor, values: torch.Tensor) -> None:
        """Fill the moving image of an entry of a `cpu_layout.ImagePair` in blocks, the rest as in `write`."""
        if self._bytes:
            ratio, to_field = self._how(displacement)
            self._bytes.pull_into_blocks(displacement, ratio, self._lines(displacement, to_field), values)
            return
        loops, found = compiled(), torch.empty(self._image.shape)
        assert loops is not None
        self.write(displacement, found)
        loops.into_blocks(found, values, 0)

    def _how(self, displacement: torch.Tensor) -> tuple[list[float], np.ndarray]:
        """The image's voxels to those of a field, and the map from its indices to the field's."""
        sizes = zip(self._image.shape, displacement.shape[1:], strict=True)
        ratio = [(n - 1) / max(m - 1, 1) for n, m in sizes]
        return ratio, np.diag([*(1 / r if r else 1.0 for r in ratio), 1.0])

    def _lines(self, displacement: torch.Tensor, to_field: np.ndarray) -> list[tuple[np.ndarray, ...]]:
        return [(n.low, n.high, n.weight) for n in _lines(displacement, to_field, self._image.shape, [0, 1, 2])]


def _compiled_lattice(
    image: torch.Tensor,
    shape: Sequence[int],
    matrix: np.ndarray,
    displacement: torch.Tensor | None,
    to_field: np.ndarray | None,
    padding: str = "zeros",
    outside: float = 0.0,
) -> Lattice | None:
    """The compiled loops over a lattice; None where there are none."""
    if not (loops := _loops_for(image)):
        return None
    if displacement is None or to_field is None or not (axes := _axes_of(to_field, shape)):
        return loops.Lattice(image, matrix, displacement, to_field, padding=padding, outside=outside)
    lines = [(n.low, n.high, n.weight) for n in _lines(displacement, to_field, shape, axes)]
    return loops.Lattice(image, matrix, displacement, to_field, axes, lines, padding, outside)


def slabs_on_lattice(
    image: torch.Tensor,
    shape: Sequence[int],
    matrix: np.ndarray,
    displacement: torch.Tensor | None = None,
    to_field: np.ndarray | None = None,
    *,
    padding: str = "zeros",
    outside: float = 0.0,
) -> Iterator[tuple[int, int, torch.Tensor]]:
    """Sample an image at ``M x + u(F x)`` for every index x of a lattice, u interpolated linearly on the way.

    One pass: neither the coordinates nor the field at the lattice's size are ever whole in memory.

    Args:
        image: (D, H, W) float32.
        shape: (D', H', W') of the lattice.
        matrix: M, 3x4 or 4x4, lattice index -> image index (tensor-axis order).
        displacement: u, (3, d, h, w), in voxels of `image`, continued at its edge value outside its grid.
        to_field: F, 4x4, lattice index -> index of `displacement`.
        padding, outside: see `Sampler`.

    Yields:
        (start, stop, values): slices start to stop of the lattice, (stop - start, H', W') float32.
    """
    depth, height, width = shape
    slab = max(1, _slab_points(image.device) // (height * width))
    if lattice := _compiled_lattice(image, shape, matrix, displacement, to_field, padding, outside):
        slab = max(1, COMPILED_SLAB_POINTS // (height * width))
        for start in range(0, depth, slab):
            values = torch.empty(min(slab, depth - start), height, width)
            lattice.write(start, values)
            yield start, start + len(values), values
        return
    sampler = Sampler(image[None], padding, outside)
    points = _points(matrix, displacement, to_field, shape, image.device)
    for start in range(0, depth, slab):
        stop = min(start + slab, depth)
        count = (stop - start) * height * width
        points.write(start, stop, sampler.points(count).view(3, stop - start, height, width))
        yield start, stop, sampler.look_up(count, points.ends(start, stop)).view(stop - start, height, width)


def points_on_lattice(
    shape: Sequence[int], matrix: np.ndarray, displacement: torch.Tensor, to_field: np.ndarray, halo: int = 0
) -> Iterator[tuple[int, int, torch.Tensor]]:
    """The points ``M x + u(F x)`` themselves, for every index x of a lattice; arguments as in `slabs_on_lattice`.

    Args:
        halo: so many slices more on either side of each slab, as far as the lattice has them.

    Yields:
        (start, stop, points): of slices start to stop, (3, slices, H', W'), component c of M's row c.
    """
    points = _points(matrix[[2, 1, 0]], displacement.flip(0), to_field, shape, displacement.device)
    depth, height, width = shape
    slab = max(4 * halo, _slab_points(displacement.device) // (height * width), 1)
    for start in range(0, depth, slab):
        stop = min(start + slab, depth)
        low, high = max(start - halo, 0), min(stop + halo, depth)
        where = torch.empty(3, high - low, height, width, device=displacement.device)
        points.write(low, high, where)
        yield start, stop, where


def _points(
    matrix: np.ndarray,
    displacement: torch.Tensor | None,
    to_field: np.ndarray | None,
    shape: Sequence[int],
    device: torch.device,
) -> _Affine | _AlongAxes | _Oblique:
    if displacement is None or to_field is None:
        return _Affine(matrix, shape, device)
    if _axes_of(to_field, shape) is None:
        return _Oblique(matrix, displacement, to_field, shape)
    return _AlongAxes(matrix, displacement, to_field, shape)


def _xyz(matrix: np.ndarray, device: torch.device) -> torch.Tensor:
    """Rows of an index matrix in the order (x, y, z), (3, 4)."""
    return torch.from_numpy(np.ascontiguousarray(matrix[:3][::-1])).to(device=device, dtype=torch.float32)


class _Affine:
    """The points ``M x`` of a lattice's slices."""

    def __init__(self, matrix: np.ndarray, shape: Sequence[int], device: torch.device) -> None:
        self._matrix, self._size = np.asarray(matrix[:3][::-1], dtype=float), shape[1:]
        rows = _xyz(matrix, device)
        j = torch.arange(shape[1], device=device, dtype=torch.float32)[:, None]
        i = torch.arange(shape[2], device=device, dtype=torch.float32)[None, :]
        self.plane = torch.stack([r[3] + j * r[1] + i * r[2] for r in rows])
        self._down = rows[:, 0]

    def down(self, start: int, stop: int) -> torch.Tensor:
        """What slices start..stop add to `plane`, (3, stop - start, 1, 1)."""
        k = torch.arange(start, stop, device=self.plane.device, dtype=torch.float32)
        return (self._down[:, None] * k)[:, :, None, None]

    def ends(self, start: int, stop: int) -> _Ends:
        """Between which the points of slices start..stop lie; a map of a box has its ends at corners."""
        corners = np.array(list(itertools.product((start, stop - 1), (0, self._size[0] - 1), (0, self._size[1] - 1))))
        points = corners @ self._matrix[:, :3].T + self._matrix[:, 3]
        return _ends(points.min(0), points.max(0))

    def write(self, start: int, stop: int, where: torch.Tensor) -> None:
        torch.add(self.plane[:, None], self.down(start, stop), out=where)


def _ends(low: np.ndarray, high: np.ndarray) -> _Ends:
    """The same a little wider, as single precision rounds."""
    room = 1e-3 + 1e-6 * np.maximum(np.abs(low), np.abs(high))
    return list(zip((low - room).tolist(), (high + room).tolist(), strict=True))


class _Displaced:
    """The points ``M x + u(F x)``: what both ways to get u have in common."""

    def __init__(self, matrix: np.ndarray, displacement: torch.Tensor, shape: Sequence[int]) -> None:
        self._affine = _Affine(matrix, shape, displacement.device)
        low, high = displacement.flip(0).flatten(1).aminmax(dim=1)
        self._reach = low.cpu().numpy().astype(float), high.cpu().numpy().astype(float)

    def ends(self, start: int, stop: int) -> _Ends:
        """See `_Affine.ends`."""
        low, high = np.array(self._affine.ends(start, stop)).T
        return _ends(low + self._reach[0], high + self._reach[1])


class _Oblique(_Displaced):
    """The points ``M x + u(F x)`` where the axes of the lattice and of the field are not parallel."""

    def __init__(
        self, matrix: np.ndarray, displacement: torch.Tensor, to_field: np.ndarray, shape: Sequence[int]
    ) -> None:
        super().__init__(matrix, displacement, shape)
        self._in_field = _Affine(to_field, shape, displacement.device)
        self._field = Sampler(displacement.flip(0))

    def write(self, start: int, stop: int, where: torch.Tensor) -> None:
        count = where[0].numel()
        self._in_field.write(start, stop, self._field.points(count).view_as(where))
        self._affine.write(start, stop, where)
        where += self._field.look_up(count, self._in_field.ends(start, stop)).view_as(where)


class _AlongAxes(_Displaced):
    """The points ``M x + u(F x)`` where the field's axes are the lattice's, also permuted or flipped.

    Linear interpolation is done axis by axis, which is the same and faster, as products with matrices of mostly zeros:
    x for the whole small field, y for those of its slices that lie about some slabs, z for the slab.
    """

    def __init__(
        self, matrix: np.ndarray, displacement: torch.Tensor, to_field: np.ndarray, shape: Sequence[int]
    ) -> None:
        super().__init__(matrix, displacement, shape)
        axes = _axes_of(to_field, shape)
        assert axes is not None
        values = displacement.flip(0).permute(0, *(1 + a for a in axes))
        self._z, y, x = _lines(displacement, to_field, shape, axes)
        self._values = values @ x.matrix(values.shape[3], values.device).T  # (3, d, h, W)
        self._across = y.matrix(values.shape[2], values.device)
        self._down = self._affine.down(0, 2)[:, 1]
        self._rate, self._offset = float(to_field[axes[0], 0]), float(to_field[axes[0], 3])
        self._first, self._slices = 0, torch.empty(3, 0, 0, 0)

    def _between(self, low: int, high: int) -> torch.Tensor:
        """The points at the places of the field's slices low..high, (3, high - low, H, W)."""
        if not self._first <= low <= high <= self._first + self._slices.shape[1]:
            count = max(high - low, _SLICES_AT_ONCE)  # with those that come next
            first = low if self._rate > 0 else max(high - count, 0)
            found = self._across @ self._values[:, first : first + count]
            found += self._affine.plane[:, None]
            place = (torch.arange(first, first + found.shape[1], device=found.device) - self._offset) / self._rate
            found += self._down[:, None] * place[:, None, None]
            self._first, self._slices = first, found
        return self._slices[:, low - self._first : high - self._first]

    def write(self, start: int, stop: int, where: torch.Tensor) -> None:
        line = self._z.part(start, stop)
        low, high = int(line.low.min()), int(line.high.max()) + 1
        slices = self._between(low, high)
        weights = line.matrix(high - low, where.device, low)
        for points, between in zip(where, slices, strict=True):
            torch.mm(weights, between.flatten(1), out=points.flatten(1))
        for n in line.excess.nonzero()[0]:
            where[:, n] += self._down * float(line.excess[n])


@dataclass(frozen=True)
class _Line:
    """Linear interpolation along one axis of a field, for every lattice voxel along it.

    Attributes:
        low, high: neighbours in the field.
        weight: of the higher one.
        excess: how many lattice voxels the point lies beyond the field's last voxel.
    """

    low: np.ndarray
    high: np.ndarray
    weight: np.ndarray
    excess: np.ndarray

    def part(self, start: int, stop: int) -> _Line:
        """Of lattice voxels start..stop."""
        return _Line(*(values[start:stop] for values in (self.low, self.high, self.weight, self.excess)))

    def matrix(self, size: int, device: torch.device, first: int = 0) -> torch.Tensor:
        """(lattice voxels, size) that multiplies the field's voxels from `first` on."""
        found = np.zeros((len(self.low), size), dtype=np.float32)
        rows = np.arange(len(self.low))
        found[rows, self.low - first] = 1 - self.weight
        found[rows, self.high - first] += self.weight.astype(np.float32)
        return torch.from_numpy(found).to(device)


def _lines(displacement: torch.Tensor, to_field: np.ndarray, shape: Sequence[int], axes: list[int]) -> list[_Line]:
    """How a lattice lies in a field that it runs along, axis by axis."""
    lines = []
    for n, axis, rate, offset in zip(shape, axes, to_field[axes, range(3)], to_field[axes, 3], strict=True):
        last = displacement.shape[1 + axis] - 1
        asked = rate * np.arange(n) + offset
        position = asked.clip(0, last)
        low = np.minimum(np.floor(position), max(last - 1, 0)).astype(np.int64)
        lines.append(_Line(low, np.minimum(low + 1, last), position - low, (asked - position) / rate))
    return lines


def _axes_of(to_field: np.ndarray, shape: Sequence[int]) -> list[int] | None:
    """The field axis that each lattice axis runs along; None if they are oblique to each other."""
    main = np.abs(to_field[:3, :3]).argmax(0)
    stray = to_field[:3, :3].copy()
    stray[main, range(3)] = 0
    if len(set(main.tolist())) < 3 or (np.abs(stray) @ np.array(shape)).max() > 1e-4:
        return None
    return [int(a) for a in main]
