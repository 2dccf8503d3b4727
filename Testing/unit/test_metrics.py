"""Measures by hand, against SimpleITK, and against definitions written out voxel by voxel."""

from __future__ import annotations

import numpy as np
import pytest
import SimpleITK as sitk

from LDRCore.evaluation import metrics

FIXED = np.array([[0, 1, 1, 2], [2, 2, 0, 3]])
WARPED = np.array([[0, 1, 2, 2], [2, 0, 0, 0]])


def test_overlaps_by_hand():
    assert metrics.dice_per_label(WARPED, FIXED) == pytest.approx({1: 2 / 3, 2: 4 / 6, 3: 0.0})
    assert metrics.jaccard_per_label(WARPED, FIXED) == pytest.approx({1: 1 / 2, 2: 2 / 4, 3: 0.0})
    assert metrics.mean_dice(WARPED, FIXED) == pytest.approx((2 / 3 + 4 / 6) / 3)


def test_overlaps_are_simpleitks():
    warped, fixed = np.random.default_rng(0).integers(0, 5, (2, 8, 9, 10)).astype(np.uint8)
    oracle = sitk.LabelOverlapMeasuresImageFilter()
    oracle.Execute(sitk.GetImageFromArray(fixed), sitk.GetImageFromArray(warped))
    dice, jaccard = metrics.dice_per_label(warped, fixed), metrics.jaccard_per_label(warped, fixed)
    assert list(dice) == list(jaccard) == [1, 2, 3, 4]
    for label in dice:
        assert dice[label] == pytest.approx(oracle.GetDiceCoefficient(label), abs=1e-6)
        assert jaccard[label] == pytest.approx(oracle.GetJaccardCoefficient(label), abs=1e-6)


def test_labels_that_only_the_warped_map_holds_do_not_count():
    assert metrics.dice_per_label(np.array([7, 7]), np.array([0, 1])) == {1: 0.0}
    assert np.isnan(metrics.mean_dice(np.array([1, 1]), np.array([0, 0])))


def test_different_shapes_are_refused():
    with pytest.raises(ValueError, match=r"one shape, got \(2,\) and \(3,\)"):
        metrics.mean_dice(np.zeros(2), np.zeros(3))


def test_landmark_errors_by_hand():
    errors = metrics.landmark_errors_mm([[0, 0, 0], [1, 1, 1]], [[3, 4, 0], [1, 1, 1]])
    assert errors.tolist() == [5.0, 0.0]
    with pytest.raises(ValueError, match=r"shape \(N, 3\), got \(1, 3\) and \(2, 3\)"):
        metrics.landmark_errors_mm(np.zeros((1, 3)), np.zeros((2, 3)))


def test_folding_and_sdlogj_by_hand():
    determinant = np.array([1.0, np.e, 0.0, -2.0])
    assert metrics.folding(determinant) == (2, 0.5)
    assert metrics.sd_log_jacobian(determinant) == pytest.approx(0.5)  # logarithms 0 and 1
    assert np.isnan(metrics.sd_log_jacobian(np.array([-1.0])))


def smooth_field(amplitude: float, shape=(12, 11, 10), seed=3) -> np.ndarray:
    """(3, D, H, W) voxels; folds in places when the amplitude is large."""
    noise = np.random.default_rng(seed).normal(size=(3, *shape))
    for axis in (1, 2, 3):
        noise = (noise + np.roll(noise, 1, axis) + np.roll(noise, -1, axis)) / 3
    return (amplitude * noise).astype(np.float32)


def central_determinant(u: np.ndarray) -> np.ndarray:
    jacobian = np.stack([np.stack(np.gradient(c), -1) for c in u], -2) + np.eye(3)
    return np.linalg.det(jacobian)


