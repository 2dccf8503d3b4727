"""This project's own light network: an LDR that is fed the gradient of local correlation."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import nn

from LDRCore.models.base import DenseNetwork, check_pair, encode_and_decode, initialise_flow, smooth
from LDRCore.refinement.backend import operations
from LDRCore.transforms import separable, spatial

_SLICES = 16  # whose lengths are computed at once
FINE_GAIN = 0.25  # at first: the longest vectors are about six typical lengths, so a step is at most 1.5 voxels
LIMIT = 2.0  # no vector that the first convolution sees is longer, in units of a typical length


class LDRGradient(DenseNetwork):
    """A learned step of an optimiser: images and gradient in, displacement at half size out.

    The gradient is that of squared local normalised cross-correlation by a displacement composed before the warped
    moving image (`refinement.torch_ops.Correlation`), which the network would otherwise have to find out. It
    is an input, without a derivative of its own. It enters twice: at the images' size, beside them; and at half size,
    averaged and smoothed, in the result, times a learned gain and a gain that the network predicts for every voxel.
    With `sigma` it enters a third time, smoothed at the images' size, where the displacement then lives as well: what
    a few steps gain depends on detail that averaging takes away. Applied again to what it warped, the same weights go
    on improving; a card says how often by "repeat".

    Sources: learned gradient descent, Adler & Oktem, Solving ill-posed inverse problems using iterative deep neural
    networks, 2017; recurrent inference machines, Putzky & Welling, 2017; for registration, Qiu et al., Embedding
    gradient-based optimization in image registration networks (GraDIRN), 2022. The layers are those of `LDR`.
    """

    def __init__(
        self,
        channels: tuple[int, ...] = (16, 32, 64, 64),
        up: tuple[int, ...] | None = None,
        hidden: int = 0,
        window: int = 3,
        epsilon: float = 1e-4,
        sigma: float = 0.0,
        sigma_total: float = 0.0,
    ) -> None:
        """Build the network.

        Args:
            channels: of the stride-2 convolutions, finest first; at most four.
            up: channels of the transposed convolutions, coarsest first; by default those of the skips that they are
                concatenated with.
            hidden: channels of a 3x3x3 convolution before the last; 0 for none.
            window: odd edge of the window of local correlation, voxels.
            epsilon: variance that is added to that of every window; well below it a window counts as constant.
            sigma: of the Gaussian on the gradient at the images' size, voxels; 0: the displacement has half that size.
            sigma_total: see `DenseNetwork`; where few voxels fold, .5 ends that.
        """
        super().__init__()
        self.field_stride = 1 if sigma else 2
        self.window, self.epsilon, self.sigma, self.sigma_total = window, epsilon, sigma, sigma_total
        widths = up or tuple(reversed(channels[:-1]))
        if len(widths) != len(channels) - 1:
            raise ValueError(f"up must be {len(channels) - 1} numbers for channels {channels}, got {widths}")
        self.encoder = nn.ModuleList(nn.Conv3d(a, b, 4, stride=2, padding=1) for a, b in pairwise((5, *channels)))
        self.decoder = nn.ModuleList()
        below = channels[-1]
        for width, skip in zip(widths, reversed(channels[:-1]), strict=True):
            self.decoder.append(nn.ConvTranspose3d(below, width, 4, stride=2, padding=1))
            below = width + skip
        self.mix = nn.Conv3d(below, hidden, 3, padding=1) if hidden else None
        self.flow = nn.Conv3d(hidden or below, 5 if sigma else 4, 3, padding=1)
        self.gain = nn.Parameter(torch.tensor(0.3))
        self.fine_gain = nn.Parameter(torch.tensor(FINE_GAIN)) if sigma else None
        initialise_flow(self.flow)

    def predict(self, moving: torch.Tensor, fixed: torch.Tensor) -> torch.Tensor:
        """See `DenseNetwork.predict`."""
        check_pair(moving, fixed, self.multiple)
        given = forces(moving, fixed, self.window, self.epsilon, self.sigma)
        features = encode_and_decode(torch.cat((moving, fixed, given.limited), dim=1), self.encoder, self.decoder)
        if self.mix is not None:
            features = torch.relu(self.mix(features))
        return given.add_to(self.flow(features).float(), self.gain, self.fine_gain)


@dataclass(frozen=True)
class Forces:
    """The gradient of local correlation in three forms, each in units of its typical length, float32.

    A typical length is the mean length of all vectors, each weighted by its length: regions without any gradient do not
    count. Where both images are constant everything is zero.

    Attributes:
        limited: (B, 3, D, H, W), no vector longer than `LIMIT`.
        coarse: (B, 3, D / 2, H / 2, W / 2), averaged and smoothed.
        smoothed: (B, 3, D, H, W), by a Gaussian; None if it was not asked for.
    """

    limited: torch.Tensor
    coarse: torch.Tensor
    smoothed: torch.Tensor | None

    def add_to(self, flow: torch.Tensor, gain: torch.Tensor, fine_gain: torch.Tensor | None) -> torch.Tensor:
        """Add the coarse and the smoothed form, times a gain everywhere and a gain of every voxel, to a displacement.

        Args:
            flow: (B, 4 or 5, d, h, w), at half size: displacement, gain of the coarse and of the smoothed form.
            gain, fine_gain: everywhere, of the coarse and of the smoothed form.

        Returns:
            (B, 3, d, h, w), or (B, 3, D, H, W) with the smoothed form.
        """
        displacement = torch.addcmul(flow[:, :3], flow[:, 3:4] + gain.float(), self.coarse)
        if self.smoothed is None or fine_gain is None:
            return displacement
        shape = self.smoothed.shape[2:]
        gains = separable.interpolate(flow[:, 4:] + fine_gain.float(), shape)
        return spatial.upsample(displacement, shape).addcmul_(gains, self.smoothed)


@torch.no_grad()
def forces(moving: torch.Tensor, fixed: torch.Tensor, window: int, epsilon: float, sigma: float = 0.0) -> Forces:
    """Compute the gradient of local correlation in the forms that a network is given.

    Args:
        moving, fixed: (B, 1, D, H, W), intensities about 0 to 1; the moving image warped so far.
        window, epsilon, sigma: see `LDRGradient`.
    """
    if moving.is_meta:  # sizes alone, see `registry.cost`
        fine = moving.expand(-1, 3, -1, -1, -1)
        return Forces(fine, fine[..., ::2, ::2, ::2], fine if sigma else None)
    with torch.autocast(moving.device.type, enabled=False):
        pairs = zip(moving[:, 0].float(), fixed[:, 0].float(), strict=True)
        return forms_of([operations(f).Correlation(f, window, epsilon).gradient(w)[0] for w, f in pairs], sigma)


def forms_of(gradients: Sequence[torch.Tensor], sigma: float) -> Forces:
    """Compute the forms of a batch's gradients, (3, D, H, W) each, which are overwritten."""
    gradient, smoothed = spatial.batch(gradients), None
    if sigma:
        smoothed = smooth(gradient, sigma)
        smoothed.div_(_typical_length(_all_lengths(smoothed)))
    coarse = _smooth(_halve(gradient))
    coarse.div_(_typical_length(_lengths(coarse)))
    lengths = _all_lengths(gradient)
    most = LIMIT * _typical_length(lengths)
    limited = gradient.mul_(torch.maximum(lengths, most, out=lengths).reciprocal_().mul_(LIMIT))
    return Forces(limited, coarse, smoothed)


