"""Reads transforms of users: files, displacement field images, SimpleITK objects, and lists of these."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Union

import numpy as np
import SimpleITK as sitk

from LDRCore import geometry
from LDRCore.errors import RegistrationError
from LDRCore.io import containers, images, nifti
from LDRCore.io.quiet import collected_warnings, silent_libraries

TransformLike = Union[str, "os.PathLike[str]", sitk.Transform, Sequence[Union[str, "os.PathLike[str]", sitk.Transform]]]
"""A path, a SimpleITK transform, or several of these: a fixed point goes through them in order, as in ANTs."""

_SUFFIXES = (".h5", ".hdf5", ".tfm", ".txt", ".mat", ".xfm")  # of transform files; others are field images
_TEXT_SUFFIXES = (".tfm", ".txt")
_OTHER_FIELDS = {"Mapping": "SPM's map of coordinates", "NREG_TRANS": "NiftyReg's transformation"}  # by intent name
_FSL_INTENTS = range(2006, 2010)


def read_transform(source: TransformLike, name: str = "the transform") -> sitk.Transform:
    """Read a transform file (.h5, .tfm, .mat, .xfm), a displacement field image (.nii.gz, .nrrd, .mha), or several.

    Args:
        source: see `TransformLike`; fixed -> moving, LPS mm.
        name: what it is to the user, for messages.

    Returns:
        A three-dimensional, finite transform whose linear parts can be inverted; composites are flattened.

    Raises:
        RegistrationError: missing, unreadable, of other kinds or dimensions, incomplete, not finite, or singular.
    """
    if isinstance(source, (list, tuple)) and source:
        return _flatten(geometry.compose_transforms(*(read_transform(one, name) for one in reversed(source))))
    if not isinstance(source, (str, os.PathLike, sitk.Transform)):
        raise RegistrationError(f"{name} must be a path or a SimpleITK transform, got {type(source).__name__}")
    origin = "memory" if isinstance(source, sitk.Transform) else os.fspath(source)
    transform = source if isinstance(source, sitk.Transform) else _read_file(Path(source), name)
    if transform.GetDimension() != 3:
        raise RegistrationError(f"{name} must be 3D, got {transform.GetDimension()}D in {origin}")
    for part in geometry.transform_parts(transform):
        _check_part(part, name, origin)
    return _flatten(transform)


def _flatten(transform: sitk.Transform) -> sitk.Transform:
    """Return the transform without composites in composites, which cannot be written."""
    if transform.GetName() != "CompositeTransform":
        return transform
    composite = sitk.CompositeTransform(transform)
    names = [composite.GetNthTransform(k).GetName() for k in range(composite.GetNumberOfTransforms())]
    return geometry.compose_transforms(composite) if "CompositeTransform" in names else transform


def _check_part(part: sitk.Transform, name: str, origin: str) -> None:
    """Refuse parameters that are not finite, and linear maps that cannot be inverted.

    Raises:
        RegistrationError: see above.
    """
    if part.GetName() == "DisplacementFieldTransform":
        values = sitk.GetArrayViewFromImage(sitk.DisplacementFieldTransform(part).GetDisplacementField())
    else:
        values = np.array([*part.GetParameters(), *part.GetFixedParameters()])
    count = images.count_non_finite(values)
    if count:
        raise RegistrationError(f"{name} must hold only finite values, got {count} others in {origin}")
    matrix = geometry.linear_matrix(part)
    if matrix is not None and geometry.is_singular(matrix):
        raise RegistrationError(
            f"{name} must be invertible, got a singular matrix {matrix[:3, :3].tolist()} ({origin})"
        )


def _read_file(path: Path, name: str) -> sitk.Transform:
    if not path.is_file():
        raise RegistrationError(f"{name} must be an existing file, got {path} (not found)")
    if not path.name.lower().endswith(_SUFFIXES):
        return _read_field(path)
    with collected_warnings() as warnings, silent_libraries():
        try:
            transform = sitk.ReadTransform(str(path))
        except (RuntimeError, UnicodeError):
            raise RegistrationError(f"{name} must be a file that SimpleITK can read, got {path}") from None
    if any("more than one transform" in text for text in warnings):
        raise RegistrationError(f"{name} must be one transform or a composite of several, got {path} with several")
    if path.suffix.lower() in _TEXT_SUFFIXES:
        _check_counts(path, transform, name)
    return transform


def _check_counts(path: Path, transform: sitk.Transform, name: str) -> None:
    """Refuse a text file with more or fewer parameters than its transforms have; ITK passes over some of these.

    Raises:
        RegistrationError: see above.
    """
    counts: list[dict[str, int]] = []
    for line in path.read_text(encoding="latin-1").splitlines():
        key, _, rest = line.partition(":")
        if key == "Transform" and not rest.strip().startswith("CompositeTransform"):
            counts.append({})
        elif counts and key in ("Parameters", "FixedParameters"):
            counts[-1][key] = len(rest.split())
    for count, part in zip(counts, geometry.transform_parts(transform), strict=False):
        expected = {"Parameters": part.GetNumberOfParameters(), "FixedParameters": len(part.GetFixedParameters())}
        for key, number in expected.items():
            if count.get(key, 0) != number:
                raise RegistrationError(f"{name} must have {number} {key} in {path}, got {count.get(key, 0)}")


def _read_field(path: Path) -> sitk.Transform:
    """Read a displacement field image: vectors in mm, LPS (NIfTI's displacement intent: RAS, converted)."""
    with silent_libraries():
        with containers.named_by_content(path) as file:
            header = nifti.read_header(file, "the displacement field")
        field = images.read_file(path, "the displacement field")
    if header is not None and (header.intent_name in _OTHER_FIELDS or header.intent in _FSL_INTENTS):
        kind = _OTHER_FIELDS.get(header.intent_name, "FSL's warp")
        raise RegistrationError(f"a displacement field must be in mm LPS, got {kind} in {path}: convert it first")
    if field.GetDimension() != 3 or field.GetNumberOfComponentsPerPixel() != 3:
        raise RegistrationError(
            "a displacement field must be 3D with 3 components a voxel, "
            f"got {field.GetDimension()}D with {field.GetNumberOfComponentsPerPixel()}"
        )
    kinds = [field.GetMetaData(key) for key in field.GetMetaDataKeys() if "displacement field type" in key.lower()]
    if any("modeling" in kind.lower() for kind in kinds):
        raise RegistrationError(
            f"a displacement field must be fixed -> moving, got a modeling transform, its inverse, in {path}"
        )
    return sitk.DisplacementFieldTransform(sitk.Cast(field, sitk.sitkVectorFloat64))


def transform_lattice(transform_or_path: TransformLike, to_lps: np.ndarray, shape: Sequence[int]) -> np.ndarray:
    """Map the points of a sampling grid through any transform, or the file of one.

    So a teacher can come from any program. Accepts what ITK reads: transforms (.h5, .tfm, .mat, .xfm) and displacement
    field images in mm LPS (ANTs' Warp.nii.gz, the deformationField of elastix, SimpleITK, Slicer), on any grid. Outside
    a field's own grid nothing moves, as in ITK, so a field should cover the sampling grid.

    Args:
        transform_or_path: fixed -> moving, LPS mm.
        to_lps: 4x4, index of the sampling grid (tensor order) -> LPS mm, axes at right angles.
        shape: (d, h, w).

    Returns:
        (d, h, w, 3) LPS mm.

    Raises:
        RegistrationError: see `read_transform`; or a transform that is not finite on the grid.
    """
    transform = read_transform(transform_or_path)
    spacing = np.linalg.norm(to_lps[:3, :3], axis=0)
    reference = sitk.Image([int(n) for n in shape[::-1]], sitk.sitkUInt8)
    reference.SetSpacing(spacing[::-1].tolist())
    reference.SetDirection((to_lps[:3, :3] / spacing)[:, ::-1].ravel().tolist())
    reference.SetOrigin(to_lps[:3, 3].tolist())
    field = geometry.displacement_field_image(transform, reference)
    moved: np.ndarray = geometry.points_lps(reference) + sitk.GetArrayViewFromImage(field)
    wrong = images.count_non_finite(moved)
    if wrong:
        raise RegistrationError(f"the transform must be finite on the lattice, got {wrong} values that are not")
    return moved
