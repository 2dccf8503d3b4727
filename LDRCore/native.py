"""What a dense field means on the fixed image's own grid: the warped image and the Jacobian.

Native grids are large (512 x 512 x 300), so everything goes slab by slab: beside the inputs and the result only some
slices are in memory. `geometry` does the same for transforms of any kind, by ITK.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import torch

from LDRCore import sampling
from LDRCore.inference import DenseField
from LDRCore.preprocess import Volume


@torch.no_grad()
def warp(
    moving: Volume,
    shape: Sequence[int],
    to_lps: np.ndarray,
    dense: DenseField,
    outside: float,
    dtype: np.dtype | type = np.float32,
    progress: Callable[[float], None] | None = None,
) -> np.ndarray:
    """Sample the moving image once, linearly, at ``A (x + u(x))`` for every voxel x of the fixed grid.

    The edge rule is ITK's: up to half a voxel beyond the last voxel centre the edge value holds, then `outside`.
    Integers are rounded; those of 8 and 16 bits cannot wrap around, as no value lies outside the moving image's range
    (float32 holds larger ones up to 2^24 exactly).

    Args:
        moving: the moving image.
        shape: (D, H, W) of the fixed grid.
        to_lps: 4x4, index of the fixed grid -> LPS mm.
        dense: A and u.
        outside: value outside the moving image.
        dtype: of the result.
        progress: called with 0..1 after each slab.

    Returns:
        (D, H, W) of `dtype`.
    """
    from_lps = np.linalg.inv(moving.to_lps)
    slabs = sampling.slabs_on_lattice(
        moving.data[0, 0], shape, *_lattice(from_lps, to_lps, dense), padding="half", outside=outside
    )
    result = np.empty(shape, dtype)
    for start, stop, values in slabs:
        _store(values.round_() if np.issubdtype(dtype, np.integer) else values, result[start:stop])
        if progress is not None:
            progress(stop / shape[0])
    return result


def _store(values: torch.Tensor, into: np.ndarray) -> None:
    """Copy and convert; by torch, on all cores, where it has the type."""
    if into.dtype.name in ("uint8", "int16", "int32", "float32"):
        torch.from_numpy(into).copy_(values)
    else:
        into[:] = values.cpu().numpy()


@torch.no_grad()
def jacobian_determinant(shape: Sequence[int], to_lps: np.ndarray, dense: DenseField) -> np.ndarray:
    """det(dT/dx) of ``T(x) = A (x + u(x))`` at every voxel of the fixed grid, (D, H, W) float32.

    Central differences along the grid's axes, one-sided at its borders, as `geometry.jacobian_determinant_image`; the
    determinant by index over that of the grid itself, so that direction, spacing and flips need no further thought.
    """
    matrix, field, to_field = _lattice(np.eye(4), to_lps, dense)
    affine = torch.from_numpy(2 * matrix[:3, :3]).to(field)[:, :, None, None, None]
    scale = 1 / (8 * float(np.linalg.det(to_lps[:3, :3])))
    result = np.empty(shape, np.float32)
    # of the field alone, whose numbers are small; the derivative of the affine part is known
    for start, stop, bend in sampling.points_on_lattice(shape, np.zeros((4, 4)), field, to_field, halo=1):
        low = max(start - 1, 0)
        a, b, c = (_differences(bend, axis + 1).add_(affine[:, axis]) for axis in range(3))
        cross = b.roll(-1, 0) * c.roll(-2, 0) - b.roll(-2, 0) * c.roll(-1, 0)
        determinant = (a * cross).sum(0).mul_(scale)
        result[start:stop] = determinant[start - low : stop - low].cpu().numpy()
    return result


def _lattice(
    to_target: np.ndarray, to_lps: np.ndarray, dense: DenseField
) -> tuple[np.ndarray, torch.Tensor, np.ndarray]:
    """(M, v, F) with ``to_target(A (x + u(x))) = M i + v(F i)`` for index i of a grid: 4x4, (3, d, h, w), 4x4."""
    whole = to_target @ dense.affine_lps
    turn = torch.from_numpy(whole[:3, :3] @ dense.grid.to_lps[:3, :3]).to(dense.displacement_vox)
    field = torch.einsum("rc,cdhw->rdhw", turn, dense.displacement_vox[0])
    return whole @ to_lps, field, np.linalg.inv(dense.grid.to_lps) @ to_lps


def _differences(values: torch.Tensor, axis: int) -> torch.Tensor:
    """Twice the derivative along an axis: central differences, one-sided at the two ends."""
    result = torch.empty_like(values)
    n = values.shape[axis]
    if n > 2:
        inner = result.narrow(axis, 1, n - 2)
        torch.sub(values.narrow(axis, 2, n - 2), values.narrow(axis, 0, n - 2), out=inner)
    for end, step in ((0, 0), (n - 1, n - 2)):
        difference = values.narrow(axis, step + 1, 1) - values.narrow(axis, step, 1)
        result.narrow(axis, end, 1).copy_(difference.mul_(2))
    return result
