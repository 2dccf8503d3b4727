"""The HDF5 file of teacher deformations: its layout and checksums.

h5py is needed here and nowhere else in the package; it is imported when the first file is opened.
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from LDRCore.errors import RegistrationError

FORMAT = "LDRCore teacher deformations"
VERSION = 1
FILTERS: dict[str, Any] = {"shuffle": True, "compression": "gzip", "compression_opts": 4}  # see Training.measure_store
_MOST_INFLATED = 1100  # times as long as its gzip form is what it holds at most
ERRORS = (OSError, RuntimeError)  # what HDF5 raises where a file cannot be read


def require_h5py() -> Any:
    """Import h5py.

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
    quality: Sequence[dict[str, float]] = (),
) -> tuple[Any, Any]:
    """Create a store whose keys are known.

    Args:
        file: a path or a binary file object.
        shape: (d, h, w).
        meta: what JSON can hold.
        keys: of the pairs, in order.
        filters: h5py's options to shuffle and compress; a checksum is always added.
        quality: of each pair, numbers by name; or nothing.

    Returns:
        The open h5py.File, and its empty dataset of displacements.
    """
    h5 = require_h5py().File(file, "w", libver=("v110", "v110"))  # this version and later check HDF5's own records too
    h5.attrs["format"], h5.attrs["version"] = FORMAT, VERSION
    index = {"keys": list(keys), "meta": meta} | ({"quality": list(quality)} if any(quality) else {})
    text = np.frombuffer(json.dumps(index).encode(), np.uint8)
    h5.create_dataset("index", data=text, chunks=text.shape, compression="gzip", fletcher32=True)
    size, chunk = (len(keys), 3, *shape), (1, 3, *shape)
    data = h5.create_dataset("displacement", size, np.float16, chunks=chunk, fletcher32=True, **filters)
    data.attrs["unit"] = "voxels of the grid (d, h, w), component c along axis c"
    return h5, data


def open_store(path: Path) -> tuple[Any, dict[str, Any]]:
    """Open a store for reading. No lock is taken: a store is never written to under its own name.

    Returns:
        The open h5py.File, and its index {"keys", "meta"}, with "quality" where it was given.

    Raises:
        RegistrationError: not such a file, another version, or a damaged index.
    """
    try:
        file = require_h5py().File(path, "r", locking=False)
    except ERRORS as error:
        raise RegistrationError(
            f"a teacher store must be a whole HDF5 file, got {path} ({first_line(error)})"
        ) from None
    try:
        kind, version = file.attrs.get("format"), file.attrs.get("version")
        if kind != FORMAT:
            raise RegistrationError(f"a teacher store must be a file that this package wrote, got another kind: {path}")
        if version != VERSION:
            raise RegistrationError(f"a teacher store must have version {VERSION}, got version {version}: {path}")
        _check_datasets(file, path)
        index = json.loads(file["index"][()].tobytes())
        counts = [len(index["keys"]), len(index.get("quality", index["keys"]))]
        if counts != [file["displacement"].shape[0]] * 2:
            raise RuntimeError("keys, displacements and qualities differ in number")
    except RegistrationError:
        file.close()
        raise
    except (*ERRORS, KeyError, ValueError) as error:
        file.close()
        raise RegistrationError(
            f"the index of a teacher store must be whole, got {path} ({first_line(error)})"
        ) from None
    return file, index


def _check_datasets(file: Any, path: Path) -> None:
    """Refuse values in other files, and more of them than the file can hold.

    Raises:
        RegistrationError: see above.
        KeyError: a dataset is missing.
    """
    most = _MOST_INFLATED * path.stat().st_size
    for name in ("index", "displacement"):
        own = isinstance(file.get(name, getlink=True), require_h5py().HardLink)  # a link is not followed
        if not own or file[name].external or file[name].is_virtual:
            raise RegistrationError(f"a teacher store must hold its {name}, got it elsewhere or not at all: {path}")
    shape = file["displacement"].shape
    if len(shape) != 5 or shape[1] != 3 or file["index"].nbytes > most or 2 * math.prod(shape[1:]) > most:
        raise RegistrationError(f"a teacher store must hold (N, 3, d, h, w) values, got {shape} in {path}")


def first_line(error: Exception) -> str:
    """Return the first line of HDF5's message."""
    return (str(error).splitlines() or [type(error).__name__])[0]
