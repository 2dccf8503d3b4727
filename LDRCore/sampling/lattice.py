"""How a lattice of points lies in the grid of a displacement, and which part of it can meet an image's content.

A lattice is every index of an array of a given shape. Matrices map its indices (tensor order, homogeneous) to those of
another array. Numpy only; both backends use it.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

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


def corners(low: Sequence[float] | np.ndarray, high: Sequence[float] | np.ndarray) -> np.ndarray:
    """Return the 8 corners of a box, (8, 3)."""
    return np.array(list(itertools.product(*zip(low, high, strict=True))), dtype=float)


def sublattice(matrix: np.ndarray, shape: Sequence[int], box: Box, reach: Box | None = None) -> tuple[slice, ...]:
    """Return the smallest block of a lattice that holds every index x with ``M x + u`` within a box.

    Args:
        matrix: M, 3x4 or 4x4, lattice index -> image index.
        shape: (D, H, W) of the lattice.
        box: in image indices.
        reach: smallest and largest value of each component of u; zero if not given.

    Returns:
        A slice for each axis; empty ones where no index can lie within the box. Everything if M is singular.
    """
    square = np.eye(4)
    square[:3] = matrix[:3]
    if abs(np.linalg.det(square[:3, :3])) < 1e-12:
        return tuple(slice(0, n) for n in shape)
    low, high = box
    if reach is not None:
        low, high = low - reach[1], high - reach[0]
    back = np.linalg.inv(square)
    points = corners(low, high) @ back[:3, :3].T + back[:3, 3]
    first = np.floor(points.min(0) - 1e-3).clip(0, np.array(shape)).astype(int)
    stop = (np.ceil(points.max(0) + 1e-3) + 1).clip(first, np.array(shape)).astype(int)
    return tuple(slice(a, b) for a, b in zip(first.tolist(), stop.tolist(), strict=True))


def shifted(matrix: np.ndarray, first: Sequence[int]) -> np.ndarray:
    """Return a matrix for a lattice that begins at index `first` of another one."""
    out = np.array(matrix, dtype=float)
    out[:3, 3] += out[:3, :3] @ np.asarray(first, dtype=float)
    return out
