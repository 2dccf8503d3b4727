"""Inverting any transform that has a displacement: split off the affine part, invert the rest by fixed point."""

from __future__ import annotations

import numpy as np
import SimpleITK as sitk

from LDRCore import geometry
from LDRCore.errors import RegistrationError
from LDRCore.geometry import Grid

_SPACING_MM = 3.0
_MAX_VOXELS = 4_000_000
_MARGIN_MM = 24.0


def invert_transform(transform: sitk.Transform, reference: sitk.Image) -> tuple[sitk.Transform, float]:
    """The inverse (moving -> fixed) of a transform fixed -> moving.

    A linear transform is inverted exactly. Of any other, the affine map that fits it best over the reference image is
    split off and inverted exactly; what remains is inverted by fixed point on a grid of about 3 mm that covers the
    image.

    Args:
        transform: fixed -> moving.
        reference: the fixed image; the inverse is good for the points that its content goes to.

    Returns:
        (inverse, residual): residual is the largest distance in mm between x and T(T^-1(x)) on that grid (of the
        grid's representation of T; where T folds there is no inverse and the residual is large).

    Raises:
        RegistrationError: the linear part cannot be inverted.
    """
    import torch

    from LDRCore import spatial

    matrix = geometry.linear_matrix(transform)
    if matrix is not None:
        if abs(np.linalg.det(matrix[:3, :3])) < 1e-9:
            raise RegistrationError("the transform must be invertible, got a singular matrix")
        return geometry.affine_transform(np.linalg.inv(matrix)), 0.0
    own = _own_parts(transform)
    if own is not None:
        affine, grid, displacement_mm = own
    else:
        corners = _corners(reference)
        grid = Grid.around(
            corners.min(0),
            corners.max(0),
            spacing_mm=_SPACING_MM,
            margin_mm=_MARGIN_MM,
            multiple=1,
            max_voxels=_MAX_VOXELS,
        )
        total = sitk.GetArrayFromImage(geometry.displacement_field_image(transform, _as_reference(grid)))
        points = _points(grid)
        mapped = points + total.reshape(-1, 3)
        affine = geometry.fit_affine(points, mapped)
        back = np.linalg.inv(affine)
        displacement_mm = (mapped @ back[:3, :3].T + back[:3, 3] - points).reshape(total.shape).astype(np.float32)
    if abs(np.linalg.det(affine[:3, :3])) < 1e-9:
        raise RegistrationError("the transform must be invertible, got a singular affine part")
    field = torch.from_numpy(geometry.lps_to_displacement(displacement_mm, grid))[None].float()
    inverse, residual_vox = spatial.invert(field)
    inverse_mm = geometry.displacement_to_lps(inverse[0].numpy(), grid)
    composite = geometry.affine_then_dense(inverse_mm, grid, np.linalg.inv(affine))
    return composite, residual_vox * max(grid.spacing_mm)


def _own_parts(transform: sitk.Transform) -> tuple[np.ndarray, Grid, np.ndarray] | None:
    """(A, grid, u in mm) of a transform written by this package, None for any other."""
    if transform.GetName() != "CompositeTransform":
        return None
    composite = sitk.CompositeTransform(transform)
    if composite.GetNumberOfTransforms() != 2:
        return None
    affine = geometry.linear_matrix(composite.GetNthTransform(0))
    last = composite.GetNthTransform(1)
    if affine is None or last.GetName() != "DisplacementFieldTransform":
        return None
    image = sitk.DisplacementFieldTransform(last).GetDisplacementField()
    if not np.allclose(image.GetDirection(), np.eye(3).ravel()):
        return None
    x, y, z = image.GetOrigin()
    a, b, c = image.GetSpacing()[::-1]
    d, h, w = image.GetSize()[::-1]
    return affine, Grid((x, y, z), (a, b, c), (d, h, w)), sitk.GetArrayFromImage(image).astype(np.float32)


def _corners(image: sitk.Image) -> np.ndarray:
    size = image.GetSize()
    picks = [[(size[a] - 1) * ((k >> a) & 1) for a in range(3)] for k in range(8)]
    return np.array([image.TransformIndexToPhysicalPoint(p) for p in picks])


def _as_reference(grid: Grid) -> sitk.Image:
    image = sitk.Image(grid.shape[::-1], sitk.sitkUInt8)
    image.SetOrigin(grid.origin_lps)
    image.SetSpacing(grid.spacing_mm[::-1])
    return image


def _points(grid: Grid) -> np.ndarray:
    index = np.stack(np.meshgrid(*[np.arange(n) for n in grid.shape], indexing="ij"), -1).reshape(-1, 3)
    return index @ grid.to_lps[:3, :3].T + grid.to_lps[:3, 3]
