"""The one path from two prepared images to a transform, and from a transform to a warped image. Torch, no files.

Stage 1, affine: the stem looks at 4 mm images on a cube about the fixed image's centre, several times, each time at
what is left over. Stage 2, dense: the networks look at a working grid that covers the fixed image's content, with the
moving image already behind the affine map. Stage 3: the moving image is sampled once, from the original, on the fixed
image's own grid.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch

from LDRCore import geometry, refine, spatial
from LDRCore.geometry import Grid
from LDRCore.preprocess import PreparedImage, Volume
from LDRCore.weights import Model

MAX_VOXELS = 5_000_000  # of a working grid; content that needs more is looked at more coarsely
TAPER_CELLS = 6  # the field fades to zero over so many cells outside the working grid
_SLAB_VOXELS = 300_000  # of a native image warped at once: temporaries stay in the cache


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
    """Pearson correlation of two batches (B, 1, D, H, W), (B,); 0 where one of them is constant."""
    x, y = a.flatten(1), b.flatten(1)
    x, y = x - x.mean(1, keepdim=True), y - y.mean(1, keepdim=True)
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

    All starts run as one batch. Of all starts and all passes the best correlated wins, so a stem that was made for
    other images cannot make the alignment worse than where it began.
    """
    stem = model.cascade.stem
    if stem is None:
        return candidates[0]
    settings = model.card["working_grid"]
    shape = tuple(settings["stem_shape"])
    extent = float((fixed.box_lps[1] - fixed.box_lps[0]).max())
    spacing = max(settings["stem_spacing_mm"], extent / (max(shape) - 4))
    grid = Grid.centred(fixed.centroid_lps.tolist(), spacing, shape)
    fixed_image = fixed.coarse.on(grid).expand(len(candidates), -1, -1, -1, -1)
    totals = list(candidates)
    best, best_score = candidates[0], -np.inf
    for remaining in range(settings["stem_passes"], -1, -1):
        moved = torch.cat([moving.coarse.on(grid, t) for t in totals])
        scores = ncc(moved, fixed_image)
        if float(scores.max()) > best_score:
            best, best_score = totals[int(scores.argmax())], float(scores.max())
        if not remaining:
            break
        matrix, translation = stem.predict(moved, fixed_image)
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
def warp_native(
    moving: Volume, fixed_shape: tuple[int, int, int], fixed_to_lps: np.ndarray, dense: DenseField, outside: float
) -> np.ndarray:
    """Sample the moving image once, linearly, at ``A (x + u(x))`` for every voxel x of the fixed grid, in slabs.

    The edge rule is ITK's: up to half a voxel beyond the last voxel centre the edge value holds, then `outside`.

    Returns:
        (D, H, W) float32.
    """
    to_index = np.linalg.inv(moving.to_lps) @ dense.affine_lps
    to_field = np.linalg.inv(dense.grid.to_lps) @ fixed_to_lps
    image_points = _NormalisedLattice(to_index @ fixed_to_lps, fixed_shape, moving.data)
    # u in the moving image's normalised units, so that one sampling of the small field is all that is needed
    turn = torch.from_numpy(to_index[:3, :3] @ dense.grid.to_lps[:3, :3]).to(dense.displacement_vox)
    turn = (turn * image_points.scale[:, None]).flip(0)
    field = _LatticeField(torch.einsum("rc,bcdhw->brdhw", turn, dense.displacement_vox), to_field, fixed_shape)
    edge = 1 + 0.5 * image_points.scale.flip(0)  # half a voxel beyond the last centre
    depth, height, width = fixed_shape
    slab = max(1, _SLAB_VOXELS // (height * width))
    result = torch.empty(fixed_shape)
    for start in range(0, depth, slab):
        stop = min(start + slab, depth)
        where = image_points.slab(start, stop)
        where += field.slab(start, stop)
        values = _grid_sample(moving.data, where)[0, 0]
        beyond = (where.abs() > edge).any(-1)[0]
        result[start:stop] = values.masked_fill_(beyond, outside).cpu()
    return result.numpy()


class _NormalisedLattice:
    """The points of a lattice in the normalised (x, y, z) coordinates that torch samples an image at, slab by slab."""

    def __init__(self, matrix: np.ndarray, shape: tuple[int, int, int], image: torch.Tensor) -> None:
        """`matrix` (4x4) takes a lattice index to an index of `image`; `scale` is 2 / (n - 1) along its axes."""
        size = np.array(image.shape[2:], dtype=float)
        scale = 2 / np.maximum(size - 1, 1)
        rows = (np.diag(scale) @ matrix[:3])[::-1]
        rows[:, 3] -= 1

        def tensor(values: np.ndarray) -> torch.Tensor:
            return torch.from_numpy(np.ascontiguousarray(values)).to(device=image.device, dtype=torch.float32)

        self.scale = tensor(scale)
        _, height, width = shape
        self._down = tensor(rows[:, 0])
        j = torch.arange(height, device=image.device, dtype=torch.float32)[:, None, None]
        i = torch.arange(width, device=image.device, dtype=torch.float32)[None, :, None]
        self._plane = tensor(rows[:, 3]) + j * tensor(rows[:, 1]) + i * tensor(rows[:, 2])

    def slab(self, start: int, stop: int) -> torch.Tensor:
        """(1, stop - start, H, W, 3)."""
        k = torch.arange(start, stop, device=self._plane.device, dtype=torch.float32)
        return (self._plane + k[:, None, None, None] * self._down)[None]


class _LatticeField:
    """A coarse vector field at the points of a lattice, slab by slab.

    Where the two grids' axes are parallel (also permuted or flipped) linear interpolation is done axis by axis, which
    is the same and faster; otherwise point by point.
    """

    def __init__(self, field: torch.Tensor, matrix: np.ndarray, shape: tuple[int, int, int]) -> None:
        """`field` is (1, 3, d, h, w); `matrix` (4x4) takes a lattice index to a field index."""
        self._oblique: _NormalisedLattice | None = None
        self._field = field
        main = np.abs(matrix[:3, :3]).argmax(0)  # the field axis that each lattice axis runs along
        stray = matrix[:3, :3].copy()
        stray[main, range(3)] = 0
        if len(set(main.tolist())) < 3 or (np.abs(stray) @ np.array(shape)).max() > 1e-4:
            self._oblique = _NormalisedLattice(matrix, shape, field)
            return
        values = field[0].permute(*(1 + main).tolist(), 0)
        rates, offsets = matrix[main, range(3)], matrix[main, 3]
        for axis in (2, 1):
            values = self._along(values, axis, rates[axis] * np.arange(shape[axis]) + offsets[axis])
        self._planes, self._rate, self._offset = values, rates[0], offsets[0]

    @staticmethod
    def _along(values: torch.Tensor, axis: int, position: np.ndarray) -> torch.Tensor:
        """Linear interpolation along one axis at positions (voxels), the edge value held outside."""
        position = position.clip(0, values.shape[axis] - 1)
        low = np.minimum(np.floor(position), values.shape[axis] - 2).astype(np.int64)
        view = [1, 1, 1, 1]
        view[axis] = -1
        index = torch.from_numpy(low).to(values.device)
        weight = torch.from_numpy(position - low).to(values).view(view)
        return torch.lerp(values.index_select(axis, index), values.index_select(axis, index + 1), weight)

    def slab(self, start: int, stop: int) -> torch.Tensor:
        """(1, stop - start, H, W, 3)."""
        if self._oblique is not None:
            return _grid_sample(self._field, self._oblique.slab(start, stop)).permute(0, 2, 3, 4, 1)
        return self._along(self._planes, 0, self._rate * np.arange(start, stop) + self._offset)[None]


def _grid_sample(image: torch.Tensor, where: torch.Tensor) -> torch.Tensor:
    return torch.nn.functional.grid_sample(image, where, padding_mode="border", align_corners=True)


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
