"""What only the compiled loops promise; that they give the same values is in test_sampling."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from LDRCore import sampling

pytest.importorskip("numba", reason="needs the package numba (pip install 'LDRCore[fast]')")
from LDRCore.sampling import numba_loops, numba_support

ROOT = Path(__file__).parents[2]


@pytest.fixture(params=[1, 2, 5])
def threads(request):
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield request.param
    torch.set_num_threads(before)


def test_a_failure_in_any_thread_is_the_callers(threads):
    def work(begin: int, end: int) -> None:
        if begin <= 500 < end:
            raise ValueError("row 500")

    with pytest.raises(ValueError, match="row 500"):
        numba_support.share(1000, work)


def test_loops_run_when_the_interpreter_ends():
    """Threads that are no daemons go on after the main thread, but nobody can start others then."""
    code = """
import threading
import torch
from LDRCore.sampling import numba_support
torch.set_num_threads(3)
rows = []
def late():
    threading.main_thread().join()
    numba_support.share(10, lambda begin, end: rows.extend(range(begin, end)))
    print(sorted(rows))
threading.Thread(target=late).start()
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, encoding="utf-8", check=True)
    assert done.stdout == f"{list(range(10))}\n", done.stderr


@pytest.mark.parametrize("count", [0, 1, 2, 7, 1000])
def test_every_row_is_computed_once_whatever_the_threads(threads, count):
    rows: list[int] = []
    numba_support.share(count, lambda begin, end: rows.extend(range(begin, end)))
    assert sorted(rows) == list(range(count))


def test_values_do_not_depend_on_the_number_of_threads(threads):
    torch.manual_seed(0)
    image, displacement = torch.rand(2, 20, 21, 22), 4 * torch.rand(3, 20, 21, 22) - 2
    matrix, to_field = np.diag([1.0, 0.9, 1.1, 1]), np.diag([0.5, 0.5, 0.5, 1])
    coarse = displacement[:, ::2, ::2, ::2].contiguous()

    def values() -> list[torch.Tensor]:
        return [
            numba_loops.displaced(image, displacement, "zeros"),
            numba_loops.displaced(displacement, displacement, "border"),
            numba_loops.at_points(image, displacement.flatten(1) + 5, "border"),
            sampling.on_lattice(image[0], (20, 21, 22), matrix, coarse, to_field),
        ]

    with sampling.forced("numba"):
        several = values()
        torch.set_num_threads(1)
        assert all(torch.equal(a, b) for a, b in zip(several, values(), strict=True))


def test_images_and_displacements_need_not_be_contiguous():
    torch.manual_seed(0)
    image, displacement = torch.rand(2, 8, 9, 10), torch.rand(3, 8, 9, 10)
    expected = numba_loops.displaced(image, displacement, "zeros")
    strided = [t.permute(3, 1, 2, 0).contiguous().permute(3, 1, 2, 0) for t in (image, displacement)]
    assert not any(t.is_contiguous() for t in strided)
    assert torch.equal(numba_loops.displaced(*strided, "zeros"), expected)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: numba_loops.displaced(torch.zeros(1, 4, 4, 4), torch.zeros(3, 4, 4, 5), "zeros"), r"\(3, 4, 4, 4\)"),
        (lambda: numba_loops.displaced(torch.zeros(1, 4, 4, 4), torch.zeros(2, 4, 4, 4), "zeros"), r"\(3, 4, 4, 4\)"),
        (lambda: numba_loops.at_points(torch.zeros(1, 4, 4, 4), torch.zeros(2, 9), "zeros"), r"\(2, 9\)"),
        (lambda: numba_loops.at_points(torch.zeros(4, 4, 4), torch.zeros(3, 9), "zeros"), "float32 tensors of 4 axes"),
        (
            lambda: numba_loops.displaced(torch.zeros(1, 4, 4, 4).double(), torch.zeros(3, 4, 4, 4), "zeros"),
            "got torch.float64",
        ),
    ],
)
def test_what_the_loops_cannot_take_is_refused(call, message):
    """They would read other memory."""
    with pytest.raises(ValueError, match=message):
        call()


def test_images_of_more_voxels_than_the_loops_count_are_torchs():
    class Huge:
        device, dtype = torch.device("cpu"), torch.float32

        @staticmethod
        def numel() -> int:
            return 1 << 31

    with sampling.forced("numba"):
        assert sampling.backend_name(Huge()) == "torch"
        assert sampling.backend_name(torch.zeros(1, 2, 2, 2)) == "numba"
        assert sampling.backend_name(torch.zeros(1, 2, 2, 2, dtype=torch.float64)) == "torch"
