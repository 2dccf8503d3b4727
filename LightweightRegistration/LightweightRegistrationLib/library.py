"""Finds the package LDRCore and imports from it on first use."""

from __future__ import annotations

import importlib
import importlib.util
import sys
from pathlib import Path
from types import ModuleType

from .module_errors import InputError

MODULE_FOLDER = Path(__file__).resolve().parents[1]


def library_folder() -> Path:
    """Return the folder that holds the package LDRCore: the module's own when installed, else the checkout's root.

    Raises:
        InputError: the package lies in neither.
    """
    for folder in (MODULE_FOLDER, MODULE_FOLDER.parent):
        if (folder / "LDRCore" / "__init__.py").is_file():
            return folder
    raise InputError(
        f"the package LDRCore must lie beside the module or in the same checkout, got neither {MODULE_FOLDER} nor "
        f"{MODULE_FOLDER.parent} with it: install the extension again"
    )


def library_module(name: str) -> ModuleType:
    """Import a module of LDRCore on first use.

    Args:
        name: its name within the package ("models.weights").

    Raises:
        InputError: LDRCore cannot be found.
    """
    folder = str(library_folder())
    if folder not in sys.path:
        sys.path.insert(0, folder)
    return importlib.import_module(f"LDRCore.{name}")
