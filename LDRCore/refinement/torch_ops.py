"""The steps of an iteration in torch alone. Images are (D, H, W), displacements (3, D, H, W) in voxels, float32.

Sums over windows and Gaussians are separable: one product with a band matrix an axis, on a CPU many times faster than
convolutions.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence

import torch

TRUNCATE = 3.0  # a Gaussian ends after so many sigmas


@functools.lru_cache(maxsize=64)
def _window_band(n: int, window: int, device: torch.device, dtype: torch.dtype) -> torch.Tensor:
    """(n, n): row i averages the `window` voxels about i; voxels outside count as zero."""
    index = torch.arange(n, device=device, dtype=torch.int64)
    return ((index[:, None] - index[None]).abs() <= window // 2).to(dtype) / window


@functools.lru_cache(maxsize=64)
def _gaussian_band(n: int, sigma: float, device: torch.device, dtype: torch.dtype) -> torch.Tensor:
    """(n, n): row i is a Gaussian about i, cut off at the border and normalised."""
    index = torch.arange(n, device=device, dtype=torch.float64)
    distance = index[:, None] - index[None]
    weights = torch.exp(-(distance**2) / (2 * sigma**2)) * (distance.abs() <= math.ceil(TRUNCATE * sigma))
    return (weights / weights.sum(1, keepdim=True)).to(dtype)


def _separable(values: torch.Tensor, bands: Sequence[torch.Tensor]) -> torch.Tensor:
    """(..., D, H, W) with a band matrix applied along each of the last three axes."""
    z, y, x = bands
    values = y @ (values @ x.T)
    return (z @ values.flatten(-2)).view(values.shape)


def window_means(images: torch.Tensor, window: int) -> torch.Tensor:
    """Average (..., D, H, W) over a box about every voxel, in which voxels outside count as zero."""
    return _separable(images, [_window_band(n, window, images.device, images.dtype) for n in images.shape[-3:]])


def smooth(displacement: torch.Tensor, sigma: float) -> tuple[torch.Tensor, float]:
    """Smooth (3, D, H, W) by a Gaussian of `sigma` voxels (0: leave it), and return the longest vector's length too."""
    if sigma > 0:
        bands = [_gaussian_band(n, sigma, displacement.device, displacement.dtype) for n in displacement.shape[-3:]]
        displacement = _separable(displacement, bands)
    return displacement, float(displacement.square().sum(0).max().sqrt())


def gradient(image: torch.Tensor) -> torch.Tensor:
    """Central differences of (D, H, W), (3, D, H, W); zero in the outermost voxels along their axis."""
    result = torch.zeros(3, *image.shape, dtype=image.dtype, device=image.device)
    for axis, n in enumerate(image.shape):
        inner = result[axis].narrow(axis, 1, n - 2)
        torch.sub(image.narrow(axis, 2, n - 2), image.narrow(axis, 0, n - 2), out=inner)
    return result.mul_(0.5)


def correlation_force(
    warped: torch.Tensor,
    fixed: torch.Tensor,
    fixed_mean: torch.Tensor,
    fixed_variance: torch.Tensor,
    window: int,
    epsilon: float,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Compute the mean squared local correlation and its gradient by the warped image.

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
    mean, square, product = window_means(torch.stack((warped, warped * warped, warped * fixed)), window)
    covariance = product.sub_(mean * fixed_mean)
    variance = square.sub_(mean * mean).clamp_min_(0).add_(epsilon)
    p = covariance / (variance * fixed_variance)
    q = covariance / variance
    pq = p * q
    k_p, k_pq, k_rest = window_means(torch.stack((p, pq, pq * mean - p * fixed_mean)), window)
    force = (fixed * k_p).sub_(warped * k_pq).add_(k_rest).mul_(2)
    return covariance * p, force


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
    similarity, force = correlation_force(warped, fixed, fixed_mean, fixed_variance, window, epsilon)
    if mask is not None:
        force = force * mask
    return gradient(warped).mul_(force), float(similarity.mean())
