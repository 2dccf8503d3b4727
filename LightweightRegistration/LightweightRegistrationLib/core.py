"""Finding LDRCore, and the errors that users can mend."""

from __future__ import annotations

import importlib
import importlib.util
import sys
from pathlib import Path
from types import ModuleType

MODULE_FOLDER = Path(__file__).resolve().parents[1]


class InputError(ValueError):
    """Something that a user can mend. The message is one sentence: the rule, and what came instead."""


class CancelledError(Exception):
    """The user cancelled, or the scene was closed during the run. Nothing was changed."""


class MemoryNeededError(InputError):
    """The computer could not give the memory that a registration needs.

    Attributes:
        fewer_cascades: a smaller number of cascades to offer, or None.
    """

    def __init__(self, message: str, fewer_cascades: int | None = None):
        super().__init__(message)
        self.fewer_cascades = fewer_cascades


def core_folder() -> Path:
    """The folder that holds the package LDRCore: the module's own when installed, the checkout's root otherwise."""
    for folder in (MODULE_FOLDER, MODULE_FOLDER.parent):
        if (folder / "LDRCore" / "__init__.py").is_file():
            return folder
    raise InputError(
        f"the package LDRCore must lie beside the module or in the same checkout, got neither {MODULE_FOLDER} nor "
        f"{MODULE_FOLDER.parent} with it: install the extension again"
    )


def core(name: str) -> ModuleType:
    """A module of LDRCore by its short name ("weights"), imported on first use."""
    folder = str(core_folder())
    if folder not in sys.path:
        sys.path.insert(0, folder)
    return importlib.import_module(f"LDRCore.{name}")
