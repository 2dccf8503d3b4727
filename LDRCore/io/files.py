"""Files and folders of users: written whole or not at all, never in place of an input; texts that can be read."""

from __future__ import annotations

import ctypes
import os
import re
import shutil
import sys
import tempfile
from collections.abc import Collection, Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from LDRCore.errors import RegistrationError

if sys.platform != "win32":
    import fcntl

_DICOM_MARK = slice(128, 132)
_LONGEST_NAME = 80  # characters of a target's name that its staging folder repeats


@contextmanager
def staging_folder(target: Path) -> Iterator[Path]:
    """Give a new, private folder beside `target`, on the same disk, in which to write what is then moved to `target`.

    Its name cannot be guessed. It is removed afterwards, and so are those of earlier runs that were killed.

    Args:
        target: of a file or folder; its parent is created if needed.

    Raises:
        RegistrationError: another process is writing the same target.
    """
    target.parent.mkdir(parents=True, exist_ok=True)
    name = target.name[:_LONGEST_NAME]
    staging = Path(tempfile.mkdtemp(prefix=f".{name}.", suffix=".part", dir=target.parent))
    lock = _lock(staging)
    try:
        for other in target.parent.iterdir():
            if other != staging and re.fullmatch(re.escape(f".{name}.") + r"\w+\.part", other.name):
                _sweep(other, target)
        yield staging
    finally:
        shutil.rmtree(staging, ignore_errors=True)
        if lock is not None:
            os.close(lock)


def _lock(folder: Path) -> int | None:
    """Lock a folder until this process ends or closes what is returned; None where that is impossible.

    Raises:
        BlockingIOError: another process holds the lock.
    """
    if sys.platform == "win32":
        return None
    handle = os.open(folder, os.O_RDONLY | os.O_NOFOLLOW | os.O_DIRECTORY)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        os.close(handle)
        if isinstance(error, BlockingIOError):
            raise
        return None  # a file system without locks
    return handle


def _sweep(leftover: Path, target: Path) -> None:
    """Remove the staging folder of a process that was killed.

    Raises:
        RegistrationError: its process is alive.
    """
    try:
        lock = _lock(leftover)
    except BlockingIOError:
        raise RegistrationError(f"one process at a time may write {target}, got a second one") from None
    except OSError:  # removed meanwhile, not a folder, or somebody else's
        return
    if lock is not None:
        shutil.rmtree(leftover, ignore_errors=True)
        os.close(lock)


@contextmanager
def complete_file(path: Path) -> Iterator[Path]:
    """Give the name under which to write a file that appears at `path` when it is complete.

    On an error an earlier file at `path` stays as it was.

    Raises:
        RegistrationError: more than one file was written (a header with its values in a file beside it).
    """
    with staging_folder(path) as staging:
        yield staging / path.name
        if len(list(staging.iterdir())) != 1:
            raise RegistrationError(f"the output must be a single file (.nii.gz, .nrrd, .mha ...), got {path.name}")
        os.replace(staging / path.name, path)


@contextmanager
def complete_folder(target: Path, own: Collection[str]) -> Iterator[Path]:
    """Give a folder in which to write files that appear in `target` together, in one step.

    Older files of the names `own` disappear in the same step; all others in `target` stay. On an error, or where the
    process is killed, `target` stays as it was.

    Args:
        target: created if needed; must pass `check_replaceable`.
        own: names that belong to what is written.
    """
    target = target.resolve()
    with staging_folder(target) as staging:
        new = staging / target.name
        new.mkdir()
        yield new
        if target.exists():
            files = {path.name for path in new.iterdir()} | set(own)
            shutil.copytree(
                target,
                new,
                symlinks=True,
                ignore=lambda folder, names: files if Path(folder) == target else (),
                copy_function=_link,
                dirs_exist_ok=True,
            )
            _exchange(new, target)
        else:
            os.rename(new, target)


def _link(source: str, target: str) -> None:
    """Give a file a second name; copy it where the file system cannot."""
    try:
        os.link(source, target, follow_symlinks=False)
    except OSError:
        shutil.copy2(source, target, follow_symlinks=False)


