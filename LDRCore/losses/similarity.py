"""How alike two images are: correlation over the whole grid, and in a moving window. Torch only."""

from __future__ import annotations

import torch


def correlation_coefficient(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """Compute the Pearson correlation coefficient of each pair (paper, Eq. 10).

    Args:
        a, b: (B, 1, D, H, W); one of the two may have a batch of 1.

    Returns:
        (B,), -1 to 1; 0 where one of the images is constant.
    """
    x, y = (t.flatten(1) - t.flatten(1).mean(1, keepdim=True) for t in (a, b))
    # Use sum: it is pairwise; a matrix product accumulates in order and loses precision.
    norm = (x.square().sum(1) * y.square().sum(1)).sqrt()
    return torch.where(norm > 1e-9, (x * y).sum(1) / norm.clamp_min(1e-9), 0.0)


def correlation(warped: torch.Tensor, fixed: torch.Tensor) -> torch.Tensor:
    """1 - Pearson correlation over the whole grid, per pair (paper, Eq. 9-11).

    Args:
        warped, fixed: (B, 1, D, H, W).
    """
    a = warped.flatten(1) - warped.flatten(1).mean(1, keepdim=True)
    b = fixed.flatten(1) - fixed.flatten(1).mean(1, keepdim=True)
    covariance = (a * b).mean(1)
    return (1 - covariance / (a.square().mean(1) * b.square().mean(1) + 1e-12).sqrt()).mean()


def local_ncc(warped: torch.Tensor, fixed: torch.Tensor, window: int = 7, epsilon: float = 1e-5) -> torch.Tensor:
    """1 - squared normalised cross-correlation in a moving box.

    Args:
        warped, fixed: (B, 1, D, H, W), intensities about 0 to 1.
        window: odd box edge, voxels.
        epsilon: variance below which a box counts as empty.
    """
    maps = torch.cat((warped, fixed, warped * warped, fixed * fixed, warped * fixed), dim=1)
    a, b, aa, bb, ab = _box_mean(maps, window).unbind(1)
    covariance = ab - a * b
    variance = (aa - a * a).clamp_min(0) * (bb - b * b).clamp_min(0)
    return 1 - (covariance.square() / (variance + epsilon**2)).clamp(max=1.0).mean()


def _box_mean(maps: torch.Tensor, window: int) -> torch.Tensor:
    """Mean over a box about every voxel, cut off at the border. (B, C, D, H, W).

    One product with a band matrix an axis: on a CPU many times faster than average pooling, forward and backward.
    """
    depth, height, width = (_band(n, window, maps) for n in maps.shape[2:])
    maps = height @ maps @ width.T
    return (depth @ maps.flatten(3)).view_as(maps)


def _band(n: int, window: int, like: torch.Tensor) -> torch.Tensor:
    """(n, n): row i averages the at most `window` neighbours of i."""
    index = torch.arange(n, dtype=torch.int64, device=like.device)
    near = ((index[:, None] - index[None]).abs() <= window // 2).to(like.dtype)
    return near / near.sum(1, keepdim=True)
