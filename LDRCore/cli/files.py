"""Output files of the commands, refused before any work is done."""

from __future__ import annotations

import tempfile
from collections.abc import Iterable
from pathlib import Path

import SimpleITK as sitk

from LDRCore.errors import RegistrationError
from LDRCore.io import files, writing
from LDRCore.io.quiet import silent_libraries

TRANSFORM_SUFFIXES = (".h5", ".hdf5", ".tfm", ".txt")  # what SimpleITK writes any transform to


def check_output_file(path: Path, overwrite: bool, inputs: Iterable[object] = ()) -> None:
    """Refuse an output file before any work is done for it.

    Args:
        path: of the file.
        overwrite: an existing file may be replaced.
        inputs: paths that are read, and anything else.

    Raises:
        RegistrationError: it is a folder or an input, cannot be written, or exists and `overwrite` is false.
    """
    if path.is_dir():
        raise RegistrationError(f"the output must be a file, got the folder {path}")
    files.check_not_input([path], inputs)
    if path.exists() and not overwrite:
        raise RegistrationError(f"the output must not exist yet (or --overwrite must be given), got {path}")
    files.check_writable(path.resolve().parent)


def check_transform_name(path: Path) -> None:
    """Refuse a file name that SimpleITK writes no transform to.

    Raises:
        RegistrationError: the suffix is none of `TRANSFORM_SUFFIXES`.
    """
    if path.suffix.lower() not in TRANSFORM_SUFFIXES:
        raise RegistrationError(f"a transform is written as .h5 or .tfm, got {path.name}")


def check_image_name(path: Path) -> None:
    """Refuse a file name that SimpleITK writes no image to, by writing an image of one voxel.

    Raises:
        RegistrationError: it does not know the suffix.
    """
    with tempfile.TemporaryDirectory() as folder, silent_libraries():
        try:
            writing.write_image(sitk.Image([1] * 3, sitk.sitkUInt8), Path(folder) / path.name)
        except (OSError, RuntimeError):
            raise RegistrationError(
                f"an image is written as .nii.gz, .nrrd, .mha or another type of SimpleITK's, got {path.name}"
            ) from None
