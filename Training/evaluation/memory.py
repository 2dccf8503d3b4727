"""Measures the peak memory of a process.

`getrusage` is not used: its value for a process starts at the memory of the process that started it.
"""

from __future__ import annotations

import resource
import sys
from pathlib import Path


def peak_mb(process: str = "self") -> float | None:
    """Return the peak resident memory in MB of a running process (its number, or "self"); None where it is unknown."""
    try:
        lines = Path(f"/proc/{process}/status").read_text().splitlines()
    except OSError:  # it has ended, or the system has no /proc
        if process != "self":
            return None
        unit = 1024 * 1024 if sys.platform == "darwin" else 1024
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / unit
    high_water = [line for line in lines if line.startswith("VmHWM:")]
    return int(high_water[0].split()[1]) / 1024 if high_water else None
