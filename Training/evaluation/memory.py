"""The largest memory that a process has used.

Not `getrusage`: what it says of a process begins with the memory of the process that started it.
"""

from __future__ import annotations

import resource
import sys
from pathlib import Path


def peak_mb(process: str = "self") -> float | None:
    """Peak resident memory in MB of a running process (its number, or "self"); None where it cannot be seen."""
    try:
        lines = Path(f"/proc/{process}/status").read_text().splitlines()
    except OSError:  # it has ended, or the system has no /proc
        if process != "self":
            return None
        unit = 1024 * 1024 if sys.platform == "darwin" else 1024
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / unit
    found = [line for line in lines if line.startswith("VmHWM:")]
    return int(found[0].split()[1]) / 1024 if found else None
