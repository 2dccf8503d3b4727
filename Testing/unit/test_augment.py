"""Augmentation and views: worked out by hand, and image, labels and points under one deformation."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch

from LDRCore.pipeline import preprocess
from LDRCore.transforms import spatial
from Training.data import augmentation, throughput
from Training.data.scan_set import Scan
from Training.data.subject_views import (
    Subject,
    foreground_centre,
    grid_matrix,
    make_subject,
    make_subjects,
    make_view,
    random_pose,
    sample_image,
)

DEVICES = ["cpu", *(["cuda"] if torch.cuda.is_available() else [])]


class Extremes:
    """Stands in for a generator: every uniform draw is one of its two ends."""

    def __init__(self, seed: int) -> None:
        self.rng = np.random.default_rng(seed)

    def uniform(self, low, high, shape):
        return np.where(self.rng.random(shape) < 0.5, low, high)


def head(spacing_mm: float = 2.0) -> Scan:
    """A bright brain of two labels in a dimmer head that reaches the lowest slice, and one landmark."""
    k, j, i = np.indices((24, 26, 22))
    radius = np.sqrt(((k - 14) / 7) ** 2 + ((j - 13) / 8) ** 2 + ((i - 11) / 6) ** 2)
    labels = np.where(radius < 1, np.where(i < 11, 3, 5), 0).astype(np.uint8)
    image = np.where(radius < 1, 200, np.where((abs(j - 13) < 11) & (abs(i - 11) < 9) & (k < 22), 100, 0))
    return Scan("head", image.astype(np.uint8), labels, np.array([[14.0, 13, 11]]), spacing_mm, np.eye(4))


# free-form deformation


def test_spline_weights_by_hand():
    # 4 voxels over 5 points: centres lie half-way between points, where the weights are 1, 23, 23, 1 of 48
    wanted = np.zeros((4, 7))
    for row in range(4):
        wanted[row, row : row + 4] = np.array([1, 23, 23, 1]) / 48
    np.testing.assert_allclose(augmentation.spline_basis(4, 5), wanted, atol=1e-12)
    basis = augmentation.spline_basis(19, 5)
    np.testing.assert_allclose(basis.sum(1), 1)
    np.testing.assert_allclose(basis @ np.arange(-1, 6), (np.arange(19) + 0.5) * 4 / 19)  # reproduces straight lines


def test_a_free_form_field_by_hand():
    shape, rng = (12, 8, 16), np.random.default_rng(4)
    field = augmentation.free_form(rng, shape, control=3, amplitude=0.3)
    moves = 0.3 * np.random.default_rng(4).uniform(-1, 1, (1, 3, 3, 3, 3))[0] ** 3
    assert field.shape == (1, 3, *shape)
    total = 0.0
    weights = [augmentation.spline_basis(n, 3)[at] for n, at in zip(shape, (2, 6, 9), strict=True)]
    for a in range(3):
        for b in range(3):
            for c in range(3):  # the points beyond the edge rest, so they add nothing
                total += weights[0][a + 1] * weights[1][b + 1] * weights[2][c + 1] * moves[1, a, b, c]
    assert float(field[0, 1, 2, 6, 9]) == pytest.approx(total * 8 / 2, abs=1e-6)


@pytest.mark.parametrize("device", DEVICES)
def test_a_free_form_field_is_the_same_for_the_same_seed(device):
    one, same, other = (
        augmentation.free_form(np.random.default_rng(s), (16, 20, 18), device=device) for s in (1, 1, 2)
    )
    assert one.device.type == device
    assert torch.equal(one, same)
    assert not torch.allclose(one, other)
    assert (one.abs().amax(dim=(0, 2, 3, 4)).cpu() < 0.4 * torch.tensor([4.0, 5.0, 4.5])).all()
    assert one.abs().max() > 0.1
    assert torch.equal(
        augmentation.free_form(np.random.default_rng(1), (8, 8, 8), amplitude=0), torch.zeros(1, 3, 8, 8, 8)
    )


@pytest.mark.parametrize("seed", range(5))
def test_even_the_largest_moves_do_not_fold(seed):
    field = augmentation.free_form(Extremes(seed), (40, 32, 48))
    assert field.abs().max() > 3
    assert spatial.folding_count(field) == 0


def test_a_free_form_field_needs_two_points():
    with pytest.raises(ValueError, match="control must be at least 2, got 1"):
        augmentation.free_form(np.random.default_rng(0), (8, 8, 8), control=1)


def test_points_follow_the_image():
    field = augmentation.free_form(Extremes(3), (32, 36, 28))
    points = np.array([[10.0, 20, 9], [20, 12, 17], [16, 18, 14], [np.nan, np.nan, np.nan]])
    grid = spatial.identity_grid((32, 36, 28))
    moved = augmentation.move_points(points, field)
    assert np.isnan(moved[3]).all()
    for before, after in zip(points[:3], moved[:3], strict=True):
        squared = (grid - torch.from_numpy(before).float().view(1, 3, 1, 1, 1)).square().sum(1, keepdim=True)
        warped = spatial.warp((-squared / 2).exp(), field)[0, 0]
        brightest = np.unravel_index(int(warped.argmax()), warped.shape)
        assert np.abs(np.array(brightest) - after).max() < 0.8
        at = torch.from_numpy(after).float().view(1, 3, 1, 1, 1)
        np.testing.assert_allclose(after + spatial.sample(field, at).flatten().numpy(), before, atol=1e-3)
        assert np.abs(after - before).max() > 0.5


# intensity


def test_blur_by_hand():
    spot = torch.zeros(1, 1, 21, 21, 21)
    spot[0, 0, 10, 10, 10] = 1
    done = augmentation.blur(spot, (1.5, 0.0, 0.8))[0, 0]
    assert float(done.sum()) == pytest.approx(1, abs=1e-5)
    offset = torch.arange(21) - 10.0
    for axis, sigma in ((0, 1.5), (2, 0.8)):
        line = done.sum(dim=[a for a in range(3) if a != axis])
        assert float((line * offset**2).sum()) ** 0.5 == pytest.approx(sigma, rel=0.01)
    assert torch.equal(done[:, [*range(10), *range(11, 21)]], torch.zeros(21, 20, 21))
    flat = torch.full((1, 1, 6, 7, 8), 0.3)
    torch.testing.assert_close(augmentation.blur(flat, (2.0, 3.0, 9.0)), flat)


def test_a_bias_field_is_joined_linearly():
    field = augmentation.bias_field(np.random.default_rng(5), (7, 4, 4), 0.2, "cpu")
    knots = np.random.default_rng(5).normal(0, 0.2, (4, 4, 4))
    np.testing.assert_allclose(field[0, 0, ::2].numpy(), np.exp(knots), rtol=1e-5)
    assert float(field[0, 0, 1, 2, 3].log()) == pytest.approx((knots[0, 2, 3] + knots[1, 2, 3]) / 2, rel=1e-4)


@pytest.mark.parametrize("device", DEVICES)
def test_intensity_keeps_range_and_background(device):
    image = torch.rand(1, 1, 12, 14, 10, generator=torch.Generator().manual_seed(0)).to(device)
    image[:, :, :, :5] = 0
    augmented = [augmentation.intensity(image, np.random.default_rng(k)) for k in range(12)]
    assert all(x.min() >= 0 and x.max() <= 1 and x.device == image.device for x in augmented)
    assert all(bool((x[:, :, :, :5] == 0).all()) for x in augmented)
    assert torch.equal(augmented[0], augmentation.intensity(image, np.random.default_rng(0)))
    assert all(float((a - b).abs().max()) > 0.01 for a, b in itertools.pairwise(augmented))
    correlation = [np.corrcoef(x.cpu().flatten(), image.cpu().flatten())[0, 1] for x in augmented]
    assert min(correlation) > 0.7


# views


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("pool", [1, 2])
def test_a_subject_of_a_scan(device, pool):
    scan = head()
    subject = make_subject(scan, pool=pool, device=device)
    assert subject.spacing_mm == 2.0 * pool
    assert subject.image.shape == tuple(n // pool for n in scan.shape)
    if pool == 1:
        np.testing.assert_array_equal(subject.labels.cpu(), scan.labels)
        np.testing.assert_array_equal(subject.brain.cpu(), scan.labels > 0)
        grown = int(subject.grown.sum())
        assert grown > int(subject.brain.sum())
        assert bool(subject.grown[subject.brain].all())
    else:
        assert subject.labels is None
        assert float(subject.image[7, 6, 5]) == scan.image[14:16, 12:14, 10:12].mean()
    assert [s.spacing_mm for s in make_subjects([scan, scan], pool=pool, device=device)] == [2.0 * pool] * 2


def test_growing_adds_one_voxel():
    brain = torch.zeros(7, 7, 7, dtype=torch.bool)
    brain[3, 3, 3] = True
    grown = Subject(None, brain, None, None, 1.0).grown
    assert grown.nonzero().tolist() == [[a, b, c] for a in (2, 3, 4) for b in (2, 3, 4) for c in (2, 3, 4)]


def test_the_foreground_centre_is_the_mean_of_its_voxels():
    volume = torch.rand(9, 8, 7, generator=torch.Generator().manual_seed(1)) * 0.3
    np.testing.assert_allclose(foreground_centre(volume), preprocess.foreground_index(volume).mean(0))
    empty = torch.zeros(4, 6, 3)
    np.testing.assert_allclose(foreground_centre(empty), preprocess.foreground_index(empty).mean(0))


def test_strip_and_cut():
    subject = make_subject(head())
    images = [make_view(subject, np.eye(4), np.random.default_rng(k), stripped=True, cut=False).image for k in range(9)]
    kept = {int((x > 0).sum()) for x in images}
    assert kept == {int(subject.brain.sum()), int(subject.grown.sum())}
    cut = [
        make_view(subject, np.eye(4), np.random.default_rng(k), stripped=False, cut=True).image[0, 0] for k in range(12)
    ]
    first = {int(x.flatten(1).any(1).int().argmax()) for x in cut}
    assert first <= set(range(8))  # the brain starts at slice 8
    assert len(first) > 3


def test_views_without_labels_or_image():
    plain = make_subject(Scan("x", head().image, None, None, 2.0, np.eye(4)))
    assert make_view(plain, np.eye(4), np.random.default_rng(0), stripped=False, cut=False).image.max() == 1
    for wish in ({"stripped": True, "cut": False}, {"stripped": False, "cut": True}):
        with pytest.raises(ValueError, match="needs labels, got a scan without"):
            make_view(plain, np.eye(4), np.random.default_rng(0), **wish)
    with pytest.raises(ValueError, match="got a scan without"):
        _ = plain.grown
    bare = make_subject(Scan("x", None, head().labels, None, 2.0, np.eye(4)))
    with pytest.raises(ValueError, match="got a label map without one"):
        make_view(bare, np.eye(4), np.random.default_rng(0), stripped=False, cut=False)


def test_a_pose_places_the_centre():
    subject = make_subject(head())
    pose = np.eye(4)
    pose[:3, 3] = (4, -2, 6)  # mm
    view = make_view(subject, pose, np.random.default_rng(0), stripped=False, cut=False)
    centre = preprocess.foreground_index(view.image[0, 0]).mean(0)
    np.testing.assert_allclose((view.to_subject @ [0, 0, 0, 1])[:3], centre + np.array([2, -1, 3]))


@pytest.mark.parametrize("device", DEVICES)
def test_image_and_labels_see_the_same_deformation(device):
    """The brain's edge in a deformed window lies at the edge of labels sampled at the same points."""
    subject = make_subject(head(), device=device)
    shape = (16, 18, 20)
    rng = np.random.default_rng(2)
    pose = random_pose(rng, 15, 3, 0.1, 0.05)
    view = make_view(subject, pose, rng, stripped=False, cut=False)
    grid = grid_matrix(shape, 2.0)
    field = augmentation.free_form(Extremes(1), shape, device=device)
    matrix = torch.from_numpy((view.to_subject @ grid)[:3]).float().to(device)
    positions = (spatial.identity_grid(shape, device=device) + field).reshape(3, -1)
    at = (matrix[:, :3] @ positions + matrix[:, 3:]).view(1, 3, *shape)
    brain = spatial.sample(subject.brain[None, None].float(), at, interpolation="nearest")[0, 0] > 0

    def agreement(image: torch.Tensor) -> float:
        shows = image[0, 0] > 0.75  # the brain is 1, the head around it 0.5
        return 2 * float((shows & brain).sum()) / float(shows.sum() + brain.sum())

    assert agreement(sample_image(view, grid, shape, field)) > 0.94
    assert agreement(sample_image(view, grid, shape)) < 0.9


