"""A scalar image as a tensor with its position in space: averaging and sampling keep the two together."""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass

import numpy as np
import torch

from LDRCore import sampling
from LDRCore.geometry import Grid
from LDRCore.sampling.lattice import Box
from LDRCore.transforms.field import multiply


@dataclass(frozen=True, eq=False)
class Volume:
    """A scalar image and its position in space.

    Attributes:
        data: (1, 1, D, H, W) float32.
        to_lps: 4x4, tensor index (k, j, i) -> LPS mm.
        lowest: a value that no voxel lies below, where that is known without looking.
    """

    data: torch.Tensor
    to_lps: np.ndarray
    lowest: float | None = None

    @property
    def spacing_mm(self) -> np.ndarray:
        """Distance of voxels along each tensor axis."""
        return np.linalg.norm(self.to_lps[:3, :3], axis=0)

    @functools.cached_property
    def from_lps(self) -> np.ndarray:
        """4x4, LPS mm -> tensor index (k, j, i)."""
        inverse: np.ndarray = np.linalg.inv(self.to_lps)
        return inverse

    @functools.cached_property
    def minimum(self) -> float:
        """The smallest value, or `lowest`."""
        return float(self.data.min()) if self.lowest is None else self.lowest

    @functools.cached_property
    def content(self) -> Box | None:
        """The box of indices outside of which every voxel has the smallest value; None if all have."""
        return sampling.content_box(self.data[0, 0], self.minimum)

    def averaged(self, target_mm: float) -> Volume:
        """Average over whole voxels so that each axis comes as near to `target_mm` as it can from below."""
        factors = [
            int(min(max(1, target_mm / s + 0.3), n)) for s, n in zip(self.spacing_mm, self.data.shape[2:], strict=True)
        ]
        if factors == [1, 1, 1]:
            return self
        lps_from_block = self.to_lps.copy()
        lps_from_block[:3, 3] += lps_from_block[:3, :3] @ ((np.array(factors) - 1) / 2)
        lps_from_block[:3, :3] = lps_from_block[:3, :3] * np.array(factors)
        return Volume(_block_means(self.data, factors), lps_from_block, self.lowest)

    def on(
        self,
        grid: Grid,
        transform_lps: np.ndarray | None = None,
        padding: str = "zeros",
        displacement: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Sample linearly at the points of a grid.

        Args:
            grid: where the result lies.
            transform_lps: 4x4, LPS mm -> LPS mm, applied to the grid's points first.
            padding: what lies outside of the image, see `sampling`.
            displacement: (3, *grid.shape), voxels of the grid, added to its points before that.

        Returns:
            (1, 1, *grid.shape).
        """
        lps_from_grid = grid.to_lps if transform_lps is None else transform_lps @ grid.to_lps
        index_from_grid = self.from_lps @ lps_from_grid
        content = self.content if padding == "zeros" and self.minimum == 0 else None
        field = to_field = None
        if displacement is not None:
            field, to_field = multiply(index_from_grid[:3, :3], displacement), np.eye(4)
        values = sampling.on_lattice(
            self.data[0, 0], grid.shape, index_from_grid, field, to_field, padding=padding, content=content
        )
        return values[None, None]


def _block_means(data: torch.Tensor, factors: list[int]) -> torch.Tensor:
    """Average over blocks of (B, C, D, H, W); what is left over at the upper ends is dropped.

    Does what torch's average pooling does, which uses one core for one channel.
    """
    for axis, factor in enumerate(factors, start=2):
        if factor > 1:
            count = data.shape[axis] // factor
            parts = data.narrow(axis, 0, count * factor).unflatten(axis, (count, factor)).unbind(axis + 1)
            data = parts[0] + parts[1]
            for part in parts[2:]:
                data += part
    return data * (1 / math.prod(factors))
