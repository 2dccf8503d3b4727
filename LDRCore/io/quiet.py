"""Keeps ITK and its libraries off stderr while files are read and written: what is wrong is said in one sentence."""

from __future__ import annotations

import os
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress

import SimpleITK as sitk

_COLLECTING = threading.Lock()  # ITK has one logger for all threads
_REDIRECTING = threading.Lock()
_redirected: list[int] = []  # the real stderr, once for every block that is running


class _Collector(sitk.LoggerBase):
    """Keeps what ITK would print."""

    def __init__(self, texts: list[str]) -> None:
        super().__init__()
        self._texts = texts

    def DisplayText(self, text: str) -> None:  # noqa: N802
        self._texts.append(text)

    DisplayErrorText = DisplayWarningText = DisplayGenericOutputText = DisplayDebugText = DisplayText


@contextmanager
def collected_warnings() -> Iterator[list[str]]:
    """Collect ITK's warnings instead of printing them, in one thread at a time, and restore what was."""
    texts: list[str] = []
    collector = _Collector(texts)
    with _COLLECTING:
        shown = sitk.ProcessObject.GetGlobalWarningDisplay()
        sitk.ProcessObject.SetGlobalWarningDisplay(True)
        before = collector.SetAsGlobalITKLogger()
        try:
            yield texts
        finally:
            before.SetAsGlobalITKLogger()
            sitk.ProcessObject.SetGlobalWarningDisplay(shown)


@contextmanager
def silent_libraries() -> Iterator[None]:
    """Keep what ITK, HDF5, MetaIO and niftilib print off the process's stderr, in any number of threads."""
    with _REDIRECTING, suppress(OSError):  # a process may have no stderr
        real = _redirected[-1] if _redirected else os.dup(2)
        if not _redirected:
            with open(os.devnull, "wb") as nothing:
                os.dup2(nothing.fileno(), 2)
        _redirected.append(real)
    try:
        yield
    finally:
        with _REDIRECTING:
            if _redirected:
                real = _redirected.pop()
                if not _redirected:
                    os.dup2(real, 2)
                    os.close(real)