def _all_lengths(field: torch.Tensor) -> torch.Tensor:
    """As `_lengths`, slab by slab, so that each stays in the cache."""
    return torch.cat([_lengths(slab) for slab in field.split(_SLICES, dim=2)], dim=2)


def _halve(field: torch.Tensor) -> torch.Tensor:
    """Average (B, 3, D, H, W) over 2x2x2 voxels."""
    for axis in (2, 3, 4):
        low, high = field.unflatten(axis, (-1, 2)).unbind(axis + 1)
        field = low + high
    return field.mul_(1 / 8)


def _smooth(field: torch.Tensor) -> torch.Tensor:
    """Smooth by (1, 2, 1) / 4 along each axis, a Gaussian of 0.7 voxels, with border padding."""
    for axis in (2, 3, 4):
        n = field.shape[axis]
        smoothed = 2 * field
        smoothed.narrow(axis, 1, n - 1).add_(field.narrow(axis, 0, n - 1))
        smoothed.narrow(axis, 0, n - 1).add_(field.narrow(axis, 1, n - 1))
        for end in (0, n - 1):
            smoothed.select(axis, end).add_(field.select(axis, end))
        field = smoothed
    return field.mul_(1 / 64)


def _lengths(field: torch.Tensor) -> torch.Tensor:
    """(B, 1, D, H, W): lengths of the vectors of (B, 3, D, H, W)."""
    z, y, x = field.split(1, dim=1)
    return (z * z).addcmul_(y, y).addcmul_(x, x).sqrt_()


def _typical_length(lengths: torch.Tensor) -> torch.Tensor:
    """(B, 1, 1, 1, 1): mean of (B, 1, D, H, W), weighted by itself; never 0."""
    flat = lengths.flatten(1)
    mean = torch.linalg.vecdot(flat, flat) / flat.sum(1).clamp_min(1e-30)
    return mean.clamp_min(1e-12).view(-1, 1, 1, 1, 1)
