"""SPM's deformations, `y_*.nii`: coordinates of the mapped points."""

from __future__ import annotations

from pathlib import Path

import SimpleITK as sitk

from LDRCore.io.nifti_header import INTENT_VECTOR
from LDRCore.io.transforms import fields
from LDRCore.io.transforms.base import Context, FileHead, TransformFormat

_INTENT_NAME = "Mapping"


class SpmFormat(TransformFormat):
    """Coordinates in mm RAS of the moving image at every voxel of the fixed, (x, y, z, 1, 3), intent name "Mapping"."""

    name = "spm"
    title = "SPM"
    dense_suffixes = (".nii", ".nii.gz")

    def recognises(self, head: FileHead) -> bool:
        """Return whether the header names a mapping."""
        return head.nifti is not None and head.nifti.intent_name == _INTENT_NAME

    def read(self, path: Path, context: Context, name: str) -> sitk.Transform:
        """Read a deformation; its own grid holds."""
        return fields.read_vectors(path, name, fields.from_absolute_ras)

    def write(self, transform: sitk.Transform, path: Path, context: Context) -> None:
        """Write a deformation on the grid of the fixed image; SPM itself reads uncompressed files only."""
        fixed = context.fixed_for("a deformation of SPM")
        values = fields.vectors_on(transform, fixed, fields.to_absolute_ras)
        fields.write_nifti(path, values, fixed, (1, 3), intent=INTENT_VECTOR, intent_name=_INTENT_NAME)
