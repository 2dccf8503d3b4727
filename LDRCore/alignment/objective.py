"""What a linear alignment makes larger: squared local correlation over what both images show, and its derivatives.

The objective of a map T (fixed -> moving) is the mean, over windows of the fixed content that lie in the moving image's
field of view, of the squared correlation of fixed and warped image, less a penalty on strain. Squared correlation does
not mind an inverted contrast. Windows without texture do not count, nor do windows beyond the end of a field of view;
so that a small overlap cannot win, the sum is divided by at least `LEAST_OVERLAP` of the fixed windows.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from LDRCore.alignment.extent import Extent
from LDRCore.geometry import Grid
from LDRCore.refinement import torch_ops
from LDRCore.sampling import slabs_on_lattice
from LDRCore.transforms.volume import Volume

EPSILON = 3e-4  # variance that is added to that of every window, as noise would; intensities are about 0 to 1
TEXTURE = 1e-3  # variance of a window from which on it counts
INSIDE = 0.99  # of a window that must lie in a mask
LEAST_OVERLAP = 0.3
THINNED = 2  # the curvature is summed over every second voxel along each axis
STRAIN = 0.02  # weight of the squared strain in the penalty: a stretch by 10 % costs 2e-4

_FIRST, _SECOND = np.triu_indices(3)
_POWERS = np.array([[0, 0, 1, 0], [0, 1, 0, 0], [1, 0, 0, 0]])  # of z, y and x in the factors x, y, z and 1
_PRODUCTS = _POWERS[:, :, None] + _POWERS[:, None]  # the same of the factors' products, (3, 4, 4)
_LINEAR = np.arange(12).reshape(3, 4)[:, :3].ravel()  # of the 12 parameters, those of E
_SYMMETRIC = np.zeros((3, 3), dtype=int)  # where an entry of a symmetric matrix stands in its upper triangle
_SYMMETRIC[_FIRST, _SECOND] = _SYMMETRIC[_SECOND, _FIRST] = np.arange(6)


@dataclass(frozen=True, eq=False)
class Side:
    """One image of a pair.

    Attributes:
        volume: normalised to 0..1.
        mask: 1 where it may drive the alignment, else 0, at about the volume's resolution; None for everywhere.
    """

    volume: Volume
    mask: Volume | None = None

    def averaged(self, target_mm: float) -> Side:
        """Average both; see `Volume.averaged`."""
        return Side(self.volume.averaged(target_mm), None if self.mask is None else self.mask.averaged(target_mm))


@dataclass(frozen=True)
class Evaluation:
    """The objective at a map, with derivatives by a map that is applied to fixed points before it.

    That map is ``x -> x + E (x - c) / L + b`` in LPS mm, c the centre and L the radius of the content; its parameters
    are the rows of (E | b), in mm.

    Attributes:
        value: the objective.
        gradient: (12,).
        curvature: (12, 12), minus the Hessian in the approximation of Gauss and Newton, positive semidefinite; None if
            it was not asked for.
    """

    value: float
    gradient: np.ndarray
    curvature: np.ndarray | None


class Objective:
    """The objective of one pair on one isotropic grid."""

    def __init__(self, fixed: Side, moving: Side, grid: Grid, window: int) -> None:
        """Compute what depends on the fixed image alone.

        Args:
            fixed, moving: at about the grid's resolution.
            grid: isotropic, over the fixed content.
            window: odd edge, voxels.
        """
        self.grid, self._window, self._moving = grid, window, moving
        self._extent = Extent.of(moving.volume)
        self._fixed = _sampled(fixed.volume, grid.to_lps, grid)
        self._mean, self._variance = torch_ops.window_statistics(self._fixed, window, EPSILON)
        self._valid = (self._variance > TEXTURE + EPSILON).float()
        index_from_grid = fixed.volume.from_lps @ grid.to_lps
        known = Extent.of(fixed.volume).contains(index_from_grid, grid.shape, window // 2, self._fixed.device)
        if known is not None:
            self._valid *= known
        if fixed.mask is not None:
            self._valid *= self._inside(fixed.mask, grid.to_lps)
        for axis, count in enumerate(grid.shape):  # windows that leave the grid
            self._valid.narrow(axis, 0, min(window // 2, count)).zero_()
            self._valid.narrow(axis, max(count - window // 2, 0), min(window // 2, count)).zero_()
        self.windows = float(self._valid.sum())
        self.centre_lps, self.radius_mm = grid.centre_lps, float(np.linalg.norm(grid.spacing_mm))
        self._lines = self._normalised_lines()
        if self.windows:
            mean, square = self._centre_and_square()
            self.centre_lps = self.centre_lps + mean * self.radius_mm
            self.radius_mm *= max(1.0, float(np.sqrt(max(square - mean @ mean, 0.0))))
            self._lines = self._normalised_lines()

    def _normalised_lines(self) -> list[torch.Tensor]:
        """Powers 0, 1, 2 of (x - c) / L along z, y, x of the grid: (3, D), (3, H), (3, W)."""
        lines = []
        for axis, count in enumerate(self.grid.shape):
            first = self.grid.origin_lps[2 - axis] - self.centre_lps[2 - axis]
            line = (first + np.arange(count) * self.grid.spacing_mm[axis]) / self.radius_mm
            lines.append(torch.from_numpy(np.stack((line**0, line, line**2)).astype(np.float32)).to(self._fixed.device))
        return lines

    def _centre_and_square(self) -> tuple[np.ndarray, float]:
        """Means of (x - c) / L, (3,), and of its squared length over the windows that count."""
        moments = self._moments_of(self._valid[None], 2)[0] / self.windows
        mean = np.array([moments[0, 0, 1], moments[0, 1, 0], moments[1, 0, 0]])
        return mean, float(moments[0, 0, 2] + moments[0, 2, 0] + moments[2, 0, 0])

    def value(self, affine_lps: np.ndarray) -> float:
        """Compute the objective alone."""
        return self.values([affine_lps])[0]

    def values(self, maps_lps: Sequence[np.ndarray]) -> list[float]:
        """Compute the objective at several maps at once, which takes less time than one after the other."""
        warped, valid, scales = zip(*map(self._warped, maps_lps), strict=True)
        covariance, variance, _ = self._statistics(torch.stack(warped))
        similarity = covariance.square_().div_(variance.mul_(self._variance))
        sums = [float(torch.dot(s.ravel(), v.ravel())) for s, v in zip(similarity, valid, strict=True)]
        return [s * scale - penalty(m) for s, scale, m in zip(sums, scales, maps_lps, strict=True)]

    def overlap(self, affine_lps: np.ndarray) -> float:
        """Return the share of the fixed windows that lie in the moving image's field of view and mask."""
        return float(self._shared(affine_lps).sum()) / max(self.windows, 1.0)

    def evaluate(self, affine_lps: np.ndarray, *, curvature: bool = True) -> Evaluation:
        """Compute the objective and its derivatives; see `refinement.torch_ops.correlation_force` for the formula.

        With the factors p, q there, the curvature is the sum over voxels of 2 K(p q) J J^T, J the derivative of the
        warped image: windows are fitted by least squares, and their gain and offset are held.

        Args:
            affine_lps: 4x4, fixed -> moving.
            curvature: also compute the curvature.
        """
        warped, valid, scale = self._warped(affine_lps)
        covariance, variance, mean = self._statistics(warped)
        q = covariance / variance
        p = (q / self._variance).mul_(valid)
        value = float(covariance.mul_(p).sum()) * scale
        pq = p * q
        rest = (pq * mean).addcmul_(p, self._mean, value=-1)
        window_p, window_pq, window_rest = torch_ops.window_means(torch.stack((p, pq, rest)), self._window)
        force = (self._fixed * window_p).addcmul_(warped, window_pq, value=-1).add_(window_rest)
        slope = torch_ops.gradient(warped).flip(0)  # tensor axes -> x, y, z
        factor, spacing = 2 * scale, self.grid.spacing_mm[0]
        moments = self._moments_of(slope * force, 1)
        z, y, x = _POWERS
        gradient = moments[:, z, y, x].ravel() * (factor / spacing)
        cost, by_strain, bend = penalty(affine_lps), *penalty_derivatives(affine_lps)
        gradient[_LINEAR] -= by_strain / self.radius_mm
        if not curvature:
            return Evaluation(value - cost, gradient, None)
        thin = slope[:, ::THINNED, ::THINNED, ::THINNED].contiguous()
        window_pq = window_pq[::THINNED, ::THINNED, ::THINNED]
        moments = self._moments_of((thin[_FIRST] * thin[_SECOND]).mul_(window_pq), 2, THINNED) * THINNED**3
        z, y, x = _PRODUCTS
        blocks = moments[:, z, y, x][_SYMMETRIC]  # (3, 3, 4, 4)
        matrix = blocks.transpose(0, 2, 1, 3).reshape(12, 12) * (factor / spacing**2)
        matrix[np.ix_(_LINEAR, _LINEAR)] += bend / self.radius_mm**2
        return Evaluation(value - cost, gradient, matrix)

    def _warped(self, affine_lps: np.ndarray) -> tuple[torch.Tensor, torch.Tensor, float]:
        """The moving image on the grid, 1 for windows that count (else 0), and one over their number."""
        warped = _sampled(self._moving.volume, affine_lps @ self.grid.to_lps, self.grid)
        valid = self._shared(affine_lps)
        count = self.windows if valid is self._valid else float(valid.sum())
        return warped, valid, 1 / max(count, LEAST_OVERLAP * self.windows, 1.0)

    def _shared(self, affine_lps: np.ndarray) -> torch.Tensor:
        """1 for windows that count and lie in the moving image's field of view and mask, else 0, (D, H, W)."""
        moving_from_grid = affine_lps @ self.grid.to_lps
        index_from_grid = self._moving.volume.from_lps @ moving_from_grid
        valid = self._valid
        inside = self._extent.contains(index_from_grid, self.grid.shape, self._window // 2, valid.device)
        if inside is not None:
            valid = valid * inside
        if self._moving.mask is not None:
            valid = valid * self._inside(self._moving.mask, moving_from_grid)
        return valid

    def _inside(self, mask: Volume, lps_from_grid: np.ndarray) -> torch.Tensor:
        """True where a window lies in a mask, (D, H, W)."""
        return torch_ops.window_means(_sampled(mask, lps_from_grid, self.grid), self._window) > INSIDE

    def _statistics(self, warped: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Of every window of (..., D, H, W): covariance with the fixed image, variance + EPSILON, mean."""
        stack = torch.stack((warped, warped * self._fixed, warped * warped))
        mean, cross, square = torch_ops.window_means(stack, self._window)
        covariance = cross.addcmul_(mean, self._mean, value=-1)
        return covariance, square.addcmul_(mean, mean, value=-1).clamp_min_(0).add_(EPSILON), mean

    def _moments_of(self, values: torch.Tensor, order: int, stride: int = 1) -> np.ndarray:
        """Sum values (C, D, H, W) of every `stride`-th voxel times powers up to `order` of z, y and x: (C, n, n, n)."""
        z, y, x = (line[: order + 1, ::stride] for line in self._lines)
        by_x = values @ x.T
        by_y = (by_x.transpose(-1, -2) @ y.T).double()  # (C, D, x, y)
        sums: np.ndarray = torch.einsum("cdxy,zd->czyx", by_y, z.double()).cpu().numpy()
        return sums


def _sampled(volume: Volume, lps_from_grid: np.ndarray, grid: Grid) -> torch.Tensor:
    """Sample a volume at the mapped points of a grid with border padding, (D, H, W)."""
    data = volume.data[0, 0]
    result = torch.empty(grid.shape, dtype=torch.float32, device=data.device)
    index_from_grid = volume.from_lps @ lps_from_grid
    for block, values in slabs_on_lattice(data, grid.shape, index_from_grid, padding="border"):
        result[block] = values
    return result


def _stretch(affine_lps: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """C = A^T A, its inverse, and the strain (C - C^-1) / 4, each (3, 3)."""
    stretch = affine_lps[:3, :3].T @ affine_lps[:3, :3]
    inverse = np.linalg.inv(stretch)
    return stretch, inverse, (stretch - inverse) / 4


def penalty(affine_lps: np.ndarray) -> float:
    """Compute `STRAIN` times the squared strain of a map, zero for rotations and infinite where it is singular.

    With C = A^T A the strain is (C - C^-1) / 4: about the logarithm of every stretch, and the same for A and A^-1.
    """
    strain = _stretch(affine_lps)[2].ravel()
    return STRAIN * float(strain @ strain)


def penalty_derivatives(affine_lps: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Compute the penalty's gradient (9,) and Gauss-Newton Hessian (9, 9) by the rows of D in ``affine (1 + D)``."""
    stretch, inverse, strain = _stretch(affine_lps)
    by = np.einsum("ij,kjl->kil", stretch, np.eye(9).reshape(9, 3, 3))
    by = by + by.transpose(0, 2, 1)  # of C
    by = ((by + inverse @ by @ inverse) / 4).reshape(9, 9)
    return 2 * STRAIN * by @ strain.ravel(), 2 * STRAIN * by @ by.T
