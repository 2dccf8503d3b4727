"""Measures the peak memory of a process."""

from __future__ import annotations

from LDRCore.cpu import memory


def peak_mb(process: str = "self") -> float | None:
    """Return the peak resident memory in MB of a running process (its number, or "self"); None where it is unknown."""
    peak = memory.peak_bytes(process)
    return None if peak is None else peak / 1024**2
