"""Reads transform files and displacement field images of users."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import SimpleITK as sitk

from LDRCore.errors import RegistrationError
from LDRCore.geometry import displacement_field_image, points_lps
from LDRCore.io import images


def read_transform(path: str) -> sitk.Transform:
    """Read a transform file (.h5, .tfm, .mat, .xfm) or a displacement field image (.nii.gz, .nrrd, .mha).

    Raises:
        RegistrationError: missing, unreadable, or a field without 3 components or with NaN or infinite values.
    """
    if not os.path.isfile(path):
        raise RegistrationError(f"the transform must be an existing file, got {path} (not found)")
    if path.lower().endswith((".h5", ".hdf5", ".tfm", ".txt", ".mat", ".xfm")):
        try:
            return sitk.ReadTransform(path)
        except RuntimeError:
            raise RegistrationError(f"the transform must be a file that SimpleITK can read, got {path}") from None
    try:
        field = images.read_file(Path(path), "the displacement field")
    except RuntimeError:
        raise RegistrationError(
            f"the transform must be a transform file or a displacement field image, got {path}"
        ) from None
    if field.GetDimension() != 3 or field.GetNumberOfComponentsPerPixel() != 3:
        raise RegistrationError(
            "a displacement field must be 3D with 3 components a voxel, "
            f"got {field.GetDimension()}D with {field.GetNumberOfComponentsPerPixel()}"
        )
    wrong = images.count_non_finite(sitk.GetArrayViewFromImage(field))
    if wrong:
        raise RegistrationError(f"a displacement field must hold only finite values, got {wrong} others in {path}")
    return sitk.DisplacementFieldTransform(sitk.Cast(field, sitk.sitkVectorFloat64))


def transform_lattice(
    transform_or_path: sitk.Transform | str | os.PathLike[str], to_lps: np.ndarray, shape: Sequence[int]
) -> np.ndarray:
    """Map the points of a lattice through any transform, or the file of one.

    So a teacher can come from any program. Accepts what ITK reads: transforms (.h5, .tfm, .mat, .xfm) and displacement
    field images in mm LPS (ANTs' Warp.nii.gz, the deformationField of elastix, SimpleITK, Slicer), on any grid. Outside
    a field's own grid nothing moves, as in ITK, so a field should cover the lattice.

    Args:
        transform_or_path: fixed -> moving, LPS mm.
        to_lps: 4x4, lattice index (tensor order) -> LPS mm, axes at right angles.
        shape: (d, h, w).

    Returns:
        (d, h, w, 3) LPS mm.

    Raises:
        RegistrationError: see `read_transform`; not 3D; or a transform that is not finite on the lattice.
    """
    transform = transform_or_path
    if not isinstance(transform, sitk.Transform):
        transform = read_transform(os.fspath(transform))
    if transform.GetDimension() != 3:
        raise RegistrationError(f"the transform must be 3D, got {transform.GetDimension()}D")
    spacing = np.linalg.norm(to_lps[:3, :3], axis=0)
    reference = sitk.Image([int(n) for n in shape[::-1]], sitk.sitkUInt8)
    reference.SetSpacing(spacing[::-1].tolist())
    reference.SetDirection((to_lps[:3, :3] / spacing)[:, ::-1].ravel().tolist())
    reference.SetOrigin(to_lps[:3, 3].tolist())
    field = displacement_field_image(transform, reference)
    moved: np.ndarray = points_lps(reference) + sitk.GetArrayViewFromImage(field)
    wrong = images.count_non_finite(moved)
    if wrong:
        raise RegistrationError(f"the transform must be finite on the lattice, got {wrong} values that are not")
    return moved
