"""The steps of an iteration in torch alone. Images are (D, H, W), displacements (3, D, H, W) in voxels, float32.

Sums over windows and Gaussians are symmetric filters along one axis after the other: additions of shifted images, or
(`Correlation`) of shifted memory. Large images are filtered slab by slab, with the neighbouring slices that a result
depends on, so that temporaries stay in the cache.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Iterator, Sequence

import torch

NEGLIGIBLE = 1e-3  # a Gaussian ends where its weight falls below such a share of the middle one
_SLAB_VOXELS = 1 << 18


def gaussian(sigma: float) -> tuple[float, ...]:
    """Return the weights of a Gaussian of `sigma` voxels, the middle one (1) first, then those of one side."""
    radius = math.floor(sigma * math.sqrt(-2 * math.log(NEGLIGIBLE)))
    return tuple(math.exp(-(d**2) / (2 * sigma**2)) for d in range(radius + 1))


def box(window: int) -> tuple[float, ...]:
    """Return the weights of a mean over `window` voxels, as `gaussian` does."""
    return (1 / window,) * (window // 2 + 1)


@functools.lru_cache(maxsize=64)
def totals(n: int, weights: tuple[float, ...]) -> tuple[float, ...]:
    """Return, for each voxel of a line of n, the sum of the weights that fall onto the line."""
    return tuple(weights[0] + sum(w * ((i >= d) + (i + d < n)) for d, w in enumerate(weights[1:], 1)) for i in range(n))


def _filtered(values: torch.Tensor, weights: Sequence[float], axis: int) -> torch.Tensor:
    """Apply a symmetric filter along an axis, with zeros outside."""
    n = values.shape[axis]
    result = values * weights[0]
    for d, weight in enumerate(weights[1:], 1):
        if d < n:
            result.narrow(axis, d, n - d).add_(values.narrow(axis, 0, n - d), alpha=weight)
            result.narrow(axis, 0, n - d).add_(values.narrow(axis, d, n - d), alpha=weight)
    return result


def filtered(values: torch.Tensor, weights: Sequence[float]) -> torch.Tensor:
    """Apply a symmetric filter along the last three axes, with zeros outside.

    Args:
        values: (..., D, H, W).
        weights: the middle one first, then those of one side.
    """
    for axis in (-1, -2, -3):
        values = _filtered(values, weights, axis)
    return values


def window_means(images: torch.Tensor, window: int) -> torch.Tensor:
    """Average (..., D, H, W) over a box about every voxel, in which voxels outside count as zero."""
    return filtered(images, box(window))


def _slabs(shape: Sequence[int], halo: int) -> Iterator[tuple[slice, slice, slice]]:
    """Yield for every slab of a volume: its slices, those with `halo` more on either side, the former in the latter."""
    depth, height, width = shape
    count = max(1, 2 * halo, _SLAB_VOXELS // (height * width))
    for start in range(0, depth, count):
        stop = min(start + count, depth)
        low, high = max(start - halo, 0), min(stop + halo, depth)
        yield slice(start, stop), slice(low, high), slice(start - low, stop - low)


def normalisation(values: torch.Tensor, weights: tuple[float, ...]) -> torch.Tensor:
    """Return one over the sum of the weights that fall onto the grid, for every voxel of (..., D, H, W): (D, H, W)."""
    z, y, x = (1 / values.new_tensor(totals(n, weights)) for n in values.shape[-3:])
    return z[:, None, None] * (y[:, None] * x)


def smooth(displacement: torch.Tensor, sigma: float, out: torch.Tensor | None = None) -> tuple[torch.Tensor, float]:
    """Smooth (3, D, H, W) by a Gaussian of `sigma` voxels (0: leave it), and return the longest vector's length too.

    At the border the weights that fall onto the grid are normalised. The result is written to `out` where given.
    """
    if sigma <= 0:
        return displacement, float(displacement.square().sum(0).max().sqrt())
    weights, shape = gaussian(sigma), displacement.shape[1:]
    factors = normalisation(displacement, weights)
    result = torch.empty_like(displacement, memory_format=torch.contiguous_format) if out is None else out
    longest = 0.0
    for slab, wide, inner in _slabs(shape, len(weights) - 1):
        square: torch.Tensor | None = None
        for source, target in zip(displacement, result, strict=True):
            part = filtered(source[wide], weights)[inner]
            torch.mul(part, factors[slab], out=target[slab])
            square = target[slab].square() if square is None else square.addcmul_(target[slab], target[slab])
        assert square is not None
        longest = max(longest, float(square.max()))
    return result, math.sqrt(longest)


def gradient(image: torch.Tensor) -> torch.Tensor:
    """Central differences of (D, H, W), (3, D, H, W); zero in the outermost voxels along their axis."""
    result = torch.zeros(3, *image.shape, dtype=image.dtype, device=image.device)
    for axis, n in enumerate(image.shape):
        inner = result[axis].narrow(axis, 1, n - 2)
        torch.sub(image.narrow(axis, 2, n - 2), image.narrow(axis, 0, n - 2), out=inner)
    return result.mul_(0.5)


def eroded(inside: torch.Tensor, radius: int) -> torch.Tensor:
    """Return where a box of edge 2 radius + 1 is all inside, (D, H, W) boolean; beyond the grid counts as inside."""
    for axis in range(3):
        n = inside.shape[axis]
        line, inside = inside, inside.clone()
        for d in range(1, min(radius, n - 1) + 1):
            inside.narrow(axis, d, n - d).logical_and_(line.narrow(axis, 0, n - d))
            inside.narrow(axis, 0, n - d).logical_and_(line.narrow(axis, d, n - d))
    return inside


def check_window(window: int) -> None:
    """Refuse a window that has no middle, or no neighbours.

    Raises:
        ValueError: the window is even, or less than 3.
    """
    if window < 3 or window % 2 == 0:
        raise ValueError(f"window must be an odd number from 3, got {window}")


def window_statistics(image: torch.Tensor, window: int, epsilon: float) -> tuple[torch.Tensor, torch.Tensor]:
    """Return (mean, variance + epsilon) of the window about every voxel of an image (D, H, W)."""
    mean, square = window_means(torch.stack((image, image * image)), window)
    return mean, square.sub_(mean * mean).clamp_min_(0).add_(epsilon)


def correlation_force(
    warped: torch.Tensor,
    fixed: torch.Tensor,
    fixed_mean: torch.Tensor,
    fixed_variance: torch.Tensor,
    window: int,
    epsilon: float,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Compute the squared local correlation and the gradient of its sum by the warped image.

    K is the mean over a window (zeros outside). With A = K(wf) - K(w) K(f), B = K(ww) - K(w)^2 + e,
    C = K(ff) - K(f)^2 + e, p = A / (B C) and q = A / B, the similarity of a voxel is A p; the sum's gradient is
    2 (f K(p) - w K(p q) + K(p q K(w) - p K(f))).

    Args:
        warped, fixed: w and f, (D, H, W).
        fixed_mean, fixed_variance: K(f) and C.
        window: odd edge, voxels.
        epsilon: e.

    Returns:
        (similarity of every voxel, gradient of their sum), (D, H, W) each. Zero over constant windows.
    """
    mean = window_means(warped, window)
    covariance = window_means(warped * fixed, window).addcmul_(mean, fixed_mean, value=-1)
    variance = window_means(warped * warped, window).addcmul_(mean, mean, value=-1).clamp_min_(0).add_(epsilon)
    q = covariance / variance
    p = q / fixed_variance
    pq = p * q
    force = fixed * window_means(p, window)
    force.addcmul_(warped, window_means(pq, window), value=-1)
    force += window_means((pq * mean).addcmul_(p, fixed_mean, value=-1), window)
    return covariance.mul_(p), force.mul_(2)


