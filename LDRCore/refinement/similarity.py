"""What the optimiser makes larger: a similarity of the warped and the fixed image with its gradient in closed form.

A similarity is made for one grid. It is asked with a displacement (3, D, H, W) in voxels, and answers with its mean and
with the gradient by a displacement that is composed before the given one.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

import torch

from LDRCore import sampling
from LDRCore.refinement import torch_ops
from LDRCore.refinement.backend import operations

Warp = Callable[[torch.Tensor], torch.Tensor]
"""Displacement (3, D, H, W) in voxels -> the moving image on the grid, (D, H, W), below 0 where it has no voxel."""


class Similarity(Protocol):
    """A similarity of one pair on one grid."""

    def gradient(self, displacement: torch.Tensor, out: torch.Tensor | None = None) -> tuple[torch.Tensor, float]:
        """Return (gradient (3, D, H, W), mean similarity); `out` is where the gradient may be written."""


class LocalCorrelation:
    """Squared local normalised cross-correlation, for images of the same or of inverted contrast.

    Source: Avants et al., Symmetric diffeomorphic image registration with cross-correlation, 2008; the gradient here is
    exact (see `torch_ops.correlation_force`), not that of the window's middle alone.
    """

    def __init__(
        self,
        warp: Warp,
        fixed: torch.Tensor,
        *,
        window: int = 3,
        epsilon: float = 1e-4,
        mask: torch.Tensor | None = None,
        inside: torch.Tensor | None = None,
    ) -> None:
        """Compute what depends on the fixed image alone.

        Args:
            warp: see `Warp`; intensities about 0 to 1.
            fixed: (D, H, W) float32, intensities about 0 to 1.
            window: odd edge, voxels.
            epsilon: variance that is added to that of every window; well below it a window counts as constant.
            mask: (D, H, W), 0 where nothing may drive the displacement.
            inside: (D, H, W) boolean, where the fixed image has voxels; everywhere if not given.
        """
        self._warp, self._mask, self._radius = warp, mask, window // 2
        self._windows = None if inside is None else torch_ops.eroded(inside, self._radius)
        self._correlation = operations(fixed).Correlation(fixed, window, epsilon)

    def gradient(self, displacement: torch.Tensor, out: torch.Tensor | None = None) -> tuple[torch.Tensor, float]:
        """See `Similarity`."""
        warped, windows = self._warp(displacement), self._windows
        inside = warped >= 0
        if not inside.all():
            warped = warped.clamp_min_(0)
            inside = torch_ops.eroded(inside, self._radius + 1)  # the window, and the neighbours of its voxels
            windows = inside if windows is None else inside.logical_and_(windows)
        return self._correlation.gradient(warped, self._mask, out, windows)


class Mind:
    """Agreement of self-similarity descriptors (MIND-SSC, 12 channels), for images of unlike contrast.

    Minus the squared difference of the descriptors, which are computed once and then warped. Source: Heinrich et al.,
    Towards realtime multimodal fusion for image-guided interventions using self-similarities, 2013.
    """

    def __init__(self, warp: Warp, fixed: torch.Tensor, *, mask: torch.Tensor | None = None) -> None:
        """Compute both images' descriptors.

        Args:
            warp, fixed, mask: see `LocalCorrelation`.
        """
        still = torch.zeros(3, *fixed.shape, dtype=fixed.dtype, device=fixed.device)
        self._moving, self._fixed, self._mask = mind(warp(still)), mind(fixed), mask

    def gradient(self, displacement: torch.Tensor, out: torch.Tensor | None = None) -> tuple[torch.Tensor, float]:
        """See `Similarity`."""
        warped = sampling.displaced(self._moving, displacement, "border")
        total = torch.zeros_like(displacement)
        value = 0.0
        for moving, fixed in zip(warped, self._fixed, strict=True):
            difference = fixed - moving
            value -= float(difference.square().mean())
            if self._mask is not None:
                difference = difference * self._mask
            total.add_(torch_ops.gradient(moving).mul_(difference))
        return total.mul_(2 / len(warped)), value / len(warped)


RELATED = 1.3  # times what chance gives; pairs of T1 heads, one of them remapped in five ways, came to 4 to 7
_WINDOW, _EPSILON = 5, 1e-4


def choose_similarity(warped: torch.Tensor, fixed: torch.Tensor, foreground: float) -> tuple[str, str]:
    """Choose the similarity that fits two images that are roughly aligned.

    Within a small window the intensities of related images are nearly linear in each other, also where a contrast is
    inverted or not monotonic. How much chance alone gives is measured on the same images with one of them turned round.
    Windows that hold air or the end of a field of view are left out: edges of two objects agree by chance.

    Args:
        warped, fixed: (D, H, W) float32, intensities about 0 to 1.
        foreground: intensity of the fixed image above which it is not air.

    Returns:
        ("local-ncc" or "mind", the reason in words).
    """
    statistics = torch_ops.window_statistics(fixed, _WINDOW, _EPSILON)

    def mean_correlation(moving: torch.Tensor) -> float:
        similarity, _ = torch_ops.correlation_force(moving, fixed, *statistics, _WINDOW, _EPSILON)
        common = ((fixed > foreground) & (moving > 0)).to(fixed.dtype)
        whole = torch_ops.window_means(common, _WINDOW) > 1 - 1e-4
        return float(similarity[whole].mean()) if whole.any() else 0.0

    related, chance = mean_correlation(warped), mean_correlation(warped.flip(0, 1).contiguous())
    found = (
        f"windows of {_WINDOW} voxels correlate (squared) to {related:.3f}, with one image turned round to {chance:.3f}"
    )
    return ("local-ncc" if related >= RELATED * chance else "mind"), found


_NEIGHBOURS = [(0, 0, 1), (0, 0, -1), (0, 1, 0), (0, -1, 0), (1, 0, 0), (-1, 0, 0)]
_PAIRS = [
    (a, b)
    for n, a in enumerate(_NEIGHBOURS)
    for b in _NEIGHBOURS[n + 1 :]
    if sum((p - q) ** 2 for p, q in zip(a, b, strict=True)) == 2
]


def mind(image: torch.Tensor, patch: int = 3) -> torch.Tensor:
    """Compute the self-similarity context descriptor.

    Channel c is exp(-D_c / V). D_c is the mean squared difference, over a patch, of two of a voxel's six neighbours
    that lie sqrt(2) apart, less the smallest of all channels. V is the mean of the channels, kept near its own mean.

    Args:
        image: (D, H, W).
        patch: odd edge, voxels.

    Returns:
        (12, D, H, W), 0 to 1.
    """
    padded = torch.nn.functional.pad(image[None, None], (1,) * 6, mode="replicate")[0, 0]
    d, h, w = image.shape

    def neighbour(offset: tuple[int, int, int]) -> torch.Tensor:
        z, y, x = (1 + o for o in offset)
        return padded[z : z + d, y : y + h, x : x + w]

    squared = torch.stack([(neighbour(a) - neighbour(b)).square() for a, b in _PAIRS])
    distance = torch_ops.window_means(squared, patch)
    distance -= distance.amin(0, keepdim=True)
    variance = distance.mean(0)
    middle = float(variance.mean())
    return torch.exp(-distance / variance.clamp(max(1e-3 * middle, 1e-9), max(1e3 * middle, 1e-6)))
