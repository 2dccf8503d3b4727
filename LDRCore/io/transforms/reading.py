"""Reads transforms of users: files of any program, SimpleITK objects, and lists of these."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Union

import numpy as np
import SimpleITK as sitk

from LDRCore import geometry
from LDRCore.errors import RegistrationError
from LDRCore.io import images
from LDRCore.io.transforms import registry
from LDRCore.io.transforms.base import Context

TransformLike = Union[str, "os.PathLike[str]", sitk.Transform, Sequence[Union[str, "os.PathLike[str]", sitk.Transform]]]
"""A path, a SimpleITK transform, or several of these: a fixed point goes through them in order, as in ANTs."""


def read_transform(
    source: TransformLike,
    name: str = "the transform",
    *,
    format_name: str = "auto",
    context: Context | None = None,
) -> sitk.Transform:
    """Read a transform file of any program (see `registry.FORMATS`), a SimpleITK transform, or several of these.

    Args:
        source: see `TransformLike`; fixed -> moving, LPS mm.
        name: what it is to the user, for messages.
        format_name: of files; "auto" by their content.
        context: the grids of the two images, for formats that count in their voxels.

    Returns:
        A three-dimensional, finite transform whose linear parts can be inverted; composites are flattened.

    Raises:
        RegistrationError: missing, unreadable, of other kinds or dimensions, incomplete, not finite, or singular; of a
            format that must be named, or that needs a grid that is not known.
    """
    if isinstance(source, (list, tuple)) and source:
        parts = [read_transform(one, name, format_name=format_name, context=context) for one in reversed(source)]
        return _flatten(geometry.compose_transforms(*parts))
    if not isinstance(source, (str, os.PathLike, sitk.Transform)):
        raise RegistrationError(f"{name} must be a path or a SimpleITK transform, got {type(source).__name__}")
    origin = "memory" if isinstance(source, sitk.Transform) else os.fspath(source)
    transform = source
    if not isinstance(transform, sitk.Transform):
        if not origin:
            raise RegistrationError(f"{name} must be an existing file, got an empty name (not found)")
        transform = _read_file(Path(origin), name, format_name, context or Context())
    if transform.GetDimension() != 3:
        raise RegistrationError(f"{name} must be 3D, got {transform.GetDimension()}D in {origin}")
    for part in geometry.transform_parts(transform):
        _check_part(part, name, origin)
    return _flatten(transform)


def _read_file(path: Path, name: str, format_name: str, context: Context) -> sitk.Transform:
    if path.is_dir():
        raise RegistrationError(f"{name} must be a file, got the folder {path}: name the file in it")
    if not path.is_file():
        raise RegistrationError(f"{name} must be an existing file, got {path} (not found)")
    chosen = registry.identify(path, name) if format_name == "auto" else registry.format_named(format_name)
    return chosen.read(path, context, name)


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
    values = [np.array(part.GetFixedParameters())]
    if part.GetName() == "DisplacementFieldTransform":
        values.append(sitk.GetArrayViewFromImage(sitk.DisplacementFieldTransform(part).GetDisplacementField()))
    else:
        values.append(np.array(part.GetParameters()))
    count = sum(images.count_non_finite(one) for one in values)
    if count:
        raise RegistrationError(f"{name} must hold only finite values, got {count} others in {origin}")
    matrix = geometry.linear_matrix(part)
    if matrix is not None and geometry.is_singular(matrix):
        raise RegistrationError(
            f"{name} must be invertible, got a singular matrix {matrix[:3, :3].tolist()} ({origin})"
        )


def transform_lattice(transform_or_path: TransformLike, to_lps: np.ndarray, shape: Sequence[int]) -> np.ndarray:
    """Map the points of a sampling grid through any transform, or the file of one.

    So a teacher can come from any program, on any grid. Outside a field's own grid nothing moves, as in ITK, so a field
    should cover the sampling grid.

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
    axes = (to_lps[:3, :3] / spacing)[:, ::-1]
    reference = geometry.empty_image(shape[::-1], spacing[::-1].tolist(), to_lps[:3, 3].tolist(), axes)
    field = geometry.displacement_field_image(transform, reference)
    moved: np.ndarray = geometry.points_lps(reference) + sitk.GetArrayViewFromImage(field)
    wrong = images.count_non_finite(moved)
    if wrong:
        raise RegistrationError(f"the transform must be finite on the lattice, got {wrong} values that are not")
    return moved
