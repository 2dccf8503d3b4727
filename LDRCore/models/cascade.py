"""The cascade: a stem and n dense networks whose displacements are composed (paper, Eq. 1-5)."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial

import torch
import torch.nn.functional as F
from torch import nn

from LDRCore.models.affine import AffineStem
from LDRCore.models.base import DenseNetwork, smooth
from LDRCore.transforms import separable, spatial

# {size: (moving, fixed)}: both images averaged to the sizes that stages take
Pyramid = dict[tuple[int, ...], tuple[torch.Tensor, torch.Tensor]]

Predictor = Callable[[torch.Tensor], torch.Tensor]
"""Moving image (B, 1, D, H, W) -> displacement, for one fixed image."""


@dataclass
class CascadeOutput:
    """Prediction of a cascade for one batch. All displacements are in voxels of the grid they live on.

    Attributes:
        displacement: the composition of all stages, (B, 3, d, h, w), on the field grid (`Cascade.field_shape`).
        composed: the composition up to and including each dense stage, on the finest grid of the stages so far.
        increments: each dense stage's own displacement, on the same grid (smoothness losses take these).
        affine: the stem's (A, b) on the input grid, or None without a stem.
    """

    displacement: torch.Tensor
    composed: list[torch.Tensor] = field(default_factory=list)
    increments: list[torch.Tensor] = field(default_factory=list)
    affine: tuple[torch.Tensor, torch.Tensor] | None = None


class Cascade(nn.Module):
    """An optional affine stem and one or more dense networks applied recursively (paper, Eq. 1-5).

    Each network takes the moving image, warped by all stages before it, and the fixed image; its displacement is
    composed with theirs. The original moving image is sampled each time, so that an image is never interpolated twice.
    A network may be applied several times in a row. Of the n cascades any first 1..n can be run.

    Displacements are composed at the resolution that the networks predict, and up-sampled only where an image is
    warped. A stage may take both images averaged to a coarser grid: at half the size it costs an eighth. Composed
    displacements live on the finest grid that a network so far predicted on; coarser predictions are resampled to it.
    """

    def __init__(
        self,
        networks: Sequence[DenseNetwork],
        stem: AffineStem | None = None,
        *,
        repeats: Sequence[int] | None = None,
        image_strides: Sequence[int] | None = None,
        stem_stride: int = 1,
        multiplier: float | None = None,
        detach_images: bool = False,
        precision: torch.dtype = torch.float32,
    ) -> None:
        """Build the cascade.

        Args:
            networks: the dense networks, first stage first.
            stem: affine stage in front of them.
            repeats: for each network, how often it is applied in a row, with the same weights; once by default.
            image_strides: for each network, how many times fewer voxels along an axis its images have; 1 for all by
                default. The product with the network's `field_stride` is the stride of its field, a multiple of the
                smallest one.
            stem_stride: the same for the stem's images.
            multiplier: factor on every network's displacement; by default 1 / n of n cascades (the release's flow
                multiplier).
            detach_images: no gradient from a stage's input image to the stages before it (cheaper training; the
                composition stays differentiable).
            precision: of the networks' convolutions, float32 or bfloat16; sampling and composing stay float32.
        """
        super().__init__()
        if not networks:
            raise ValueError("a cascade needs at least one dense network, got none")
        self.image_strides = tuple(image_strides) if image_strides else (1,) * len(networks)
        if len(self.image_strides) != len(networks) or min(self.image_strides) < 1:
            raise ValueError(f"image_strides must be {len(networks)} numbers from 1, got {self.image_strides}")
        self.repeats = tuple(repeats) if repeats else (1,) * len(networks)
        if len(self.repeats) != len(networks) or min(self.repeats) < 1:
            raise ValueError(f"repeats must be {len(networks)} numbers from 1, got {self.repeats}")
        pairs = zip(networks, self.image_strides, strict=True)
        strides = {network.field_stride * stride for network, stride in pairs}
        if any(stride % min(strides) for stride in strides):
            raise ValueError(f"the stride of every field must be a multiple of the smallest, got {sorted(strides)}")
        self.stem = stem
        self.stem_stride = stem_stride
        self.networks = nn.ModuleList(networks)
        self.multiplier = 1.0 / len(self) if multiplier is None else multiplier
        self.detach_images = detach_images
        self.precision = precision
        self.field_stride: int = min(strides)
        self.multiple: int = math.lcm(*self.image_strides, stem_stride, *(network.multiple for network in networks))

    def __len__(self) -> int:
        """Return the number of cascades: how often networks are applied."""
        return sum(self.repeats)

    def stages(self) -> list[tuple[DenseNetwork, int]]:
        """Return (network, image stride) of every cascade, in the order in which they are applied."""
        found: list[tuple[DenseNetwork, int]] = []
        for network, stride, repeat in zip(self.networks, self.image_strides, self.repeats, strict=True):
            assert isinstance(network, DenseNetwork)
            found += [(network, stride)] * repeat
        return found

    def field_shape(self, shape: Sequence[int]) -> tuple[int, ...]:
        """Return the shape of the composed displacement's grid for images of size `shape` (D, H, W)."""
        return tuple(n // self.field_stride for n in shape)

    def forward(self, moving: torch.Tensor, fixed: torch.Tensor, n_cascades: int | None = None) -> CascadeOutput:
        """Register a batch.

        Args:
            moving, fixed: (B, 1, D, H, W) on one grid, intensities about 0 to 1.
            n_cascades: how many of the cascades to run, all by default.

        Raises:
            ValueError: n_cascades outside 1..len(self), or a grid that the networks cannot take.
        """
        affine, initial = None, None
        pyramid: Pyramid = {}
        if self.stem is not None:
            shape, stem_shape = fixed.shape[2:], tuple(n // self.stem_stride for n in fixed.shape[2:])
            with self._in_precision(stem_shape, self.stem.multiple, fixed.device):
                matrix, translation = self.stem.predict(*_level(pyramid, moving, fixed, stem_shape))
            affine = _change_grid(matrix.float(), translation.float(), stem_shape, shape)
            field_shape = self.field_shape(shape)
            initial = spatial.affine_to_displacement(*_change_grid(*affine, shape, field_shape), field_shape)
        output = self._compose_stages(moving, fixed, n_cascades, initial, pyramid)
        output.affine = affine
        return output

    def dense(
        self,
        moving: torch.Tensor,
        fixed: torch.Tensor,
        n_cascades: int | None = None,
        *,
        initial: torch.Tensor | None = None,
    ) -> CascadeOutput:
        """Run the dense stages alone, for images that are already affinely aligned.

        Args:
            moving, fixed, n_cascades: as in `forward`.
            initial: displacement on the field grid, in its voxels, that is applied before the first network.
        """
        return self._compose_stages(moving, fixed, n_cascades, initial, {})

    def _compose_stages(
        self,
        moving: torch.Tensor,
        fixed: torch.Tensor,
        n_cascades: int | None,
        initial: torch.Tensor | None,
        pyramid: Pyramid,
    ) -> CascadeOutput:
        count = len(self) if n_cascades is None else n_cascades
        if not 1 <= count <= len(self):
            raise ValueError(f"n_cascades must be 1 to {len(self)}, got {count}")
        total = initial
        composed: list[torch.Tensor] = []
        increments: list[torch.Tensor] = []
        prepared: tuple[DenseNetwork, int] | None = None
        for network, stride in self.stages()[:count]:
            source, target = _level(pyramid, moving, fixed, tuple(n // stride for n in fixed.shape[2:]))
            if total is not None:
                source = spatial.warp_by_coarse(source, total.detach() if self.detach_images else total)
            if prepared != (network, stride):
                prepared, predict = (network, stride), self._predictor(network, target)
            increment = predict(source.detach() if self.detach_images else source)
            shape = increment.shape[2:] if total is None else torch.Size(map(max, increment.shape[2:], total.shape[2:]))
            increment = spatial.upsample(increment.float(), shape)
            if self.multiplier != 1:
                increment = increment * self.multiplier
            total = increment if total is None else spatial.compose(spatial.upsample(total, shape), increment)
            if network.sigma_total:
                total = smooth(total, network.sigma_total)
            increments.append(increment)
            composed.append(total)
        assert total is not None
        return CascadeOutput(spatial.upsample(total, self.field_shape(fixed.shape[2:])), composed, increments)

    def _predictor(self, network: DenseNetwork, fixed: torch.Tensor) -> Predictor:
        """Return what predicts a displacement for a moving image of the fixed one's size.

        Images of a size that the network cannot take are padded with zeros at their ends.
        """
        missing = [-n % network.multiple for n in fixed.shape[2:]]
        padding = [p for n in reversed(missing) for p in (0, n)]
        precise = partial(self._in_precision, fixed.shape[2:], network.multiple, fixed.device)
        with precise():
            predict = network.predictor(F.pad(fixed, padding) if any(missing) else fixed)

        def predict_any(moving: torch.Tensor) -> torch.Tensor:
            with precise():
                displacement = predict(F.pad(moving, padding) if any(missing) else moving)
            d, h, w = (n - m // network.field_stride for n, m in zip(displacement.shape[2:], missing, strict=True))
            return displacement[..., :d, :h, :w]

        return predict_any

    def _in_precision(self, shape: Sequence[int], multiple: int, device: torch.device) -> torch.autocast:
        """Autocast for a network on images of a size.

        In training on a CPU not where the lowest level is 1 or 2 voxels wide: of images of 2 x 2 x 2 voxels
        oneDNN makes bfloat16's weight gradients from memory that nobody has written.
        """
        wide = min(shape) > 2 * multiple
        safe = device.type != "cpu" or wide or not torch.is_grad_enabled()
        return torch.autocast(device.type, self.precision, enabled=safe and self.precision != torch.float32)


def _level(
    pyramid: Pyramid, moving: torch.Tensor, fixed: torch.Tensor, shape: tuple[int, ...]
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return both images averaged to a size, computed once for each size."""
    if shape not in pyramid:
        pyramid[shape] = separable.shrink(moving, shape), separable.shrink(fixed, shape)
    return pyramid[shape]


def _change_grid(
    matrix: torch.Tensor, translation: torch.Tensor, old_shape: Sequence[int], new_shape: Sequence[int]
) -> tuple[torch.Tensor, torch.Tensor]:
    """Express an affine map (A, b) about a grid's centre in voxels of another grid with the same corners."""
    ratio = [(new - 1) / max(old - 1, 1) for old, new in zip(old_shape, new_shape, strict=True)]
    scale = torch.tensor(ratio, dtype=matrix.dtype, device=matrix.device)
    return matrix * scale[:, None] / scale, translation * scale