class Correlation:
    """Squared local correlation with one fixed image; see `correlation_force` for the formulas.

    An image lies in flat memory with zeros after every row, and rows of zeros after every slice, so that a neighbour
    along any axis is at one distance: a sum over neighbours adds whole blocks of memory.
    """

    def __init__(self, fixed: torch.Tensor, window: int, epsilon: float) -> None:
        """Compute what depends on the fixed image alone.

        Args:
            fixed: (D, H, W).
            window: odd edge, voxels, from 3.
            epsilon: variance that is added to that of every window.
        """
        check_window(window)
        self._shape, self._window, self._epsilon = fixed.shape, window, epsilon
        _, height, width = fixed.shape
        radius = window // 2
        row = width + radius
        self._steps = 1, row, row * (height + radius)
        self._guard = radius * (row + 1)  # what a sum along rows and columns reaches beyond the slices
        self._slices = max(1, _SLAB_VOXELS // (height * width))
        mean, variance = window_statistics(fixed, window, epsilon)
        self._fixed, self._mean, self._inverse = self._flat(fixed), self._flat(mean), self._flat(1 / variance)

    def gradient(
        self,
        warped: torch.Tensor,
        mask: torch.Tensor | None = None,
        out: torch.Tensor | None = None,
        windows: torch.Tensor | None = None,
    ) -> tuple[torch.Tensor, float]:
        """Compute the gradient by a displacement that is composed before the warped image's.

        Args:
            warped: (D, H, W).
            mask: (D, H, W), a factor on the gradient.
            out: (3, D, H, W) that the gradient is written to; a new tensor if not given.
            windows: (D, H, W) boolean, the middles of the windows that count; all if not given.

        Returns:
            (gradient (3, D, H, W) of the sum over windows, their mean similarity).
        """
        result = warped.new_empty(3, *self._shape) if out is None else out
        flat, total = self._flat(warped), 0.0
        inverse, count = self._inverse, warped.numel()
        if windows is not None:
            inverse, count = inverse * self._flat(windows.to(inverse)), max(int(windows.sum()), 1)
        for slab, similarity, force in self._forces(flat, inverse):
            total += similarity
            if mask is not None:
                self._image(force).mul_(mask[slab])
            force.mul_(1 / self._window**3)  # the factors 2 of the square and 1 / 2 of central differences cancel
            for axis, step in enumerate(self._steps[::-1]):
                begin = self._begin(slab)
                difference = (
                    flat[begin + step : begin + step + len(force)] - flat[begin - step : begin - step + len(force)]
                )
                torch.mul(self._image(difference), self._image(force), out=result[axis, slab])
        for axis, n in enumerate(self._shape):
            result[axis].narrow(axis, 0, 1).zero_()
            result[axis].narrow(axis, n - 1, 1).zero_()
        return result, total / count

    def force(self, warped: torch.Tensor) -> tuple[float, torch.Tensor]:
        """Compute the mean similarity and the gradient of its sum by the warped image."""
        result, total = torch.empty_like(warped, memory_format=torch.contiguous_format), 0.0
        for slab, similarity, force in self._forces(self._flat(warped), self._inverse):
            total += similarity
            result[slab] = self._image(force.mul_(2 / self._window**3))
        return total / warped.numel(), result

    def _flat(self, image: torch.Tensor) -> torch.Tensor:
        """Return an image in flat memory, with zeros for what sums reach beyond its first and last slices."""
        if image.shape != self._shape:
            raise ValueError(f"both images must have one shape, got {tuple(image.shape)} and {tuple(self._shape)}")
        radius, plane = self._window // 2, self._steps[2]
        flat = image.new_zeros((self._shape[0] + 4 * radius) * plane + 2 * self._guard)
        begin = self._begin(slice(0, 0))
        self._image(flat[begin : begin + self._shape[0] * plane]).copy_(image)
        return flat

    def _begin(self, slab: slice) -> int:
        """Index in flat memory of a slab's first voxel."""
        return self._guard + (2 * (self._window // 2) + slab.start) * self._steps[2]

    def _image(self, slices: torch.Tensor) -> torch.Tensor:
        """Return a view of whole slices in flat memory as an image."""
        _, height, width = self._shape
        return slices.view(-1, self._steps[2] // self._steps[1], self._steps[1])[:, :height, :width]

    def _forces(self, warped: torch.Tensor, inverse: torch.Tensor) -> Iterator[tuple[slice, float, torch.Tensor]]:
        """Yield for every slab: its slices, the sum of its similarity, the sum's gradient by the warped image.

        Args:
            warped: from `_flat`.
            inverse: one over the variance of the fixed image's windows, likewise; 0 for a window that does not count.

        Yields:
            The gradient is in flat memory, with anything between rows and slices, free to be overwritten, and still to
            be multiplied by 2 / window^3.
        """
        radius, plane, guard = self._window // 2, self._steps[2], self._guard
        count = min(self._slices, self._shape[0])
        size = (count + 4 * radius) * plane + 2 * guard
        workspace, voxels = warped.new_empty(2, 3, size), self._window**3
        for start in range(0, self._shape[0], count):
            slab = slice(start, min(start + count, self._shape[0]))
            slices = slab.stop - slab.start
            size = (slices + 4 * radius) * plane + 2 * guard
            first, second = workspace[:, :, :size]
            begin = start * plane
            w, f, mean_f, inverse_f = (t[begin : begin + size] for t in (warped, self._fixed, self._mean, inverse))
            first[0] = w
            torch.mul(w, w, out=first[1])
            torch.mul(w, f, out=first[2])
            # of the windows about `radius` slices more on either side
            within = slice(guard + radius * plane, size - guard - radius * plane)
            total, variance, covariance = (s[within] for s in self._window_sums(first, second))
            mean_f, inverse_f = mean_f[within], inverse_f[within]
            covariance.addcmul_(total, mean_f, value=-1)
            variance.addcmul_(total, total, value=-1 / voxels).clamp_min_(0).add_(voxels * self._epsilon)
            mean = total.mul_(1 / voxels)
            factors, other = (t[:, radius * plane : size - radius * plane] for t in (first, second))
            p, pq, rest = factors[:, guard:-guard]
            factors[:, :guard] = 0
            factors[:, -guard:] = 0
            q = variance.reciprocal_().mul_(covariance)
            torch.mul(q, inverse_f, out=p)  # zero between rows and slices, and outside of the image
            torch.mul(p, q, out=pq)
            torch.mul(pq, mean, out=rest).addcmul_(p, mean_f, value=-1)
            own = slice(radius * plane, (radius + slices) * plane)
            similarity = float(covariance[own].mul_(p[own]).sum()) / voxels
            own = slice(guard + radius * plane, guard + (radius + slices) * plane)
            p, pq, force = (s[own] for s in self._window_sums(factors, other))
            own = slice(guard + 2 * radius * plane, guard + (2 * radius + slices) * plane)
            yield slab, similarity, force.addcmul_(p, f[own]).addcmul_(pq, w[own], value=-1)

    def _window_sums(self, source: torch.Tensor, other: torch.Tensor) -> torch.Tensor:
        """Sum over each number's window; both buffers are overwritten, and what is next to their ends is not computed.

        Returns:
            `other`.
        """
        radius = self._window // 2
        for images, out in zip(source, other, strict=True):
            for step in self._steps:
                inner = out[radius * step : len(out) - radius * step]
                torch.add(images[: len(inner)], images[2 * radius * step :], out=inner)
                for shift in range(1, 2 * radius):
                    inner += images[shift * step : shift * step + len(inner)]
                images, out = out, images
        return other
