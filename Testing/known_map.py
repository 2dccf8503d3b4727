"""A pair of images whose map is known by formula: T(x) = A (x + u(x)), fixed -> moving, in LPS mm.

Numpy alone, SimpleITK only to hold the images: nothing of the package under test. Points are (..., 3) arrays of x, y, z
in mm. The fixed image is ``intensity(T(x))`` and the moving image ``intensity(y)``, both by formula at every voxel, so
neither was interpolated. The two grids differ in size, spacing, direction and handedness.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import SimpleITK as sitk


def rotation(degrees: tuple[float, float, float]) -> np.ndarray:
    """Rotate about x, then y, then z: (3, 3)."""
    out = np.eye(3)
    for axis, angle in enumerate(np.deg2rad(degrees)):
        i, j = (axis + 1) % 3, (axis + 2) % 3
        turn = np.eye(3)
        turn[i, i] = turn[j, j] = np.cos(angle)
        turn[i, j], turn[j, i] = -np.sin(angle), np.sin(angle)
        out = turn @ out
    return out


CENTRE = np.array([12.0, -20.0, 35.0])  # of the fixed image's content
MATRIX = rotation((7.0, -5.0, 9.0)) @ np.diag([1.05, 0.94, 1.08]) @ np.array([[1, 0.05, 0], [0, 1, 0], [0, -0.04, 1]])
SHIFT = np.array([14.0, -9.0, 11.0])  # where CENTRE goes, less CENTRE
AFFINE_LPS = np.eye(4)
AFFINE_LPS[:3, :3] = MATRIX
AFFINE_LPS[:3, 3] = CENTRE + SHIFT - MATRIX @ CENTRE

AMPLITUDES_MM = np.array([5.0, -6.0, 4.5])
WAVES = np.array([[0.5, 1.0, -0.3], [0.9, -0.2, 0.7], [-0.6, 0.4, 0.9]]) * (2 * np.pi / 110)  # row c: of component c
PHASES = np.array([0.4, 1.3, -0.7])
WIDTH_MM = 55.0  # of the Gaussian under which u lives


def displacement(points: np.ndarray) -> np.ndarray:
    """u(x), mm: component c is a plane wave of its own direction, under a Gaussian about CENTRE."""
    relative = points - CENTRE
    window = np.exp(-(relative**2).sum(-1, keepdims=True) / (2 * WIDTH_MM**2))
    return AMPLITUDES_MM * window * np.sin(relative @ WAVES.T + PHASES)


def map_points(points: np.ndarray) -> np.ndarray:
    """T(x) = A (x + u(x))."""
    return (points + displacement(points)) @ MATRIX.T + AFFINE_LPS[:3, 3]


def jacobian_determinant(points: np.ndarray) -> np.ndarray:
    """det dT/dx = det A det (I + du/dx), du/dx worked out from the formula of u: (...)."""
    relative = points - CENTRE
    window = np.exp(-(relative**2).sum(-1, keepdims=True) / (2 * WIDTH_MM**2))
    angles = relative @ WAVES.T + PHASES
    outer = np.sin(angles)[..., :, None] * (-relative / WIDTH_MM**2)[..., None, :]
    gradient = (AMPLITUDES_MM * window)[..., None] * (outer + np.cos(angles)[..., None] * WAVES)
    determinant: np.ndarray = np.linalg.det(MATRIX) * np.linalg.det(np.eye(3) + gradient)
    return determinant


@dataclass(frozen=True)
class Lattice:
    """Where the voxels of an image lie.

    Attributes:
        size: voxels along i, j, k.
        spacing_mm: along i, j, k.
        direction: (3, 3), column a is the direction of axis a in LPS.
        centre_lps: of the middle of the image.
    """

    size: tuple[int, int, int]
    spacing_mm: tuple[float, float, float]
    direction: np.ndarray
    centre_lps: np.ndarray

    @property
    def origin_lps(self) -> np.ndarray:
        """Voxel (0, 0, 0)."""
        origin: np.ndarray = self.centre_lps - self.points_of((np.array(self.size) - 1) / 2)
        return origin

    def points_of(self, index: np.ndarray) -> np.ndarray:
        """Offset in mm of an index (..., 3) in the order i, j, k from voxel (0, 0, 0)."""
        offset: np.ndarray = (index * np.array(self.spacing_mm)) @ self.direction.T
        return offset

    def points(self) -> np.ndarray:
        """(k, j, i, 3): LPS mm of every voxel."""
        i, j, k = (np.arange(n) for n in self.size)
        index = np.stack(np.meshgrid(k, j, i, indexing="ij")[::-1], -1)
        return self.origin_lps + self.points_of(index)

    def index_of(self, points: np.ndarray) -> np.ndarray:
        """Continuous index (..., 3) in the order i, j, k of points in LPS mm."""
        index: np.ndarray = (points - self.origin_lps) @ self.direction / np.array(self.spacing_mm)
        return index

    def image(self, values: np.ndarray) -> sitk.Image:
        """Values (k, j, i) or vectors (k, j, i, 3) as an image."""
        image = sitk.GetImageFromArray(values, isVector=values.ndim == 4)
        image.SetSpacing(self.spacing_mm)
        image.SetOrigin(self.origin_lps.tolist())
        image.SetDirection(self.direction.ravel().tolist())
        return image


FIXED = Lattice((84, 100, 58), (2.0, 1.7, 2.9), rotation((-12.0, 17.0, 8.0)) @ np.diag([1.0, -1.0, 1.0]), CENTRE)
MOVING = Lattice((66, 90, 104), (3.1, 2.0, 1.8), rotation((15.0, 6.0, -20.0))[:, [2, 0, 1]], CENTRE + SHIFT)


def intensity(points: np.ndarray) -> np.ndarray:
    """A head in moving space: an ellipsoid with a folded surface and two dark chambers, 0 outside, up to some 900."""
    x, y, z = np.moveaxis((points - CENTRE - SHIFT) / np.array([66.0, 80.0, 62.0]), -1, 0)
    radius = np.sqrt(x**2 + y**2 + z**2)
    folds = 0.06 * (np.sin(17 * x + 3 * z) + np.sin(15 * y - 4 * x) + np.sin(16 * z + 5 * y))
    white = _step(0.78 + folds - radius, 0.03)
    brain = _step(0.97 - radius, 0.03)
    chambers = sum(
        _step(0.2 - np.hypot(np.hypot(2.2 * (x - side), 0.7 * (y + 0.1)), z - 0.12), 0.03) for side in (0.12, -0.1)
    )
    nuclei = sum(_step(0.16 - np.hypot(np.hypot(x - side, y - 0.05), z + 0.1), 0.03) for side in (0.27, -0.29))
    head: np.ndarray = brain * (560 + 260 * white - 120 * nuclei - 520 * np.clip(chambers, 0, 1))
    return head


def _step(distance: np.ndarray, width: float) -> np.ndarray:
    """A smooth step from 0 to 1 at distance 0."""
    step: np.ndarray = 0.5 * (1 + np.tanh(distance / width))
    return step


def fixed_image() -> sitk.Image:
    """``intensity(T(x))`` on FIXED."""
    return FIXED.image(intensity(map_points(FIXED.points())).astype(np.float32))


def moving_image() -> sitk.Image:
    """``intensity(y)`` on MOVING."""
    return MOVING.image(intensity(MOVING.points()).astype(np.float32))


def landmarks(count: int = 300) -> np.ndarray:
    """Points within the fixed head (N, 3), LPS mm, whose images lie in the moving head."""
    rng = np.random.default_rng(0)
    points = CENTRE + rng.uniform(-1, 1, (20 * count, 3)) * np.array([70.0, 85.0, 66.0])
    return points[intensity(map_points(points)) > 300][:count]
