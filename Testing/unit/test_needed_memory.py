"""The estimate of memory, worked out by hand."""

from __future__ import annotations

import subprocess
import sys

import pytest

from LDRCore.cpu import memory

CARD = {"working_grid": {"spacing_mm": 2.0, "margin_mm": 10.0}}


def test_sizes_and_spacings_are_paired_axis_by_axis():
    """Extents of 200, 100 and 400 mm, 10 mm more on each side, every 2 mm: 110 x 60 x 210 voxels to work on."""
    needed = memory.needed_bytes(CARD, (50, 100, 200), (4.0, 1.0, 2.0), (30, 40, 50), cascades=2)
    working, native = 110 * 60 * 210, 50 * 100 * 200 + 30 * 40 * 50
    expected = memory.BASE + memory._NATIVE * native + (memory._WORKING + 2 * memory._CASCADE) * working
    assert needed == pytest.approx(expected, abs=1)


def test_the_order_of_the_axes_does_not_matter():
    there = memory.needed_bytes(CARD, (50, 100, 200), (4.0, 1.0, 2.0), (30, 40, 50), cascades=1)
    back = memory.needed_bytes(CARD, (200, 100, 50), (2.0, 1.0, 4.0), (50, 40, 30), cascades=1)
    assert there == back
    assert memory.needed_bytes(CARD, (50, 100, 200), (2.0, 1.0, 4.0), (30, 40, 50), cascades=1) != there


def test_a_working_grid_has_its_limit():
    """Extents of a metre: 1e9 mm^3 at 2 mm are 125 million voxels, more than is ever worked on."""
    needed = memory.needed_bytes(CARD, (10, 10, 10), (100.0, 100.0, 100.0), (10, 10, 10), cascades=1)
    working = memory.MAX_WORKING_VOXELS
    expected = memory.BASE + memory._NATIVE * 2000 + (memory._WORKING + memory._CASCADE) * working
    assert needed == pytest.approx(expected, abs=1)


@pytest.mark.skipif(sys.platform != "linux", reason="other systems tell it otherwise")
def test_the_peak_of_a_process_is_its_own():
    """Not that of the (large) process that started it, which `getrusage` tells."""
    held = bytearray(300_000_000)
    held[::4096] = b"x" * len(held[::4096])
    code = "from LDRCore.cpu import memory; a = bytearray(50_000_000); print(memory.peak_bytes())"
    told = subprocess.run([sys.executable, "-c", code], capture_output=True, encoding="utf-8", check=True)
    assert 50e6 < int(told.stdout) < 200e6
    assert memory.peak_bytes() > 300e6
    assert memory.peak_bytes("none") is None
