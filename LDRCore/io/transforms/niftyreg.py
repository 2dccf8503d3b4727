"""NiftyReg's transformations: affine matrices as text, fields and cubic B-splines as NIfTI; RAS mm, fixed -> moving."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import SimpleITK as sitk

from LDRCore import geometry
from LDRCore.errors import RegistrationError
from LDRCore.io.nifti_header import INTENT_VECTOR
from LDRCore.io.transforms import fields, matrices, splines
from LDRCore.io.transforms.base import Context, FileHead, TransformFormat, matrix_of, ras_matrix

_INTENT_NAME = "NREG_TRANS"
_DEFORMATION, _DISPLACEMENT, _SPLINE = 0, 1, 2  # intent_p1
_OTHERS = {3: "a velocity field", 4: "a velocity field", 5: "a stationary velocity spline", 6: "a linear spline"}


class NiftyRegFormat(TransformFormat):
    """Intent name NREG_TRANS; intent_p1 0: coordinates in mm RAS, 1: displacements in mm RAS, 2: a cubic B-spline.

    Control points of a spline hold coordinates in mm RAS; their grid is the header's. Velocities would have to be
    integrated as NiftyReg does: `reg_transform -def` writes their field.
    """

    name = "niftyreg"
    title = "NiftyReg"
    linear_suffixes = (".txt",)
    dense_suffixes = (".nii.gz", ".nii")

    def recognises(self, head: FileHead) -> bool:
        """Return whether the header names one of NiftyReg's transformations."""
        return head.nifti is not None and head.nifti.intent_name == _INTENT_NAME

    def read(self, path: Path, context: Context, name: str) -> sitk.Transform:
        """Read a matrix, a field or a spline."""
        head = FileHead.of(path)
        if head.text:
            return geometry.affine_transform(ras_matrix(matrices.read_matrix(path, name)))
        kind = int(head.nifti.parameters[0]) if head.nifti is not None else -1
        if kind == _DEFORMATION:
            return fields.read_vectors(path, name, fields.from_absolute_ras)
        if kind == _DISPLACEMENT:
            return fields.read_vectors(path, name, fields.to_ras)
        if kind == _SPLINE:
            return _read_spline(path, name)
        what = _OTHERS.get(kind, "another kind")
        raise RegistrationError(
            f"{name} must be a deformation, a displacement or a cubic spline of NiftyReg, got {what} in {path}: "
            "write its field by reg_transform -def"
        )

    def write(self, transform: sitk.Transform, path: Path, context: Context) -> None:
        """Write a matrix, or coordinates on the grid of the fixed image."""
        if self.writes_matrix(path):
            matrices.write_matrix(path, ras_matrix(matrix_of(transform, self.title)))
            return
        fixed = context.fixed_for("a deformation of NiftyReg")
        values = fields.vectors_on(transform, fixed, fields.to_absolute_ras)
        fields.write_nifti(path, values, fixed, (1, 3), intent=INTENT_VECTOR, intent_name=_INTENT_NAME)


def _read_spline(path: Path, name: str) -> sitk.Transform:
    """Read control points; a spline reproduces linear functions, so that their displacements are its coefficients."""
    values, grid = fields.read_components(path, name)
    points = fields.slab_points(grid, 0, grid.GetSize()[2])
    coefficients = fields.from_absolute_ras(points, np.moveaxis(values, 0, -1).astype(np.float64))
    return splines.spline_transform(
        np.moveaxis(coefficients, -1, 0), grid.GetOrigin(), grid.GetSpacing(), grid.GetDirection()
    )
