"""Where an image is known: up to the ends of its field of view, and beyond those of its faces that end in air."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch

from LDRCore.transforms.volume import Volume

AIR = 0.15  # of the normalised range; below it lies air or a removed background
OPEN = 0.02  # a face with less content than this share of its voxels ends in air


@dataclass(frozen=True, eq=False)
class Extent:
    """The known part of an image.

    Attributes:
        low, high: (3,) voxel indices along the tensor axes; infinite beyond a face that ends in air.
    """

    low: np.ndarray
    high: np.ndarray

    @classmethod
    def of(cls, volume: Volume) -> Extent:
        """Look at the six faces of a normalised image."""
        data = volume.data[0, 0]
        low, high = np.zeros(3), np.array(data.shape) - 1.0
        for axis in range(3):
            for index, bound, beyond in ((0, low, -np.inf), (-1, high, np.inf)):
                if float((data.select(axis, index) > AIR).float().mean()) < OPEN:
                    bound[axis] = beyond
        return cls(low, high)

    def contains(
        self, index_from_grid: np.ndarray, shape: tuple[int, int, int], radius: float, device: torch.device
    ) -> torch.Tensor | None:
        """Return whether the window about every voxel of a grid lies inside, (D, H, W); None if all do.

        Args:
            index_from_grid: 4x4, grid index -> index of the image.
            shape: of the grid.
            radius: half the window's edge, grid voxels.
            device: of the result.
        """
        inside: torch.Tensor | None = None
        last = np.array(shape) - 1
        for row, low, high in zip(index_from_grid[:3], self.low, self.high, strict=True):
            reach = radius * np.abs(row[:3]).sum()
            ends = row[3] + np.minimum(row[:3] * last, 0).sum(), row[3] + np.maximum(row[:3] * last, 0).sum()
            if ends[0] - reach >= low and ends[1] + reach <= high:
                continue
            z, y, x = (
                torch.arange(n, dtype=torch.float32, device=device) * float(f)
                for n, f in zip(shape, row[:3], strict=True)
            )
            index = (z[:, None, None] + float(row[3])) + (y[:, None] + x)
            within = (index >= low + reach) & (index <= high - reach)
            inside = within if inside is None else inside.logical_and_(within)
        return inside