def test_learn2regs_sdlogj_is_their_published_definition():
    """Central differences with zeros outside, two voxels cut off, J + 3 clipped, natural logarithm, std."""
    from scipy import ndimage

    u = smooth_field(4.0)
    derivative = np.empty((3, 3, *u.shape[1:]))
    for c in range(3):
        for a in range(3):
            kernel = np.array([-0.5, 0, 0.5]).reshape([3 if b == a else 1 for b in range(3)])
            derivative[c, a] = ndimage.correlate(u[c].astype(float), kernel, mode="constant", cval=0.0)
    jacobian = np.moveaxis(derivative, (0, 1), (-2, -1)) + np.eye(3)
    theirs = np.log((np.linalg.det(jacobian[2:-2, 2:-2, 2:-2]) + 3).clip(1e-9, 1e9)).std()
    assert metrics.learn2reg_sd_log_jacobian(central_determinant(u)) == pytest.approx(theirs, rel=1e-5)
    with pytest.raises(ValueError, match=r"at least 5 voxels along each of 3 axes, got \(4, 9, 9\)"):
        metrics.learn2reg_sd_log_jacobian(np.ones((4, 9, 9)))


def tetrahedra_by_vertices(u: np.ndarray) -> tuple[int, float]:
    """Non-diffeomorphic voxels and volume from the corner points of tetrahedra, voxel by voxel."""
    position = np.stack(np.meshgrid(*[np.arange(n) for n in u.shape[1:]], indexing="ij")) + u
    corners = [np.diag([a, b, c]) for a in (1, -1) for b in (1, -1) for c in (1, -1)]
    middles = [np.array([[-1, -1, 0], [-1, 0, -1], [0, -1, -1]]), np.array([[1, 1, 0], [0, 1, 1], [1, 0, 1]])]
    voxels, volume = 0, 0.0
    for k in range(1, u.shape[1] - 1):
        for j in range(1, u.shape[2] - 1):
            for i in range(1, u.shape[3] - 1):
                here = np.array([k, j, i])
                signed = []
                for offsets in (*corners, *middles):
                    edges = [position[(slice(None), *(here + o))] - position[:, k, j, i] for o in offsets]
                    before = np.linalg.det(offsets)  # the undeformed tetrahedron's orientation
                    signed.append(np.linalg.det(np.array(edges)) * np.sign(before) / 6)
                voxels += min(signed[:8]) <= 0
                volume += sum(max(0.0, -v) for v in signed) / 2
    return voxels, volume


@pytest.mark.parametrize("slab", [1, 10**6])
def test_non_diffeomorphic_volume_is_what_inverted_tetrahedra_span(monkeypatch, slab):
    monkeypatch.setattr(metrics, "_SLAB_VOXELS", slab)
    u = smooth_field(3.0, (8, 7, 9))
    voxels, volume = tetrahedra_by_vertices(u)
    measured = metrics.non_diffeomorphic(u)
    assert measured.inner_voxels == 6 * 5 * 7
    assert 0 < voxels < measured.inner_voxels
    assert measured.voxels == voxels
    assert measured.volume_vox == pytest.approx(volume, rel=1e-4)
    assert measured.volume_percent == pytest.approx(100 * volume / measured.inner_voxels, rel=1e-4)
    assert measured.voxels_fraction == voxels / measured.inner_voxels


def test_identity_is_a_diffeomorphism_and_a_reflection_is_none():
    shape = (5, 6, 7)
    assert metrics.non_diffeomorphic(np.zeros((3, *shape))) == metrics.NonDiffeomorphic(0, 0.0, 60)
    mirrored = np.zeros((3, *shape))
    mirrored[1] = -2 * np.arange(6)[None, :, None]  # x + u = -x along the second axis: every tetrahedron turned over
    measured = metrics.non_diffeomorphic(mirrored)
    assert measured.voxels == 60
    assert measured.volume_percent == pytest.approx(100)


def test_checkerboard_folding_escapes_central_differences_but_not_one_sided_ones():
    u = np.zeros((3, 7, 6, 8))
    u[0] = 0.6 * (-1.0) ** np.arange(7)[:, None, None]  # neighbours pass each other by 0.2 voxels
    inner = (slice(1, -1),) * 3
    assert (central_determinant(u)[inner] == pytest.approx(1)) is True
    measured = metrics.non_diffeomorphic(u)
    assert measured.voxels == measured.inner_voxels
    assert measured.volume_percent > 5


def test_non_diffeomorphic_refuses_other_shapes():
    with pytest.raises(ValueError, match=r"at least 3 voxels an axis, got \(3, 2, 5, 5\)"):
        metrics.non_diffeomorphic(np.zeros((3, 2, 5, 5)))
