"""How loops are compiled with numba, and shared out between threads. Nothing here is needed: see `kernels`.

Importing this file imports numba. The loops release the interpreter and run on as many threads as torch may use;
numba's own threads are never started.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numba
import numpy as np
import torch
from llvmlite import binding
from numba.core import types
from numba.extending import intrinsic


def has(feature: str) -> bool:
    """Whether code is compiled for a processor with this feature, by LLVM's name."""
    chosen = getattr(numba.config, "CPU_FEATURES", None)  # by NUMBA_CPU_FEATURES
    if chosen is not None:
        return f"+{feature}" in chosen.split(",")
    return bool(binding.get_host_cpu_features().get(feature))


LANES = 16 if has("avx512f") else 8  # float32 numbers in the vectors of loops that are written with such
_PIECES = 4  # of the work for each thread, so that none waits long for another
_FAST = {"contract", "reassoc", "nsz", "arcp"}  # no promise that every number is finite


def loop(function: Callable[..., Any]) -> Callable[..., Any]:
    """Compile a function at its first call for its arguments' types, and keep the result on disk."""
    try:
        return numba.njit(nogil=True, fastmath=_FAST, cache=True)(function)
    except RuntimeError:  # no folder that compiled code could be kept in
        return numba.njit(nogil=True, fastmath=_FAST)(function)


def inline(function: Callable[..., Any]) -> Callable[..., Any]:
    """Compile a function into those that call it."""
    return numba.njit(inline="always", fastmath=_FAST)(function)


def array(tensor: torch.Tensor) -> np.ndarray:
    """A tensor on the CPU as the loops take it: C-contiguous, not copied where it is."""
    return tensor.detach().contiguous().numpy()


def share(count: int, work: Callable[[int, int], Any]) -> None:
    """work(begin, end) for all of 0 ... count, in pieces on as many threads as torch may use."""
    threads = torch.get_num_threads()
    if threads == 1:
        work(0, count)
        return
    step = max(1, -(-count // (threads * _PIECES)))
    starts = list(range(0, count, step))

    def some() -> None:
        while True:
            try:
                begin = starts.pop()
            except IndexError:
                return
            work(begin, min(begin + step, count))

    together([some] * threads)


def together(works: Sequence[Callable[[], Any]]) -> None:
    """Call the first one here and the others on other threads; those that have not begun when it ends never will."""
    helpers = [_pool(len(works)).submit(work) for work in works[1:]]
    try:
        works[0]()
    finally:
        for helper in helpers:
            if not helper.cancel():
                helper.result()


@functools.lru_cache(maxsize=4)
def _pool(threads: int) -> ThreadPoolExecutor:
    return ThreadPoolExecutor(threads - 1, thread_name_prefix="ldr-loops")


def _prefer_wide(typing: Any) -> Any:
    """Have LLVM use vectors of LANES numbers in the function that this is called in, where it prefers shorter ones."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        set.add(builder.function.attributes, f'"prefer-vector-width"="{32 * LANES}"')
        return context.get_dummy_value()

    return types.void(), generate


wide: Any = intrinsic(_prefer_wide)
