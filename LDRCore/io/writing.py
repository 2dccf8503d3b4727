"""The only writers of images and transforms: what does not come back whole from the disk is an error.

ITK writes a cut-off NIfTI file to a full disk without a word.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import SimpleITK as sitk

from LDRCore import geometry
from LDRCore.errors import RegistrationError
from LDRCore.io import containers, images, nifti
from LDRCore.io.files import complete_file, describe_failure
from LDRCore.io.quiet import silent_libraries

_HDF5_BYTES = 1 << 16  # of a transform's file beside its parameters
_NOT_WHOLE = "the file was not written whole: is the disk full?"


def write_file(path: Path, write: Callable[[Path], object]) -> None:
    """Write a file that appears at `path` when it is complete; an earlier one stays as it was on an error.

    Args:
        path: of the file; its folder is created if needed.
        write: writes the file whose path it is given; what it returns is lost.

    Raises:
        RegistrationError: a file type that cannot be written, a full disk, or a folder that cannot be written.
    """
    try:
        with complete_file(path) as temporary, silent_libraries():
            write(temporary)
    except (OSError, RuntimeError) as error:
        raise describe_failure(path, error) from None


def write_image(image: sitk.Image, path: Path) -> None:
    """Write an image, compressed, and check that its file is whole.

    Raises:
        RegistrationError: its axes are not at right angles.
        OSError: it is not.
        RuntimeError: SimpleITK does not write this file type.
    """
    images.check_right_angles(image, "an image that is written")
    sitk.WriteImage(image, str(path), useCompression=True)
    try:
        file = nifti.find(path, "the output")
        if file is not None:
            nifti.check_complete(file, "the output", every_byte=True)
        elif sitk.ImageFileReader.GetImageIOFromFileName(str(path)):
            containers.check_complete(path, "the output")
            sitk.ReadImage(str(path))
        else:
            raise OSError(_NOT_WHOLE)
    except (RegistrationError, RuntimeError):
        raise OSError(_NOT_WHOLE) from None


def _is_whole_hdf5(path: Path) -> bool:
    """Return whether an HDF5 file is as long as it says: reading a large field back takes as much memory again."""
    with path.open("rb") as stream:
        head = stream.read(48)
    if len(head) < 48 or not head.startswith(b"\x89HDF\r\n\x1a\n"):
        return False
    at = 40 if head[8] < 2 else 28  # of the end's address, by the version of the first block
    return path.stat().st_size >= int.from_bytes(head[at : at + 8], "little") > 0


def _reserve(path: Path, count: int) -> None:
    """Make a file of so many bytes, without writing them where the system can do so.

    Raises:
        OSError: the disk has less room.
    """
    with path.open("wb") as stream:
        if hasattr(os, "posix_fallocate"):
            os.posix_fallocate(stream.fileno(), 0, count)
            return
        for start in range(0, count, containers.CHUNK_BYTES):
            stream.write(bytes(min(containers.CHUNK_BYTES, count - start)))


def _write_hdf5(transform: sitk.Transform, path: Path) -> None:
    """Write an HDF5 file as SimpleITK does, which holds a further copy of every field meanwhile.

    Where h5py is installed, SimpleITK writes fields of one voxel, and the values of the real ones take their place.
    """
    parts = geometry.transform_parts(transform)
    fields = {
        number: sitk.DisplacementFieldTransform(part).GetDisplacementField()
        for number, part in enumerate(parts)
        if part.GetName() == "DisplacementFieldTransform"
    }
    try:
        import h5py
    except ImportError:
        fields = {}
    if not fields:
        sitk.WriteTransform(transform, str(path))
        return
    voxel = sitk.DisplacementFieldTransform(sitk.Image([1, 1, 1], sitk.sitkVectorFloat64, 3))
    small = [voxel if number in fields else part for number, part in enumerate(parts)]
    is_composite = transform.GetName() == "CompositeTransform"
    sitk.WriteTransform(geometry.compose_transforms(*small) if is_composite else voxel, str(path))
    with h5py.File(path, "r+") as file:
        for number, field in fields.items():
            node = file[f"TransformGroup/{number + is_composite}"]  # the first node of a composite is itself
            fixed_parameters = parts[number].GetFixedParameters()
            del node["TransformFixedParameters"], node["TransformParameters"]
            node["TransformFixedParameters"] = fixed_parameters
            node["TransformParameters"] = sitk.GetArrayViewFromImage(field).reshape(-1)


def write_transform(transform: sitk.Transform, path: Path) -> None:
    """Write a transform and check that its file is whole.

    HDF5 crashes where it cannot write, so the disk is asked for the room first.

    Raises:
        OSError: it is not.
        RuntimeError: SimpleITK does not write this file type.
    """
    if path.suffix.lower() in (".h5", ".hdf5"):
        values = sum(part.GetNumberOfParameters() for part in geometry.transform_parts(transform))
        _reserve(path, 8 * values + _HDF5_BYTES)
        _write_hdf5(transform, path)
    else:
        sitk.WriteTransform(transform, str(path))
    if path.suffix.lower() in (".h5", ".hdf5"):
        whole = _is_whole_hdf5(path)
    else:
        try:
            whole = sitk.ReadTransform(str(path)) is not None
        except RuntimeError:
            whole = False
    is_text = path.suffix.lower() in (".tfm", ".txt")
    if not whole or (is_text and not path.read_bytes().endswith(b"\n")):
        raise OSError(_NOT_WHOLE)
