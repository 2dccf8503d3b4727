"""Displacement fields: tensors in voxels <-> SimpleITK vector images in mm LPS <-> composite transforms."""

from __future__ import annotations

import numpy as np
import SimpleITK as sitk

from LDRCore.geometry.affine import affine_transform, fit_affine
from LDRCore.geometry.grids import Grid, corners_lps, index_to_lps
from LDRCore.geometry.points import transform_points

COVERING_VOXELS = 16_000_000  # of a covering field; larger fixed images are sampled at every n-th voxel
DEEPEST_COMPOSITE = 8  # composites in composites that are taken apart


def displacement_to_lps(displacement_vox: np.ndarray, grid: Grid) -> np.ndarray:
    """Convert (3, D, H, W) in voxels along tensor axes to (D, H, W, 3) in mm along (x, y, z)."""
    displacement_mm = np.empty((*displacement_vox.shape[1:], 3), displacement_vox.dtype)
    for axis, spacing in enumerate(grid.spacing_mm):
        np.multiply(displacement_vox[axis], spacing, out=displacement_mm[..., 2 - axis])
    return displacement_mm


def lps_to_displacement(displacement_mm: np.ndarray, grid: Grid) -> np.ndarray:
    """Convert (D, H, W, 3) in mm along (x, y, z) to (3, D, H, W) in voxels along tensor axes."""
    by_tensor_axis = np.moveaxis(displacement_mm, -1, 0)[::-1]
    return np.ascontiguousarray(
        by_tensor_axis / np.array(grid.spacing_mm, dtype=displacement_mm.dtype)[:, None, None, None]
    )


def field_image(displacement_mm: np.ndarray, grid: Grid) -> sitk.Image:
    """Make a vector image of doubles of (D, H, W, 3) mm LPS on a grid."""
    image = sitk.GetImageFromArray(displacement_mm.astype(np.float64), isVector=True)
    image.SetOrigin(grid.origin_lps)
    image.SetSpacing(grid.spacing_mm[::-1])
    return image


def dense_then_affine(displacement_mm: np.ndarray, grid: Grid, affine_lps: np.ndarray) -> sitk.CompositeTransform:
    """Make one transform ``x -> A (x + u(x))``; outside the field's grid u is 0 and the affine part still holds.

    Args:
        displacement_mm: u, (D, H, W, 3) mm LPS.
        grid: where u lives.
        affine_lps: A, 4x4.
    """
    composite = sitk.CompositeTransform(3)
    composite.AddTransform(affine_transform(affine_lps))
    composite.AddTransform(sitk.DisplacementFieldTransform(field_image(displacement_mm, grid)))  # applied first
    return composite


def affine_then_dense(displacement_mm: np.ndarray, grid: Grid, affine_lps: np.ndarray) -> sitk.CompositeTransform:
    """Make one transform ``y -> A y + v(A y)``: the form of the inverse of `dense_then_affine`; arguments as there."""
    composite = sitk.CompositeTransform(3)
    composite.AddTransform(sitk.DisplacementFieldTransform(field_image(displacement_mm, grid)))
    composite.AddTransform(affine_transform(affine_lps))  # applied first
    return composite


def transform_parts(transform: sitk.Transform, depth: int = 0) -> list[sitk.Transform]:
    """Return the transforms that a composite consists of, composites in it taken apart too; the last applies first."""
    if transform.GetName() != "CompositeTransform" or depth == DEEPEST_COMPOSITE:  # ITK's base class holds itself
        return [transform]
    composite = sitk.CompositeTransform(transform)  # what is read from a file may be a plain sitk.Transform
    parts = [composite.GetNthTransform(k) for k in range(composite.GetNumberOfTransforms())]
    return [part for one in parts for part in transform_parts(one, depth + 1)]


def compose_transforms(last: sitk.Transform, *earlier: sitk.Transform) -> sitk.CompositeTransform:
    """Compose ``x -> last(... first(x))``, flattened so that it can be written to a file; `first` comes last."""
    composite = sitk.CompositeTransform(3)
    for transform in (last, *earlier):
        for part in transform_parts(transform):
            composite.AddTransform(part)
    return composite


def displacement_field_image(transform: sitk.Transform, reference: sitk.Image) -> sitk.Image:
    """Sample a transform on the grid of a reference image: ``T(x) - x`` in mm LPS, float32 vectors."""
    return sitk.TransformToDisplacementField(
        transform,
        sitk.sitkVectorFloat32,
        reference.GetSize(),
        reference.GetOrigin(),
        reference.GetSpacing(),
        reference.GetDirection(),
    )


def field_in_voxels(field: sitk.Image) -> np.ndarray:
    """Convert a displacement field image (mm LPS) to (3, D, H, W) float32, in voxels of its grid along tensor axes."""
    index_from_lps = np.linalg.inv(index_to_lps(field)[:3, :3]).astype(np.float32)
    return np.einsum(
        "ac,dhwc->adhw", index_from_lps, sitk.GetArrayViewFromImage(field).astype(np.float32), optimize=True
    )


def covering_field_image(
    transform: sitk.Transform, fixed: sitk.Image, moving: sitk.Image, spacing_mm: float = 0.0
) -> sitk.Image:
    """Sample a transform as one displacement field, for programs without composites: ``T(x) - x``, mm LPS, float32.

    Its voxels are voxels of the fixed image, so it is exact there whatever interpolation its reader uses: every voxel,
    or every n-th along axes that are finer than `spacing_mm`. The lattice is grown in whole cells to hold what T takes
    into the moving image, unless that needs more than `COVERING_VOXELS`.

    Args:
        transform: T, fixed -> moving.
        fixed, moving: only their grids matter.
        spacing_mm: voxels need not be closer.
    """
    while True:
        stride = np.array([max(1, int(spacing_mm / s + 1e-6)) for s in fixed.GetSpacing()])
        high = -(-(np.array(fixed.GetSize()) - 1) // stride)
        if np.prod(high + 1.0) <= COVERING_VOXELS:
            break
        spacing_mm = max(1.2 * spacing_mm, min(fixed.GetSpacing()))
    low = np.zeros(3, dtype=int)
    lps_from_index = index_to_lps(fixed)[:, [2, 1, 0, 3]] @ np.diag([*stride, 1])  # index (i, j, k) of the lattice
    corners = corners_lps(fixed)
    far = corners.mean(0) + 20 * (corners - corners.mean(0))  # beyond any dense field, only the affine part is left
    affine_lps = fit_affine(far, transform_points(far, transform))
    if abs(np.linalg.det(affine_lps[:3, :3])) > 1e-6:
        index_from_moving_lps = np.linalg.inv(affine_lps @ lps_from_index)
        reach = corners_lps(moving) @ index_from_moving_lps[:3, :3].T + index_from_moving_lps[:3, 3]
        grown_low = np.minimum(low, np.floor(reach.min(0)).astype(int))
        grown_high = np.maximum(high, np.ceil(reach.max(0)).astype(int))
        if np.prod(grown_high - grown_low + 1.0) <= COVERING_VOXELS:
            low, high = grown_low, grown_high
    return sitk.TransformToDisplacementField(
        transform,
        sitk.sitkVectorFloat32,
        (high - low + 1).tolist(),
        (lps_from_index[:3, :3] @ low + lps_from_index[:3, 3]).tolist(),
        (np.array(fixed.GetSpacing()) * stride).tolist(),
        fixed.GetDirection(),
    )
