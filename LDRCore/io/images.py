"""Reads images, masks and DICOM folders, and refuses what cannot be registered, in one clear sentence.

SimpleITK and numpy only. Every later stage may rely on three dimensions, one finite value a voxel, and an image that is
not constant.
"""

from __future__ import annotations

import os
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path
from typing import Any, Union

import numpy as np
import SimpleITK as sitk

from LDRCore.errors import RegistrationError
from LDRCore.geometry import RAS_TO_LPS, index_to_lps
from LDRCore.io import containers, dicom, nifti
from LDRCore.io.quiet import silent_libraries

ImageLike = Union[str, "os.PathLike[str]", sitk.Image, tuple[np.ndarray, np.ndarray]]
"""A path (file, or a folder with one DICOM series), a SimpleITK image, or (array[i, j, k], 4x4 voxel -> RAS mm)."""

_OTHER_TYPES: dict[Any, Any] = {  # of arrays, that SimpleITK does not have
    np.bool_: np.uint8,
    np.float16: np.float32,
    np.longdouble: np.float64,
    np.clongdouble: np.complex128,
}
_PLACEMENT = "LDRCore placement"  # metadata of an image that was read: see `nifti.describe_placement`
MIN_VOXELS = 4  # along each axis
SHEAR = 1e-3  # of unit axes: larger dot products mean that they are not at right angles
GRID_VOX = 0.1  # two grids are the same where their corners are closer, in voxels
MASK_VOXELS = MIN_VOXELS**3  # a mask must hold so many
# of the voxels of a label map have the value of the next one along x: .51 to .98 of brains in 33 to 147 parts at 1 to
# 6 mm, .89 of organs; of T1 heads of 64 grey levels and more, also magnified three times, at most .31
LABEL_NEIGHBOURS = 0.45
_LABEL_VOXELS = 2_000_000  # looked at, about
_INTENT_LABEL = "1002"  # NIfTI's code
AIR = 0.02  # of an image's range of intensities: a mask with nothing brighter holds only air


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
    if not os.fspath(source) or not path.exists():
        raise RegistrationError(f"{name} must be an existing file, got {source or 'an empty name'} (not found)")
    with silent_libraries():
        image = dicom.read_folder(path, name) if path.is_dir() else read_file(path, name)
    return check_right_angles(image, name)


def read_header(path: Path, name: str) -> sitk.ImageFileReader | sitk.Image:
    """Read size, placement and pixel type of an image: from its header alone, or the image where that does not do.

    Raises:
        RegistrationError: missing, unreadable, or a placement that ITK does not come back from.
    """
    if path.is_file():
        nifti.check_placement(path, name)
        containers.check_placement(path, name)
        reader = sitk.ImageFileReader()
        reader.SetFileName(str(path))
        with silent_libraries(), suppress(RuntimeError):  # known by its content perhaps
            reader.ReadImageInformation()
            return reader
    return read(path, name)  # also a DICOM series, which has no single header


def read_file(path: Path, name: str) -> sitk.Image:
    """Read one image file of any format that SimpleITK knows, with NaN and infinity as they are stored.

    The content decides on the format, not the name.

    Args:
        path: an existing file.
        name: what the image is to the user ("fixed image"), for messages.

    Raises:
        RegistrationError: cut off, damaged, or not an image that SimpleITK can read.
    """
    try:
        with containers.named_by_content(path) as named:
            file = nifti.find(named, name)
            if file is None:
                containers.check_complete(named, name)
                return sitk.ReadImage(str(named))
            if file.needs_read_values:
                image = nifti.read_values(file, name)
            else:
                nifti.check_complete(file, name)
                image = sitk.ReadImage(str(named))
            placement = nifti.describe_placement(file)
            if placement:
                image.SetMetaData(_PLACEMENT, placement)
            return image
    except (RuntimeError, OSError, UnicodeError) as error:
        raise RegistrationError(
            f"{name} must be an image that SimpleITK can read (NIfTI, NRRD, MetaImage, DICOM ...), "
            f"got {path} ({_reason(error)})"
        ) from None


