"""The recursion: a stem and n dense networks whose displacements are composed (paper, Eq. 1-5)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import nn

from LDRCore import spatial
from LDRCore.models.affine import AffineStem
from LDRCore.models.blocks import DenseNetwork


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
    of the image are brought to full size.
    """

    def __init__(
        self,
        networks: Sequence[DenseNetwork],
        stem: AffineStem | None = None,
        *,
        multiplier: float | None = None,
        detach_images: bool = False,
        precision: torch.dtype = torch.float32,
    ) -> None:
        """Build the cascade.

        Args:
            networks: the dense networks, first stage first.
            stem: affine stage in front of them.
            multiplier: factor on every network's displacement; 1 / n by default (release: flow multiplier).
            detach_images: no gradient from a stage's input image to the stages before it (cheaper training; the
                composition stays differentiable).
            precision: of the networks' convolutions, float32 or bfloat16; sampling and composing stay float32.
        """
        super().__init__()
        if not networks:
            raise ValueError("a cascade needs at least one dense network, got none")
        strides = {network.field_stride for network in networks}
        if len(strides) > 1:
            raise ValueError(f"all networks of a cascade must share one field_stride, got {sorted(strides)}")
        self.stem = stem
        self.networks = nn.ModuleList(networks)
        self.multiplier = 1.0 / len(networks) if multiplier is None else multiplier
        self.detach_images = detach_images
        self.precision = precision
        self.field_stride: int = strides.pop()
        self.multiple: int = max(network.multiple for network in networks)

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
        if self.stem is not None:
            with torch.autocast(fixed.device.type, self.precision, enabled=self.precision != torch.float32):
                matrix, translation = self.stem.predict(moving, fixed)
            affine = matrix.float(), translation.float()
            start = self._on_field_grid(*affine, fixed.shape[2:])
        output = self.dense(moving, fixed, n_cascades, start=start)
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
        count = len(self) if n_cascades is None else n_cascades
        if not 1 <= count <= len(self):
            raise ValueError(f"n_cascades must be 1 to {len(self)}, got {count}")
        total, warped = None, moving
        if start is not None:
            warped, total = self._warp(moving, start), start
        output = CascadeOutput(displacement=torch.empty(0))
        for k in range(count):
            network = self.networks[k]
            assert isinstance(network, DenseNetwork)
            source = warped.detach() if self.detach_images else warped
            with torch.autocast(fixed.device.type, self.precision, enabled=self.precision != torch.float32):
                increment = network.predict(source, fixed)
            increment = increment.float() * self.multiplier
            total = increment if total is None else spatial.compose(total, increment)
            output.increments.append(increment)
            output.composed.append(total)
            if k + 1 < count:
                warped = self._warp(moving, total)
        assert total is not None
        output.displacement = total
        return output

    def _on_field_grid(self, matrix: torch.Tensor, translation: torch.Tensor, shape: Sequence[int]) -> torch.Tensor:
        """The displacement of an affine map about the input grid's centre, (B, 3, d, h, w) on the field grid."""
        coarse = self.field_shape(shape)
        ratio = [(n - 1) / max(m - 1, 1) for n, m in zip(shape, coarse, strict=True)]
        scale = torch.tensor(ratio, dtype=matrix.dtype, device=matrix.device)
        return spatial.affine_to_displacement(matrix * scale / scale[:, None], translation / scale, coarse)

    def _warp(self, moving: torch.Tensor, total: torch.Tensor) -> torch.Tensor:
        return spatial.warp_by_coarse(moving, total.detach() if self.detach_images else total)