def test_a_shift_of_the_window_is_a_shift_of_the_image():
    subject = make_subject(head())
    view = make_view(subject, np.eye(4), np.random.default_rng(0), stripped=False, cut=False)
    grid, shape = grid_matrix((12, 12, 12), 2.0), (12, 12, 12)
    shift = torch.zeros(1, 3, *shape)
    shift[:, 1] = 2
    moved, still = sample_image(view, grid, shape, shift), sample_image(view, grid, shape)
    torch.testing.assert_close(moved[:, :, :, :-2], still[:, :, :, 2:], atol=1e-5, rtol=0)


def test_coarse_windows_are_averaged():
    subject = make_subject(head())
    view = make_view(subject, np.eye(4), np.random.default_rng(0), stripped=False, cut=False)
    view.to_subject[:3, 3] = (11.5, 13.5, 11.5)  # so that every coarse voxel is the average of eight
    coarse = sample_image(view, grid_matrix((6, 6, 6), 4.0), (6, 6, 6))
    block = view.image[0, 0, 6:18, 8:20, 6:18].reshape(6, 2, 6, 2, 6, 2).mean((1, 3, 5))
    assert coarse.shape == (1, 1, 6, 6, 6)
    torch.testing.assert_close(coarse[0, 0], block, atol=1e-5, rtol=0)


def test_throughput_measures_every_step():
    scans = (throughput.made_up_scan(n, (20, 22, 18), 9) for n in ("a", "bb"))
    timings = throughput.measure(*scans, torch.device("cpu"), repeats=1, shape=(16, 16, 16))
    assert all(ms > 0 for ms in timings.values())
    assert {"a whole pair", "a whole synthesised pair", "LDR forward + backward"} <= set(timings)