def _exchange(first: Path, second: Path) -> None:
    """Exchange two folders: in one step where the system can (Linux, macOS), otherwise by three renames."""
    names = os.fsencode(first), os.fsencode(second)
    with suppress(OSError, AttributeError):
        if sys.platform == "linux":
            if ctypes.CDLL(None).renameat2(-100, names[0], -100, names[1], 2) == 0:  # AT_FDCWD, RENAME_EXCHANGE
                return
        elif sys.platform == "darwin" and ctypes.CDLL(None).renamex_np(*names, 2) == 0:  # RENAME_SWAP
            return
    aside = second.with_name(f"{first.parent.name}.old")
    os.rename(second, aside)
    try:
        os.rename(first, second)
    except BaseException:
        os.rename(aside, second)
        raise
    os.rename(aside, first)


def check_replaceable(folder: Path, own: Iterable[str]) -> None:
    """Refuse a folder that `complete_folder` cannot replace in one step.

    Raises:
        RegistrationError: it is a mount point, holds the current folder, or has a folder where a file shall be.
    """
    if not folder.exists():
        return
    resolved = folder.resolve()
    if os.path.ismount(resolved) or Path.cwd().is_relative_to(resolved):
        what = "a mount point" if os.path.ismount(resolved) else "the current folder"
        raise RegistrationError(f"the output must be a folder of its own, got {what} {folder}: name a folder in it")
    taken = next((name for name in own if (resolved / name).is_dir()), None)
    if taken is not None:
        raise RegistrationError(f"an output must not take the place of a folder, got the folder {folder / taken}")


def check_writable(folder: Path) -> None:
    """Refuse a folder in which no file can be made, or that cannot be made itself.

    Raises:
        RegistrationError: see above.
    """
    existing = folder.resolve()
    while not existing.exists():
        existing = existing.parent
    try:
        with tempfile.TemporaryFile(dir=existing):
            pass
    except OSError as error:
        raise RegistrationError(f"the output must be writable, got {folder} ({error.strerror})") from None


def check_not_input(outputs: Iterable[Path], inputs: Iterable[object]) -> None:
    """Refuse outputs that would replace a file that is read.

    Args:
        outputs: paths, which need not exist.
        inputs: paths, also of folders of DICOM files; what is none (None, an image in memory) is passed over.

    Raises:
        RegistrationError: an output is one of the inputs.
    """
    paths = [os.fspath(source) for source in inputs if isinstance(source, (str, os.PathLike))]
    for output in outputs:
        if any(_is_same_file(output, source) or _is_slice_of(output, source) for source in paths):
            raise RegistrationError(f"the output must not replace an input, got {output} for both")


def _is_same_file(path: Path, other: str) -> bool:
    try:
        return os.path.samefile(path, other)
    except (OSError, ValueError):  # one of them does not exist, or is no path at all
        return False


def _is_slice_of(path: Path, folder: str) -> bool:
    """Return whether a path is one of the DICOM files of a folder."""
    if not (os.path.isdir(folder) and path.is_file() and _is_same_file(path.parent, folder)):
        return False
    with path.open("rb") as stream:
        return stream.read(_DICOM_MARK.stop)[_DICOM_MARK] == b"DICM"


def describe_failure(path: Path, error: Exception) -> RegistrationError:
    """Say in one sentence why an output could not be written."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    reason = getattr(error, "strerror", None) or (lines[-1] if lines else type(error).__name__)
    reason = re.sub(r"[^\s\"]*\.part/|\(0x[0-9a-f]+\)", "", reason)  # names and addresses that tell a user nothing
    return RegistrationError(
        f"the output must be writable and of a file type that SimpleITK writes, got {path} ({reason[:160]})"
    )


def read_text(path: Path, name: str, kind: str = "file") -> str:
    """Read a text file of a user.

    Args:
        path: of the file.
        name: what it is to the user ("points"), for messages.
        kind: what it should be ("CSV file").

    Raises:
        RegistrationError: missing, not readable, or not UTF-8 text.
    """
    try:
        text = path.read_text(encoding="utf-8-sig")
    except FileNotFoundError:
        raise RegistrationError(f"{name} must be an existing {kind}, got {path} (not found)") from None
    except OSError as error:
        raise RegistrationError(f"{name} must be a readable {kind}, got {path} ({error.strerror})") from None
    except UnicodeDecodeError:
        text = "\0"
    if "\0" in text:
        raise RegistrationError(f"{name} must be a {kind} in UTF-8, got {path} (binary, or in another encoding)")
    return text
