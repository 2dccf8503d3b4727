"""A pair after a non-linear initial transform: what its masks exclude, and its scanner coordinates."""

from __future__ import annotations

import numpy as np
import pytest
import SimpleITK as sitk
import torch

from LDRCore.pipeline.inputs import Inputs, Pair, prepare_pair
from Testing import known_map
from Testing.known_map import CENTRE, SHIFT, Lattice

CARD = {"working_grid": {"spacing_mm": 4.0, "stem_spacing_mm": 8.0}}
FIXED = Lattice((40, 50, 42), (4.5, 4.0, 5.0), np.eye(3), CENTRE)
MOVING = Lattice((44, 46, 40), (4.0, 4.5, 5.5), known_map.rotation((5.0, -8.0, 3.0)), CENTRE + SHIFT)


def nonlinear() -> sitk.Transform:
    """The known map, as SimpleITK has it, on the fixed grid."""
    field = known_map.map_points(FIXED.points()) - FIXED.points()
    return sitk.DisplacementFieldTransform(FIXED.image(field))


def mask() -> np.ndarray:
    """(k, j, i): the half of the moving head on one side of an oblique plane."""
    return (MOVING.points() - CENTRE - SHIFT) @ np.array([0.9, 0.3, -0.2]) > 5


def prepare(moving_values: np.ndarray, moving_mask: np.ndarray | None, initial: sitk.Transform | None) -> Pair:
    fixed = FIXED.image(known_map.intensity(known_map.map_points(FIXED.points())).astype(np.float32))
    moving = MOVING.image(moving_values.astype(np.float32))
    return prepare_pair(Inputs(fixed, moving, None, moving_mask), initial, CARD, "cpu")


def clean_and_dirty() -> tuple[np.ndarray, np.ndarray]:
    """The moving head, and the same with noise outside the mask."""
    clean = known_map.intensity(MOVING.points())
    noise = np.random.default_rng(0).uniform(-500, 3000, clean.shape)
    return clean, np.where(mask(), clean, noise)


@pytest.mark.parametrize("initial", [None, nonlinear()], ids=["scanner", "nonlinear"])
def test_nothing_outside_the_moving_mask_is_seen(initial):
    """Not even by interpolation at the mask's edge, where the moving image is resampled through the transform."""
    pairs = [prepare(values, mask(), initial) for values in clean_and_dirty()]
    for name in ("fine", "coarse"):
        clean, dirty = (getattr(pair.moving, name).data for pair in pairs)
        assert float(clean.max()) == 1
        assert torch.equal(clean, dirty)
    assert pairs[0].moving.centroid_lps == pytest.approx(pairs[1].moving.centroid_lps)
    assert torch.equal(pairs[0].moving_as_scanned.data, pairs[1].moving_as_scanned.data)
    unmasked = prepare(clean_and_dirty()[1], None, initial)
    assert not torch.allclose(unmasked.moving.fine.data, pairs[0].moving.fine.data, atol=0.1)


def test_the_moving_image_behind_a_nonlinear_transform_lies_on_the_fixed_grid():
    """The whole head is mapped onto the fixed head, half a head onto its half."""
    values = clean_and_dirty()[0]
    pair = prepare(values, None, nonlinear())
    assert np.allclose(pair.moving.native.to_lps, pair.fixed.native.to_lps)
    inner = (0, 0, slice(2, -2), slice(2, -2), slice(2, -2))
    both = [image.fine.data[inner].flatten() for image in (pair.fixed, pair.moving)]
    assert np.corrcoef(*both)[0, 1] > 0.97
    half = prepare(values, mask(), nonlinear())
    content = half.moving.fine.data[0, 0].numpy() > 0.3
    points = FIXED.points()[content[: FIXED.size[2], : FIXED.size[1], : FIXED.size[0]]]
    sides = (known_map.map_points(points) - CENTRE - SHIFT) @ np.array([0.9, 0.3, -0.2])
    assert len(points) > 3000
    assert sides.min() > 5 - 8  # mm: half a voxel of either grid


def test_where_the_scanner_put_the_moving_image_is_kept():
    values = clean_and_dirty()[0]
    scanned, resampled = prepare(values, None, None), prepare(values, None, nonlinear())
    assert torch.equal(resampled.moving_as_scanned.data, scanned.moving.coarse.data)
    assert np.array_equal(resampled.moving_as_scanned.to_lps, scanned.moving.coarse.to_lps)
