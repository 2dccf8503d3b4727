"""A transform scored on a pair: values worked out by hand on oblique, anisotropic grids; refusals."""

from __future__ import annotations

import numpy as np
import pytest
import SimpleITK as sitk

from LDRCore import geometry
from LDRCore.errors import RegistrationError
from LDRCore.evaluation import metrics, scoring

TURN = np.array(sitk.Euler3DTransform((0, 0, 0), 0.3, -0.2, 0.4).GetMatrix())


def image(values: np.ndarray) -> sitk.Image:
    """On an oblique, anisotropic grid."""
    out = sitk.GetImageFromArray(values)
    out.SetSpacing((1.0, 2.0, 3.0))
    out.SetDirection(TURN.tolist())
    out.SetOrigin((5.0, -7.0, 11.0))
    return out


def boxes(shift: int = 0) -> np.ndarray:
    values = np.zeros((12, 14, 16), np.uint8)
    values[3:7, 4:9, 3 + shift : 8 + shift] = 1
    values[8:11, 9:12, 4 + shift : 10 + shift] = 5
    return values


def along_i(mm: float) -> sitk.Transform:
    """A shift along the image's first axis."""
    return sitk.TranslationTransform(3, (TURN.reshape(3, 3)[:, 0] * mm).tolist())


@pytest.fixture
def truth() -> scoring.Truth:
    labels = image(boxes())
    points = geometry.points_lps(labels)[[4, 9], [5, 10], [4, 6]]
    moved = points + TURN.reshape(3, 3)[:, 0] * 2
    return scoring.Truth(labels, labels, image(boxes(2)), points, moved)


def test_the_right_shift_scores_perfectly(truth):
    scores = scoring.score(along_i(2.0), truth)
    assert scores["dice_mean"] == scores["jaccard_mean"] == 1
    assert scores["hd95_mm"] == scores["surface_mm"] == 0
    assert scores["tre_mm"] == pytest.approx(0, abs=1e-6)
    assert scores["landmarks"] == 2
    assert scores["structures"][5] == {"dice": 1, "jaccard": 1, "hd95_mm": 0, "surface_mm": 0}
    regular = {"folding_count": 0, "folding_fraction": 0, "sdlogj": 0, "sdlogj_learn2reg": 0, "ndv_percent": 0}
    assert {k: scores[k] for k in regular} == regular
    assert scores["non_diffeomorphic_voxels"] == 0


def test_doing_nothing_by_hand(truth):
    """Boxes of 5 and 6 voxels length, shifted by 2: 3 and 4 in common."""
    scores = scoring.score(sitk.Transform(3, sitk.sitkIdentity), truth)
    assert scores["structures"][1]["dice"] == pytest.approx(3 / 5)
    assert scores["structures"][5]["jaccard"] == pytest.approx(4 / 8)
    assert scores["dice_mean"] == pytest.approx((3 / 5 + 4 / 6) / 2)
    assert scores["tre_mm"] == pytest.approx(2)
    assert scores["hd95_mm"] == pytest.approx(2)


def test_measures_can_be_chosen(truth):
    identity = sitk.Transform(3, sitk.sitkIdentity)
    assert set(scoring.score(identity, truth, measures=["landmarks"])) == {"tre_mm", "tre_max_mm", "landmarks"}
    only = scoring.score(identity, truth, measures=["surface"])
    assert set(only) == {"hd95_mm", "surface_mm", "structures_lost", "structures"}
    assert set(only["structures"][1]) == {"hd95_mm", "surface_mm"}
    with pytest.raises(RegistrationError, match=r"every measure must be one of .*, got 'dise'"):
        scoring.score(identity, truth, measures=["dise"])


def test_linear_threshold_protocol_by_hand():
    """A shift by 0.4 voxels: linear masks keep their borders above 128 of 255 on both sides, 0.6 lose and win one."""
    labels = image(boxes())
    dice, jaccard = scoring.overlaps(labels, along_i(0.4), labels, "linear-threshold")
    assert dice == {1: 1, 5: 1}
    dice, jaccard = scoring.overlaps(labels, along_i(0.6), labels, "linear-threshold")
    assert dice == pytest.approx({1: 4 / 5, 5: 5 / 6})
    assert jaccard == pytest.approx({1: 4 / 6, 5: 5 / 7})
    with pytest.raises(RegistrationError, match="protocol must be one of"):
        scoring.overlaps(labels, along_i(0.6), labels, "cubic")


