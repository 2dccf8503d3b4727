"""Resamples on the fixed image's own grid by a dense field: the warped image and the Jacobian determinant.

Native grids are large (512 x 512 x 300), so everything goes slab by slab: beside the inputs and the result only some
slices are in memory. `geometry` does the same for transforms of any kind, by ITK.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import numpy as np
import torch

from LDRCore import sampling
from LDRCore.sampling.precise import PrecisePoints
from LDRCore.transforms.field import DenseField, multiply
from LDRCore.transforms.volume import Volume


@torch.no_grad()
def warp(
    moving: Volume,
    shape: Sequence[int],
    to_lps: np.ndarray,
    field: DenseField,
    dtype: np.dtype | type = np.float32,
    progress: Callable[[float], None] | None = None,
) -> np.ndarray:
    """Sample the moving image once, linearly, at ``A (x + u(x))`` for every voxel x of the fixed grid.

    The boundary condition is ITK's: up to half a voxel beyond the last voxel centre the edge value holds, then the
    moving image's smallest value, decided in double precision. What can only meet that value (air, a removed
    background) is not sampled. Integers are rounded; those of 8 and 16 bits cannot wrap around, as no value lies
    outside the moving image's range (float32 holds larger ones up to 2^24 exactly).

    Args:
        moving: the moving image.
        shape: (D, H, W) of the fixed grid.
        to_lps: 4x4, index of the fixed grid -> LPS mm.
        field: A and u.
        dtype: of the result.
        progress: called with 0..1 after each slab.

    Returns:
        (D, H, W) of `dtype`.
    """
    moving_from_fixed, linear, field_from_fixed = _on_grid(moving.from_lps, to_lps, field)
    u = field.displacement_vox[0]
    result = np.full(shape, moving.minimum, dtype)
    slabs = sampling.slabs_on_lattice(
        moving.data[0, 0],
        shape,
        moving_from_fixed,
        multiply(linear, u),
        field_from_fixed,
        padding="half",
        fill=moving.minimum,
        content=moving.content,
        precise=PrecisePoints(moving_from_fixed, u, linear, field_from_fixed),
    )
    for block, values in slabs:
        _store(values.round_() if np.issubdtype(dtype, np.integer) else values, result[block])
        if progress is not None:
            progress(block[0].stop / shape[0])
    return result


def _store(values: torch.Tensor, target: np.ndarray) -> None:
    """Copy values into an array and convert them: by torch, on all cores, if it has the type."""
    if target.dtype.name in ("uint8", "int16", "int32", "float32"):
        torch.from_numpy(target).copy_(values)
    else:
        target[:] = values.cpu().numpy()


def jacobian_determinant(shape: Sequence[int], to_lps: np.ndarray, field: DenseField) -> np.ndarray:
    """Compute det(dT/dx) of ``T(x) = A (x + u(x))`` at every voxel of the fixed grid.

    Args:
        shape, to_lps, field: see `jacobian_slabs`.

    Returns:
        (D, H, W) float32.
    """
    result = np.empty(shape, np.float32)
    for start, stop, determinant in jacobian_slabs(shape, to_lps, field):
        result[start:stop] = determinant
    return result


@torch.no_grad()
def jacobian_slabs(
    shape: Sequence[int], to_lps: np.ndarray, field: DenseField
) -> Iterator[tuple[int, int, np.ndarray]]:
    """Compute det(dT/dx) of ``T(x) = A (x + u(x))`` on the fixed grid, some slices at a time.

    Takes central differences along the grid's axes, one-sided at its borders, as `geometry.jacobian_determinant_image`.
    Divides the determinant by index by that of the grid itself, which accounts for direction, spacing and flips.

    Args:
        shape: (D, H, W) of the fixed grid.
        to_lps: 4x4, index of the fixed grid -> LPS mm.
        field: A and u.

    Yields:
        (start, stop, determinant): of slices start to stop, (slices, H, W) float32.
    """
    scale = 1 / float(np.linalg.det(to_lps[:3, :3]))
    matrix, linear, to_field = _on_grid(np.eye(4), to_lps, field)
    displacement = multiply(linear, field.displacement_vox[0])
    for start, stop, determinant in sampling.determinants_on_lattice(shape, matrix, displacement, to_field):
        yield start, stop, determinant.mul_(scale).cpu().numpy()


def _on_grid(
    target_from_lps: np.ndarray, to_lps: np.ndarray, field: DenseField
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Rewrite a dense field for the indices i of a grid: ``target_from_lps A (x + u(x)) = M i + L u(F i)``.

    Args:
        target_from_lps: 4x4.
        to_lps: 4x4, ``x = to_lps i``.
        field: A and u.

    Returns:
        (M, L, F): M, 4x4, target <- index; L, 3x3, target <- voxels of u; F, 4x4, index of u <- index.
    """
    target_from_mapped = target_from_lps @ field.affine_lps
    linear = target_from_mapped[:3, :3] @ field.grid.to_lps[:3, :3]
    return target_from_mapped @ to_lps, linear, np.linalg.inv(field.grid.to_lps) @ to_lps
