"""What only the compiled loops promise; that they give the same values is in test_sampling."""

from __future__ import annotations

import subprocess
import sys

import numpy as np
import pytest
import torch

from LDRCore import sampling

kernels = pytest.importorskip("LDRCore.kernels", reason="needs the package numba (pip install 'LDRCore[fast]')")
compiling = pytest.importorskip("LDRCore.compiling")


@pytest.mark.parametrize("padding", ["zeros", "border", "half"])
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf"), 1e30])
def test_no_coordinate_reads_outside_of_the_image(padding, bad):
    image = torch.ones(1, 5, 6, 7)
    for axis in range(3):
        points = torch.full((3, 1000), 2.0)
        points[axis] = bad
        found = kernels.at_points(image, points, padding)
        assert found.shape == (1, 1000)
        assert bad != bad or set(found.unique().tolist()) <= {0.0, 1.0}


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf"), 1e30])
def test_nor_does_an_image_in_bytes(bad):
    puller = sampling.Puller(torch.ones(8, 6, 10), torch.bfloat16)
    for axis in range(3):
        displacement = torch.zeros(3, 4, 3, 5)
        displacement[axis] = bad
        for dtype in (torch.float32, torch.bfloat16):
            out = torch.empty(8, 6, 10, dtype=dtype)
            puller.write(displacement, out)
            assert set(out.unique().tolist()) == {0.0}


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf"), 1e30])
def test_nor_does_a_composition(bad):
    first = torch.arange(3.0).view(3, 1, 1, 1).expand(3, 5, 6, 7).contiguous()
    for axis in range(3):
        second = torch.zeros(3, 5, 6, 7)
        second[axis] = bad
        found = kernels.composed(first, second)
        others = [c for c in range(3) if c != axis]
        assert torch.equal(found[others], first[others])


def test_a_row_is_stretched_alike_by_permuting_vectors_and_one_by_one(monkeypatch):
    """Coarse fields go through permutations of vectors, finer ones than the lattice cannot."""
    torch.manual_seed(0)
    image = torch.rand(9, 10, 60)
    for width, field_width in ((60, 30), (60, 60), (60, 150), (7, 3), (33, 2), (40, 1)):
        field = torch.rand(3, 5, 6, field_width) * 4 - 2
        ratio = (field_width - 1) / (width - 1)
        to_field = np.diag([0.5, 0.5, ratio, 1.0])
        lattice = image[..., :width].contiguous()
        found = sampling.on_lattice(lattice, lattice.shape, np.eye(4), field, to_field)
        with monkeypatch.context() as plain:
            plain.setattr(sampling, "COMPILED", False)
            expected = sampling.on_lattice(lattice, lattice.shape, np.eye(4), field, to_field)
        assert float((found - expected).abs().max()) < 2e-4


def test_a_failure_in_any_thread_is_the_callers():
    def work(begin: int, end: int) -> None:
        if begin <= 500 < end:
            raise ValueError("row 500")

    with pytest.raises(ValueError, match="row 500"):
        compiling.share(1000, work)


def test_every_row_is_done_once_whatever_the_threads():
    before = torch.get_num_threads()
    try:
        for threads in (1, 2, 5):
            torch.set_num_threads(threads)
            for count in (1, 2, 7, 1000):
                seen = []
                compiling.share(count, lambda begin, end, seen=seen: seen.extend(range(begin, end)))
                assert sorted(seen) == list(range(count))
    finally:
        torch.set_num_threads(before)


def test_the_environment_forbids_them_and_nothing_imports_numba():
    code = "import sys; from LDRCore import sampling; print(sampling.compiled(), 'numba' in sys.modules)"
    for value, expected in (("0", "None False"), ("1", "True")):
        done = subprocess.run(
            [sys.executable, "-c", code], capture_output=True, text=True, check=True, env=_environment(value)
        )
        assert done.stdout.strip().endswith(expected)


def test_without_numba_sampling_goes_on(monkeypatch):
    monkeypatch.setitem(sys.modules, "LDRCore.kernels", None)
    monkeypatch.delattr("LDRCore.kernels")
    sampling._kernels.cache_clear()
    try:
        assert sampling.compiled() is None
        assert float(sampling.at_points(torch.ones(1, 5, 6, 7), torch.full((3, 9), 2.0)).min()) == 1
    finally:
        sampling._kernels.cache_clear()


def _environment(value: str) -> dict[str, str]:
    import os

    return {**os.environ, sampling.VARIABLE: value}


def test_values_and_what_lies_outside_are_kept_exactly():
    image = torch.full((1, 4, 4, 4), 16_000_001.0)
    points = torch.tensor([[1.0, 2, 3], [9, 9, 9]]).T.contiguous()
    assert kernels.at_points(image, points, "half").tolist() == [[16_000_001.0, 0.0]]
    lattice = kernels.Lattice(image[0], np.diag([1, 1, 3, 1.0]), padding="half", outside=-16_000_001.0)
    found = torch.empty(1, 1, 3)
    lattice.write(0, found)
    assert found[0, 0].tolist() == [16_000_001.0, 16_000_001.0, -16_000_001.0]
