"""Pairs that cannot be registered: the verdict says so, with the reason, and nothing pretends."""

from __future__ import annotations

import numpy as np
import pytest
import SimpleITK as sitk

import LDRCore


def verdict(fixed, moving, **options) -> tuple[str, str]:
    """Word and reasons of the verdict on a pair, registered as any images."""
    found = LDRCore.register(fixed, moving, model="any", **options).report["verdict"]
    return found["verdict"], "; ".join(found["reasons"])


@pytest.fixture(scope="module")
def head(demo_pair) -> sitk.Image:
    """The demo pair's fixed brain with axes along the patient's, 3 mm."""
    image = sitk.ReadImage(demo_pair["fixed"])
    size = [int(n * s / 3) for n, s in zip(image.GetSize(), image.GetSpacing(), strict=True)]
    return sitk.Resample(
        image, size, sitk.Transform(), sitk.sitkLinear, image.GetOrigin(), (3.0,) * 3, image.GetDirection()
    )


@pytest.fixture(scope="module")
def finger() -> sitk.Image:
    """A cylinder of 18 mm with a brighter bone, 1 mm."""
    k, j, i = np.meshgrid(*[np.arange(n) for n in (60, 24, 24)], indexing="ij")
    radius = np.hypot(j - 12, i - 12)
    values = np.where(radius < 9, 300 + 30 * np.sin(k / 3), 0) * ((k > 5) & (k < 55))
    return sitk.GetImageFromArray(np.where((radius < 4) & (values > 0), 600, values).astype(np.int16))


@pytest.mark.parametrize("head_is", ["fixed", "moving"])
def test_a_finger_is_no_head(head, finger, head_is):
    pair = (head, finger) if head_is == "fixed" else (finger, head)
    word, reasons = verdict(*pair)
    assert word == "failed"
    assert "hardly better than shifted ones" in reasons or "of the fixed content meets the moving image" in reasons


def test_noise_has_nothing_in_common_with_a_head(head):
    values = np.random.default_rng(0).integers(0, 900, (40, 44, 30)).astype(np.int16)
    noise = sitk.GetImageFromArray(values)
    noise.SetSpacing((3.0, 3.0, 3.0))
    assert verdict(head, noise)[0] == "failed"


def test_two_slices_in_common_are_not_enough(head):
    """The halves of one head, apart but for two slices of 3 mm."""
    depth = head.GetSize()[2]
    lower, upper = head[:, :, : depth // 2 + 1], head[:, :, depth // 2 - 1 :]
    word, reasons = verdict(lower, upper)
    assert word == "failed", reasons


def test_two_slices_are_refused(head):
    with pytest.raises(
        LDRCore.RegistrationError, match=r"at least 4 voxels along every axis, got size \(\d+, \d+, 2\)"
    ):
        verdict(head[:, :, 20:22], head)


def test_a_mask_on_one_side_alone_is_no_obstacle(demo_pair):
    labels = sitk.ReadImage(demo_pair["fixed_labels"])
    word, reasons = verdict(demo_pair["fixed"], demo_pair["moving"], fixed_mask=labels > 0)
    assert word == "trust", reasons
