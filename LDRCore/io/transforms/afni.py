"""AFNI's matrices (`.aff12.1D`) and 3dQwarp's fields: DICOM order, which is LPS mm; base (fixed) -> source (moving)."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import SimpleITK as sitk

from LDRCore import geometry
from LDRCore.errors import RegistrationError
from LDRCore.io.nifti_header import INTENT_VECTOR
from LDRCore.io.transforms import fields, matrices
from LDRCore.io.transforms.base import Context, FileHead, TransformFormat, matrix_of

_EXTENSION = b"AFNI_attributes"
_OBLIQUE = 2e-4  # of unit axes: about 0.01 degrees


class AfniFormat(TransformFormat):
    """Twelve numbers by rows, and NIfTI fields (x, y, z, 1, 3) or (x, y, z, 3) of displacements.

    AFNI takes an oblique image for one along the patient's axes while it computes, so that what it writes of one means
    another map than the header's placement says: such images are refused here.
    """

    name = "afni"
    title = "AFNI"
    linear_suffixes = (".1d",)
    dense_suffixes = (".nii.gz", ".nii")

    def recognises(self, head: FileHead) -> bool:
        """Return whether AFNI's extension follows a header, or a text is one of AFNI's matrices."""
        if head.nifti is not None:
            return head.nifti.vector_shape and _EXTENSION in head.nifti.extensions
        return head.text.startswith(("# 3dvolreg matrices", "# 3dAllineate matrices"))

    def read(self, path: Path, context: Context, name: str) -> sitk.Transform:
        """Read a matrix or a field."""
        for image in (context.fixed, context.moving):
            _check_not_oblique(image, name)
        if FileHead.of(path).text:
            return geometry.affine_transform(matrices.read_matrix(path, name))
        made = fields.read_vectors(path, name)
        _check_not_oblique(sitk.DisplacementFieldTransform(made).GetDisplacementField(), name)
        return made

    def check_context(self, context: Context) -> None:
        """Refuse oblique images."""
        for image in (context.fixed, context.moving):
            _check_not_oblique(image, "a transform of AFNI")

    def write(self, transform: sitk.Transform, path: Path, context: Context) -> None:
        """Write a matrix, or displacements on the grid of the fixed image."""
        self.check_context(context)
        if self.writes_matrix(path):
            matrix = matrix_of(transform, self.title)
            numbers = " ".join(f"{value:.10g}" for value in matrix[:3].ravel())
            path.write_text(f"# 3dvolreg matrices (DICOM-to-DICOM, row-by-row):\n{numbers}\n", encoding="ascii")
            return
        fixed = context.fixed_for("a warp of AFNI")
        values = fields.vectors_on(transform, fixed)
        fields.write_nifti(path, values, fixed, (1, 3), intent=INTENT_VECTOR)


def _check_not_oblique(image: sitk.Image | None, name: str) -> None:
    """Refuse an image whose axes are not the patient's.

    Raises:
        RegistrationError: see above.
    """
    if image is None:
        return
    axes = np.abs(np.array(image.GetDirection()).reshape(3, 3))
    if np.minimum(axes, np.abs(1 - axes)).max() > _OBLIQUE:
        raise RegistrationError(
            f"{name} in AFNI's coordinates must belong to images along the patient's axes, got an oblique one: "
            "AFNI ignores the angle"
        )
