"""How a lattice of points lies in the grid of a displacement, and which part of it can meet an image's content.

A lattice is every index of an array of a given shape. Matrices map its indices (tensor order, homogeneous) to those of
another array. Numpy only; both backends use it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

Block = tuple[slice, slice, slice]
"""Part of a lattice: slices, rows, columns."""

Box = tuple[np.ndarray, np.ndarray]
"""Lower and upper corner, (3,) each, both inclusive."""


@dataclass(frozen=True)
class Line:
    """Linear interpolation along one axis of a grid, for every lattice index along it.

    Attributes:
        low, high: indices of the two neighbours, (n,) int64.
        weight: of the higher one, (n,) float64.
        excess: by how many lattice indices the point lies beyond the grid's last voxel, (n,) float64.
    """

    low: np.ndarray
    high: np.ndarray
    weight: np.ndarray
    excess: np.ndarray

    def part(self, start: int, stop: int) -> Line:
        """Return the line for the lattice indices start to stop."""
        return Line(*(values[start:stop] for values in (self.low, self.high, self.weight, self.excess)))

    def is_identity(self, size: int) -> bool:
        """Return whether lattice index n is voxel n of a grid of `size` voxels, for all of them."""
        ends = np.where(self.weight == 1, self.high, self.low)
        exact = bool(((self.weight == 0) | (self.weight == 1)).all())
        return exact and len(ends) == size and bool((ends == np.arange(size)).all())

    def matrix(self, size: int, first: int = 0) -> np.ndarray:
        """Return the (n, size) float32 matrix that interpolates `size` voxels of the grid, from `first` on."""
        matrix = np.zeros((len(self.low), size), dtype=np.float32)
        rows = np.arange(len(self.low))
        matrix[rows, self.low - first] = 1 - self.weight
        matrix[rows, self.high - first] += self.weight.astype(np.float32)
        return matrix


def parallel_axes(to_field: np.ndarray, shape: Sequence[int]) -> list[int] | None:
    """Return the field axis that each lattice axis runs along, or None where they are oblique to each other.

    Args:
        to_field: 4x4, lattice index -> index of the field.
        shape: (D, H, W) of the lattice. A drift of less than 1e-4 voxel over the whole lattice counts as parallel.
    """
    main = np.abs(to_field[:3, :3]).argmax(0)
    stray = to_field[:3, :3].copy()
    stray[main, range(3)] = 0
    if len(set(main.tolist())) < 3 or (np.abs(stray) @ np.array(shape)).max() > 1e-4:
        return None
    return [int(axis) for axis in main]


def interpolation_lines(
    field_shape: Sequence[int], to_field: np.ndarray, shape: Sequence[int], axes: Sequence[int]
) -> list[Line]:
    """Return how a lattice that is parallel to a field lies in it, one `Line` per lattice axis.

    Args:
        field_shape: (d, h, w) of the field.
        to_field: 4x4, lattice index -> index of the field.
        shape: (D, H, W) of the lattice.
        axes: see `parallel_axes`.
    """
    lines = []
    for n, axis, rate, offset in zip(shape, axes, to_field[axes, range(3)], to_field[axes, 3], strict=True):
        last = field_shape[axis] - 1
        wanted = rate * np.arange(n) + offset
        position = wanted.clip(0, last)
        low = np.minimum(np.floor(position), max(last - 1, 0)).astype(np.int64)
        lines.append(Line(low, np.minimum(low + 1, last), position - low, (wanted - position) / rate))
    return lines


@dataclass(frozen=True)
class Spans:
    """Which part of each row of a lattice is worth sampling.

    Attributes:
        first, stop: (D, H) int64: indices first <= i < stop along the last axis; equal where there is nothing.
    """

    first: np.ndarray
    stop: np.ndarray

    def window(self, start: int, stop: int) -> tuple[slice, slice]:
        """Return the smallest block of rows and columns that holds the spans of slices start to stop."""
        first, last = self.first[start:stop], self.stop[start:stop]
        used = first < last
        rows = used.any(0).nonzero()[0]
        if not len(rows):
            return slice(0, 0), slice(0, 0)
        return slice(int(rows[0]), int(rows[-1]) + 1), slice(int(first[used].min()), int(last[used].max()))


def whole_rows(shape: Sequence[int]) -> Spans:
    """Return spans that leave nothing out of a lattice (D, H, W)."""
    return Spans(np.zeros(shape[:2], np.int64), np.full(shape[:2], shape[2], np.int64))


def spans_within(matrix: np.ndarray, shape: Sequence[int], box: Box, reach: Box | None = None) -> Spans:
    """Find where ``M x + u`` can lie within a box, row by row of a lattice.

    Along a row each component of M x is a line, so that the indices within the box widened by u are one interval.

    Args:
        matrix: M, 3x4 or 4x4, lattice index -> image index.
        shape: (D, H, W) of the lattice.
        box: in image indices.
        reach: smallest and largest value of each component of u; zero if not given, unlimited where NaN.
    """
    low, high = box
    if reach is not None:
        low = np.nan_to_num(low - reach[1], nan=-np.inf, posinf=np.inf, neginf=-np.inf)
        high = np.nan_to_num(high - reach[0], nan=np.inf, posinf=np.inf, neginf=-np.inf)
    k, j = np.arange(shape[0])[:, None], np.arange(shape[1])[None, :]
    first, last = np.zeros(shape[:2]), np.full(shape[:2], shape[2] - 1.0)
    for row, lowest, highest in zip(matrix[:3], low - 1e-3, high + 1e-3, strict=True):
        begin, step = row[0] * k + row[1] * j + row[3], row[2]
        if abs(step) < 1e-9:
            last = np.where((begin >= lowest) & (begin <= highest), last, -1.0)
            continue
        enters, leaves = (lowest, highest) if step > 0 else (highest, lowest)
        np.maximum(first, (enters - begin) / step, out=first)
        np.minimum(last, (leaves - begin) / step, out=last)
    stop = np.floor(last.clip(-1)).astype(np.int64) + 1
    start = np.ceil(first.clip(max=shape[2])).astype(np.int64)
    return Spans(np.minimum(start, stop), stop)
