"""Keeps ITK's warnings off stderr while a file is read: what is wrong is said in one sentence."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import SimpleITK as sitk


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
    """Collect ITK's warnings instead of printing them, and restore what was."""
    texts: list[str] = []
    collector = _Collector(texts)
    shown = sitk.ProcessObject.GetGlobalWarningDisplay()
    sitk.ProcessObject.SetGlobalWarningDisplay(True)
    before = collector.SetAsGlobalITKLogger()
    try:
        yield texts
    finally:
        before.SetAsGlobalITKLogger()
        sitk.ProcessObject.SetGlobalWarningDisplay(shown)
