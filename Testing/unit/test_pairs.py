"""Samples of training: geometry of windows, initial transforms, free-form deformation, teacher deformations."""

from __future__ import annotations

import shutil

import numpy as np
import pytest
import SimpleITK as sitk
import torch

from LDRCore.distillation.teacher_store import TeacherStore, TeacherStoreWriter
from LDRCore.transforms import spatial
from Training.config import ConfigError
from Training.pair_settings import PairSettings
from Training.pairs import PairSource
from Training.window_geometry import include_initial, remove_initial, sample_labels, warped_grid

CPU = torch.device("cpu")


def settings(data, **changes) -> PairSettings:
    plain = {"pose_deg": 0.0, "pose_scale": 0.0, "offset_mm": 0.0, "jitter_deg": 0.0, "jitter_mm": 0.0}
    base = {"data": data, "cache": None, "shape": (32, 32, 32), "initial": "centred", "jitter_scale": 0.0, **plain}
    return PairSettings(**{**base, "loss_stride": 1, "intensity": False, **changes})


@pytest.fixture
def source(tiny_brains) -> PairSource:
    return PairSource(settings(tiny_brains), "train", 1, CPU, labels=True)


def test_the_window_shows_the_scan_where_its_matrix_says(source):
    sample = source.make(0, 1, np.random.default_rng(0), augment=False)
    view = source.scans[0].image.astype(float)
    window = source.canonical(0)
    index = np.array([10, 17, 20, 1.0])
    scan_index = window @ index  # scan voxel, between voxels
    low = np.floor(scan_index[:3]).astype(int)
    share = scan_index[:3] - low
    expected = 0.0
    for corner in np.ndindex(2, 2, 2):
        weight = np.prod([f if c else 1 - f for c, f in zip(corner, share, strict=True)])
        expected += weight * view[tuple(low + corner)]
    values = sample.fixed[0, 0]
    # the window is normalised, so compare the ratio of two places
    other = (window @ np.array([16, 16, 16, 1.0]))[:3]
    reference = sitk.GetImageFromArray(view)
    at = reference.EvaluateAtContinuousIndex(other[::-1].tolist(), sitk.sitkLinear)
    assert float(values[10, 17, 20] / values[16, 16, 16]) == pytest.approx(expected / at, rel=1e-3)


def test_a_sample_depends_on_seed_step_and_index_alone(tiny_brains):
    moved = settings(tiny_brains, pose_deg=10.0, jitter_deg=5.0, free_form=1.0, intensity=True, stripped=0.5, cut=0.5)
    first, second = (PairSource(moved, "train", 1, CPU) for _ in range(2))
    first.sample(3, 0)
    a, b, c = first.sample(5, 1), second.sample(5, 1), second.sample(5, 2)
    assert a.keys == b.keys
    assert torch.equal(a.fixed, b.fixed)
    assert torch.equal(a.moving, b.moving)
    assert not torch.equal(b.moving, c.moving)


@pytest.mark.parametrize("free_form", [0.0, 1.0])
def test_labels_follow_the_moving_image_through_initial_transform_jitter_and_free_form(tiny_brains, free_form):
    moved = settings(tiny_brains, jitter_deg=10.0, jitter_mm=5.0, free_form=free_form)
    source = PairSource(moved, "train", 1, CPU, labels=True)
    # moving labels as an image: what the image sampler shows must be what the label positions find
    scan = source.scans[1]
    volume = torch.from_numpy((scan.labels > 0).astype(np.float32))[None, None]
    source._views = lambda *_: [volume, volume]
    sample = source.make(0, 1, np.random.default_rng(4))
    labels = sample.labels[0]
    u = torch.full((1, 3, 32, 32, 32), 2.0)
    warped = sample_labels(labels.moving, labels.positions(u)).reshape(32, 32, 32) > 0
    shown = spatial.warp(sample.moving, u)[0, 0]
    inside, outside = shown > 0.95, shown < 0.05
    core = (slice(1, -3),) * 3
    assert inside[core].sum() > 500
    assert warped[core][inside[core]].float().mean() > 0.99
    assert (~warped)[core][outside[core]].float().mean() > 0.99


def test_centroids_bring_labels_together(tiny_brains):
    source = PairSource(settings(tiny_brains, initial="centroids"), "train", 1, CPU)
    centred = PairSource(settings(tiny_brains), "train", 1, CPU)

    def mean(s):
        return np.mean(
            [
                s.make(i, j, np.random.default_rng(0), augment=False).labels[0].dice(None)
                for i, j in ((0, 1), (1, 2), (2, 3))
            ]
        )

    assert mean(source) > mean(centred) > 0.3


def test_removing_and_including_the_initial_transform_are_inverse():
    rng = np.random.default_rng(1)
    left = torch.from_numpy(rng.normal(0, 2, (1, 3, 8, 9, 10))).float()
    matrix = np.eye(4)
    matrix[:3] += rng.normal(0, 0.1, (3, 4))
    shape = (16, 18, 20)
    stored = include_initial(left, shape, np.linalg.inv(matrix))
    assert torch.allclose(remove_initial(stored, shape, (8, 9, 10), matrix), left, atol=1e-4)


