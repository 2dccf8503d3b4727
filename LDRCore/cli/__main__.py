"""Run `python -m LDRCore.cli` like `ldr`."""

from __future__ import annotations

import sys

from LDRCore.cli.main import script

sys.exit(script())
