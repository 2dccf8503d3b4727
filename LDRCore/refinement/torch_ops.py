"""The steps of an iteration in torch alone. Images are (D, H, W), displacements (3, D, H, W) in voxels, float32.

Sums over windows and Gaussians are symmetric filters along one axis after the other: additions of shifted images. Large
images are filtered slab by slab, with the neighbouring slices that a result depends on, so that temporaries stay in the
cache.
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


def smooth(displacement: torch.Tensor, sigma: float) -> tuple[torch.Tensor, float]:
    """Smooth (3, D, H, W) by a Gaussian of `sigma` voxels (0: leave it), and return the longest vector's length too.

    At the border the weights that fall onto the grid are normalised.
    """
    if sigma <= 0:
        return displacement, float(displacement.square().sum(0).max().sqrt())
    weights, shape = gaussian(sigma), displacement.shape[1:]
    z, y, x = (1 / displacement.new_tensor(totals(n, weights)) for n in shape)
    plane = y[:, None] * x
    result = torch.empty_like(displacement, memory_format=torch.contiguous_format)
    longest = 0.0
    for slab, wide, inner in _slabs(shape, len(weights) - 1):
        square: torch.Tensor | None = None
        for source, target in zip(displacement, result, strict=True):
            part = filtered(source[wide], weights)[inner]
            torch.mul(part, plane * z[slab, None, None], out=target[slab])
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


def correlation_gradient(
    warped: torch.Tensor,
    fixed: torch.Tensor,
    fixed_mean: torch.Tensor,
    fixed_variance: torch.Tensor,
    *,
    window: int,
    epsilon: float,
    mask: torch.Tensor | None,
) -> tuple[torch.Tensor, float]:
    """Compute the gradient of squared local correlation by a displacement that is composed before the warped image's.

    Args:
        warped, fixed, fixed_mean, fixed_variance, window, epsilon: see `correlation_force`.
        mask: (D, H, W), a factor on the gradient.

    Returns:
        (gradient (3, D, H, W), mean similarity).
    """
    result = torch.zeros(3, *warped.shape, dtype=warped.dtype, device=warped.device)
    total = 0.0
    # a window's factors need the slices of that window, the force those of all windows that hold a voxel, and
    # differences a slice on either side
    for slab, wide, inner in _slabs(warped.shape, max(1, 2 * (window // 2))):
        similarity, force = correlation_force(
            warped[wide], fixed[wide], fixed_mean[wide], fixed_variance[wide], window, epsilon
        )
        total += float(similarity[inner].sum())
        force = force[inner] if mask is None else force[inner] * mask[slab]
        torch.mul(gradient(warped[wide])[:, inner], force, out=result[:, slab])
    return result, total / warped.numel()


def mean_correlation_force(
    warped: torch.Tensor,
    fixed: torch.Tensor,
    fixed_mean: torch.Tensor,
    fixed_variance: torch.Tensor,
    window: int,
    epsilon: float,
) -> tuple[float, torch.Tensor]:
    """Compute the mean of the similarity that `correlation_force` returns, and the gradient of its sum."""
    result, total = torch.empty_like(warped), 0.0
    for slab, wide, inner in _slabs(warped.shape, 2 * (window // 2)):
        similarity, force = correlation_force(
            warped[wide], fixed[wide], fixed_mean[wide], fixed_variance[wide], window, epsilon
        )
        total += float(similarity[inner].sum())
        result[slab] = force[inner]
    return total / warped.numel(), result
