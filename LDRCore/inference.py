"""The one path from two prepared images to a transform. Torch, no files.

Stage 1, affine: the stem looks at 4 mm images on a cube about the fixed image's centre, several times, each time at
what is left over. Stage 2, dense: the networks look at a working grid that covers the fixed image's content, with the
moving image already behind the affine map. What follows on the fixed image's own grid is `native`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch

from LDRCore import geometry, refine, spatial
from LDRCore.geometry import Grid
from LDRCore.preprocess import PreparedImage
from LDRCore.weights import Model

MAX_VOXELS = 5_000_000  # of a working grid; content that needs more is looked at more coarsely
TAPER_CELLS = 6  # the field fades to zero over so many cells outside the working grid


@dataclass
class DenseField:
    """A dense displacement before the affine map: ``T(x) = A (x + u(x))``.

    Attributes:
        displacement_vox: u, (1, 3, d, h, w), voxels of `grid`, fading to zero at the grid's border.
        grid: where u lives.
        affine_lps: A, 4x4, LPS mm.
    """

    displacement_vox: torch.Tensor
    grid: Grid
    affine_lps: np.ndarray

    def displacement_mm(self) -> np.ndarray:
        """The displacement u as (d, h, w, 3) mm LPS."""
        return geometry.displacement_to_lps(self.displacement_vox[0].cpu().numpy(), self.grid)


def ncc(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """Pearson correlation of two batches (B or 1, 1, D, H, W), (B,); 0 where one of them is constant."""
    x, y = (t.flatten(1) - t.flatten(1).mean(1, keepdim=True) for t in (a, b))
    # torch's sum is pairwise; a product of matrices, or a norm, adds hundreds of thousands of numbers one to the other
    norm = (x.square().sum(1) * y.square().sum(1)).sqrt()
    return torch.where(norm > 1e-9, (x * y).sum(1) / norm.clamp_min(1e-9), 0.0)


def centring_candidates(fixed: PreparedImage, moving: PreparedImage) -> list[np.ndarray]:
    """Translations (4x4, LPS mm) that bring the contents together, in the order in which they are preferred.

    Foreground centroid onto centroid; and, because fields of view often end at different heights of the neck, the
    centroid in plane with the tops of the foregrounds aligned; and the scanner coordinates as they are.
    """
    by_centroid = np.eye(4)
    by_centroid[:3, 3] = moving.centroid_lps - fixed.centroid_lps
    by_top = by_centroid.copy()
    by_top[2, 3] = moving.box_lps[1, 2] - fixed.box_lps[1, 2]
    return [by_centroid, by_top, np.eye(4)]


@torch.no_grad()
def estimate_affine(
    model: Model, fixed: PreparedImage, moving: PreparedImage, candidates: list[np.ndarray]
) -> np.ndarray:
    """The affine map fixed -> moving (4x4, LPS mm) that the stem finds from the best of several starts.

    All starts run as one batch through the first pass; the one that then correlates best goes on alone. Of all starts
    and all passes the best correlated wins, so a stem that was made for other images cannot make the alignment worse
    than where it began.
    """
    stem = model.cascade.stem
    if stem is None:
        return candidates[0]
    settings = model.card["working_grid"]
    shape = tuple(settings["stem_shape"])
    extent = float((fixed.box_lps[1] - fixed.box_lps[0]).max())
    spacing = max(settings["stem_spacing_mm"], extent / (max(shape) - 4))
    grid = Grid.centred(fixed.centroid_lps.tolist(), spacing, shape)
    fixed_image = fixed.coarse.on(grid)
    totals = list(candidates)
    best, best_score = candidates[0], -np.inf
    passes = settings["stem_passes"]
    for done in range(passes + 1):
        moved = torch.cat([moving.coarse.on(grid, t) for t in totals])
        scores = ncc(moved, fixed_image)
        leader = int(scores.argmax())
        if float(scores[leader]) > best_score:
            best, best_score = totals[leader], float(scores[leader])
        if done == passes:
            break
        if done:
            totals, moved = [totals[leader]], moved[leader : leader + 1]
        matrix, translation = stem.predict(moved, fixed_image.expand_as(moved))
        for k in range(len(totals)):
            step = geometry.tensor_affine_to_lps(matrix[k].cpu().numpy(), translation[k].cpu().numpy(), grid)
            totals[k] = totals[k] @ step
    return best


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
    return DenseField(fade_out(displacement, TAPER_CELLS), field_grid.padded(TAPER_CELLS), affine_lps)


def fade_out(displacement: torch.Tensor, cells: int) -> torch.Tensor:
    """Continue a displacement by `cells` voxels on each side, fading from its edge value to exactly zero."""
    padded = torch.nn.functional.pad(displacement, (cells,) * 6, mode="replicate")
    ramp = torch.arange(cells, device=padded.device, dtype=padded.dtype) / cells
    for axis in (2, 3, 4):
        n = padded.shape[axis]
        line = torch.ones(n, device=padded.device, dtype=padded.dtype)
        line[:cells], line[n - cells :] = ramp, ramp.flip(0)
        view = [1, 1, 1, 1, 1]
        view[axis] = n
        padded = padded * line.view(view)
    return padded


@torch.no_grad()
def invert(dense: DenseField) -> tuple[DenseField, float]:
    """The inverse ``y -> A^-1 y + v(A^-1 y)`` and the largest residual in mm at its voxels.

    v lives on a grid twice as fine: u is linear between its voxels, but its inverse is not.
    """
    d, h, w = (2 * n - 1 for n in dense.grid.shape)
    a, b, c = (s / 2 for s in dense.grid.spacing_mm)
    fine = Grid(dense.grid.origin_lps, (a, b, c), (d, h, w))
    field = spatial.upsample(dense.displacement_vox, fine.shape)
    inverse, residual_vox = spatial.invert(field)
    return DenseField(inverse, fine, np.linalg.inv(dense.affine_lps)), residual_vox * max(fine.spacing_mm)
