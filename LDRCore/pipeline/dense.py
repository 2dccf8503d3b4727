"""Stage 2, dense: the networks look at a working grid that covers the fixed image's content.

The moving image is seen after applying the affine map, and neither where the fixed one ends other than in air. What
follows on the fixed image's own grid is `transforms.resample`. Torch, no files.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

from LDRCore.geometry import Grid
from LDRCore.pipeline.model import Model
from LDRCore.pipeline.preprocess import PreparedImage, continued, ends_in_tissue
from LDRCore.transforms.field import DenseField, with_taper

MAX_VOXELS = 5_000_000  # of a working grid; content that needs more is looked at more coarsely
TAPER_VOXELS = 6  # the field fades to zero over so many voxels outside the working grid, or more


def working_grid(model: Model, fixed: PreparedImage) -> Grid:
    """The grid that the dense networks see: covers the fixed image's content with a margin."""
    settings = model.card["working_grid"]
    return Grid.around(
        fixed.box_lps[0],
        fixed.box_lps[1],
        spacing_mm=settings["spacing_mm"],
        margin_mm=settings["margin_mm"],
        multiple=1 if model.cascade is None else model.cascade.multiple,
        max_voxels=MAX_VOXELS,
    )


@torch.no_grad()
def estimate_dense(
    model: Model,
    fixed: PreparedImage,
    moving: PreparedImage,
    affine_lps: np.ndarray,
    n_cascades: int,
) -> DenseField:
    """Run the dense networks after applying an affine map.

    Args:
        model: the networks.
        fixed, moving: prepared images.
        affine_lps: 4x4, fixed -> moving, LPS mm.
        n_cascades: how many networks to run; 0 leaves the displacement zero.
    """
    grid = working_grid(model, fixed)
    field_grid = grid if model.cascade is None else grid.coarser(model.cascade.field_stride)
    displacement = torch.zeros(1, 3, *field_grid.shape, dtype=torch.float32, device=fixed.fine.data.device)
    if model.cascade is not None and n_cascades:
        spacing = model.card["working_grid"]["spacing_mm"]  # which may be larger than what the images were prepared at
        target, source = fixed.fine.averaged(spacing), moving.fine.averaged(spacing)
        images = source.on(grid, affine_lps), target.on(grid)
        if ends_in_tissue(target):  # where the fixed image's view ends there is no edge to match
            known = continued(target).on(grid, padding="border") >= 0
            images = images[0] * known, images[1] * known
        displacement = model.cascade.dense(*images, n_cascades).displacement
    return with_taper(displacement, field_grid, affine_lps, TAPER_VOXELS)


def made_worse(evidence: dict[str, Any]) -> bool:
    """Return whether two images agree better by the affine map alone than after the networks.

    Networks that learned from different people do not stand still on two scans of one. Two heads onto themselves, also
    with noise and displacements of up to 2.6 mm: wherever local correlation fell, the mean error grew, else it shrank.

    Args:
        evidence: of the result, see `evidence.measure`.
    """
    correlation = evidence["local_correlation"]
    return bool(correlation["after"] < correlation["affine"])
