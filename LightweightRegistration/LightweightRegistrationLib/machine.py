"""What this computer is: its memory, and whether torch exists for it. Standard library only."""

from __future__ import annotations

import ctypes
import os
import platform
import sys

GIGABYTE = 1e9


class _MemoryStatus(ctypes.Structure):
    """MEMORYSTATUSEX of Windows."""

    _fields_ = (
        ("length", ctypes.c_ulong),
        ("load", ctypes.c_ulong),
        *((name, ctypes.c_ulonglong) for name in ("total", "free", "a", "b", "c", "d", "e")),
    )


def memory_bytes() -> int:
    """Return the physical memory, 0 where the system does not say."""
    if os.name == "nt":
        status = _MemoryStatus()
        status.length = ctypes.sizeof(status)
        ok = ctypes.windll.kernel32.GlobalMemoryStatusEx(ctypes.byref(status))
        return int(status.total) if ok else 0
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (ValueError, OSError):
        return 0


def without_torch() -> str:
    """Return why no usable torch can be installed into this Python; empty where one can be.

    The last torch for Intel Macs is 2.2, which cannot exchange arrays with the numpy 2 of Slicer 5.10 and newer.
    Measured on Linux: torch 2.2.2 with numpy 2.4 raises "Numpy is not available"; with numpy 1.26 the registration
    tests pass.
    """
    if sys.platform == "darwin" and platform.machine() == "x86_64":
        return "Slicer for Intel Macs has no torch that works with its numpy: use another computer"
    return ""
