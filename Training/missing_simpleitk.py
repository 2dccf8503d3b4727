"""Lets training scripts be imported where SimpleITK is not installed, such as on a GPU box.

Data made by `Training.prepare_data` are read with numpy alone, and `initial` other than "stem" aligns no images. What
does need SimpleITK fails there with one sentence.
"""

from __future__ import annotations

import importlib.util
import sys
import types
from typing import Any

NAME = "SimpleITK"


class _Absent:
    """Stands for every class and function; code may name it, but not call it."""

    def __new__(cls, *_: Any, **__: Any) -> Any:
        from Training.config import ConfigError

        raise ConfigError(f"{NAME} must be installed to read or align images, got none: use data of prepare_data")


class _StandIn(types.ModuleType):
    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return type(name, (_Absent,), {})


def stand_in() -> None:
    """Put the stand-in where `import SimpleITK` looks, if it is not installed."""
    if NAME not in sys.modules and importlib.util.find_spec(NAME) is None:
        sys.modules[NAME] = _StandIn(NAME)
