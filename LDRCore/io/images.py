"""Reads images, masks and DICOM folders, and refuses what cannot be registered, in one clear sentence.

SimpleITK and numpy only. Every later stage may rely on three dimensions, one finite value a voxel, and an image that is
not constant.
"""

from __future__ import annotations

import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any, Union

import numpy as np
import SimpleITK as sitk

from LDRCore.errors import RegistrationError
from LDRCore.geometry import RAS_TO_LPS
from LDRCore.io import nifti

ImageLike = Union[str, "os.PathLike[str]", sitk.Image, tuple[np.ndarray, np.ndarray]]
"""A path (file, or a folder with one DICOM series), a SimpleITK image, or (array[i, j, k], 4x4 voxel -> RAS mm)."""

MIN_VOXELS = 4  # along each axis


def read(source: ImageLike, name: str) -> sitk.Image:
    """Read any accepted form of an image, unchecked beyond being readable.

    Args:
        source: see `ImageLike`.
        name: what the image is to the user ("fixed image"), for messages.

    Raises:
        RegistrationError: missing, unreadable, or not one of the accepted forms.
    """
    if isinstance(source, sitk.Image):
        return source
    if isinstance(source, tuple):
        return _from_array(source, name)
    if not isinstance(source, (str, os.PathLike)):
        raise RegistrationError(
            f"{name} must be a path, a SimpleITK image or (array, affine), got {type(source).__name__}"
        )
    path = Path(source)
    if not path.exists():
        raise RegistrationError(f"{name} must be an existing file, got {path} (not found)")
    if path.is_dir():
        return _read_dicom(path, name)
    try:
        return read_file(path, name)
    except RuntimeError as error:
        raise RegistrationError(
            f"{name} must be an image that SimpleITK can read (NIfTI, NRRD, MetaImage, DICOM ...), "
            f"got {path} ({_reason(error)})"
        ) from None


def read_file(path: Path, name: str) -> sitk.Image:
    """Read one image file of any format that SimpleITK knows, with NaN and infinity as they are stored.

    Args:
        path: an existing file.
        name: what the image is to the user ("fixed image"), for messages.

    Raises:
        RegistrationError: a NIfTI file that is cut off or damaged.
        RuntimeError: SimpleITK cannot read it.
    """
    header = nifti.read_header(path, name)
    if header is not None:
        if header.stored_type is not None:
            return nifti.read_values(header, name)
        nifti.check_complete(header, name)
    return sitk.ReadImage(str(path))


