"""`sampling.determinants_on_lattice` as a compiled loop, for lattices that are parallel to the field.

The displacement is interpolated slice by slice into a ring buffer of three slices, so that nothing of the lattice's
size but the result is in memory.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator, Sequence

import numpy as np
import torch

from LDRCore.sampling.numba_loops import SLAB_POINTS, interpolated_rows
from LDRCore.sampling.numba_support import inline, loop, share


@inline
def _interpolate_slice(field, zs, ys, k, out):  # type: ignore[no-untyped-def]
    """Slice k of the displacement on the lattice, (3, H, W); arguments as in `numba_loops._parallel`."""
    low_z, high_z, wz = zs[0][k], zs[1][k], zs[2][k]
    for c in range(3):
        for j in range(out.shape[1]):
            low_y, high_y, wy = ys[0][j], ys[1][j], ys[2][j]
            near, far = field[c, low_z, low_y], field[c, high_z, low_y]
            low, lower = field[c, low_z, high_y], field[c, high_z, high_y]
            row = out[c, j]
            for i in range(len(row)):
                upper = near[i] + wz * (far[i] - near[i])
                row[i] = upper + wy * (low[i] + wz * (lower[i] - low[i]) - upper)


@inline
def _write_difference(before, after, one_sided, constant, out):  # type: ignore[no-untyped-def]
    """The derivative of a row along another axis, plus a constant."""
    factor = np.float32(1) if one_sided else np.float32(0.5)
    for i in range(len(out)):
        out[i] = factor * (after[i] - before[i]) + constant


@loop
def _determinants(field, matrix, zs, ys, depth, start, out, begin, end):  # type: ignore[no-untyped-def]
    """out[k]: determinant of the derivatives of slice start + k, for begin <= k < end."""
    _, height, width = out.shape
    ring = np.empty((3, 3, height, width), np.float32)
    d = np.empty((3, 3, width), np.float32)  # component, axis
    for k in range(max(start + begin - 1, 0), start + begin + 1):
        _interpolate_slice(field, zs, ys, k, ring[k % 3])
    for m in range(start + begin, start + end):
        above, below = min(m + 1, depth - 1), max(m - 1, 0)
        if above > m:
            _interpolate_slice(field, zs, ys, above, ring[above % 3])
        for j in range(height):
            after, before = min(j + 1, height - 1), max(j - 1, 0)
            for c in range(3):
                here = ring[m % 3, c]
                _write_difference(
                    ring[below % 3, c, j], ring[above % 3, c, j], above - below < 2, matrix[c, 0], d[c, 0]
                )
                _write_difference(here[before], here[after], after - before < 2, matrix[c, 1], d[c, 1])
                row, target = here[j], d[c, 2]
                _write_difference(row[: width - 2], row[2:], False, matrix[c, 2], target[1 : width - 1])
                target[0] = row[1] - row[0] + matrix[c, 2]
                target[width - 1] = row[width - 1] - row[width - 2] + matrix[c, 2]
            (p, q, r), (s, t, u), (v, w, x) = d[0], d[1], d[2]
            target = out[m - start, j]
            for i in range(width):
                target[i] = (
                    p[i] * (t[i] * x[i] - u[i] * w[i])
                    - q[i] * (s[i] * x[i] - u[i] * v[i])
                    + r[i] * (s[i] * w[i] - t[i] * v[i])
                )


def determinants(
    shape: Sequence[int], matrix: np.ndarray, displacement: torch.Tensor, to_field: np.ndarray
) -> Iterator[tuple[int, int, torch.Tensor]]:
    """See `sampling.determinants_on_lattice`; the lattice must be parallel to the field's axes."""
    depth, height, width = shape
    rows = interpolated_rows(displacement, to_field, shape)
    assert rows is not None
    field, zs, ys = rows
    linear = np.ascontiguousarray(matrix[:3, :3], np.float32)
    slab = max(1, SLAB_POINTS // (height * width))
    for start in range(0, depth, slab):
        out = np.empty((min(slab, depth - start), height, width), np.float32)
        arguments = field, linear, zs, ys, depth, start, out
        share(len(out), functools.partial(_determinants, *arguments))
        yield start, start + len(out), torch.from_numpy(out)