def wave(reference: sitk.Image, amplitude_mm: float) -> sitk.DisplacementFieldTransform:
    points = geometry.points_lps(reference)
    shift = amplitude_mm * np.stack([np.sin(points[..., 0] / 3), np.cos(points[..., 2] / 4), 0 * points[..., 0]], -1)
    field = sitk.GetImageFromArray(shift, isVector=True)
    field.CopyInformation(reference)
    return sitk.DisplacementFieldTransform(field)


def test_regularity_counts_what_an_independent_jacobian_says(truth):
    transform = wave(truth.fixed, 4.0)
    scores = scoring.regularity(transform, truth.fixed)
    field = geometry.displacement_field_image(transform, truth.fixed)
    u = geometry.field_in_voxels(field)
    jacobian = np.stack([np.stack(np.gradient(c), -1) for c in u], -2) + np.eye(3)
    determinant = np.linalg.det(jacobian)  # in voxels: the same number as in mm, on any grid
    assert scores["folding_count"] == (determinant <= 0).sum() > 0
    assert scores["folding_fraction"] == scores["folding_count"] / determinant.size
    assert scores["sdlogj"] == pytest.approx(np.log(determinant[determinant > 0]).std(), rel=1e-3)
    assert scores["ndv_percent"] == metrics.non_diffeomorphic(u).volume_percent > 0
    assert "ndv_percent" not in scoring.regularity(transform, truth.fixed, ndv=False)


def test_field_in_voxels_by_hand(truth):
    """2 mm along the first image axis (1 mm voxels) and 6 mm along the third (3 mm voxels) are 2 and 2 voxels."""
    shift = TURN.reshape(3, 3) @ [2.0, 0.0, 6.0]
    field = sitk.GetImageFromArray(np.broadcast_to(shift, (3, 3, 3, 3)).copy(), isVector=True)
    field.SetSpacing(truth.fixed.GetSpacing())
    field.SetDirection(truth.fixed.GetDirection())
    assert geometry.field_in_voxels(field)[:, 1, 1, 1] == pytest.approx([2, 0, 2], abs=1e-6)


def test_a_mirror_folds_everywhere(truth):
    mirror = geometry.affine_transform(np.diag([-1.0, 1, 1, 1]))
    scores = scoring.regularity(mirror, truth.fixed)
    assert scores["folding_fraction"] == 1
    assert scores["ndv_percent"] == 100


def test_inverse_consistency_by_hand(truth):
    forth, back = along_i(2.0), along_i(-1.5)
    scores = scoring.inverse_consistency_mm(forth, back, truth.fixed)
    assert scores == pytest.approx({"mean": 0.5, "p95": 0.5, "max": 0.5}, abs=1e-5)


def test_a_lost_structure_is_counted_and_not_averaged(truth):
    gone = boxes(2)
    gone[gone == 5] = 0
    scores = scoring.score(along_i(2.0), scoring.Truth(truth.fixed, truth.fixed_labels, image(gone)))
    assert scores["structures"][5] == {"dice": 0, "jaccard": 0, "hd95_mm": None, "surface_mm": None}
    assert scores["structures_lost"] == 1
    assert scores["hd95_mm"] == 0


def test_bad_labels_and_landmarks_are_refused(truth):
    other = image(np.where(boxes(2) > 0, 3, 0).astype(np.uint8))
    with pytest.raises(RegistrationError, match=r"structure in common, got \[1, 5\] and \[3\]"):
        scoring.score(along_i(2.0), scoring.Truth(truth.fixed, truth.fixed_labels, other))
    with pytest.raises(RegistrationError, match=r"whole numbers from 0 to 65535, got values from 0 to 1\.5"):
        scoring.load_labels(image(boxes() * np.float32(0.3)), "labels")
    with pytest.raises(RegistrationError, match="got only background"):
        scoring.load_labels(image(np.zeros((8, 8, 8), np.uint8)), "labels")
    with pytest.raises(RegistrationError, match="one to one, got 2 and 1"):
        scoring.score(along_i(0), scoring.Truth(truth.fixed, None, None, truth.fixed_landmarks_lps, np.zeros((1, 3))))
    assert scoring.load_labels(image(boxes().astype(np.float32)), "labels").GetPixelID() == sitk.sitkInt32


def test_landmarks_outside_are_named(truth):
    inside = truth.fixed_landmarks_lps
    scoring.check_landmarks(inside, truth.fixed, "fixed landmarks")
    corner = np.array([truth.fixed.TransformContinuousIndexToPhysicalPoint((-0.6, 0, 0))])
    with pytest.raises(RegistrationError, match="fixed landmarks must lie inside their image, got 1 of 3 outside"):
        scoring.check_landmarks(np.concatenate([inside, corner]), truth.fixed, "fixed landmarks")
