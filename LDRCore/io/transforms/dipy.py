"""DIPY's mappings, as `dipy.align.write_mapping` writes them: NIfTI (x, y, z, 3, 2), RAS mm."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import SimpleITK as sitk

from LDRCore import geometry
from LDRCore.errors import RegistrationError
from LDRCore.io.transforms import fields
from LDRCore.io.transforms.base import Context, FileHead, TransformFormat, lps_from_ijk
from LDRCore.io.transforms.grids import grid_from_ras

_ITERATIONS = 30  # of the fixed point that inverts a field


class DipyFormat(TransformFormat):
    """Displacements in mm RAS; [..., 1] pulls the moving image to the static (fixed) one, [..., 0] is its inverse.

    The file's affine is the inverse of the static image's, so other programs place it elsewhere. A prealignment is not
    in the file: it applies after the field, as a second transform; `read_mapping` wants its inverse.
    """

    name = "dipy"
    title = "DIPY"
    dense_suffixes = (".nii.gz", ".nii")

    def recognises(self, head: FileHead) -> bool:
        """Return whether the array has the shape of a mapping, which no other program writes."""
        return head.nifti is not None and head.nifti.shape[3:] == (3, 2)

    def read(self, path: Path, context: Context, name: str) -> sitk.Transform:
        """Read the pulling field; its grid is that of the inverse of the file's affine."""
        array, head = fields.read_array(path, name)
        if head.shape[3:] != (3, 2):
            raise RegistrationError(f"{name} must be a mapping of DIPY, (x, y, z, 3, 2), got {head.shape} in {path}")
        if geometry.is_singular(head.sform):
            raise RegistrationError(f"{name} must have an invertible affine, got {head.sform.tolist()} in {path}")
        grid = grid_from_ras(np.linalg.inv(head.sform), head.shape[:3], name)
        pull = np.ascontiguousarray(array[..., 1].transpose(3, 2, 1, 0), dtype=np.float32)
        return fields.field_transform(pull, grid, fields.to_ras)

    def write(self, transform: sitk.Transform, path: Path, context: Context) -> None:
        """Write the field on the grid of the fixed image, and its inverse by fixed point on the same grid."""
        fixed = context.fixed_for("a mapping of DIPY")
        push = _inverted(fields.sampled(transform, fixed))
        values = [fields.vectors_on(one, fixed, fields.to_ras) for one in (push, transform)]
        affine = np.linalg.inv(geometry.RAS_TO_LPS @ lps_from_ijk(fixed))
        fields.write_nifti(path, np.concatenate(values), fixed, (3, 2), affine=affine)


def _inverted(field: sitk.Image) -> sitk.Transform:
    """Invert a displacement field on its grid by fixed point: ``v(y) = -u(y + v(y))``."""
    forward = sitk.DisplacementFieldTransform(sitk.Cast(field, sitk.sitkVectorFloat64))
    inverse = np.negative(sitk.GetArrayFromImage(field))
    for step in range(_ITERATIONS):
        image = sitk.GetImageFromArray(inverse.astype(np.float64), isVector=True)
        image.CopyInformation(field)
        guess = sitk.DisplacementFieldTransform(image)
        if step == _ITERATIONS - 1:
            break
        both = geometry.displacement_field_image(geometry.compose_transforms(forward, guess), field)
        inverse = inverse - sitk.GetArrayViewFromImage(both)  # both = v + u(y + v)
    return guess
