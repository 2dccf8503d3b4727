"""Computes the outputs of a registration from its dense field: transform, warped image, Jacobian, inverse."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol

import numpy as np
import SimpleITK as sitk

from LDRCore import geometry
from LDRCore.torch_context import own_torch_context
from LDRCore.transforms import inversion, resample
from LDRCore.transforms.field import DenseField
from LDRCore.transforms.volume import Volume


class Output(Protocol):
    """The transform of a registration, and the images computed from it.

    Attributes:
        transform: fixed -> moving.
        affine: its affine part alone (behind a non-linear initial transform: that transform after the affine part).
    """

    transform: sitk.Transform
    affine: sitk.Transform

    def jacobian(self) -> np.ndarray:
        """Compute the determinant on the fixed grid, (D, H, W) float32."""

    def summarise_jacobian(self) -> dict[str, Any]:
        """Summarise the same without holding all of it, see `geometry.summarise_jacobian`."""

    def warp(self, progress: Callable[[float], None] | None = None) -> sitk.Image:
        """Warp the moving image onto the fixed grid, in its own pixel type, sampled once."""

    def invert(self) -> sitk.Transform:
        """Compute the inverse transform, moving -> fixed."""


class DenseOutput:
    """``T(x) = A (x + u(x))``: sampled by this package, slab by slab."""

    def __init__(self, field: DenseField, fixed: sitk.Image, moving: sitk.Image, volume: Volume) -> None:
        """`volume` is the moving image with its own intensities."""
        self._field, self._fixed, self._volume = field, fixed, volume
        self._shape, self._to_lps = fixed.GetSize()[::-1], geometry.index_to_lps(fixed)
        self._dtype = sitk.GetArrayViewFromImage(moving).dtype
        self.transform: sitk.Transform = field.transform()
        self.affine: sitk.Transform = field.affine()

    def warp(self, progress: Callable[[float], None] | None = None) -> sitk.Image:
        """See `Output`."""
        values = resample.warp(self._volume, self._shape, self._to_lps, self._field, self._dtype, progress)
        warped = sitk.GetImageFromArray(values)
        warped.CopyInformation(self._fixed)
        return warped

    def invert(self) -> sitk.Transform:
        """See `Output`."""
        return inversion.inverted(self._field)

    def jacobian(self) -> np.ndarray:
        """See `Output`."""
        with own_torch_context():
            return resample.jacobian_determinant(self._shape, self._to_lps, self._field)

    def summarise_jacobian(self) -> dict[str, Any]:
        """See `Output`."""
        with own_torch_context():
            slabs = resample.jacobian_slabs(self._shape, self._to_lps, self._field)
            return geometry.summarise_jacobian(determinant for _, _, determinant in slabs)


class LinearOutput(DenseOutput):
    """``T(x) = A x``, as an affine transform or, for the kind "rigid", one of 6 parameters."""

    def __init__(self, field: DenseField, fixed: sitk.Image, moving: sitk.Image, volume: Volume, kind: str) -> None:
        """`field` has no displacement; others see `DenseOutput`."""
        super().__init__(field, fixed, moving, volume)
        make = geometry.rigid_transform if kind == "rigid" else geometry.affine_transform
        self.transform = self.affine = make(field.affine_lps)
        self._determinant = 1.0 if kind == "rigid" else float(np.linalg.det(field.affine_lps[:3, :3]))

    def invert(self) -> sitk.Transform:
        """See `Output`."""
        return self.transform.GetInverse()

    def jacobian(self) -> np.ndarray:
        """See `Output`."""
        return np.full(self._shape, self._determinant, np.float32)

    def summarise_jacobian(self) -> dict[str, Any]:
        """See `Output`."""
        return geometry.summarise_jacobian([np.broadcast_to(np.float32(self._determinant), self._shape)])


class ComposedOutput:
    """``T(x) = T0(A (x + u(x)))`` behind a non-linear initial transform T0: sampled by SimpleITK."""

    def __init__(self, field: DenseField, initial: sitk.Transform, fixed: sitk.Image, moving: sitk.Image) -> None:
        self._fixed, self._moving = fixed, moving
        self.transform: sitk.Transform = geometry.compose_transforms(initial, field.transform())
        self.affine: sitk.Transform = geometry.compose_transforms(initial, field.affine())

    def warp(self, progress: Callable[[float], None] | None = None) -> sitk.Image:
        """See `Output`."""
        minimum = float(sitk.GetArrayViewFromImage(self._moving).min())
        return sitk.Resample(self._moving, self._fixed, self.transform, sitk.sitkLinear, minimum)

    def invert(self) -> sitk.Transform:
        """See `Output`."""
        return inversion.inverse_of(self.transform, self._fixed)

    def jacobian(self) -> np.ndarray:
        """See `Output`."""
        field = geometry.displacement_field_image(self.transform, self._fixed)
        return sitk.GetArrayFromImage(geometry.jacobian_determinant_image(field))

    def summarise_jacobian(self) -> dict[str, Any]:
        """See `Output`."""
        return geometry.summarise_jacobian([self.jacobian()])
