"""A dense displacement before an affine map, as a tensor: what the networks predict and everything later uses."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import SimpleITK as sitk
import torch
import torch.nn.functional as F

from LDRCore import geometry, sampling
from LDRCore.geometry import Grid
from LDRCore.transforms import spatial

_TAPER_PER_VOXEL = 2.0  # voxels of the taper for each that the displacement moves across the border
_MOST_TAPER = 32  # voxels; who moves more across the border is lost anyway
COARSE_MM = 3.0  # a larger spacing of a field is halved for its inverse


@dataclass(frozen=True, eq=False)
class DenseField:
    """A dense displacement before an affine map: ``T(x) = A (x + u(x))``.

    Attributes:
        displacement_vox: u, (1, 3, d, h, w), voxels of `grid`, fading to zero at the grid's border.
        grid: where u lives.
        affine_lps: A, 4x4, LPS mm.
        taper: so many voxels at each border of the grid are there only for the displacement to fade out.
    """

    displacement_vox: torch.Tensor
    grid: Grid
    affine_lps: np.ndarray
    taper: int = 0

    @property
    def content_grid(self) -> Grid:
        """The grid without its taper."""
        return self.grid.padded(-self.taper)

    @property
    def content_displacement_vox(self) -> torch.Tensor:
        """The displacement on `content_grid`, (1, 3, d, h, w), voxels."""
        d, h, w = (slice(self.taper, n - self.taper) for n in self.grid.shape)
        return self.displacement_vox[:, :, d, h, w]

    def on(self, grid: Grid) -> torch.Tensor:
        """Sample the displacement on another grid, with border padding: (3, D, H, W) in voxels of that grid."""
        if grid == self.content_grid:
            return self.content_displacement_vox[0]
        field_from_grid = np.linalg.inv(self.grid.to_lps) @ grid.to_lps
        source = self.displacement_vox[0]
        matrix = torch.from_numpy(field_from_grid[:3]).to(source)
        values = sampling.at_points(source, spatial.affine_coordinates(matrix, grid.shape)[0], "border")
        ratio = [a / b for a, b in zip(self.grid.spacing_mm, grid.spacing_mm, strict=True)]
        return values * values.new_tensor(ratio).view(3, 1, 1, 1)

    def displacement_mm(self) -> np.ndarray:
        """Return the displacement u as (d, h, w, 3) mm LPS."""
        return geometry.displacement_to_lps(self.displacement_vox[0].cpu().numpy(), self.grid)

    def transform(self) -> sitk.CompositeTransform:
        """Return T as one SimpleITK transform."""
        return geometry.dense_then_affine(self.displacement_mm(), self.grid, self.affine_lps)

    def affine(self) -> sitk.AffineTransform:
        """Return A alone as a SimpleITK transform."""
        return geometry.affine_transform(self.affine_lps)


def multiply(matrix: np.ndarray, displacement: torch.Tensor) -> torch.Tensor:
    """Multiply every vector of a displacement (3, D, H, W) by a 3x3 matrix."""
    u = displacement
    return torch.stack([u[0] * row[0] + u[1] * row[1] + u[2] * row[2] for row in matrix.tolist()])


def with_taper(displacement: torch.Tensor, grid: Grid, affine_lps: np.ndarray, voxels: int) -> DenseField:
    """Return a field that fades out beyond its grid, so slowly that this folds nothing.

    Where the displacement points across a border, its fall to zero over n voxels may lower the Jacobian determinant by
    u / n, at an edge or a corner by the sum over the borders that meet. It falls over 2 u voxels, up to 32.

    Args:
        displacement: u, (1, 3, d, h, w), voxels.
        grid: where u lives.
        affine_lps: A, 4x4.
        voxels: of the taper on every side, at least.
    """
    across = torch.zeros_like(displacement[0, 0])
    for axis in range(3):
        for end in (0, -1):
            across.select(axis, end).add_(displacement[0, axis].select(axis, end).abs())
    voxels = max(voxels, min(math.ceil(_TAPER_PER_VOXEL * float(across.max())), _MOST_TAPER))
    return DenseField(fade_out(displacement, voxels), grid.padded(voxels), affine_lps, voxels)


def fade_out(displacement: torch.Tensor, voxels: int) -> torch.Tensor:
    """Pad a displacement (B, 3, D, H, W) by some voxels on each side, falling from its edge value to exactly zero."""
    padded = F.pad(displacement, (voxels,) * 6, mode="replicate")
    ramp = torch.arange(voxels, device=padded.device, dtype=padded.dtype) / voxels
    for axis in (2, 3, 4):
        n = padded.shape[axis]
        line = torch.ones(n, device=padded.device, dtype=padded.dtype)
        line[:voxels], line[n - voxels :] = ramp, ramp.flip(0)
        view = [1, 1, 1, 1, 1]
        view[axis] = n
        padded *= line.view(view)
    return padded


@torch.no_grad()
def invert_field(field: DenseField) -> DenseField:
    """Invert a dense field: ``y -> A^-1 y + v(A^-1 y)``; returns v with A^-1.

    v lives on a grid twice as fine where u's is coarse: u is linear between its voxels, but its inverse is not.
    """
    fine = field.grid
    if max(fine.spacing_mm) > COARSE_MM:
        d, h, w = (2 * n - 1 for n in fine.shape)
        a, b, c = (s / 2 for s in fine.spacing_mm)
        fine = Grid(fine.origin_lps, (a, b, c), (d, h, w))
    inverse, _ = spatial.invert(spatial.upsample(field.displacement_vox, fine.shape))
    return DenseField(inverse, fine, np.linalg.inv(field.affine_lps))
