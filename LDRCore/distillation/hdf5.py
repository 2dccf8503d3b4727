"""The HDF5 file of teacher deformations: its layout and checksums, and files that are whole or not there at all.

h5py is needed here and nowhere else in the package; it is imported when the first file is opened.
"""

from __future__ import annotations

import errno
import io
import json
import os
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import numpy as np

from LDRCore.errors import RegistrationError

FORMAT = "LDRCore teacher deformations"
VERSION = 1
FILTERS: dict[str, Any] = {"shuffle": True, "compression": "gzip", "compression_opts": 4}  # see Training.measure_store
ERRORS = (OSError, RuntimeError)  # what HDF5 raises where a file cannot be read


def require_h5py() -> Any:
    """The module.

    Raises:
        RegistrationError: it is not installed.
    """
    try:
        import h5py
    except ModuleNotFoundError:
        raise RegistrationError("teacher deformations need the package h5py, got none (pip install h5py)") from None
    return h5py


def create(
    file: Any,
    shape: tuple[int, int, int],
    meta: dict[str, Any],
    keys: Sequence[str],
    filters: dict[str, Any] = FILTERS,
) -> tuple[Any, Any]:
    """Begin a store whose keys are known: (open h5py.File, its empty dataset of displacements).

    Args:
        file: a path or a binary file object.
        shape: (d, h, w).
        meta: what JSON can hold.
        keys: of the pairs, in order.
        filters: how h5py shall shuffle and compress; a checksum is always added.
    """
    h5 = require_h5py().File(file, "w", libver=("v110", "v110"))  # from here on HDF5 checks its own records as well
    h5.attrs["format"], h5.attrs["version"] = FORMAT, VERSION
    text = np.frombuffer(json.dumps({"keys": list(keys), "meta": meta}).encode(), np.uint8)
    h5.create_dataset("index", data=text, chunks=text.shape, compression="gzip", fletcher32=True)
    size, chunk = (len(keys), 3, *shape), (1, 3, *shape)
    data = h5.create_dataset("displacement", size, np.float16, chunks=chunk, fletcher32=True, **filters)
    data.attrs["unit"] = "voxels of the grid (d, h, w), component c along axis c"
    return h5, data


def open_store(path: Path) -> tuple[Any, dict[str, Any]]:
    """(h5py.File, {"keys", "meta"}) of a store. No lock is taken: a store is never written to under its own name.

    Raises:
        RegistrationError: not such a file, another version, or a damaged index.
    """
    try:
        file = require_h5py().File(path, "r", locking=False)
    except ERRORS as error:
        raise RegistrationError(f"a teacher store must be a whole HDF5 file, got {path} ({reason(error)})") from None
    try:
        kind, version = file.attrs.get("format"), file.attrs.get("version")
        if kind != FORMAT:
            raise RegistrationError(f"a teacher store must be a file that this package wrote, got another kind: {path}")
        if version != VERSION:
            raise RegistrationError(f"a teacher store must have version {VERSION}, got version {version}: {path}")
        index = json.loads(file["index"][()].tobytes())
        if file["displacement"].shape[0] != len(index["keys"]):
            raise RuntimeError("keys and displacements differ in number")
    except RegistrationError:
        file.close()
        raise
    except (*ERRORS, KeyError, ValueError) as error:
        file.close()
        raise RegistrationError(f"the index of a teacher store must be whole, got {path} ({reason(error)})") from None
    return file, index


def temporary(path: Path) -> Path:
    """The name of a file while it is being written."""
    return path.with_name(path.name + ".part")


@contextmanager
def whole_file(path: Path) -> Iterator[Path]:
    """Where to write a file that shall appear at `path` when it is complete and on disk, or not at all.

    Raises:
        RegistrationError: a full disk, or a place that cannot be written.
    """
    part = temporary(path)
    try:
        yield part
        with open(part, "rb+") as file:
            os.fsync(file.fileno())
        part.replace(path)
        _sync_folder(path.parent)
    except OSError as error:
        raise unwritable(path, error) from None
    finally:
        part.unlink(missing_ok=True)


def _sync_folder(folder: Path) -> None:
    """Let a renaming survive a power failure, where the system can."""
    if os.name != "posix":
        return
    handle = os.open(folder, os.O_RDONLY)
    with suppress(OSError):  # not every file system can
        os.fsync(handle)
    os.close(handle)


class Sink(io.FileIO):
    """A file for h5py to write to that keeps a failed write to itself until it is asked.

    HDF5 cannot close a file that it cannot write: it keeps it open, or crashes when the process ends.
    """

    _error: OSError | None = None

    def write(self, values: Any) -> int:
        """Write everything; after the first failure nothing."""
        view = memoryview(values).cast("B")
        done = 0
        while done < len(view) and self._error is None:
            try:
                done += super().write(view[done:])
            except OSError as error:
                self._error = error
        return len(view)

    def truncate(self, size: int | None = None) -> int:
        """Set the size, as HDF5 does when it closes a file; after the first failure not."""
        return super().truncate(size) if self._error is None else self.tell()

    def check(self) -> None:
        """Raise the first failure, if there was one."""
        if self._error is not None:
            raise self._error


def unwritable(path: Path, error: OSError) -> RegistrationError:
    """One sentence for a file that the system did not let us write."""
    if error.errno in (errno.ENOSPC, getattr(errno, "EDQUOT", errno.ENOSPC)):
        return RegistrationError(
            f"the disk must have room for {path}, got a full one ({free_bytes(path) / 1e6:,.1f} MB free)"
        )
    return RegistrationError(
        f"a teacher store must lie where files can be written, got {path} ({error.strerror or error})"
    )


def require_free(path: Path, needed: int, what: str) -> None:
    """Refuse what the disk of `path` has no room for.

    Raises:
        RegistrationError: fewer than `needed` bytes are free.
    """
    free = free_bytes(path)
    if free < needed:
        raise RegistrationError(
            f"{needed / 1e6:,.1f} MB of disk must be free for {what}, got {free / 1e6:,.1f} MB at {path}"
        )


def free_bytes(path: Path) -> int:
    """Free on the disk that `path` (which need not exist) is on."""
    return shutil.disk_usage(next(p for p in path.parents if p.is_dir())).free


def reason(error: Exception) -> str:
    """The first line of what HDF5 says."""
    return (str(error).splitlines() or [type(error).__name__])[0]