def _reason(error: Exception) -> str:
    """Return the last line of an ITK message, which gives the reason."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[-1][:160] if lines else "unreadable"


def _from_array(source: tuple[Any, Any], name: str) -> sitk.Image:
    """Make an image of (array[i, j, k], 4x4 voxel -> RAS mm)."""
    if len(source) != 2:
        raise RegistrationError(f"{name} as a tuple must be (array, affine), got {len(source)} items")
    try:
        array, affine = np.asarray(source[0]), np.asarray(source[1], dtype=float)
    except (TypeError, ValueError) as error:
        raise RegistrationError(f"{name} as a tuple must be two arrays of numbers, got others ({error})") from None
    if affine.shape != (4, 4):
        raise RegistrationError(f"the affine of {name} must be 4x4, got {affine.shape}")
    if not np.isfinite(affine).all():
        raise RegistrationError(f"the affine of {name} must be finite, got {affine.tolist()}")
    if array.ndim != 3 or not array.size:
        raise RegistrationError(f"{name} must be 3D, got an array of shape {array.shape}")
    if array.dtype.kind not in "biufc":
        raise RegistrationError(f"{name} must hold numbers, got an array of type {array.dtype}")
    lps_from_index = RAS_TO_LPS @ affine  # index in the order i, j, k
    spacing = np.linalg.norm(lps_from_index[:3, :3], axis=0)
    if np.any(spacing == 0) or abs(np.linalg.det(lps_from_index[:3, :3] / np.where(spacing == 0, 1, spacing))) < 1e-6:
        raise RegistrationError(f"the affine of {name} must be invertible, got {affine.tolist()}")
    array = array.astype(_OTHER_TYPES.get(array.dtype.type, array.dtype.newbyteorder("=")), copy=False)
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
    if isinstance(source, tuple):
        check_right_angles(image, name)
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


def looks_like_labels(image: sitk.Image) -> bool:
    """Return whether an image of whole numbers says that it holds labels, or has regions of one value as labels have.

    Whole numbers may be stored as floating point, as some programs store labels. The most frequent value, which is
    background in most images, counts nowhere.

    Args:
        image: three-dimensional scalar image.
    """
    values = sitk.GetArrayViewFromImage(image)
    values = values[:: max(1, values.size // _LABEL_VOXELS)]
    if values.dtype.kind not in "iuf" or (values.dtype.kind == "f" and not np.array_equal(values, np.rint(values))):
        return False
    if image.HasMetaDataKey("intent_code") and image.GetMetaData("intent_code") == _INTENT_LABEL:
        return True
    found, counts = np.unique(values, return_counts=True)
    filled = values[..., :-1] != found[counts.argmax()]
    equal = np.count_nonzero(filled & (values[..., :-1] == values[..., 1:]))
    return bool(equal > LABEL_NEIGHBOURS * max(1, int(np.count_nonzero(filled))))


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
        advice = f": give one of its {image.GetSize()[3]} volumes" if image.GetDimension() == 4 else ""
        raise RegistrationError(f"{name} must be 3D, got {image.GetDimension()}D of size {image.GetSize()}{advice}")
    if image.GetNumberOfComponentsPerPixel() != 1:
        raise RegistrationError(
            f"{name} must hold one value a voxel, got {image.GetNumberOfComponentsPerPixel()} (colour or vector)"
        )
    if "complex" in image.GetPixelIDTypeAsString():
        raise RegistrationError(f"{name} must be real-valued, got {image.GetPixelIDTypeAsString()}")
    size = image.GetSize()
    if min(size) == 1 and image.HasMetaDataKey("0020|000e"):  # the identifier of a DICOM series
        raise RegistrationError(f"{name} must be a whole series, got one DICOM slice of it: give the folder")
    if min(image.GetSize()) < MIN_VOXELS:
        raise RegistrationError(
            f"{name} must have at least {MIN_VOXELS} voxels along every axis, got size {image.GetSize()}"
        )
    numbers = [*image.GetSpacing(), *image.GetDirection(), *image.GetOrigin()]
    if not (np.isfinite(numbers).all() and min(image.GetSpacing()) > 0):
        raise RegistrationError(
            f"{name} must have a finite origin, direction and spacing, got {image.GetOrigin()}, "
            f"{image.GetDirection()} and {image.GetSpacing()}"
        )
    return image


def check_right_angles(image: sitk.Image, name: str) -> sitk.Image:
    """Return the image if its axes are at right angles, as a NIfTI file needs: it would lie elsewhere there.

    A sheared image in memory can be registered and warped, but not written.

    Raises:
        RegistrationError: they are not.
    """
    dimension = image.GetDimension()
    axes = np.array(image.GetDirection()).reshape(dimension, dimension)
    shear = np.abs(axes.T @ axes - np.eye(dimension)).max()
    if shear > SHEAR:
        raise RegistrationError(
            f"{name} must have axes at right angles, got a sheared direction "
            f"{tuple(_rounded(axes.flat))}: resample it first"
        )
    return image


def load_mask(source: ImageLike | None, reference: sitk.Image, name: str) -> np.ndarray | None:
    """Read a mask as a boolean array (z, y, x), true inside; None where none is given.

    Args:
        source: see `ImageLike`; voxels above 0 are inside.
        reference: the image of the mask.
        name: what the mask is to the user ("fixed mask"), for messages.

    Raises:
        RegistrationError: unreadable, on another grid than its image, with NaN, or with nothing of the image in it.
    """
    if source is None:
        return None
    mask = three_dimensional(read(source, name), name)
    same_geometry = mask.GetSize() == reference.GetSize() and _apart_vox(mask, reference) < GRID_VOX
    if not same_geometry:
        raise RegistrationError(
            f"{name} must lie on the grid of its image (size {reference.GetSize()}, spacing "
            f"{_rounded(reference.GetSpacing())} mm), got size {mask.GetSize()}, spacing "
            f"{_rounded(mask.GetSpacing())} mm"
            + (" and another origin or direction" if mask.GetSize() == reference.GetSize() else "")
        )
    stored = sitk.GetArrayViewFromImage(mask)
    count = count_non_finite(stored)
    if count:
        raise RegistrationError(f"{name} must hold only finite values, got {count} voxels that are NaN or infinite")
    inside = stored > 0
    if not inside.any():
        raise RegistrationError(f"{name} must have voxels above 0, got an empty mask")
    if np.count_nonzero(inside) < MASK_VOXELS:
        raise RegistrationError(f"{name} must have {MASK_VOXELS} voxels, got {np.count_nonzero(inside)}")
    values = sitk.GetArrayViewFromImage(reference)
    low, high = float(values.min()), float(np.percentile(values.ravel()[:: max(1, values.size // 1_000_000)], 99.9))
    if float(values[inside].max()) <= low + AIR * (high - low):
        raise RegistrationError(f"{name} must have something of its image inside, got only air")
    return inside


def _apart_vox(image: sitk.Image, other: sitk.Image) -> float:
    """Return the largest distance between the corners of two images of one size, in voxels."""
    corners = np.array([[k, j, i, 1] for k in (0, 1) for j in (0, 1) for i in (0, 1)])
    corners = corners * [*(n - 1 for n in image.GetSize()[::-1]), 1]
    moved = np.linalg.inv(index_to_lps(other)) @ index_to_lps(image) @ corners.T
    return float(np.abs(moved - corners.T).max())


def _rounded(values: Iterable[float]) -> tuple[float, ...]:
    return tuple(round(float(v), 4) for v in values)


def describe(image: sitk.Image) -> dict[str, Any]:
    """Return size, spacing, place and type of an image, and what is odd about its placement, for reports."""
    placement = image.GetMetaData(_PLACEMENT) if image.HasMetaDataKey(_PLACEMENT) else ""
    return {
        **({"placement": placement} if placement else {}),
        "size": list(image.GetSize()),
        "spacing_mm": [round(s, 6) for s in image.GetSpacing()],
        "origin_lps": [round(x, 4) for x in image.GetOrigin()],
        "direction": [round(x, 7) for x in image.GetDirection()],
        "type": image.GetPixelIDTypeAsString(),
    }
