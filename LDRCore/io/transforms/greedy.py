"""greedy's files: affine matrices as text in RAS mm, warps as NIfTI in LPS mm; fixed -> moving."""

from __future__ import annotations

from pathlib import Path

import SimpleITK as sitk

from LDRCore import geometry
from LDRCore.io.transforms import matrices
from LDRCore.io.transforms.base import Context, FileHead, matrix_of, ras_matrix
from LDRCore.io.transforms.itk import ItkFormat


class GreedyFormat(ItkFormat):
    """A 4x4 as text, RAS mm, and warps of NIfTI's vector intent (1007), LPS mm.

    greedy 1.4 reads ITK's binary .mat and .h5 as the matrix diag(0, 1, 1) without an error: linear transforms are
    written as text for it.
    """

    name = "greedy"
    title = "greedy"
    linear_suffixes = (".mat", ".txt")
    dense_suffixes = (".nii.gz", ".nii")

    def recognises(self, head: FileHead) -> bool:
        """A matrix may be another program's, and its warps are ITK's."""
        return False

    def read(self, path: Path, context: Context, name: str) -> sitk.Transform:
        """Read a matrix in RAS mm or a warp."""
        if not FileHead.of(path).text or path.name.lower().endswith(".tfm"):
            return super().read(path, context, name)
        return geometry.affine_transform(ras_matrix(matrices.read_matrix(path, name)))

    def write(self, transform: sitk.Transform, path: Path, context: Context) -> None:
        """Write a matrix in RAS mm, or a field on the grid of the fixed image."""
        if self.writes_matrix(path):
            matrices.write_matrix(path, ras_matrix(matrix_of(transform, self.title)))
            return
        super().write(transform, path, context)
