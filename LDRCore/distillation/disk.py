"""Files on disk: complete or not there at all, and refused where the disk is full.

What goes wrong is told in one sentence, as for every input of a user.
"""

from __future__ import annotations

import errno
import io
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from LDRCore.errors import RegistrationError


def temporary_path(path: Path) -> Path:
    """Return the path of a file while it is being written."""
    return path.with_name(path.name + ".part")


@contextmanager
def complete_file(path: Path) -> Iterator[Path]:
    """Give the path at which to write a file that appears at `path` when it is complete and on disk.

    On an error the unfinished file is removed.

    Raises:
        RegistrationError: a full disk, or a place that cannot be written.
    """
    part = temporary_path(path)
    try:
        yield part
        with open(part, "rb+") as file:
            os.fsync(file.fileno())
        part.replace(path)
        _sync_folder(path.parent)
    except OSError as error:
        raise describe_failure(path, error) from None
    finally:
        part.unlink(missing_ok=True)


def _sync_folder(folder: Path) -> None:
    """Make a renaming survive a power failure, where the system can."""
    if os.name != "posix":
        return
    handle = os.open(folder, os.O_RDONLY)
    with suppress(OSError):  # not every file system can
        os.fsync(handle)
    os.close(handle)


class DeferredErrorFile(io.FileIO):
    """A file for h5py to write to that raises a failed write only when asked.

    HDF5 cannot close a file that it cannot write: it keeps the file open, or crashes when the process ends.
    """

    _error: OSError | None = None

    def write(self, values: Any) -> int:
        """Write everything; after the first failure write nothing."""
        view = memoryview(values).cast("B")
        done = 0
        while done < len(view) and self._error is None:
            try:
                done += super().write(view[done:])
            except OSError as error:
                self._error = error
        return len(view)

    def truncate(self, size: int | None = None) -> int:
        """Set the size, as HDF5 does when it closes a file; after the first failure leave it."""
        return super().truncate(size) if self._error is None else self.tell()

    def check(self) -> None:
        """Raise the first failure, if there was one."""
        if self._error is not None:
            raise self._error


def describe_failure(path: Path, error: OSError) -> RegistrationError:
    """Say in one sentence why a file could not be written."""
    if error.errno in (errno.ENOSPC, getattr(errno, "EDQUOT", errno.ENOSPC)):
        return RegistrationError(
            f"the disk must have room for {path}, got a full one ({free_bytes(path) / 1e6:,.1f} MB free)"
        )
    return RegistrationError(
        f"a teacher store must lie where files can be written, got {path} ({error.strerror or error})"
    )


def require_free(path: Path, needed: int, what: str) -> None:
    """Refuse to write more than fits on the disk of `path`.

    Args:
        path: of a file, which need not exist.
        needed: bytes.
        what: they are for, for the message.

    Raises:
        RegistrationError: fewer than `needed` bytes are free.
    """
    free = free_bytes(path)
    if free < needed:
        raise RegistrationError(
            f"{needed / 1e6:,.1f} MB of disk must be free for {what}, got {free / 1e6:,.1f} MB at {path}"
        )


def free_bytes(path: Path) -> int:
    """Return the bytes that are free on the disk of `path`, which need not exist."""
    return shutil.disk_usage(next(p for p in path.parents if p.is_dir())).free
