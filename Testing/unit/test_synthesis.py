"""Images synthesised from label maps."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from Training.data import synthesis
from Training.data.scan_set import Scan
from Training.data.subject_views import make_subject, make_view, synthetic

DEVICES = ["cpu", *(["cuda"] if torch.cuda.is_available() else [])]


def whole_head() -> np.ndarray:
    """Blocks: background 0, brain 2 and 10 within CSF 24, head tissues 507 and 515 around, as in SynthSeg's maps."""
    labels = np.zeros((24, 24, 24), np.int16)
    labels[2:22, 2:22, 2:22] = 507
    labels[2:22, 2:12, 2:22] = 515
    labels[6:18, 6:18, 6:18] = 24
    labels[8:16, 8:16, 8:12] = 2
    labels[8:16, 8:16, 12:16] = 10
    return labels


def inner(image: torch.Tensor, labels: np.ndarray, value: int) -> float:
    return float(np.median(image[0, 0].cpu().numpy()[labels == value]))


@pytest.mark.parametrize("device", DEVICES)
def test_the_same_seed_makes_the_same_image_and_another_seed_another_contrast(device):
    labels = torch.from_numpy(whole_head()).to(device)
    one, same, other = (synthesis.synthesise(np.random.default_rng(s), labels) for s in (1, 1, 2))
    assert one.shape == (1, 1, 24, 24, 24)
    assert one.dtype == torch.float32
    assert one.device == labels.device
    assert torch.equal(one, same)
    brightness = [[inner(x, whole_head(), v) for v in (2, 10, 507, 515)] for x in (one, other)]
    assert np.abs(np.subtract(*brightness)).max() > 0.1
    for seed in range(10):
        image = synthesis.synthesise(np.random.default_rng(seed), labels)
        assert float(image.min()) >= 0
        assert 0.3 < float(image.max()) <= 1


def test_every_structure_is_a_bright_or_dark_place_of_its_own():
    labels = whole_head()
    for seed in range(8):
        image = synthesis.synthesise(np.random.default_rng(seed), torch.from_numpy(labels))[0, 0].numpy()
        inside = image[9:15, 9:15, 9:11]  # of label 2, away from its edge
        assert inside.std() < 0.2
    contrast = [
        inner(x, labels, 2) - inner(x, labels, 10)
        for x in (synthesis.synthesise(np.random.default_rng(s), torch.from_numpy(labels)) for s in range(30))
    ]
    assert min(contrast) < -0.2  # either may be the brighter one
    assert max(contrast) > 0.2


def test_background_is_empty_in_the_asked_share():
    labels = torch.from_numpy(whole_head())
    empty = [
        float(synthesis.synthesise(np.random.default_rng(s), labels, zero_background=share)[0, 0, 0, 0, 0]) == 0
        for share in (1.0, 0.0)
        for s in range(10)
    ]
    assert empty == [True] * 10 + [False] * 10


def test_stripped_images_show_the_brain_alone():
    labels = whole_head()
    fluid = set()
    for seed in range(10):
        image = synthesis.synthesise(np.random.default_rng(seed), torch.from_numpy(labels), stripped=True)
        assert float(image[0, 0, :2].max()) == 0
        assert inner(image, labels, 507) == inner(image, labels, 515) == 0
        assert inner(image, labels, 2) > 0
        fluid.add(inner(image, labels, 24) > 0.02)
    assert fluid == {True, False}  # a tight or a generous strip


def test_tissues_outside_of_the_brain_are_merged_and_dropped_at_times():
    tables = [synthesis.contrast(np.random.default_rng(s), 540, stripped=False, zero_background=1.0) for s in range(40)]
    kinds = [len(np.unique(t[0, 256:][t[0, 256:] > 0])) for t in tables]
    assert 10 < sum(k <= 4 for k in kinds) < 30
    assert max(kinds) > 200
    dropped = [(t[0, 256:] == 0).mean() for t in tables]
    assert 0.03 < np.mean(dropped) < 0.25
    assert all((t[0, 1:256] > 0).all() for t in tables)
    assert all(((t[1] > 0) == (t[0] > 0)).all() for t in tables)


def test_labels_below_256_are_never_taken_for_other_tissue():
    table = synthesis.contrast(np.random.default_rng(0), 208, stripped=True, zero_background=0.0)
    assert (table[:, 0] == 0).all()
    assert (table[0, 1:] > 0).all()


@pytest.mark.parametrize("device", DEVICES)
def test_a_subject_of_a_label_map(device):
    labels = whole_head()
    subject = make_subject(Scan("map", None, labels, None, 2.0, np.eye(4)), device=device)
    np.testing.assert_array_equal(subject.brain.cpu(), (labels > 0) & (labels < 256))
    np.testing.assert_array_equal(subject.labels.cpu(), np.where(labels < 256, labels, 0))
    np.testing.assert_array_equal(subject.tissues.cpu(), labels)
    one, other = (synthetic(subject, np.random.default_rng(s)) for s in (1, 2))
    assert one.labels is subject.labels
    assert not torch.allclose(one.image, other.image, atol=0.05)
    view = make_view(one, np.eye(4), np.random.default_rng(0), stripped=True, cut=True)
    assert bool((view.image[0, 0][~subject.grown] == 0).all())
    bare = make_subject(Scan("image", np.ones((8, 8, 8), np.uint8), None, None, 2.0, np.eye(4)), device=device)
    with pytest.raises(ValueError, match="can only be synthesised where there are labels"):
        synthetic(bare, np.random.default_rng(0))


def test_labels_of_a_scan_with_image_are_all_structures():
    labels = whole_head()
    subject = make_subject(Scan("scan", np.ones((24, 24, 24), np.uint8), labels, None, 2.0, np.eye(4)))
    np.testing.assert_array_equal(subject.brain, labels > 0)
    np.testing.assert_array_equal(subject.labels, labels)
