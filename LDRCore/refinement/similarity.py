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
"""Displacement (3, D, H, W) in voxels -> the moving image on the grid, (D, H, W), below 0 where it is unknown."""


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
            inside: (D, H, W) boolean, where the fixed image is known; everywhere if not given.
        """
        self._warp, self._mask, self._radius = warp, mask, window // 2
        self._windows = None if inside is None else torch_ops.eroded(inside, self._radius)
        self._correlation = operations(fixed).Correlation(fixed, window, epsilon)

    def gradient(self, displacement: torch.Tensor, out: torch.Tensor | None = None) -> tuple[torch.Tensor, float]:
        """See `Similarity`."""
        warped, windows = self._warp(displacement), self._windows
        known = _known(warped, self._radius + 1)  # the window, and the neighbours of its voxels
        if known is not None:
            windows = known if windows is None else known.logical_and_(windows)
        return self._correlation.gradient(warped, self._mask, out, windows)


def _known(warped: torch.Tensor, radius: int) -> torch.Tensor | None:
    """Return where a box of edge 2 radius + 1 holds nothing unknown, which becomes 0; None where none does."""
    known = warped >= 0
    if known.all():
        return None
    warped.clamp_min_(0)
    return torch_ops.eroded(known, radius)


class Mind:
    """Agreement of self-similarity descriptors (MIND-SSC, 12 channels), for images of unlike contrast.

    Minus the squared difference of the descriptors, which are computed once and then warped. Source: Heinrich et al.,
    Towards realtime multimodal fusion for image-guided interventions using self-similarities, 2013.
    """

    def __init__(
        self,
        warp: Warp,
        fixed: torch.Tensor,
        *,
        mask: torch.Tensor | None = None,
        inside: torch.Tensor | None = None,
    ) -> None:
        """Compute both images' descriptors.

        Args:
            warp, fixed, mask, inside: see `LocalCorrelation`.
        """
        moving = warp(torch.zeros(3, *fixed.shape, dtype=fixed.dtype, device=fixed.device))
        known = _known(moving, _REACH + 1)  # of a descriptor, and of its neighbours'
        self._moving, self._fixed, self._mask = mind(moving), mind(fixed), mask
        self._inside = None if inside is None else torch_ops.eroded(inside, _REACH).to(fixed)
        self._warps_known = known is not None
        if known is not None:
            self._moving = torch.cat((self._moving, known[None].to(fixed)))

    def gradient(self, displacement: torch.Tensor, out: torch.Tensor | None = None) -> tuple[torch.Tensor, float]:
        """See `Similarity`."""
        warped, inside = sampling.displaced(self._moving, displacement, "border"), self._inside
        if self._warps_known:
            known = (warped[-1] > 1 - 1e-4).to(warped)
            warped, inside = warped[:-1], known if inside is None else known * inside
        total = torch.zeros_like(displacement)
        value, count = 0.0, displacement[0].numel() if inside is None else max(float(inside.sum()), 1.0)
        for moving, fixed in zip(warped, self._fixed, strict=True):
            difference = fixed - moving
            if inside is not None:
                difference *= inside
            value -= float(difference.square().sum()) / count
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


_PATCH = 3
_REACH = _PATCH // 2 + 1  # voxels that a descriptor depends on along each axis


def mind(image: torch.Tensor, patch: int = _PATCH) -> torch.Tensor:
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
