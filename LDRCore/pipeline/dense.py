"""Stage 2, dense: the networks look at a working grid that covers the fixed image's content.

The moving image is seen after applying the affine map. What follows on the fixed image's own grid is
`transforms.resample`. Torch, no files.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch

from LDRCore.geometry import Grid
from LDRCore.pipeline import refine
from LDRCore.pipeline.model import Model
from LDRCore.pipeline.preprocess import PreparedImage
from LDRCore.transforms.field import DenseField, fade_out

MAX_VOXELS = 5_000_000  # of a working grid; content that needs more is looked at more coarsely
TAPER_VOXELS = 6  # the field fades to zero over so many voxels outside the working grid


def working_grid(model: Model, fixed: PreparedImage) -> Grid:
    """The grid that the dense networks see: covers the fixed image's content with a margin."""
    settings = model.card["working_grid"]
    return Grid.around(
        fixed.box_lps[0],
        fixed.box_lps[1],
        spacing_mm=settings["spacing_mm"],
        margin_mm=settings["margin_mm"],
        multiple=model.cascade.multiple,
        max_voxels=MAX_VOXELS,
    )


@torch.no_grad()
def estimate_dense(
    model: Model,
    fixed: PreparedImage,
    moving: PreparedImage,
    affine_lps: np.ndarray,
    n_cascades: int,
    refine_steps: int = 0,
    progress: Callable[[float], None] | None = None,
) -> DenseField:
    """Run the dense networks behind an affine map, and `refine` what they found."""
    grid = working_grid(model, fixed)
    displacement = model.cascade.dense(moving.fine.on(grid, affine_lps), fixed.fine.on(grid), n_cascades).displacement
    field_grid = grid.coarser(model.cascade.field_stride)
    if refine_steps:
        pair = moving.coarse.on(field_grid, affine_lps), fixed.coarse.on(field_grid)
        displacement = refine.refine(displacement, *pair, refine_steps, progress=progress)
    return DenseField(fade_out(displacement, TAPER_VOXELS), field_grid.padded(TAPER_VOXELS), affine_lps, TAPER_VOXELS)
