"""The estimate of memory, worked out by hand."""

from __future__ import annotations

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
