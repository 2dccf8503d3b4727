"""The recursion: a stem and n dense networks whose displacements are composed (paper, Eq. 1-5)."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import nn

from LDRCore.models.affine import AffineStem
from LDRCore.models.base import DenseNetwork
from LDRCore.transforms import spatial

# the moving and the fixed image at the sizes that stages look at, averaged once
Pyramid = dict[tuple[int, ...], tuple[torch.Tensor, torch.Tensor]]


@dataclass
class CascadeOutput:
    """What a cascade predicts for one batch. All displacements are in voxels of the grid they live on.

    Attributes:
        displacement: the composition of all stages, (B, 3, d, h, w), on the field grid (`Cascade.field_shape`).
        composed: the composition up to and including each dense stage, on the field grid.
        increments: each dense stage's own displacement, on the field grid (smoothness is asked of these).
        affine: the stem's (A, b) on the input grid, or None without a stem.
    """

    displacement: torch.Tensor
    composed: list[torch.Tensor] = field(default_factory=list)
    increments: list[torch.Tensor] = field(default_factory=list)
    affine: tuple[torch.Tensor, torch.Tensor] | None = None


class Cascade(nn.Module):
    """An optional affine stem and one or more dense networks applied recursively.

    Each network k sees (moving warped so far, fixed) and its displacement is composed onto the total. The moving
    image is always sampled once, from the original, by the composed displacement: never a warped image again.
    A cascade trained with n networks runs with any 1..n of them.

    Where every network predicts at half resolution, composing happens there and only the sampling coordinates
    of the image are brought to full size. A stage may look at both images averaged to half their size: the first ones
    then cost an eighth. All fields live on one grid, whatever size of image they were predicted from.
    """

    def __init__(
        self,
        networks: Sequence[DenseNetwork],
        stem: AffineStem | None = None,
        *,
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
            image_strides: for each network 1 or more: the images it sees have so many times fewer voxels along an
                axis; 1 for all by default. Times the network's `field_stride` it must be the same for all.
            stem_stride: the same for the stem.
            multiplier: factor on every network's displacement; 1 / n by default (release: flow multiplier).
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
        pairs = zip(networks, self.image_strides, strict=True)
        strides = {network.field_stride * stride for network, stride in pairs}
        if len(strides) > 1:
            raise ValueError(f"all fields of a cascade must share one grid, got strides of {sorted(strides)}")
        self.stem = stem
        self.stem_stride = stem_stride
        self.networks = nn.ModuleList(networks)
        self.multiplier = 1.0 / len(networks) if multiplier is None else multiplier
        self.detach_images = detach_images
        self.precision = precision
        self.field_stride: int = strides.pop()
        self.multiple: int = math.lcm(*self.image_strides, stem_stride, *(network.multiple for network in networks))

    def __len__(self) -> int:
        return len(self.networks)

    def field_shape(self, shape: Sequence[int]) -> tuple[int, ...]:
        """Grid of the composed displacement for images of size `shape` (D, H, W)."""
        return tuple(n // self.field_stride for n in shape)

    def forward(self, moving: torch.Tensor, fixed: torch.Tensor, n_cascades: int | None = None) -> CascadeOutput:
        """Register a batch.

        Args:
            moving, fixed: (B, 1, D, H, W) on one grid, intensities about 0 to 1.
            n_cascades: how many of the dense networks to run, all by default.

        Raises:
            ValueError: n_cascades outside 1..len(self), or a grid that the networks cannot take.
        """
        affine, start = None, None
        seen: Pyramid = {}
        if self.stem is not None:
            shape = tuple(n // self.stem_stride for n in fixed.shape[2:])
            seen[shape] = spatial.shrink(moving, shape), spatial.shrink(fixed, shape)
            with self._in_precision(fixed.device):
                matrix, translation = self.stem.predict(*seen[shape])
            affine = _on_grid(matrix.float(), translation.float(), shape, fixed.shape[2:])
            field_shape = self.field_shape(fixed.shape[2:])
            start = spatial.affine_to_displacement(*_on_grid(*affine, fixed.shape[2:], field_shape), field_shape)
        output = self._dense(moving, fixed, n_cascades, start, seen)
        output.affine = affine
        return output

    def dense(
        self,
        moving: torch.Tensor,
        fixed: torch.Tensor,
        n_cascades: int | None = None,
        *,
        start: torch.Tensor | None = None,
    ) -> CascadeOutput:
        """The dense stages alone, for images that are already affinely aligned (or behind `start`).

        Args:
            moving, fixed, n_cascades: as in `forward`.
            start: displacement on the field grid, in its voxels, that comes before the first network.
        """
        return self._dense(moving, fixed, n_cascades, start, {})

    def _dense(
        self,
        moving: torch.Tensor,
        fixed: torch.Tensor,
        n_cascades: int | None,
        start: torch.Tensor | None,
        seen: Pyramid,
    ) -> CascadeOutput:
        count = len(self) if n_cascades is None else n_cascades
        if not 1 <= count <= len(self):
            raise ValueError(f"n_cascades must be 1 to {len(self)}, got {count}")
        total = start
        composed: list[torch.Tensor] = []
        increments: list[torch.Tensor] = []
        for network, stride in zip(self.networks[:count], self.image_strides, strict=False):
            assert isinstance(network, DenseNetwork)
            shape = tuple(n // stride for n in fixed.shape[2:])
            if shape not in seen:
                seen[shape] = spatial.shrink(moving, shape), spatial.shrink(fixed, shape)
            source, target = seen[shape]
            if total is not None:
                source = self._warp(source, total)
            increment = self._predict(network, source.detach() if self.detach_images else source, target)
            increment = increment.float() if self.multiplier == 1 else increment.float() * self.multiplier
            total = increment if total is None else spatial.compose(total, increment)
            increments.append(increment)
            composed.append(total)
        assert total is not None
        return CascadeOutput(total, composed, increments)

    def _predict(self, network: DenseNetwork, moving: torch.Tensor, fixed: torch.Tensor) -> torch.Tensor:
        """The network's displacement; images whose size it cannot take are continued by zeros, and it is cut again."""
        short = [-n % network.multiple for n in fixed.shape[2:]]
        if any(short):
            padding = [p for n in reversed(short) for p in (0, n)]
            moving, fixed = F.pad(moving, padding), F.pad(fixed, padding)
        with self._in_precision(fixed.device):
            found = network.predict(moving, fixed)
        d, h, w = (n - s // network.field_stride for n, s in zip(found.shape[2:], short, strict=True))
        return found[..., :d, :h, :w]

    def _in_precision(self, device: torch.device) -> torch.autocast:
        return torch.autocast(device.type, self.precision, enabled=self.precision != torch.float32)

    def _warp(self, moving: torch.Tensor, total: torch.Tensor) -> torch.Tensor:
        return spatial.warp_by_coarse(moving, total.detach() if self.detach_images else total)


def _on_grid(
    matrix: torch.Tensor, translation: torch.Tensor, shape: Sequence[int], other: Sequence[int]
) -> tuple[torch.Tensor, torch.Tensor]:
    """An affine map about the centre of a grid, on another grid with the same corners: (A, b) in its voxels."""
    ratio = [(m - 1) / max(n - 1, 1) for n, m in zip(shape, other, strict=True)]
    scale = torch.tensor(ratio, dtype=matrix.dtype, device=matrix.device)
    return matrix * scale[:, None] / scale, translation * scale
