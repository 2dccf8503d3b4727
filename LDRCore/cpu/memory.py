"""How much memory a registration needs and a process has taken, and keeping what it freed. Standard library only."""

from __future__ import annotations

import ctypes
import math
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

MAX_WORKING_VOXELS = 5_000_000  # as pipeline.dense.MAX_VOXELS
BASE = 400e6  # Python, weights, a CPU build of torch (CUDA builds take about a gigabyte more, numba an eighth)
_JACOBIAN_SLABS = 80e6  # what the Jacobian map takes at any size
# bytes a voxel at the peak, measured on CPU runs of 4 to 17 million voxels; non-linear `initial` transforms take more
_NATIVE, _JACOBIAN, _WORKING, _CASCADE, _REFINED, _INVERSE = 7.0, 4.0, 60.0, 6.0, 90.0, 380.0


def working_voxels(card: dict[str, Any], fixed_size: Sequence[int], fixed_spacing_mm: Sequence[float]) -> float:
    """Return the voxels of the working grid over the whole field of view; see `needed_bytes`."""
    settings = card["working_grid"]
    voxels = math.prod(
        (n * s + 2 * settings["margin_mm"]) / settings["spacing_mm"]
        for n, s in zip(fixed_size, fixed_spacing_mm, strict=True)
    )
    return min(voxels, MAX_WORKING_VOXELS)


def needed_bytes(
    card: dict[str, Any],
    fixed_size: Sequence[int],
    fixed_spacing_mm: Sequence[float],
    moving_size: Sequence[int],
    *,
    cascades: int,
    refine: bool = False,
    inverse: bool = False,
    jacobian: bool = False,
) -> int:
    """Estimate the peak memory of `register` in bytes, the process itself included: rather too much than too little.

    Args:
        card: the model's card (its working grid).
        fixed_size, moving_size: voxels along each axis, in any order.
        fixed_spacing_mm: of the fixed image, in the order of `fixed_size`.
        cascades, inverse: as in `register`.
        refine: whether there is instance optimisation.
        jacobian: whether `RegistrationResult.jacobian_determinant` is asked for as well.
    """
    fixed, moving = math.prod(fixed_size), math.prod(moving_size)
    working = working_voxels(card, fixed_size, fixed_spacing_mm)
    peak = BASE + _NATIVE * (fixed + moving) + (_WORKING + _CASCADE * cascades) * working
    if refine:
        peak += _REFINED * working
    if inverse:
        peak += _INVERSE * working
    if jacobian:
        peak += _JACOBIAN_SLABS + _JACOBIAN * fixed
    return int(peak)


def peak_bytes(process: str = "self") -> int | None:
    """Return the most memory that a running process has held.

    `getrusage` is asked only where the system has no /proc: its value begins at the memory of the process that started
    this one.

    Args:
        process: its number, or "self".

    Returns:
        None where it is not known.
    """
    try:
        lines = Path(f"/proc/{process}/status").read_text().splitlines()
    except OSError:  # it has ended, or the system has no /proc
        try:
            import resource
        except ImportError:  # Windows
            return None
        if process != "self":
            return None
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
    high_water = [line for line in lines if line.startswith("VmHWM:")]
    return 1024 * int(high_water[0].split()[1]) if high_water else None


_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3  # of glibc's mallopt


def keep_freed_blocks() -> bool:
    """Let the allocator of this process keep large freed blocks instead of returning them to the system.

    Memory that was returned comes back page by page at a few GB/s, which took up to a quarter of a cascade's time. The
    process's size then stays at its peak, so only programs of our own ask for it (`ldr`, the benchmark); a script
    that registers many pairs may.

    Returns:
        Whether there was something to set: on Linux with glibc.
    """
    if sys.platform != "linux":
        return False
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (OSError, AttributeError):
        return False
    return all([mallopt(_M_MMAP_THRESHOLD, 1 << 30), mallopt(_M_TRIM_THRESHOLD, (1 << 31) - 1)])


def release_freed_blocks() -> bool:
    """Return freed memory to the system, for a process that goes on for hours after `keep_freed_blocks`.

    Blocks of many sizes leave gaps that no later block fits in; without this the process grows with every pair.

    Returns:
        Whether there was something to release: on Linux with glibc.
    """
    if sys.platform != "linux":
        return False
    try:
        return bool(ctypes.CDLL(None).malloc_trim(0))
    except (OSError, AttributeError):
        return False
