"""Dice by hand and against SimpleITK."""

from __future__ import annotations

import numpy as np
import pytest
import SimpleITK as sitk

from LDRCore import metrics


def test_dice_by_hand():
    truth = np.array([[0, 1, 1, 2], [2, 2, 0, 3]])
    found = np.array([[0, 1, 2, 2], [2, 0, 0, 0]])
    assert metrics.dice_per_label(found, truth) == pytest.approx({1: 2 / 3, 2: 4 / 6, 3: 0.0})
    assert metrics.mean_dice(found, truth) == pytest.approx((2 / 3 + 4 / 6) / 3)


def test_dice_is_simpleitks():
    rng = np.random.default_rng(0)
    truth, found = rng.integers(0, 5, (2, 8, 9, 10)).astype(np.uint8)
    oracle = sitk.LabelOverlapMeasuresImageFilter()
    oracle.Execute(sitk.GetImageFromArray(truth), sitk.GetImageFromArray(found))
    for label, value in metrics.dice_per_label(found, truth).items():
        assert value == pytest.approx(oracle.GetDiceCoefficient(label), abs=1e-6)


def test_labels_that_only_the_found_map_holds_do_not_count():
    assert metrics.dice_per_label(np.array([7, 7]), np.array([0, 1])) == {1: 0.0}
    assert np.isnan(metrics.mean_dice(np.array([1, 1]), np.array([0, 0])))


def test_different_shapes_are_refused():
    with pytest.raises(ValueError, match=r"one shape, got \(2,\) and \(3,\)"):
        metrics.mean_dice(np.zeros(2), np.zeros(3))
