"""Output files of the commands: refused before any work is done, written complete or not at all."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from LDRCore.errors import RegistrationError
from LDRCore.io.files import complete_file
from LDRCore.result import check_output_folder

TRANSFORM_SUFFIXES = (".h5", ".hdf5", ".tfm", ".txt")  # what SimpleITK writes any transform to


def check_output_file(path: Path, overwrite: bool) -> None:
    """Refuse an output file before any work is done for it.

    Raises:
        RegistrationError: it is a folder, cannot be written, or exists and `overwrite` is false.
    """
    if path.is_dir():
        raise RegistrationError(f"the output must be a file, got the folder {path}")
    if path.exists() and not overwrite:
        raise RegistrationError(f"the output must not exist yet (or --overwrite must be given), got {path}")
    check_output_folder(path.resolve().parent, overwrite=True)


def check_transform_name(path: Path) -> None:
    """Refuse a file name that SimpleITK writes no transform to.

    Raises:
        RegistrationError: the suffix is none of `TRANSFORM_SUFFIXES`.
    """
    if path.suffix.lower() not in TRANSFORM_SUFFIXES:
        raise RegistrationError(f"a transform is written as .h5 or .tfm, got {path.name}")


def write_file(path: Path, write: Callable[[str], None]) -> None:
    """Write a file under a temporary name with the same suffix, then rename it.

    Args:
        path: of the file; its folder is created if needed.
        write: writes the file whose name it is given.

    Raises:
        RegistrationError: a file type that SimpleITK does not write, or a folder that cannot be written.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    try:
        with complete_file(path) as temporary:
            write(str(temporary))
    except RuntimeError as error:
        reason = str(error).strip().splitlines()[-1]
        raise RegistrationError(
            f"the output must have a file type that SimpleITK writes, got {path} ({reason})"
        ) from None
    except OSError as error:
        raise RegistrationError(f"the output must be writable, got {path} ({error})") from None
