"""A pair's folder: written aside, checksummed, moved into place in one step, and known again by its checksums."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from LDRCore.cohort.pairs import CohortPair
from LDRCore.cohort.settings import CHECKSUMS, CohortSettings, key_of
from LDRCore.errors import RegistrationError
from LDRCore.io.files import describe_failure

if sys.platform != "win32":
    import fcntl

PAIRS, STAGING, LOCK = "pairs", ".part", ".lock"  # in the output folder
_CHUNK = 1 << 20
_INPUTS = ("fixed", "moving", "fixed_mask", "moving_mask", "fixed_labels", "moving_labels", "initial")


def folder_of(out: Path, pair: CohortPair) -> Path:
    """Return the folder of a pair's results."""
    return out / PAIRS / pair.name


@contextmanager
def only_run(out: Path) -> Iterator[None]:
    """Let one run at a time write an output folder, and remove what earlier ones left half written.

    Raises:
        RegistrationError: another run is at work there, or the folder cannot be made.
    """
    try:
        out.mkdir(parents=True, exist_ok=True)
        handle = os.open(out / LOCK, os.O_RDWR | os.O_CREAT, 0o644)
    except OSError as error:
        raise describe_failure(out, error) from None
    try:
        if sys.platform != "win32":
            try:
                fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                raise RegistrationError(f"one run at a time may write {out}, got a second one") from None
            except OSError:
                pass  # a file system without locks
        shutil.rmtree(out / STAGING, ignore_errors=True)
        yield
    finally:
        shutil.rmtree(out / STAGING, ignore_errors=True)
        os.close(handle)


def mark_of(path: str) -> list[int] | None:
    """Return [bytes, time of change in ns] of a file, by which a change is seen; None where there is none."""
    try:
        found = os.stat(path)
    except (OSError, ValueError):
        return None
    return [found.st_size, found.st_mtime_ns]


def input_marks(pair: CohortPair) -> dict[str, list[int]]:
    """Return {input: its mark} of the inputs that are files now."""
    return {name: found for name in _INPUTS if (found := mark_of(getattr(pair, name))) is not None}


def _digest(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as stream:
        while chunk := stream.read(_CHUNK):
            digest.update(chunk)
    return digest.hexdigest()


@contextmanager
def staging(out: Path) -> Iterator[Path]:
    """Give a new folder on the output's disk, removed afterwards."""
    (out / STAGING).mkdir(parents=True, exist_ok=True)
    private = Path(tempfile.mkdtemp(dir=out / STAGING))
    folder = private / "pair"
    folder.mkdir()  # with the permissions of any new folder
    try:
        yield folder
    finally:
        shutil.rmtree(private, ignore_errors=True)


def seal(folder: Path, pair: CohortPair, settings: CohortSettings, row: dict[str, Any], marks: dict[str, Any]) -> None:
    """Write the checksums of a folder's files, and see to it that all of it is on the disk.

    Args:
        folder: holds the outputs of the pair.
        pair, settings: what they are of.
        row: what the cohort's table says of the pair.
        marks: of the inputs, taken before they were read; see `input_marks`.
    """
    files = {
        path.name: {"bytes": path.stat().st_size, "sha256": _digest(path)}
        for path in sorted(folder.iterdir())
        if path.name != CHECKSUMS
    }
    sealed = {"key": key_of(pair, settings), "inputs": marks, "row": row, "files": files}
    (folder / CHECKSUMS).write_text(json.dumps(sealed, indent=1) + "\n", encoding="utf-8")
    flush_all(folder)


def flush_all(folder: Path) -> None:
    """See to it that the files of a folder are on the disk before it is moved into place."""
    for path in [*folder.iterdir(), folder]:
        _flush(path)


def _flush(path: Path) -> None:
    with suppress(PermissionError):  # Windows opens no folder
        handle = os.open(path, os.O_RDONLY)
        try:
            os.fsync(handle)
        except OSError as error:
            if error.errno not in (9, 22):  # a handle that cannot be flushed: read-only on Windows, some folders
                raise
        finally:
            os.close(handle)


def publish(folder: Path, target: Path) -> bool:
    """Move a sealed folder into place; what is there gives way.

    Returns:
        Whether it was moved; not where another process put one there at the same moment.
    """
    target.parent.mkdir(parents=True, exist_ok=True)
    if target.exists():
        with suppress(OSError):
            os.rename(target, folder.with_name("old"))
    try:
        os.rename(folder, target)
    except OSError:
        if not target.exists():
            raise
        return False
    _flush(target.parent)
    return True


def finished_row(out: Path, pair: CohortPair, settings: CohortSettings) -> dict[str, Any] | None:
    """Return the stored row of a pair whose outputs are all there and whole; None where it must be registered.

    A result of other settings, of inputs that changed since, or with a file that is missing, cut off or changed does
    not count. Inputs that are gone since do not matter.
    """
    folder = folder_of(out, pair)
    try:
        sealed = json.loads((folder / CHECKSUMS).read_text(encoding="utf-8"))
        if sealed["key"] != key_of(pair, settings):
            return None
        now = input_marks(pair)
        if any(now.get(name, mark) != mark for name, mark in sealed["inputs"].items()):
            return None
        for name, file in sealed["files"].items():
            path = folder / name
            if path.stat().st_size != file["bytes"] or _digest(path) != file["sha256"]:
                return None
        return dict(sealed["row"])
    except (OSError, ValueError, KeyError, TypeError):
        return None
