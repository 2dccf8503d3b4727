"""FSL's transforms: FLIRT's matrices, dense warps and FNIRT's coefficients, in FSL's own scaled voxels."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import SimpleITK as sitk

from LDRCore import geometry
from LDRCore.errors import RegistrationError
from LDRCore.io.transforms import fields, matrices, splines
from LDRCore.io.transforms.base import Context, FileHead, TransformFormat, chain, lps_from_ijk, matrix_of

_FIELD, _CUBIC, _DCT, _QUADRATIC = 2006, 2007, 2008, 2009  # NIfTI's intents of FNIRT
_KINDS = range(2006, 2019)  # FNIRT's and topup's
_ORDERS = {_CUBIC: 3, _QUADRATIC: 2}


class FslFormat(TransformFormat):
    """Coordinates are voxels times their spacing, x counted from the other end where the voxels are right-handed.

    - FLIRT's 4x4 takes moving to fixed coordinates, so that its inverse is the point map.
    - A warp (x, y, z, 3) holds displacements, or coordinates in the moving image, at every voxel of the fixed. Which of
      these is told as FSL does: by the one whose values vary less as displacements.
    - Coefficients (intents 2007, 2009) are splines on knots every so many voxels, knot 1 at voxel 0; the header's
      sform is FLIRT's matrix that comes last.

    Both images' grids are needed.
    """

    name = "fsl"
    title = "FSL"
    linear_suffixes = (".mat", ".txt")
    dense_suffixes = (".nii.gz", ".nii")

    def recognises(self, head: FileHead) -> bool:
        """Return whether the header has one of FSL's intents."""
        return head.nifti is not None and head.nifti.intent in _KINDS

    def read(self, path: Path, context: Context, name: str) -> sitk.Transform:
        """Read a matrix, a warp or coefficients."""
        fixed_fsl = fsl_from_lps(context.fixed_for(f"{name} of FSL"))
        moving_lps = np.linalg.inv(fsl_from_lps(context.moving_for(f"{name} of FSL")))
        head = FileHead.of(path)
        if head.text:
            matrix = matrices.read_matrix(path, name)
            if geometry.is_singular(matrix):
                raise RegistrationError(f"{name} must be invertible, got a singular matrix in {path}")
            return geometry.affine_transform(moving_lps @ np.linalg.inv(matrix) @ fixed_fsl)
        if head.nifti is not None and head.nifti.intent in _ORDERS:
            return _read_coefficients(path, fixed_fsl, moving_lps, name)
        if head.nifti is not None and head.nifti.intent in _KINDS and head.nifti.intent != _FIELD:
            raise RegistrationError(
                f"{name} must be a warp, or cubic or quadratic coefficients of FNIRT, got NIfTI's intent "
                f"{head.nifti.intent} in {path}: write its field by fnirtfileutils"
            )
        values, grid = fields.read_components(path, name)
        fixed = context.fixed_for(f"{name} of FSL")
        fields.check_same_size(grid, fixed, name, path)
        absolute = _holds_coordinates(values, fixed, fixed_fsl)

        def convert(points: np.ndarray, vectors: np.ndarray) -> np.ndarray:
            coordinates = vectors if absolute else vectors + fields.apply_matrix(fixed_fsl, points)
            return fields.apply_matrix(moving_lps, coordinates) - points

        return fields.field_transform(values, fixed, convert)

    def write(self, transform: sitk.Transform, path: Path, context: Context) -> None:
        """Write FLIRT's matrix, or displacements on the grid of the fixed image."""
        fixed = context.fixed_for("a transform of FSL")
        fixed_fsl, moving_fsl = fsl_from_lps(fixed), fsl_from_lps(context.moving_for("a transform of FSL"))
        if self.writes_matrix(path):
            matrix = moving_fsl @ matrix_of(transform, self.title) @ np.linalg.inv(fixed_fsl)
            matrices.write_matrix(path, np.linalg.inv(matrix))
            return

        def convert(points: np.ndarray, displacement: np.ndarray) -> np.ndarray:
            return fields.apply_matrix(moving_fsl, points + displacement) - fields.apply_matrix(fixed_fsl, points)

        values = fields.vectors_on(transform, fixed, convert)
        fields.write_nifti(path, values, fixed, (3,), intent=_FIELD)


def fsl_from_lps(image: sitk.Image) -> np.ndarray:
    """Return the 4x4 from LPS mm to FSL's coordinates of an image."""
    lps_from_index = lps_from_ijk(image)
    fsl_from_ijk = np.diag([*image.GetSpacing(), 1.0])
    if np.linalg.det(lps_from_index[:3, :3]) > 0:  # the same sign in RAS
        fsl_from_ijk[0, 0] *= -1
        fsl_from_ijk[0, 3] = (image.GetSize()[0] - 1) * image.GetSpacing()[0]
    return fsl_from_ijk @ np.linalg.inv(lps_from_index)


def _holds_coordinates(values: np.ndarray, fixed: sitk.Image, fixed_fsl: np.ndarray) -> bool:
    """Return whether a warp holds coordinates, (3, D, H, W) in FSL's mm, rather than displacements."""
    step = max(1, values.shape[1] // 16)
    stored, displaced = [], []
    for k in range(0, values.shape[1], step):
        with np.errstate(invalid="ignore"):  # what is not finite is refused later
            vectors = np.moveaxis(values[:, k : k + 1], 0, -1).astype(np.float64)
        stored.append(vectors.reshape(-1, 3))
        own = fields.apply_matrix(fixed_fsl, fields.slab_points(fixed, k, k + 1))
        displaced.append((vectors - own).reshape(-1, 3))
    return bool(np.concatenate(displaced).std(0).sum() < np.concatenate(stored).std(0).sum())


def _read_coefficients(path: Path, fixed_fsl: np.ndarray, moving_lps: np.ndarray, name: str) -> sitk.Transform:
    """Read FNIRT's coefficients as affine, spline and affine."""
    array, known = fields.read_array(path, name)
    if known.shape[3:] != (3,):
        raise RegistrationError(f"{name} must hold 3 coefficients a knot, got the shape {known.shape} in {path}")
    pixel = np.array(known.parameters)  # the spacing of the image that they were made for
    spacing = np.array(known.spacing[:3]) * pixel
    if not (np.isfinite(known.sform).all() and (spacing > 0).all() and not geometry.is_singular(known.sform)):
        raise RegistrationError(f"{name} must name its knots' spacing and an invertible matrix, got others in {path}")
    # fnirtfileutils adds displacements after the matrix, A^-1 x + d, which is A^-1 (x + A d)
    turned = np.einsum("ac,ijkc->akji", known.sform[:3, :3], array.astype(np.float64))
    spline = splines.spline_transform(
        turned, (-spacing).tolist(), spacing.tolist(), order=_ORDERS[known.intent], padding=2
    )
    return chain(moving_lps @ np.linalg.inv(known.sform), spline, fixed_fsl)
