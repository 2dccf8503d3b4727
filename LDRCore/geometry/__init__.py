"""Between voxels and millimetres: grids, linear maps, displacement fields, Jacobians. SimpleITK and numpy only.

Matrices are 4x4 and homogeneous. "Index" here always means tensor order (k, j, i), the order of a numpy array of a
SimpleITK image; "lps" means (x, y, z) in mm. A transform maps fixed points to moving points (ITK's resampling
convention).
"""

from __future__ import annotations

from LDRCore.geometry.affine import (
    RAS_TO_LPS,
    affine_transform,
    fit_affine,
    is_singular,
    linear_matrix,
    rigid_transform,
    tensor_affine_to_lps,
)
from LDRCore.geometry.fields import (
    affine_then_dense,
    compose_transforms,
    covering_field_image,
    dense_then_affine,
    displacement_field_image,
    displacement_to_lps,
    field_image,
    field_in_voxels,
    lps_to_displacement,
    transform_parts,
)
from LDRCore.geometry.grids import Grid, corners_lps, empty_image, index_to_lps, points_lps
from LDRCore.geometry.jacobian import jacobian_determinant_image, summarise_jacobian
from LDRCore.geometry.points import transform_points
from LDRCore.geometry.warping import INTERPOLATIONS, volumes_of, warp_volume, warp_volumes

__all__ = [
    "INTERPOLATIONS",
    "RAS_TO_LPS",
    "Grid",
    "affine_then_dense",
    "affine_transform",
    "compose_transforms",
    "corners_lps",
    "covering_field_image",
    "dense_then_affine",
    "displacement_field_image",
    "displacement_to_lps",
    "empty_image",
    "field_image",
    "field_in_voxels",
    "fit_affine",
    "index_to_lps",
    "is_singular",
    "jacobian_determinant_image",
    "linear_matrix",
    "lps_to_displacement",
    "points_lps",
    "rigid_transform",
    "summarise_jacobian",
    "tensor_affine_to_lps",
    "transform_parts",
    "transform_points",
    "volumes_of",
    "warp_volume",
    "warp_volumes",
]
