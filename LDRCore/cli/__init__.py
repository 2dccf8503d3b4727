"""The command line `ldr`: the parser, one module for each command, the overview picture."""

from __future__ import annotations

from LDRCore.cli.main import main, script

__all__ = ["main", "script"]