def test_a_stored_deformation_is_the_same_map_after_any_initial_transform(tiny_brains, tmp_path):
    """Where a stored field leads does not depend on the jitter of the initial transform that it is read after."""
    still = PairSource(settings(tiny_brains), "train", 1, CPU)
    key = still.key(0, 1)
    wave = spatial.identity_grid((16, 16, 16)) / 3
    stored = torch.sin(wave)[0].numpy()
    with TeacherStoreWriter(tmp_path / "t.h5", (16, 16, 16), {}) as writer:
        writer.write(key, stored)
        writer.finish()
    moved = settings(tiny_brains, jitter_deg=10.0, jitter_mm=5.0)
    teacher = TeacherStore(tmp_path / "t.h5")
    source = PairSource(moved, "train", 1, CPU, labels=True, teacher=teacher, field_shape=(16, 16, 16))
    sample = source.make(0, 1, np.random.default_rng(2), teacher=True)
    scan_index = sample.labels[0].positions(sample.teacher).reshape(3, 16, 16, 16)
    full = warped_grid(torch.from_numpy(teacher.read(key))[None], (32, 32, 32))[0]
    canonical = source.canonical(1)
    expected = torch.einsum("ij,jdhw->idhw", torch.from_numpy(canonical[:3, :3]).float(), full)
    expected = expected + torch.from_numpy(canonical[:3, 3]).float().view(3, 1, 1, 1)
    assert torch.allclose(scan_index, expected, atol=1e-3)


def test_pairs_of_the_teacher_must_be_in_the_data_set(tiny_brains, tmp_path):
    with TeacherStoreWriter(tmp_path / "t.h5", (4, 4, 4), {}) as writer:
        writer.write("a|b", np.zeros((3, 4, 4, 4)))
        writer.finish()
    with pytest.raises(ConfigError, match=r"a pair must name two scans of the data set, got 'a\|b' \(1 unknown\)"):
        PairSource(settings(tiny_brains), "train", 1, CPU, teacher=TeacherStore(tmp_path / "t.h5"))


def test_images_of_label_maps_differ_in_contrast_but_not_in_shape(tiny_brains):
    source = PairSource(settings(tiny_brains, synthesis=True, initial="centroids"), "train", 1, CPU, labels=True)
    first, second = (source.make(0, 1, np.random.default_rng(k), augment=False) for k in range(2))
    assert torch.equal(first.labels[0].fixed, second.labels[0].fixed)
    labels = first.labels[0].fixed

    def means(image):
        return torch.stack([image[0, 0][labels == v].mean() for v in labels.unique() if v])

    assert (means(first.fixed) - means(second.fixed)).abs().max() > 0.1


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"initial": "luck"}, "initial must be one of .*, got 'luck'"),
        ({"loss_stride": 3}, "loss_stride must be 1 or 2, got 3"),
        ({"shape": (30, 32, 32)}, "every axis of shape must be a multiple of 16"),
        ({"stripped": 1.5}, "stripped must lie between 0 and 1, got 1.5"),
        ({"data": None}, "one of data and pairs must be given, got data=None and pairs=None"),
    ],
)
def test_refused_settings(tiny_brains, changes, message):
    with pytest.raises(ConfigError, match=message):
        settings(tiny_brains, **changes) if "data" not in changes else PairSettings(**changes)


@pytest.mark.parametrize(
    ("changes", "rule"),
    [({"stripped": 0.5}, "stripped > 0"), ({"initial": "centroids"}, "initial = centroids"), ({"cut": 0.5}, "cut > 0")],
)
def test_what_needs_labels_says_so(tiny_brains, tmp_path, changes, rule):
    text = (tiny_brains / "manifest.csv").read_text(encoding="utf-8").splitlines()
    rows = [line.rsplit(",", 1)[0].split(",") for line in text]
    lines = ["image,split"] + [f"{tiny_brains / r[2]},{r[1]}" for r in rows[1:]]
    (tmp_path / "images.csv").write_text("\n".join(lines) + "\n")
    with pytest.raises(ConfigError, match=f"{rule} needs labels, got none for"):
        PairSource(settings(tmp_path / "images.csv", **changes), "train", 1, CPU)


def test_kept_initial_transforms_are_those_of_these_scans(tiny_brains, tmp_path):
    data = shutil.copytree(tiny_brains, tmp_path / "data")

    def first_transform(**changes) -> np.ndarray:
        found = PairSource(settings(data, initial="stem", stem="brain-t1-small", n_pairs=1, **changes), "train", 1, CPU)
        return found.moving_from_fixed(*found.pairs[0])

    cache = tmp_path / "cache"
    first = first_transform(cache=cache)
    np.testing.assert_array_equal(first_transform(cache=cache), first)
    finer = {"scan_spacing_mm": 1.0}  # the same scans, on other voxels
    np.testing.assert_array_equal(first_transform(cache=cache, **finer), first_transform(**finer))
    assert not np.allclose(first_transform(**finer), first)
    for number in range(4):  # the same names, other scans
        for what in ("image", "labels"):
            shutil.copy(tiny_brains / f"s{(number + 1) % 4}-{what}.nii.gz", data / f"s{number}-{what}.nii.gz")
    np.testing.assert_array_equal(first_transform(cache=cache), first_transform())
    assert not np.allclose(first_transform(), first)
