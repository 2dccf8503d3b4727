"""Other contrasts, slices and fields of view of one scan, and pairs that are made of them."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import SimpleITK as sitk
import torch

from LDRCore.losses import local_ncc
from Testing.unit.test_pairs import CPU, settings
from Training.config import ConfigError
from Training.data import contrasts
from Training.data.joined import Joined
from Training.data.scan_set import DataError
from Training.data.scans import open_scans
from Training.pairs import PairSource, validation_pairs


@pytest.fixture
def ramp() -> torch.Tensor:
    """Background 0 in the first four slices, then 0.25, 0.45 ... of what a curve is given at."""
    levels = torch.tensor([0.0] * 4 + [0.25] * 4 + [0.45] * 4 + [0.7] * 4 + [0.9] * 4)
    return levels.view(1, 1, 20, 1, 1).expand(1, 1, 20, 12, 12).contiguous()


def test_curves_invert_or_reorder_tissues_and_keep_the_background(ramp):
    orders, backgrounds = set(), set()
    for seed in range(40):
        changed = contrasts.remap(np.random.default_rng(seed), ramp)
        again = contrasts.remap(np.random.default_rng(seed), ramp)
        assert torch.equal(changed, again)
        line = changed[0, 0, ::4, 0, 0]
        assert 0 <= float(line.min()) < float(line.max()) <= 1
        orders.add(tuple(torch.argsort(line[1:]).tolist()))
        backgrounds.add(float(line[0]) > 0.5)
        stripped = contrasts.remap(np.random.default_rng(seed), ramp, stripped=True)
        assert float(stripped[0, 0, 0, 0, 0]) == 0
    assert (3, 2, 1, 0) in orders  # inverted
    assert len(orders) > 3
    assert backgrounds == {False, True}


def test_slices_average_and_are_joined_linearly():
    """Four voxels in two slices: means of two; voxel 1 is a quarter of the way from one middle to the other."""
    expected = [[0.5, 0.5, 0, 0], [0.375, 0.375, 0.125, 0.125], [0.125, 0.125, 0.375, 0.375], [0, 0, 0.5, 0.5]]
    assert np.allclose(contrasts.slice_matrix(4, 2), expected)
    assert np.allclose(contrasts.slice_matrix(5, 5), np.eye(5))
    assert np.allclose(contrasts.slice_matrix(7, 3).sum(1), 1)


def test_thick_slices_blur_one_axis_alone():
    rng = np.random.default_rng(2)
    image = torch.from_numpy(rng.uniform(0, 1, (1, 1, 20, 20, 20)).astype(np.float32))
    thick = contrasts.thick_slices(np.random.default_rng(1), image, 1.0)
    spread = [float((thick.diff(dim=axis)).std() / image.diff(dim=axis).std()) for axis in (2, 3, 4)]
    assert min(spread) < 0.5
    flat = torch.full((1, 1, 12, 12, 12), 0.3)
    assert torch.allclose(contrasts.thick_slices(rng, flat, 2.0), flat)


def test_a_field_of_view_ends_within_the_content_at_one_face():
    image = torch.zeros(1, 1, 30, 30, 30)
    image[:, :, 5:25, 5:25, 5:25] = 0.5
    axes = set()
    for seed in range(30):
        seen = contrasts.field_of_view(np.random.default_rng(seed), image)[0, 0]
        assert set(seen.unique().tolist()) <= {0.0, 1.0}
        assert float((image[0, 0] * seen).sum() / image.sum()) >= 0.5
        lines = [seen.movedim(axis, 0).flatten(1).amin(1) for axis in range(3)]
        cut = [axis for axis, line in enumerate(lines) if line.amax() > 0 and line.amin() == 0]
        assert len(cut) <= 1
        if cut:
            line = lines[cut[0]]
            assert line[0] != line[-1]
            assert float(line.diff().abs().sum()) == 1
        axes.update(cut)
    assert axes == {0, 1, 2}


def test_the_loss_sees_one_contrast_where_the_network_sees_two(tiny_brains):
    plain, changed = (
        PairSource(settings(tiny_brains, remap=share), "train", 1, CPU, labels=True).sample(0, 0)
        for share in (0.0, 1.0)
    )
    assert plain.keys == changed.keys
    assert torch.allclose(changed.fixed_target, plain.fixed, atol=1e-6)
    assert torch.allclose(changed.moving_target, plain.moving, atol=1e-6)
    assert not torch.allclose(changed.fixed, plain.fixed, atol=0.1)


@pytest.fixture
def label_maps(tiny_brains, tmp_path) -> Path:
    """A folder of label maps without images."""
    for k in range(4):
        labels = sitk.ReadImage(str(tiny_brains / f"s{k}-labels.nii.gz"))
        sitk.WriteImage(labels, str(tmp_path / f"s{k}.nii.gz"))
    return tmp_path


def test_label_maps_get_targets_of_one_contrast(label_maps):
    options = {"synthesis": 1.0, "remap": 0.5, "initial": "centroids"}
    source = PairSource(settings(label_maps, **options), "train", 1, CPU, labels=True)
    sample = source.sample(0, 0)
    apart, alike = local_ncc(sample.moving, sample.fixed), local_ncc(sample.moving_target, sample.fixed_target)
    assert float(alike) < float(apart)  # minus the correlation
    means = []
    labels = sample.labels[0]
    for target in (sample.fixed_target, sample.moving_target):
        values = [target[0, 0][labels.fixed == v].median() for v in labels.fixed.unique() if v]
        means.append(torch.stack(values))
    assert (means[0] - means[1]).abs().median() < 0.1


def test_a_pair_of_one_scan_is_that_scan_deformed(tiny_brains):
    sample = PairSource(settings(tiny_brains, same=1.0), "train", 1, CPU, labels=True).sample(0, 0)
    fixed, moving = sample.keys[0].split("|")
    assert fixed == moving
    assert not torch.allclose(sample.fixed, sample.moving, atol=0.05)
    assert sample.labels[0].free_form is not None


def test_pairs_of_two_data_sets_stay_within_one(tiny_brains):
    first, second = (open_scans(tiny_brains, split) for split in ("train", "val"))
    joined = Joined(first, second, 0.25)
    assert joined.names == [*(f"0/s{k}" for k in range(4)), "1/s4", "1/s5"]
    assert joined.groups == [(0.75, [0, 1, 2, 3]), (0.25, [4, 5])]
    assert np.array_equal(joined.read(5).image, second[1].image)
    assert joined.count_labels() == first.n_labels == 6
    source = PairSource(settings(tiny_brains, more_data=tiny_brains), "train", 1, CPU)
    keys = {source.sample(step, 0).keys[0] for step in range(20)}
    assert {key[0] for key in keys} == {"0", "1"}
    assert all(left[0] == right[0] for left, right in (key.split("|") for key in keys))
    with pytest.raises(DataError, match=r"two data sets must be read at one spacing .*, got 2 and 4 mm"):
        Joined(first, open_scans(tiny_brains, "val", spacing_mm=4.0), 0.5)


def test_no_more_pairs_are_listed_than_two_data_sets_have(tiny_brains):
    source = PairSource(settings(tiny_brains, more_data=tiny_brains, n_pairs=100), "train", 1, CPU)
    assert source.scans.count_pairs() == 2 * 4 * 3
    assert len(source.pairs) == len(set(source.pairs)) == 2 * 4 * 3  # and not 8 * 7: none leads from one to the other
    assert all((fixed < 4) == (moving < 4) for fixed, moving in source.pairs)


def test_each_of_two_data_sets_must_have_what_is_needed(tiny_brains, label_maps, tmp_path):
    def refusal(more_data: Path, **changes) -> str:
        with pytest.raises(ConfigError) as refused:
            PairSource(settings(tiny_brains, more_data=more_data, **changes), "train", 1, CPU, labels=True)
        return str(refused.value)

    assert refusal(label_maps) == f"a data set without images needs synthesis, got 0 for {label_maps}"
    assert refusal(label_maps, initial="stem", synthesis=0.5).startswith("initial = stem needs images, got label maps")
    rows = "".join(f"{tiny_brains}/s{k}-image.nii.gz\n" for k in range(3))
    (tmp_path / "images.csv").write_text(f"image\n{rows}", encoding="utf-8")
    assert refusal(tmp_path / "images.csv").startswith("dice > 0 needs labels, got none for ")
    both = settings(tiny_brains, more_data=label_maps, more_share=1.0, synthesis=0.1)
    assert PairSource(both, "train", 1, CPU, labels=True).sample(0, 0).keys[0].startswith("1/")


def test_changed_contrasts_are_validated_beside_the_plain_ones(tiny_brains):
    sources = validation_pairs(settings(tiny_brains, remap=0.3, stripped=0.5, val_pairs=1), CPU)
    assert list(sources) == ["whole", "stripped", "whole remapped", "stripped remapped"]
    plain, remapped = (sources[kind].sample(0, 0, augment=False) for kind in ("whole", "whole remapped"))
    assert plain.keys == remapped.keys
    assert not torch.allclose(plain.moving, remapped.moving, atol=0.1)


def test_an_alignment_may_come_first(tiny_brains):
    source = PairSource(settings(tiny_brains, initial="aligned", n_pairs=2), "train", 1, CPU, labels=True)
    fixed, moving = source.pairs[0]
    found = source.moving_from_fixed(fixed, moving)
    assert np.abs(np.diag(found)[:3] - 1).max() < 0.3
    assert source.make(fixed, moving, np.random.default_rng(0), augment=False).labels[0].dice(None) > 0.6


def test_shares_are_checked(tiny_brains):
    with pytest.raises(ConfigError, match="remap must lie between 0 and 1, got 2"):
        settings(tiny_brains, remap=2.0)