def _reason(error: RuntimeError) -> str:
    """Return the last line of an ITK message, which gives the reason."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[-1][:160] if lines else "unreadable"


def _read_dicom(folder: Path, name: str) -> sitk.Image:
    """Read the one DICOM series of a folder."""
    reader = sitk.ImageSeriesReader()
    series = reader.GetGDCMSeriesIDs(str(folder))
    if not series:
        raise RegistrationError(f"{name} must be an image file or a folder with one DICOM series, got {folder} (none)")
    if len(series) > 1:
        raise RegistrationError(
            f"{name} must be a folder with one DICOM series, got {folder} with {len(series)}: "
            "put the wanted series in a folder of its own or convert it to NIfTI"
        )
    reader.SetFileNames(reader.GetGDCMSeriesFileNames(str(folder), series[0]))
    try:
        return reader.Execute()
    except RuntimeError as error:
        raise RegistrationError(f"{name} must be a readable DICOM series, got {folder} ({_reason(error)})") from None


def _from_array(source: tuple[Any, Any], name: str) -> sitk.Image:
    """Make an image of (array[i, j, k], 4x4 voxel -> RAS mm)."""
    if len(source) != 2:
        raise RegistrationError(f"{name} as a tuple must be (array, affine), got {len(source)} items")
    array, affine = np.asarray(source[0]), np.asarray(source[1], dtype=float)
    if affine.shape != (4, 4):
        raise RegistrationError(f"the affine of {name} must be 4x4, got {affine.shape}")
    if array.ndim != 3:
        raise RegistrationError(f"{name} must be 3D, got an array of shape {array.shape}")
    lps_from_index = RAS_TO_LPS @ affine  # index in the order i, j, k
    spacing = np.linalg.norm(lps_from_index[:3, :3], axis=0)
    if np.any(spacing == 0) or abs(np.linalg.det(lps_from_index[:3, :3] / np.where(spacing == 0, 1, spacing))) < 1e-6:
        raise RegistrationError(f"the affine of {name} must be invertible, got {affine.tolist()}")
    if array.dtype == bool:
        array = array.astype(np.uint8)
    elif array.dtype == np.float16:
        array = array.astype(np.float32)
    image = sitk.GetImageFromArray(np.ascontiguousarray(array.transpose(2, 1, 0)))
    image.SetSpacing(spacing.tolist())
    image.SetDirection((lps_from_index[:3, :3] / spacing).ravel().tolist())
    image.SetOrigin(lps_from_index[:3, 3].tolist())
    return image


def load(source: ImageLike, name: str) -> sitk.Image:
    """Read an image and check that it can be registered.

    Args:
        source: see `ImageLike`.
        name: what the image is to the user ("fixed image"), for messages.

    Raises:
        RegistrationError: unreadable, not 3D, several values a voxel, fewer than 4 voxels along an axis, NaN or
            infinite voxels, or constant.
    """
    image = three_dimensional(read(source, name), name)
    values = sitk.GetArrayViewFromImage(image)
    count = count_non_finite(values)
    if count:
        raise RegistrationError(f"{name} must hold only finite values, got {count} voxels that are NaN or infinite")
    if values.min() == values.max():
        raise RegistrationError(f"{name} must show something, got a constant image (every voxel {values.flat[0]})")
    return image


def count_non_finite(values: np.ndarray) -> int:
    """Count the values that are NaN or infinite."""
    if not np.issubdtype(values.dtype, np.inexact):
        return 0
    finite = np.isfinite(values)
    return 0 if finite.all() else int(finite.size - np.count_nonzero(finite))


def three_dimensional(image: sitk.Image, name: str) -> sitk.Image:
    """Return the image if it is a three-dimensional scalar image of a useful size.

    Args:
        image: of any kind; a series of one volume counts as three-dimensional.
        name: what the image is to the user ("fixed image"), for messages.

    Raises:
        RegistrationError: not 3D, several values a voxel, complex, or fewer than 4 voxels along an axis.
    """
    if image.GetDimension() == 4 and image.GetSize()[3] == 1:  # one volume stored as a series of one
        image = image[:, :, :, 0]
    if image.GetDimension() != 3:
        raise RegistrationError(f"{name} must be 3D, got {image.GetDimension()}D of size {image.GetSize()}")
    if image.GetNumberOfComponentsPerPixel() != 1:
        raise RegistrationError(
            f"{name} must hold one value a voxel, got {image.GetNumberOfComponentsPerPixel()} (colour or vector)"
        )
    if "complex" in image.GetPixelIDTypeAsString():
        raise RegistrationError(f"{name} must be real-valued, got {image.GetPixelIDTypeAsString()}")
    if min(image.GetSize()) < MIN_VOXELS:
        raise RegistrationError(
            f"{name} must have at least {MIN_VOXELS} voxels along every axis, got size {image.GetSize()}"
        )
    return image


def load_mask(source: ImageLike | None, reference: sitk.Image, name: str) -> np.ndarray | None:
    """Read a mask as a boolean array (z, y, x), true inside; None where none is given.

    Args:
        source: see `ImageLike`; voxels above 0 are inside.
        reference: the image of the mask.
        name: what the mask is to the user ("fixed mask"), for messages.

    Raises:
        RegistrationError: unreadable, on another grid than its image, or empty.
    """
    if source is None:
        return None
    mask = three_dimensional(read(source, name), name)
    same_geometry = (
        mask.GetSize() == reference.GetSize()
        and np.allclose(mask.GetSpacing(), reference.GetSpacing(), rtol=1e-4)
        and np.allclose(mask.GetOrigin(), reference.GetOrigin(), atol=1e-2)
        and np.allclose(mask.GetDirection(), reference.GetDirection(), atol=1e-4)
    )
    if not same_geometry:
        raise RegistrationError(
            f"{name} must lie on the grid of its image (size {reference.GetSize()}, spacing "
            f"{_rounded(reference.GetSpacing())} mm), got size {mask.GetSize()}, spacing "
            f"{_rounded(mask.GetSpacing())} mm"
            + (" and another origin or direction" if mask.GetSize() == reference.GetSize() else "")
        )
    inside = sitk.GetArrayViewFromImage(mask) > 0
    if not inside.any():
        raise RegistrationError(f"{name} must have voxels above 0, got an empty mask")
    return inside


def _rounded(values: Iterable[float]) -> tuple[float, ...]:
    return tuple(round(float(v), 4) for v in values)


def describe(image: sitk.Image) -> dict[str, Any]:
    """Return size, spacing and type of an image, for reports."""
    return {
        "size": list(image.GetSize()),
        "spacing_mm": list(_rounded(image.GetSpacing())),
        "type": image.GetPixelIDTypeAsString(),
    }
