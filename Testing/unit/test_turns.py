"""Threads that share out steps in compiled code compute every row once, and no step before the one it reads."""

from __future__ import annotations

import threading

import numpy as np
import pytest
import torch

turns = pytest.importorskip("LDRCore.turns", reason="needs the package numba (pip install 'LDRCore[fast]')")
compiling = pytest.importorskip("LDRCore.compiling")
if not compiling.has("sse2"):
    pytest.skip("needs a processor of the x86 family", allow_module_level=True)


@compiling.loop
def count(values, shared, own):
    """Row r of step s becomes one more than the smallest of the step before."""
    for s in range(1, len(values)):
        rows = values.shape[1]
        if turns.is_done(shared, s, rows):
            continue
        while True:
            begin, end = turns.next_piece(shared, s, rows, own)
            if begin == end:
                break
            for r in range(begin, end):
                values[s, r] += values[s - 1].min() + 1
            turns.finish(shared, s, end - begin)
        if not turns.wait(shared, s, rows):
            return False
    return True


@pytest.fixture
def threads(request):
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield request.param
    torch.set_num_threads(before)


@pytest.mark.parametrize("threads", [1, 2, 5], indirect=True)
@pytest.mark.parametrize("rows", [1, 3, 1000])
def test_every_row_of_every_step_once(threads, rows):
    for _ in range(20):
        values = np.zeros((12, rows), np.int64)
        turns.take_turns(len(values), lambda shared, own, values=values: count(values, shared, own))
        assert np.array_equal(values, np.broadcast_to(np.arange(12)[:, None], values.shape))


@pytest.mark.parametrize("threads", [3], indirect=True)
def test_nobody_waits_for_threads_that_have_not_begun(threads):
    busy = threading.Event()
    held = [compiling._pool(threads).submit(busy.wait, 60) for _ in range(threads - 1)]
    try:
        values = np.zeros((5, 100), np.int64)
        turns.take_turns(len(values), lambda shared, own: count(values, shared, own))
        assert (values[-1] == 4).all()
    finally:
        busy.set()
        for one in held:
            one.result()


@pytest.mark.parametrize("threads", [2], indirect=True)
def test_a_thread_that_takes_long_is_waited_for(threads):
    """`wait` gives up after a while, and the work is called again."""
    rows, calls, taken = 4, [], threading.Event()

    def work(shared, own):
        if own:  # takes a piece, and needs its time
            begin, end = take(shared, own)
            taken.set()
            for _ in range(100):
                if len(calls) > 2:
                    break
                threading.Event().wait(0.05)
            done(shared, end - begin)
            return True
        assert taken.wait(60)
        calls.append(own)
        return drain(shared)

    take = compiling.loop(lambda shared, own: turns.next_piece(shared, 0, rows, own))
    done = compiling.loop(lambda shared, rows: turns.finish(shared, 0, rows))

    @compiling.loop
    def drain(shared):
        while True:
            begin, end = turns.next_piece(shared, 0, rows, 0)
            if begin == end:
                break
            turns.finish(shared, 0, end - begin)
        return turns.wait(shared, 0, rows)

    turns.take_turns(1, work)
    assert len(calls) > 2
