"""Grids and points in physical space: voxel index <-> millimetres. SimpleITK and numpy only."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import SimpleITK as sitk


def index_to_lps(image: sitk.Image) -> np.ndarray:
    """Return the 4x4 from tensor index (k, j, i) to LPS mm (x, y, z) of a SimpleITK image."""
    direction = np.array(image.GetDirection()).reshape(3, 3)
    out = np.eye(4)
    out[:3, :3] = (direction * np.array(image.GetSpacing()))[:, ::-1]
    out[:3, 3] = image.GetOrigin()
    return out


def corners_lps(image: sitk.Image) -> np.ndarray:
    """Return the corner voxels of an image, (8, 3) LPS mm."""
    size = image.GetSize()
    corners = [[(size[a] - 1) * ((k >> a) & 1) for a in range(3)] for k in range(8)]
    return np.array([image.TransformIndexToPhysicalPoint(index) for index in corners])


def points_lps(image: sitk.Image) -> np.ndarray:
    """Return every voxel of an image, (D, H, W, 3) LPS mm."""
    index = np.stack(np.meshgrid(*[np.arange(n) for n in image.GetSize()[::-1]], indexing="ij"), -1)
    lps_from_index = index_to_lps(image)
    return index @ lps_from_index[:3, :3].T + lps_from_index[:3, 3]


def empty_image(
    size: Sequence[int], spacing: Sequence[float], origin: Sequence[float], direction: Sequence[float] | np.ndarray
) -> sitk.Image:
    """Make an image whose grid alone matters.

    Args:
        size: along the image's axes.
        spacing: mm, likewise.
        origin: (x, y, z) LPS mm of the first voxel.
        direction: 3x3, unit axes as columns; or its numbers by rows, as SimpleITK has them.
    """
    image = sitk.Image([int(n) for n in size], sitk.sitkUInt8)
    image.SetSpacing([float(s) for s in spacing])
    image.SetOrigin([float(x) for x in origin])
    image.SetDirection(np.ravel(direction).tolist())
    return image


@dataclass(frozen=True)
class Grid:
    """A grid whose axes are the patient's (tensor axes S, P, L; identity direction), for working in.

    >>> grid = Grid(origin_lps=(10.0, 20.0, 30.0), spacing_mm=(2.0, 2.0, 2.0), shape=(5, 5, 9))
    >>> grid.to_lps @ [0, 0, 1, 1]  # one voxel along tensor axis 2 is 2 mm to the patient's left
    array([12., 20., 30.,  1.])

    Attributes:
        origin_lps: (x, y, z) mm of voxel (0, 0, 0).
        spacing_mm: along the tensor axes (D, H, W).
        shape: (D, H, W).
    """

    origin_lps: tuple[float, float, float]
    spacing_mm: tuple[float, float, float]
    shape: tuple[int, int, int]

    @property
    def to_lps(self) -> np.ndarray:
        """4x4 from tensor index to LPS mm."""
        out = np.zeros((4, 4))
        for axis in range(3):
            out[2 - axis, axis] = self.spacing_mm[axis]
        out[:3, 3] = self.origin_lps
        out[3, 3] = 1
        return out

    @property
    def centre_lps(self) -> np.ndarray:
        """(x, y, z) mm of the grid's centre."""
        return (self.to_lps @ np.append((np.array(self.shape) - 1) / 2, 1))[:3]

    @classmethod
    def centred(cls, centre_lps: Sequence[float], spacing_mm: float, shape: Sequence[int]) -> Grid:
        """Make an isotropic grid about a point (x, y, z) mm; `shape` is (D, H, W)."""
        half = (np.array(shape)[::-1] - 1) / 2 * spacing_mm
        x, y, z = (np.asarray(centre_lps, dtype=float) - half).tolist()
        d, h, w = (int(n) for n in shape)
        return cls((x, y, z), (spacing_mm,) * 3, (d, h, w))

    @classmethod
    def around(
        cls,
        low_lps: np.ndarray,
        high_lps: np.ndarray,
        *,
        spacing_mm: float,
        margin_mm: float,
        multiple: int,
        max_voxels: int,
    ) -> Grid:
        """Make the isotropic grid that covers a box, sizes rounded up to `multiple`.

        The spacing grows if the box would need more than `max_voxels`.

        Args:
            low_lps, high_lps: corners of the box, (3,) mm.
            spacing_mm: at least.
            margin_mm: more on every side of the box.
            multiple: of every size.
            max_voxels: in total.
        """
        extent = np.asarray(high_lps) - np.asarray(low_lps) + 2 * margin_mm
        while True:
            shape = [max(1, math.ceil(e / spacing_mm / multiple)) * multiple for e in extent[::-1]]
            if math.prod(shape) <= max_voxels:
                break
            spacing_mm *= 1.05
        return cls.centred((np.asarray(low_lps) + np.asarray(high_lps)) / 2, spacing_mm, shape)

    def coarser(self, stride: int) -> Grid:
        """Return the grid with the same corners and `stride` times fewer voxels along each axis."""
        if stride == 1:
            return self
        d, h, w = (n // stride for n in self.shape)
        a, b, c = (s * (n - 1) / (m - 1) for s, n, m in zip(self.spacing_mm, self.shape, (d, h, w), strict=True))
        return Grid(self.origin_lps, (a, b, c), (d, h, w))

    def reference_image(self) -> sitk.Image:
        """Return an empty image that lies on the grid."""
        image = sitk.Image(self.shape[::-1], sitk.sitkUInt8)
        image.SetOrigin(self.origin_lps)
        image.SetSpacing(self.spacing_mm[::-1])
        return image

    def padded(self, cells: int) -> Grid:
        """Return the grid grown by `cells` voxels on every side."""
        x, y, z = (o - cells * s for o, s in zip(self.origin_lps, self.spacing_mm[::-1], strict=True))
        d, h, w = (n + 2 * cells for n in self.shape)
        return Grid((x, y, z), self.spacing_mm, (d, h, w))
