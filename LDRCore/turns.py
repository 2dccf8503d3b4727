"""How threads share out a task of several steps in compiled code, without the interpreter between the steps.

Each thread runs the same loop over the steps: it takes pieces (`next_piece`) until none are left, and goes on when all
are done (`wait`). No thread is waited for that has not begun, so a busy machine makes it slower but never stops it.
For processors of the x86 family; importing this file imports numba.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from llvmlite import ir
from numba.core import cgutils, types
from numba.extending import intrinsic

from LDRCore import compiling

_LINE = 8  # numbers of a cache line: threads that count beside each other shall not wait for each other
_PART = 4  # the fourth part of the rows left in a range is taken at once; in the end they are taken one by one
_SPINS = 4096  # a fifth of a millisecond


def take_turns(steps: int, work: Callable[[np.ndarray, int], bool]) -> None:
    """work(turns, own) on as many threads as torch may use, until each says that all is done.

    Args:
        steps: their number.
        work: given what the functions below take, and the number of its thread.
    """
    threads = torch.get_num_threads()
    # of each step's rows: taken so far, of the range of each thread; then done so far
    turns = np.zeros((steps, threads + 1, _LINE), np.int64)

    def of(own: int) -> Callable[[], None]:
        def until_done() -> None:
            while not work(turns, own):
                time.sleep(0)  # let those run that have pieces to finish

        return until_done

    compiling.together([of(own) for own in range(threads)])


def _atomic(change: bool) -> Any:
    """A function that reads a number that other threads change, and with `change` adds to it at once."""

    def access(typing, turns, step, part, amount):  # type: ignore[no-untyped-def]
        def generate(context, builder, signature, arguments):  # type: ignore[no-untyped-def]
            array = context.make_array(signature.args[0])(context, builder, arguments[0])
            row = builder.mul(arguments[1], builder.extract_value(array.shape, 1))
            place = builder.mul(builder.add(row, arguments[2]), ir.Constant(ir.IntType(64), _LINE))
            place = builder.gep(array.data, [place])
            if change:
                return builder.atomic_rmw("add", place, arguments[3], "seq_cst")
            return builder.load_atomic(place, "acquire", 8)

        return types.int64(turns, types.int64, types.int64, types.int64), generate

    return intrinsic(access)


def _rest(typing: Any) -> Any:
    """Let the processor's other thread go first."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        kind = ir.FunctionType(ir.VoidType(), [])
        builder.call(cgutils.get_or_insert_function(builder.module, kind, "llvm.x86.sse2.pause"), [])
        return context.get_dummy_value()

    return types.void(), generate


_add, _read = _atomic(True), _atomic(False)
_pause: Any = intrinsic(_rest)


@compiling.inline
def next_piece(turns, step, rows, own):  # type: ignore[no-untyped-def]
    """(begin, end) of the rows of a step that thread `own` computes next; equal if none are left."""
    threads = turns.shape[1] - 1
    for n in range(threads):
        part = (own + n) % threads
        first, last = rows * part // threads, rows * (part + 1) // threads
        left = last - first - _read(turns, step, part, 0)
        if left > 0:
            size = max(1, left // _PART)
            begin = first + _add(turns, step, part, size)
            if begin < last:
                return begin, min(begin + size, last)
    return 0, 0


@compiling.inline
def finish(turns, step, count):  # type: ignore[no-untyped-def]
    """Say that so many rows of a step are done."""
    _add(turns, step, turns.shape[1] - 1, count)


@compiling.inline
def is_done(turns, step, rows):  # type: ignore[no-untyped-def]
    """Whether all rows of a step are."""
    return _read(turns, step, turns.shape[1] - 1, 0) >= rows


@compiling.inline
def wait(turns, step, rows):  # type: ignore[no-untyped-def]
    """The same, after a while at most."""
    for _ in range(_SPINS):
        if is_done(turns, step, rows):
            return True
        _pause()
    return False
