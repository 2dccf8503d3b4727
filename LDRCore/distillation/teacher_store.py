"""Teacher deformations in one file: extracted once, read at random by any number of processes while a student trains.

The file is HDF5 and can be read without this package: `displacement` (N, 3, d, h, w) float16, one compressed chunk with
a checksum for each pair, and `index`, JSON text with the pairs' keys, the meta data and, where it was given, how good
each pair is. While it is being written it is a folder PATH.parts of complete smaller stores, so that a killed
extraction loses at most one group of pairs.

float16 has 11 significant bits: displacements of up to 16, 32 and 64 voxels come back wrong by at most 1/256, 1/128
and 1/64 voxel. Fields may lie on a coarser grid than the images (`spatial.upsample` goes there and back,
`Grid.coarser` names the grid).
"""

from __future__ import annotations

import io
import json
import math
import os
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np

from LDRCore.distillation import disk, hdf5
from LDRCore.errors import RegistrationError

PENDING_BYTES = 256_000_000  # a group that holds this much is written before it is full
_ENTRY_BYTES = 16_384  # upper bound of what a pair takes beside its values, alone in its group


def pair_key(fixed: str, moving: str) -> str:
    """Return the key of an ordered pair; two different pairs never share one.

    >>> pair_key("case1", "case2")
    'case1|case2'

    Raises:
        RegistrationError: a name that is empty or holds the separator "|".
    """
    for name in (fixed, moving):
        if not name or "|" in name:
            raise RegistrationError(f'a name in a pair must be a text without "|", got {name!r}')
    return f"{fixed}|{moving}"


def needed_bytes(n_pairs: int, shape: tuple[int, int, int]) -> int:
    """Return an upper bound of the bytes on disk that an extraction takes.

    The fields are float16 and count as uncompressed; the groups and the merged file exist side by side.
    """
    return 2 * n_pairs * (_field_bytes(shape) + _ENTRY_BYTES)


