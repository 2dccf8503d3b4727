"""Files that are complete or not there at all."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def complete_file(path: Path) -> Iterator[Path]:
    """Give the name under which to write a file that appears at `path` when it is complete.

    The temporary name lies beside `path` and has the same suffixes, by which programs choose the format. On an error
    the temporary file is removed, and an earlier file at `path` stays as it was.
    """
    temporary = path.with_name(f".part-{path.name}")
    try:
        yield temporary
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)
