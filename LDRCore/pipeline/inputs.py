"""Reads the two scans and their masks and prepares them, behind a non-linear initial transform if there is one."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np
import SimpleITK as sitk

from LDRCore.errors import RegistrationError
from LDRCore.io import images
from LDRCore.io.images import ImageLike
from LDRCore.pipeline.preprocess import PreparedImage, prepare
from LDRCore.transforms.volume import Volume


@dataclass(frozen=True, eq=False)
class FixedImage:
    """A fixed image that many pairs share, read and checked once, prepared when it is first registered to.

    Attributes:
        image: three-dimensional scalar image, not to be changed.
        mask: boolean array (z, y, x) on its grid, or None.
    """

    image: sitk.Image
    mask: np.ndarray | None = None
    _prepared: dict[tuple[Any, ...], PreparedImage] = field(default_factory=dict)

    def prepare(self, **spacings: Any) -> PreparedImage:
        """See `preprocess.prepare`; the same object for every pair."""
        key = tuple(sorted(spacings.items()))
        if key not in self._prepared:
            self._prepared[key] = prepare(self.image, self.mask, **spacings)
        return self._prepared[key]


@dataclass(frozen=True, eq=False)
class Inputs:
    """The images and masks of the user, read and checked.

    Attributes:
        fixed, moving: three-dimensional scalar images.
        fixed_mask, moving_mask: boolean arrays (z, y, x) on their grids, or None.
        shared_fixed: the fixed image and its mask once more, where many pairs share them.
    """

    fixed: sitk.Image
    moving: sitk.Image
    fixed_mask: np.ndarray | None
    moving_mask: np.ndarray | None
    shared_fixed: FixedImage | None = None


def read_inputs(
    fixed: ImageLike | FixedImage, moving: ImageLike, fixed_mask: ImageLike | None, moving_mask: ImageLike | None
) -> Inputs:
    """Read both images and their masks.

    Args:
        fixed: an image, or one that was read before with its mask (then `fixed_mask` is not looked at).
        moving, fixed_mask, moving_mask: see `register`.

    Raises:
        RegistrationError: one of them cannot be used; see `io.images`.
    """
    shared = fixed if isinstance(fixed, FixedImage) else None
    fixed_image = fixed.image if isinstance(fixed, FixedImage) else images.load(fixed, "fixed image")
    moving_image = images.load(moving, "moving image")
    return Inputs(
        fixed_image,
        moving_image,
        shared.mask if shared else images.load_mask(fixed_mask, fixed_image, "fixed mask"),
        images.load_mask(moving_mask, moving_image, "moving mask"),
        shared,
    )


@dataclass(frozen=True, eq=False)
class Pair:
    """Two scans ready for the networks.

    Attributes:
        fixed, moving: prepared; `moving` is seen through a non-linear initial transform where there is one.
        moving_as_scanned: the moving image's coarse copy in scanner coordinates, before any initial transform.
    """

    fixed: PreparedImage
    moving: PreparedImage
    moving_as_scanned: Volume


def prepare_pair(inputs: Inputs, nonlinear: sitk.Transform | None, card: dict[str, Any], device: str) -> Pair:
    """Prepare both images for a model.

    Args:
        inputs: see `read_inputs`.
        nonlinear: fixed -> moving. The moving image, masked, is resampled through it onto the fixed grid, and
            registered from there.
        card: of the model: its working spacings.
        device: where the tensors live.
    """
    settings = card["working_grid"]
    spacings = {"fine_mm": settings["spacing_mm"], "coarse_mm": settings["stem_spacing_mm"], "device": device}
    fixed = (inputs.shared_fixed or FixedImage(inputs.fixed, inputs.fixed_mask)).prepare(**spacings)
    moving = prepare(inputs.moving, inputs.moving_mask, **spacings)
    if nonlinear is None:
        return Pair(fixed, moving, moving.coarse)
    resampled = resample_through(inputs.moving, inputs.moving_mask, inputs.fixed, nonlinear)
    mask = None
    if inputs.moving_mask is not None:
        inside = sitk.GetImageFromArray(inputs.moving_mask.astype(np.uint8))
        inside.CopyInformation(inputs.moving)
        mask = sitk.Resample(inside, inputs.fixed, nonlinear, sitk.sitkNearestNeighbor, 0.0)
    allowed = None if mask is None else sitk.GetArrayFromImage(mask) > 0
    if allowed is not None and not allowed.any():
        raise RegistrationError(
            "the moving mask must reach the fixed image through the initial transform, got none of its voxels there"
        )
    return Pair(fixed, prepare(resampled, allowed, **spacings), moving.coarse)


def resample_through(
    image: sitk.Image, mask: np.ndarray | None, reference: sitk.Image, transform: sitk.Transform
) -> sitk.Image:
    """Resample an image linearly through a transform onto a reference grid, masked.

    The mask is applied first: interpolation would mix in what lies outside it.

    Args:
        image: three-dimensional scalar image.
        mask: (D, H, W) boolean on the image's grid; what lies outside becomes the smallest value inside. Or None.
        reference: image on whose grid the result lies.
        transform: points of `reference` -> points of `image`.

    Returns:
        float32, the smallest value outside the image.
    """
    values = sitk.GetArrayViewFromImage(image)
    if mask is None:
        minimum = values.min()
    else:
        minimum = values[mask].min()
        masked = sitk.GetImageFromArray(np.where(mask, values, minimum))
        masked.CopyInformation(image)
        image = masked
    return sitk.Resample(image, reference, transform, sitk.sitkLinear, float(minimum), sitk.sitkFloat32)