class TeacherStore:
    """A finished store, for reading.

    May be pickled, sent to other processes and used after a fork: every process opens the file itself at its first
    read. Files that are being read are never written to, so no locks are taken.

    Attributes:
        path: absolute.
        keys: of all pairs, in the order in which they were written.
        shape: (d, h, w) of the stored fields.
        meta: what the writer was given.
        quality: of each pair that the writer was given one for, numbers by name.

    Raises:
        RegistrationError: no such file, not a store, a store of another version, or a damaged index.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = Path(path).absolute()
        self.keys: list[str] = []
        self.shape: tuple[int, int, int] = (0, 0, 0)
        self.meta: dict[str, Any] = {}
        self.quality: dict[str, dict[str, float]] = {}
        self._file: Any = None
        self._process = 0
        if not self.path.is_file():
            parts = _parts_folder(self.path)
            why = "a folder" if self.path.is_dir() else "not found"
            if parts.is_dir():
                why = f"not finished: {parts} holds its parts"
            raise RegistrationError(f"a teacher store must be an existing file, got {self.path} ({why})")
        self._file, index = hdf5.open_store(self.path)
        self._process = os.getpid()
        self.keys, self.meta, self._index = index["keys"], index["meta"], index
        self.quality = {key: row for key, row in zip(self.keys, index.get("quality", []), strict=False) if row}
        d, h, w = self._file["displacement"].shape[2:]
        self.shape = (d, h, w)
        self._row = {key: row for row, key in enumerate(self.keys)}

    def __len__(self) -> int:
        return len(self.keys)

    def __contains__(self, key: object) -> bool:
        return key in self._row

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_file": None}

    def close(self) -> None:
        """Close the file in this process; the next read opens it again."""
        if self._file is not None and self._process == os.getpid():
            self._file.close()
        self._file = None

    def read(self, key: str) -> np.ndarray:
        """Read the displacement of a pair.

        Returns:
            (3, d, h, w) float32, voxels of its own grid, component c along axis c.

        Raises:
            RegistrationError: an unknown key, a damaged entry, or a file that changed since it was first opened.
        """
        if key not in self._row:
            raise RegistrationError(
                f"a key must be one of the {len(self)} in the teacher store, got {key!r} ({self.path})"
            )
        data = self._data()
        try:
            values: np.ndarray = data[self._row[key]]
        except hdf5.ERRORS as error:
            raise self._damaged(key, error) from None
        return values.astype(np.float32)

    def compressed(self, row: int) -> tuple[int, bytes]:
        """Read (filter mask, bytes) of an entry as it is in the file, unchecked, for copying."""
        data = self._data()
        try:
            mask, chunk = data.id.read_direct_chunk((row, 0, 0, 0, 0))
        except hdf5.ERRORS as error:
            raise self._damaged(self.keys[row], error) from None
        return mask, chunk

    def _damaged(self, key: str, error: Exception) -> RegistrationError:
        return RegistrationError(
            f"an entry of a teacher store must be whole, got a damaged {key!r} in {self.path} "
            f"({hdf5.first_line(error)})"
        )

    def verify(self) -> list[str]:
        """Read every entry and return the keys of those that are damaged."""
        self._data()
        damaged = []
        for key in self.keys:
            try:
                self.read(key)
            except RegistrationError:
                damaged.append(key)
        return damaged

    def _data(self) -> Any:
        """Return the dataset, from a handle that this process opened."""
        if self._file is None or self._process != os.getpid():
            self._file, index = hdf5.open_store(self.path)
            self._process = os.getpid()
            if index != self._index or self._file["displacement"].shape[2:] != self.shape:
                raise RegistrationError(f"a teacher store must stay as it was first opened, got {self.path} replaced")
        return self._file["displacement"]


class TeacherStoreWriter:
    """Writes a store in groups, each complete on disk before the next begins, and merges them at the end.

    A context manager: leaving it, also by an error, writes the last, incomplete group. Groups in PATH.parts and a
    finished store at PATH count as written; they must have the same shape and meta data. One process at a time may
    write.

    Args:
        path: of the finished store.
        shape: (d, h, w) of the fields.
        meta: whatever JSON can hold: what identifies the teacher, the pairs and the grid.
        group: pairs in a group, at most: what a killed extraction can lose.

    Raises:
        RegistrationError: h5py missing, arguments that cannot be stored, another shape or meta than what lies there, a
            damaged group, or a folder that cannot be written.
    """

    def __init__(
        self, path: str | os.PathLike[str], shape: tuple[int, int, int], meta: dict[str, Any], *, group: int = 32
    ) -> None:
        hdf5.require_h5py()
        if len(shape) != 3 or any(n != int(n) or n < 1 for n in shape) or _field_bytes(shape) >= 2**32:
            raise RegistrationError(f"shape must be three sizes (d, h, w), below 4 GB a field, got {tuple(shape)}")
        if group < 1:
            raise RegistrationError(f"group must be 1 or more, got {group}")
        self.path = Path(path).absolute()
        d, h, w = (int(n) for n in shape)
        self.shape, self.group = (d, h, w), group
        try:
            self.meta: dict[str, Any] = json.loads(json.dumps(dict(meta), allow_nan=False))
        except (TypeError, ValueError) as error:
            raise RegistrationError(f"meta must be a dict that JSON can hold, got {error}") from None
        self._parts = _parts_folder(self.path)
        self._pending: dict[str, tuple[np.ndarray, dict[str, float]]] = {}
        self._written: set[str] = set()
        for store in self._stored():
            self._check_same(store)
            self._written.update(store.keys)
        try:
            self._parts.mkdir(parents=True, exist_ok=True)
            for stray in (*self._parts.glob("*.part"), disk.temporary_path(self.path)):
                stray.unlink(missing_ok=True)
        except OSError as error:
            raise disk.describe_failure(self._parts, error) from None

    def __enter__(self) -> TeacherStoreWriter:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            self._write_group()
        except RegistrationError:
            if error is None:
                raise
        finally:
            self._remove_folder_if_empty()

    def missing(self, keys: Sequence[str]) -> list[str]:
        """Return those of the keys that are still to be written, in their order."""
        return [key for key in dict.fromkeys(keys) if key not in self._written]

    def check_space(self, n_pairs: int) -> None:
        """Refuse to begin with so many more pairs if the disk may not hold them.

        Raises:
            RegistrationError: less is free than `needed_bytes` and the bytes to merge what is on disk already.
        """
        needed = needed_bytes(n_pairs, self.shape) + self._stored_bytes()
        disk.require_free(self.path, needed, f"{n_pairs} teacher deformations of {self.shape}")

    def forget(self, keys: Iterable[str]) -> None:
        """Count pairs on disk as not written, so that they can be written again (see `TeacherStore.verify`)."""
        self._written.difference_update(set(keys) - self._pending.keys())

    def write(self, key: str, displacement: np.ndarray, quality: dict[str, float] | None = None) -> None:
        """Add a pair; it is on disk when its group is full.

        Args:
            key: as from `pair_key`; new to this store.
            displacement: (3, d, h, w), voxels of the grid (d, h, w), component c along axis c.
            quality: how good it is, finite numbers by name.

        Raises:
            RegistrationError: a key that is there already, another shape, values that are not finite or that float16
                cannot hold, or a disk that is full.
        """
        if not isinstance(key, str) or not key or key in self._written:
            raise RegistrationError(f"a key must be a text that is new to the store, got {key!r} ({self.path})")
        values = np.asarray(displacement)
        if values.shape != (3, *self.shape) or values.dtype.kind not in "fiu":
            raise RegistrationError(
                f"the displacement of {key!r} must be numbers of shape {(3, *self.shape)}, "
                f"got {values.dtype} of shape {values.shape}"
            )
        with np.errstate(over="ignore"):
            half = values.astype(np.float16)
        if not np.isfinite(half).all():
            wrong = int(np.count_nonzero(~np.isfinite(values)))
            if wrong:
                raise RegistrationError(f"the displacement of {key!r} must be finite, got {wrong} values that are not")
            raise RegistrationError(
                f"the displacement of {key!r} must fit float16 (up to 65504 voxels), got {np.abs(values).max():.6g}"
            )
        row = {name: float(value) for name, value in (quality or {}).items()}
        if not np.isfinite(list(row.values())).all():
            raise RegistrationError(f"the quality of {key!r} must be finite numbers, got {row}")
        self._pending[key] = half, row
        self._written.add(key)
        if len(self._pending) >= min(self.group, math.ceil(PENDING_BYTES / half.nbytes)):
            self._write_group()

    def finish(self) -> Path:
        """Merge all groups into the one file (compressed as they are), remove them and return its path.

        Nothing is lost when this is refused or killed: call it again.

        Raises:
            RegistrationError: nothing was written, or a disk that is full.
        """
        self._write_group()
        if not self._written:
            raise RegistrationError(f"a teacher store must hold at least one pair, got none for {self.path}")
        if self._sources() != [self.path]:
            disk.require_free(self.path, self._stored_bytes(), f"merging {len(self._written)} pairs")
            with ThreadPoolExecutor(1) as pool:  # in a thread Ctrl-C cannot interrupt HDF5 while it writes
                pool.submit(self._merge).result()
            for part in self._part_files():
                part.unlink(missing_ok=True)
        self._remove_folder_if_empty()
        return self.path

    def _part_files(self) -> list[Path]:
        return sorted((p for p in self._parts.glob("*.h5") if p.stem.isdecimal()), key=lambda p: int(p.stem))

    def _sources(self) -> list[Path]:
        return [self.path] * self.path.exists() + self._part_files()

    def _stored_bytes(self) -> int:
        return sum(path.stat().st_size for path in self._sources())

    def _stored(self) -> Iterable[TeacherStore]:
        """Open every store on disk in turn; only one file is open at a time."""
        for path in self._sources():
            try:
                store = TeacherStore(path)
            except RegistrationError as error:
                if path == self.path:
                    raise
                raise RegistrationError(f"{error}: delete that part to extract its pairs again") from None
            yield store
            store.close()

    def _check_same(self, store: TeacherStore) -> None:
        if store.shape != self.shape:
            raise RegistrationError(
                f"the store at {store.path} must have the shape that is asked for, got {store.shape} there, "
                f"{self.shape} now"
            )
        for name in [*store.meta, *self.meta]:
            stored, wanted = store.meta.get(name), self.meta.get(name)
            if stored != wanted:
                raise RegistrationError(
                    f"the store at {store.path} must have the meta data that are asked for, got {name} = {stored!r} "
                    f"there, {wanted!r} now"
                )

    def _write_group(self) -> None:
        if not self._pending:
            return
        files = self._part_files()
        target = self._parts / f"{int(files[-1].stem) + 1 if files else 0:05d}.h5"
        buffer = io.BytesIO()  # HDF5 does not write to disk itself: see disk.DeferredErrorFile
        quality = [row for _, row in self._pending.values()]
        h5, data = hdf5.create(buffer, self.shape, self.meta, list(self._pending), quality=quality)
        with h5:
            for row, (values, _) in enumerate(self._pending.values()):
                data[row] = values
        with disk.complete_file(target) as part:
            self._parts.mkdir(parents=True, exist_ok=True)
            part.write_bytes(buffer.getbuffer())
        self._pending.clear()

    def _merge(self) -> None:
        """Copy the compressed chunks of all stores into one file; later entries of a key replace earlier ones."""
        keys = list(dict.fromkeys(key for store in self._stored() for key in store.keys))
        row_of = {key: row for row, key in enumerate(keys)}
        quality: dict[str, dict[str, float]] = {}
        for store in self._stored():
            quality |= {key: store.quality.get(key, {}) for key in store.keys}
        with disk.complete_file(self.path) as part, disk.DeferredErrorFile(part, "w+") as file:
            h5, data = hdf5.create(file, self.shape, self.meta, keys, quality=[quality[key] for key in keys])
            with h5:
                for store in self._stored():
                    for row, key in enumerate(store.keys):
                        mask, chunk = store.compressed(row)
                        data.id.write_direct_chunk((row_of[key], 0, 0, 0, 0), chunk, mask)
                        file.check()
            file.check()

    def _remove_folder_if_empty(self) -> None:
        if self._parts.is_dir() and not any(self._parts.iterdir()):
            self._parts.rmdir()


def _field_bytes(shape: Sequence[int]) -> int:
    return 3 * 2 * math.prod(shape)


def _parts_folder(path: Path) -> Path:
    return path.with_name(path.name + ".parts")
