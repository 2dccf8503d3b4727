"""The points of a lattice at which an image is sampled, written block by block with torch alone."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

from LDRCore.sampling import lattice
from LDRCore.sampling.lattice import Block
from LDRCore.sampling.torch_sampler import Bounds, SliceSampler

_SLICES_AT_ONCE = 4  # of a field, interpolated to the rows and columns of a lattice
_BAND = 8  # slices of a lattice that are interpolated together from the few slices of a field about them


class ListedPoints:
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
) -> Affine | OnGrid | Parallel | Oblique:
    """Return what writes the points ``M x + u(F x)`` of a lattice, components in the order x, y, z."""
    if displacement is None or to_field is None:
        return Affine(matrix, shape, device)
    if displacement.shape[1:] == tuple(shape) and np.array_equal(to_field, np.eye(4)):
        return OnGrid(matrix, displacement, shape)
    if lattice.parallel_axes(to_field, shape) is None:
        return Oblique(matrix, displacement, to_field, shape)
    return Parallel(matrix, displacement, to_field, shape)


def reversed_components(field: torch.Tensor) -> torch.Tensor:
    """Components in the order x, y, z; several times faster than torch's flip."""
    return torch.stack(field.unbind()[::-1])


def component_bounds(field: torch.Tensor) -> tuple[np.ndarray, np.ndarray]:
    """Return the smallest and the largest value of each component; several times faster than along an axis."""
    low, high = torch.stack([torch.stack(component.aminmax()) for component in field]).T.cpu().numpy().astype(float)
    return low, high


class Affine:
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
        """Write the points of a block, (3, slices, rows, columns)."""
        slices, rows, columns = block
        torch.add(self.plane[:, None, rows, columns], self.step(slices.start, slices.stop), out=out)

    def write_listed(self, block: Block, listed: ListedPoints, out: torch.Tensor) -> None:
        """Write the listed points of a block, (3, count)."""
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
        self._affine = Affine(matrix, shape, displacement.device)
        low, high = component_bounds(displacement)
        self._reach = low[::-1], high[::-1]

    def bounds(self, block: Block) -> Bounds:
        """See `Affine.bounds`."""
        low, high = np.array(self._affine.bounds(block)).T
        return _widened(low + self._reach[0], high + self._reach[1])


class OnGrid(_Displaced):
    """The points ``M x + u(x)`` where the field lives on the lattice itself."""

    def __init__(self, matrix: np.ndarray, displacement: torch.Tensor, shape: Sequence[int]) -> None:
        super().__init__(matrix, displacement, shape)
        self._displacement = displacement

    def write(self, block: Block, out: torch.Tensor) -> None:
        """See `Affine.write`."""
        self._affine.write(block, out)
        for component, u in zip(out, reversed(self._displacement.unbind()), strict=True):
            component += u[block]


class Oblique(_Displaced):
    """The points ``M x + u(F x)`` where the axes of the lattice and of the field are not parallel."""

    def __init__(
        self, matrix: np.ndarray, displacement: torch.Tensor, to_field: np.ndarray, shape: Sequence[int]
    ) -> None:
        super().__init__(matrix, displacement, shape)
        self._in_field = Affine(to_field, shape, displacement.device)
        self._field = SliceSampler(reversed_components(displacement))

    def write(self, block: Block, out: torch.Tensor) -> None:
        """See `Affine.write`."""
        count = out[0].numel()
        self._in_field.write(block, self._field.buffer(count).view_as(out))
        self._affine.write(block, out)
        out += self._field.sample(count, self._in_field.bounds(block)).view_as(out)

    def write_listed(self, block: Block, listed: ListedPoints, out: torch.Tensor) -> None:
        """See `Affine.write_listed`."""
        self._in_field.write_listed(block, listed, self._field.buffer(listed.count))
        self._affine.write_listed(block, listed, out)
        out += self._field.sample(listed.count, self._in_field.bounds(block))


class Parallel(_Displaced):
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
        """See `Affine.write`."""
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
