"""How loops are compiled with numba and shared out between threads.

Importing this file imports numba; `numba_check` decides whether. The loops release the interpreter and run on as many
threads as torch may use; numba's own threads are never started.
"""

from __future__ import annotations

import contextlib
import functools
import pickle
import tempfile
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numba
import numpy as np
import torch

_CHUNKS = 4  # of the work for each thread, so that none waits long for another
_FASTMATH = {"contract", "reassoc", "nsz", "arcp"}  # no promise that every number is finite
_MOST_LOOPS = 10  # that call each other
_TEST_BYTES = 1 << 20  # that must fit into the cache folder


@functools.lru_cache(maxsize=1)
def _can_cache() -> bool:
    """Whether compiled code can be kept on disk: a folder that can be written and is not full."""

    def nothing() -> None:
        """Never called."""

    try:
        folder = Path(str(numba.njit(cache=True)(nothing).stats.cache_path))
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder) as file:
            file.write(bytes(_TEST_BYTES))
    except (RuntimeError, OSError, AttributeError):  # the last where the compiler is switched off
        return False
    return True


def loop(function: Callable[..., Any]) -> Any:
    """Compile a function at its first call for its arguments' types; keep the result on disk where that is possible."""
    return numba.njit(nogil=True, fastmath=_FASTMATH, cache=_can_cache())(function)


def inline(function: Callable[..., Any]) -> Callable[..., Any]:
    """Compile a function into those that call it."""
    return numba.njit(inline="always", fastmath=_FASTMATH)(function)


def array(tensor: torch.Tensor, ndim: int) -> np.ndarray:
    """Return a CPU tensor as the loops take it: C-contiguous float32, not copied where it is.

    Raises:
        ValueError: another number of axes, another type, another device.
    """
    if tensor.ndim != ndim or tensor.dtype != torch.float32 or tensor.device.type != "cpu":
        raise ValueError(
            f"compiled loops take float32 tensors of {ndim} axes on the CPU, "
            f"got {tensor.dtype} of shape {tuple(tensor.shape)} on {tensor.device}"
        )
    return tensor.detach().contiguous().numpy()


def share(count: int, work: Callable[[int, int], Any]) -> None:
    """Call work(begin, end) for all of 0 ... count, in chunks, on as many threads as torch may use.

    An exception in any thread ends the others after their chunk and is raised here.
    """
    threads = torch.get_num_threads()
    if threads == 1:
        _run(work, 0, count)
        return
    step = max(1, -(-count // (threads * _CHUNKS)))
    starts = list(range(0, count, step))

    def take_chunks() -> None:
        try:
            while True:
                try:
                    begin = starts.pop()
                except IndexError:
                    return
                _run(work, begin, min(begin + step, count))
        except BaseException:
            starts.clear()
            raise

    helpers: list[Future[None]] = []
    with contextlib.suppress(RuntimeError):  # the interpreter is ending, and lets no more threads begin
        for _ in range(threads - 1):
            helpers.append(_pool(threads).submit(take_chunks))
    try:
        take_chunks()
    finally:
        for helper in helpers:  # one that has not begun never will
            if not helper.cancel():
                helper.result()


def _run(work: Callable[[int, int], Any], begin: int, end: int) -> None:
    """Call work(begin, end), again where numba could not save what it had just compiled, or read what it had saved.

    That is a disk that became full, or files that were cut off. Each call then comes at least one loop further, before
    any of them has run.
    """
    for _ in range(_MOST_LOOPS):
        try:
            return work(begin, end)
        except OSError:
            continue
        except (EOFError, pickle.UnpicklingError):
            _remove_saved_code()
    work(begin, end)


def _remove_saved_code() -> None:
    """Have every loop that is not loaded yet compiled anew."""
    for file in Path(str(_test_loop.stats.cache_path)).glob("numba_*.nb[ci]"):
        with contextlib.suppress(OSError):
            file.unlink()


@functools.lru_cache(maxsize=4)
def _pool(threads: int) -> ThreadPoolExecutor:
    return ThreadPoolExecutor(threads - 1, thread_name_prefix="ldr-loops")


def self_test() -> None:
    """Compile and run a small loop.

    Raises:
        RuntimeError: numba cannot be used here; the message says why.
    """
    if getattr(numba.config, "DISABLE_JIT", 0):
        raise RuntimeError("its compiler is switched off by NUMBA_DISABLE_JIT")
    means = np.zeros(5, np.float32)
    share(5, lambda begin, end: _test_loop(np.arange(6, dtype=np.float32), means, begin, end))
    if means.tolist() != [0.5, 1.5, 2.5, 3.5, 4.5]:
        raise RuntimeError(f"a test loop computed {means.tolist()}")


@loop
def _test_loop(values, out, begin, end):  # type: ignore[no-untyped-def]
    """Write the means of neighbours."""
    for n in range(begin, end):
        out[n] = np.float32(0.5) * (values[n] + values[n + 1])
