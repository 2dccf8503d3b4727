"""Parts that networks share: check of inputs, dense interface, start of the flow layer, way down and up, smoothing."""

from __future__ import annotations

from collections.abc import Callable, Iterable

import torch
from torch import nn

from LDRCore.refinement import torch_ops
from LDRCore.refinement.backend import operations
from LDRCore.transforms import spatial


def check_pair(moving: torch.Tensor, fixed: torch.Tensor, multiple: int) -> None:
    """Refuse images that a network cannot take.

    Args:
        moving, fixed: must be (B, 1, D, H, W) of one shape.
        multiple: of which every axis must be a multiple, the factor of the network's down-sampling.

    Raises:
        ValueError: the message names the rule and what came.
    """
    if moving.shape != fixed.shape or moving.ndim != 5 or moving.shape[1] != 1:
        raise ValueError(
            f"moving and fixed must both have shape (B, 1, D, H, W), got {tuple(moving.shape)} and {tuple(fixed.shape)}"
        )
    if any(n % multiple for n in moving.shape[2:]):
        raise ValueError(f"every axis must be a multiple of {multiple}, got {tuple(moving.shape[2:])}")


def initialise_flow(layer: nn.Conv3d | nn.ConvTranspose3d) -> None:
    """Draw weights from N(0, 1e-5), with zero bias, so that an untrained network predicts almost no displacement."""
    nn.init.normal_(layer.weight, 0.0, 1e-5)
    if layer.bias is not None:
        nn.init.zeros_(layer.bias)


class DenseNetwork(nn.Module):
    """A base network of a cascade: (moving, fixed) -> displacement.

    Subclasses implement `predict`.

    Attributes:
        multiple: every axis of the images must be a multiple of it.
        field_stride: how many times fewer voxels along each axis the predicted displacement has, on a grid with the
            same corners.
        sigma_total: of a Gaussian on what is composed of this network's displacement and all before, voxels; 0: none.
    """

    multiple: int = 16
    field_stride: int = 1
    sigma_total: float = 0.0

    def predict(self, moving: torch.Tensor, fixed: torch.Tensor) -> torch.Tensor:
        """Predict the displacement that warps the moving image onto the fixed one.

        Args:
            moving, fixed: (B, 1, D, H, W), intensities about 0 to 1.

        Returns:
            (B, 3, D / s, H / s, W / s) in voxels of its own grid, s = `field_stride`.
        """
        raise NotImplementedError

    def predictor(self, fixed: torch.Tensor) -> Callable[[torch.Tensor], torch.Tensor]:
        """Return `predict` for one fixed image, which may compute once what depends on that image alone."""
        return lambda moving: self.predict(moving, fixed)

    def forward(self, moving: torch.Tensor, fixed: torch.Tensor) -> torch.Tensor:
        """Predict the displacement and up-sample it: (B, 3, D, H, W) in voxels of the input grid."""
        return spatial.upsample(self.predict(moving, fixed), fixed.shape[2:])


def encode_and_decode(
    features: torch.Tensor, encoder: Iterable[nn.Module], decoder: Iterable[nn.Module]
) -> torch.Tensor:
    """Run layers down and up again, a ReLU after each; on the way up the features of the same size are concatenated."""
    skips: list[torch.Tensor] = []
    for layer in encoder:
        features = torch.relu(layer(features))
        skips.append(features)
    features = skips.pop()
    for layer in decoder:
        features = torch.cat((torch.relu(layer(features)), skips.pop()), dim=1)
    return features


def smooth(displacements: torch.Tensor, sigma: float) -> torch.Tensor:
    """Smooth (B, 3, D, H, W) by a Gaussian of `sigma` voxels, normalised at the border; differentiable."""
    if displacements.requires_grad or displacements.is_meta:
        weights = torch_ops.gaussian(sigma)
        return torch_ops.filtered(displacements, weights) * torch_ops.normalisation(displacements, weights)
    return spatial.batch([operations(u[0]).smooth(u, sigma)[0] for u in displacements])
