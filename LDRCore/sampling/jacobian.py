"""The points ``M x + u(F x)`` of a lattice and their Jacobian determinant by index, slab by slab, in torch alone."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np
import torch

from LDRCore.sampling import torch_cpu, torch_points


def points_on_lattice(
    shape: Sequence[int], matrix: np.ndarray, displacement: torch.Tensor, to_field: np.ndarray, halo: int
) -> Iterator[tuple[int, int, torch.Tensor]]:
    """See `sampling.points_on_lattice`."""
    points = torch_points.points_of_lattice(
        matrix[[2, 1, 0]], torch_points.reversed_components(displacement), to_field, shape, displacement.device
    )
    depth, height, width = shape
    slab = max(4 * halo, torch_cpu.slab_points(displacement.device) // 2 // (height * width), 1)
    for start in range(0, depth, slab):
        stop = min(start + slab, depth)
        low, high = max(start - halo, 0), min(stop + halo, depth)
        buffer = displacement.new_empty(3, high - low, height, width)
        points.write((slice(low, high), slice(0, height), slice(0, width)), buffer)
        yield start, stop, buffer


def determinants(
    shape: Sequence[int], matrix: np.ndarray, displacement: torch.Tensor, to_field: np.ndarray
) -> Iterator[tuple[int, int, torch.Tensor]]:
    """See `sampling.determinants_on_lattice`."""
    twice = (2 * matrix[:3, :3]).tolist()
    # of the displacement alone, whose numbers are small; the derivative of M x is known
    slabs = points_on_lattice(shape, np.zeros((4, 4)), displacement, to_field, halo=1)
    for start, stop, points in slabs:
        inner = slice(start - max(start - 1, 0), points.shape[1] - (min(stop + 1, shape[0]) - stop))
        a, b, c = (
            [d[inner].add_(row[axis]) for d, row in zip(_differences(points, axis + 1), twice, strict=True)]
            for axis in range(3)
        )
        determinant = (b[1] * c[2]).addcmul_(b[2], c[1], value=-1).mul_(a[0])
        determinant.addcmul_((b[2] * c[0]).addcmul_(b[0], c[2], value=-1), a[1])
        determinant.addcmul_((b[0] * c[1]).addcmul_(b[1], c[0], value=-1), a[2])
        yield start, stop, determinant.div_(8)


def _differences(values: torch.Tensor, axis: int) -> torch.Tensor:
    """Return twice the derivative along an axis: central differences, one-sided at the two ends."""
    result = torch.empty_like(values)
    n = values.shape[axis]
    if n > 2:
        inner = result.narrow(axis, 1, n - 2)
        torch.sub(values.narrow(axis, 2, n - 2), values.narrow(axis, 0, n - 2), out=inner)
    for end, before in ((0, 0), (n - 1, n - 2)):
        difference = values.narrow(axis, before + 1, 1) - values.narrow(axis, before, 1)
        result.narrow(axis, end, 1).copy_(difference.mul_(2))
    return result
