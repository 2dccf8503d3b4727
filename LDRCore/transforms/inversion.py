"""Inverts any transform: splits off its affine part, inverts the rest by a fixed-point iteration."""

from __future__ import annotations

import numpy as np
import SimpleITK as sitk
import torch

from LDRCore import geometry
from LDRCore.errors import RegistrationError
from LDRCore.geometry import Grid
from LDRCore.torch_context import own_torch_context
from LDRCore.transforms import spatial
from LDRCore.transforms.field import DenseField, invert_field

_SPACING_MM = 3.0
_MAX_VOXELS = 4_000_000
_MARGIN_MM = 24.0


@own_torch_context()
def invert_transform(transform: sitk.Transform, reference: sitk.Image) -> tuple[sitk.Transform, float]:
    """Invert a transform fixed -> moving.

    A linear transform is inverted exactly. Of any other, the affine map that fits it best over the reference image is
    split off and inverted exactly; what remains is inverted by fixed point on a grid of about 3 mm that covers the
    image.

    Args:
        transform: fixed -> moving.
        reference: the fixed image; the inverse is good for the points that its content goes to.

    Returns:
        (inverse, residual): inverse maps moving -> fixed; residual is the largest distance in mm between x and
        T(T^-1(x)) on that grid (of the grid's representation of T; where T folds there is no inverse and the residual
        is large).

    Raises:
        RegistrationError: the linear part cannot be inverted.
    """
    matrix = geometry.linear_matrix(transform)
    if matrix is not None:
        _check_invertible(matrix)
        return geometry.affine_transform(np.linalg.inv(matrix)), 0.0
    field = _own_field(transform)
    if field is not None:
        _check_invertible(field.affine_lps)
        inverse, residual_mm = invert_field(field)
    else:
        field = _sampled_field(transform, reference)
        v, residual_vox = spatial.invert(field.displacement_vox)
        inverse = DenseField(v, field.grid, np.linalg.inv(field.affine_lps))
        residual_mm = residual_vox * max(field.grid.spacing_mm)
    return geometry.affine_then_dense(inverse.displacement_mm(), inverse.grid, inverse.affine_lps), residual_mm


def _check_invertible(affine_lps: np.ndarray) -> None:
    """Refuse a singular 4x4."""
    if abs(np.linalg.det(affine_lps[:3, :3])) < 1e-9:
        raise RegistrationError("the transform must be invertible, got a singular affine part")


def _field(displacement_mm: np.ndarray, grid: Grid, affine_lps: np.ndarray) -> DenseField:
    """Make a dense field of (D, H, W, 3) mm LPS."""
    displacement = geometry.lps_to_displacement(displacement_mm.astype(np.float32), grid)
    return DenseField(torch.from_numpy(displacement)[None], grid, affine_lps)


def _own_field(transform: sitk.Transform) -> DenseField | None:
    """Return the dense field and affine map of a transform written by this package, None for any other."""
    if transform.GetName() != "CompositeTransform":
        return None
    composite = sitk.CompositeTransform(transform)
    if composite.GetNumberOfTransforms() != 2:
        return None
    affine_lps = geometry.linear_matrix(composite.GetNthTransform(0))
    dense = composite.GetNthTransform(1)
    if affine_lps is None or dense.GetName() != "DisplacementFieldTransform":
        return None
    image = sitk.DisplacementFieldTransform(dense).GetDisplacementField()
    if not np.allclose(image.GetDirection(), np.eye(3).ravel()):
        return None
    x, y, z = image.GetOrigin()
    a, b, c = image.GetSpacing()[::-1]
    d, h, w = image.GetSize()[::-1]
    return _field(sitk.GetArrayFromImage(image), Grid((x, y, z), (a, b, c), (d, h, w)), affine_lps)


def _sampled_field(transform: sitk.Transform, reference: sitk.Image) -> DenseField:
    """Sample any transform on a grid around an image; split it into the affine map that fits best and the rest."""
    corners = geometry.corners_lps(reference)
    grid = Grid.around(
        corners.min(0),
        corners.max(0),
        spacing_mm=_SPACING_MM,
        margin_mm=_MARGIN_MM,
        multiple=1,
        max_voxels=_MAX_VOXELS,
    )
    empty = grid.reference_image()
    points = geometry.points_lps(empty)
    mapped = points + sitk.GetArrayFromImage(geometry.displacement_field_image(transform, empty))
    affine_lps = geometry.fit_affine(points.reshape(-1, 3), mapped.reshape(-1, 3))
    _check_invertible(affine_lps)
    inverse = np.linalg.inv(affine_lps)
    return _field(mapped @ inverse[:3, :3].T + inverse[:3, 3] - points, grid, affine_lps)
