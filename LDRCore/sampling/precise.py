"""Points of a lattice in double precision: whether one at the very edge of an image lies inside.

Both backends compute coordinates in single precision. Padding "half" ends abruptly, so the few points whose coordinates
lie within `band` of the edge are decided here, as ITK decides: from half a voxel before the first voxel centre, which
is inside, to half a voxel beyond the last one, which is not.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

_CORNERS = np.indices((2, 2, 2)).reshape(3, 8).T  # lower or upper neighbour along each axis


@dataclass(frozen=True, eq=False)
class PrecisePoints:
    """The points ``M x + L u(F x)`` of a lattice, computed one by one in double precision.

    Attributes:
        matrix: M, 3x4 or 4x4, lattice index -> image index (tensor-axis order).
        displacement: u, (3, d, h, w), with border padding; None for the points ``M x``.
        linear: L, 3x3, unit of u -> voxels of the image.
        to_field: F, 4x4, lattice index -> index of `displacement`; None where there is none.
    """

    matrix: np.ndarray
    displacement: torch.Tensor | None
    linear: np.ndarray
    to_field: np.ndarray | None

    def at(self, index: np.ndarray) -> np.ndarray:
        """Return the points of lattice indices (3, n), (3, n) float64.

        >>> shift = np.array([[1, 0, 0, 0.25], [0, 1, 0, 0], [0, 0, 1, 0]])
        >>> PrecisePoints(shift, None, np.eye(3), None).at(np.array([[2], [3], [4]])).T
        array([[2.25, 3.  , 4.  ]])
        """
        points: np.ndarray = self.matrix[:3, :3] @ index + self.matrix[:3, 3:]
        if self.displacement is not None and self.to_field is not None:
            points += self.linear @ _interpolated(
                self.displacement, self.to_field[:3, :3] @ index + self.to_field[:3, 3:]
            )
        return points

    def inside(self, index: np.ndarray, shape: Sequence[int]) -> np.ndarray:
        """Return which of the lattice indices (3, n) are mapped into an image of this shape, (n,) bool."""
        points = self.at(index)
        within = (points >= -0.5) & (points < np.array(shape)[:, None] - 0.5)
        return np.asarray(within.all(0))

    def band(self, shape: Sequence[int]) -> float:
        """Return how wrong the coordinates of a lattice (D, H, W) may be in single precision, voxels."""
        return 1e-3 + 1e-6 * float((np.abs(self.matrix[:3]) @ [*shape, 1]).max())


def _interpolated(field: torch.Tensor, points: np.ndarray) -> np.ndarray:
    """Interpolate a field (3, d, h, w) linearly at points (3, n), with border padding: (3, n) float64."""
    last = np.array(field.shape[1:])[:, None] - 1
    points = points.clip(0, last)
    low = np.minimum(np.floor(points), np.maximum(last - 1, 0)).astype(np.int64)
    ends = np.stack((low, np.minimum(low + 1, last)))
    weights = np.stack((1 - (points - low), points - low))
    axes = np.arange(3)
    corners, factors = ends[_CORNERS, axes], weights[_CORNERS, axes].prod(1)  # (8, 3, n), (8, n)
    index = np.ravel_multi_index(tuple(corners.swapaxes(0, 1)), tuple(field.shape[1:]))
    values = field.flatten(1)[:, torch.from_numpy(index).to(field.device)].cpu().numpy()  # (3, 8, n)
    return np.asarray((factors * values).sum(1))
