"""Similarity losses: correlation of two images over the grid, and in a moving window. Torch only."""

from __future__ import annotations

import torch


def correlation_coefficient(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """Compute the Pearson correlation coefficient of each pair (paper, Eq. 10).

    >>> image = torch.arange(8.0).view(1, 1, 2, 2, 2)
    >>> correlation_coefficient(image, 5 - 2 * image)
    tensor([-1.])

    Args:
        a, b: (B, 1, D, H, W); one of the two may have a batch of 1.

    Returns:
        (B,), -1 to 1; 0 where one of the images is constant.
    """
    x, y = (t.flatten(1) - t.flatten(1).mean(1, keepdim=True) for t in (a, b))
    # Use sum: it is pairwise; a matrix product accumulates in order and loses precision.
    norm = (x.square().sum(1) * y.square().sum(1)).clamp_min(1e-18).sqrt()  # clamped first: sqrt has no gradient at 0
    return torch.where(norm > 1e-9, (x * y).sum(1) / norm, 0.0)


def correlation(warped: torch.Tensor, fixed: torch.Tensor) -> torch.Tensor:
    """Compute 1 - Pearson correlation over the grid, averaged over pairs (paper, Eq. 9-11).

    Args:
        warped, fixed: (B, 1, D, H, W).

    Returns:
        0 (equal but for gain and offset) to 2; 1 for a pair with a constant image, which has no gradient.
    """
    return (1 - correlation_coefficient(warped, fixed)).mean()


def local_ncc(warped: torch.Tensor, fixed: torch.Tensor, window: int = 7, epsilon: float = 1e-5) -> torch.Tensor:
    """Compute 1 - squared normalised cross-correlation in a box about every voxel, averaged over voxels.

    Computes 1 - cov(a, b)^2 / (var(a) var(b)) with means over the box; at the border the box is cut off.

    Args:
        warped, fixed: (B, 1, D, H, W), intensities about 0 to 1.
        window: odd box edge, voxels.
        epsilon: variance below which a box counts as empty.

    Returns:
        0 (equal but for gain and offset, in every box) to 1.
    """
    maps = torch.cat((warped, fixed, warped * warped, fixed * fixed, warped * fixed), dim=1)
    a, b, aa, bb, ab = _average_boxes(maps, window).unbind(1)
    covariance = ab - a * b
    variances = (aa - a * a).clamp_min(0) * (bb - b * b).clamp_min(0)
    return 1 - (covariance.square() / (variances + epsilon**2)).clamp(max=1.0).mean()


def _average_boxes(maps: torch.Tensor, window: int) -> torch.Tensor:
    """Average maps (B, C, D, H, W) over a box about every voxel, cut off at the border.

    One product with a band matrix along each axis: on a CPU many times faster than average pooling, forward and
    backward.
    """
    depth, height, width = (_band_matrix(n, window, maps) for n in maps.shape[2:])
    maps = height @ maps @ width.T
    return (depth @ maps.flatten(3)).view_as(maps)


def _band_matrix(n: int, window: int, like: torch.Tensor) -> torch.Tensor:
    """Make the (n, n) matrix whose row i averages the at most `window` neighbours of i."""
    index = torch.arange(n, dtype=torch.int64, device=like.device)
    band = ((index[:, None] - index[None]).abs() <= window // 2).to(like.dtype)
    return band / band.sum(1, keepdim=True)
