"""A log of registrations and errors that outlives the application, for reports of errors."""

from __future__ import annotations

import contextlib
import time
from pathlib import Path

import slicer

NAME = "LightweightRegistration.log"
MOST_BYTES = 1_000_000  # then the file becomes NAME.1, and a new one begins


def path() -> Path:
    """Return the file, beside the application's settings; it exists after the call, if it can."""
    file = Path(slicer.app.slicerUserSettingsFilePath).parent / NAME
    with contextlib.suppress(OSError):
        file.parent.mkdir(parents=True, exist_ok=True)
        file.touch()
    return file


def write(text: str) -> None:
    """Append an entry with date and time; a disk that is full or read-only hinders nothing."""
    with contextlib.suppress(OSError):
        file = path()
        if file.stat().st_size > MOST_BYTES:
            file.replace(file.with_name(f"{NAME}.1"))
        with file.open("a", encoding="utf-8") as stream:
            stream.write(f"{time.strftime('%Y-%m-%d %H:%M:%S')} {text.rstrip()}\n")
