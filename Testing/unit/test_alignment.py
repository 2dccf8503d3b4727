"""Rigid and affine alignment without a network, on images by formula whose map is known (`known_map`)."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import SimpleITK as sitk
import torch

from LDRCore.alignment import search, starts
from LDRCore.alignment.extent import Extent
from LDRCore.alignment.objective import Objective, Side, penalty, penalty_derivatives
from LDRCore.alignment.optimiser import optimise, rotation_matrix, step_lps
from LDRCore.geometry import Grid
from LDRCore.pipeline.preprocess import PreparedImage, prepare
from LDRCore.transforms.volume import Volume
from Testing import known_map

NEAR_MM = 1.0  # at landmarks; a voxel of the fine grid has some 4 mm
FAR = known_map.rotation((70.0, -40.0, 100.0))


def affine_lps(matrix: np.ndarray) -> np.ndarray:
    """The map with this linear part that takes the fixed content's centre to the moving content's."""
    return starts.about(matrix, known_map.CENTRE, known_map.CENTRE + known_map.SHIFT)


def fixed_of(truth: np.ndarray, lattice: known_map.Lattice = known_map.FIXED) -> sitk.Image:
    points = lattice.points() @ truth[:3, :3].T + truth[:3, 3]
    return lattice.image(known_map.intensity(points).astype(np.float32))


def prepared(image: sitk.Image, mask: np.ndarray | None = None) -> PreparedImage:
    return prepare(image, mask, fine_mm=2.0, coarse_mm=4.0)


def pyramid(fixed: PreparedImage, moving: PreparedImage) -> search.Pyramid:
    return search.Pyramid(Side(fixed.fine, fixed.mask), Side(moving.fine, moving.mask), fixed.box_lps)


def centred(fixed: PreparedImage, moving: PreparedImage) -> list[np.ndarray]:
    return [starts.about(np.eye(3), fixed.centroid_lps, moving.centroid_lps), np.eye(4)]


def error_mm(result: np.ndarray, truth: np.ndarray, above: float = -np.inf) -> float:
    """The largest distance at points within the fixed head, of those above a height."""
    grid = np.stack(np.meshgrid(*[np.linspace(-1, 1, 9)] * 3, indexing="ij"), -1).reshape(-1, 3)
    points = known_map.CENTRE + grid[(grid**2).sum(1) <= 1] * np.array([62.0, 76.0, 58.0])
    points = points[points[:, 2] > above]
    difference = result - truth
    return float(np.linalg.norm(points @ difference[:3, :3].T + difference[:3, 3], axis=1).max())


@pytest.fixture(scope="module")
def moving() -> sitk.Image:
    return known_map.moving_image()


TRUTHS = {
    "rigid": affine_lps(known_map.rotation((9.0, -12.0, 7.0))),
    "affine": known_map.AFFINE_LPS,
    "rigid, far": affine_lps(FAR),
    "affine, far": affine_lps(known_map.MATRIX @ FAR),
}


@pytest.mark.parametrize("name", TRUTHS)
def test_a_known_map_is_found_from_the_centres(name, moving):
    """Grids of both images are oblique and anisotropic, and differ."""
    truth, kind = TRUTHS[name], name.split(",")[0]
    images = prepared(fixed_of(truth)), prepared(moving)
    result = search.align(pyramid(*images), centred(*images), kind)
    assert error_mm(result.affine_lps, truth) < NEAR_MM
    assert result.searched or "far" not in name


def test_a_rigid_result_is_exactly_rigid_where_the_truth_is_not(moving):
    images = prepared(fixed_of(known_map.AFFINE_LPS)), prepared(moving)
    linear = search.align(pyramid(*images), centred(*images), "rigid").affine_lps[:3, :3]
    assert np.abs(linear.T @ linear - np.eye(3)).max() < 1e-12
    assert np.linalg.det(linear) == pytest.approx(1, abs=1e-12)


@pytest.mark.parametrize("contrast", ["inverted", "inverted within the head", "not monotonic"])
def test_a_contrast_of_another_kind_does_not_matter(contrast, moving):
    """Where air is dark, or bright and so taken for a removed background, the head's edge is another one: 1 to 3 mm."""
    values = sitk.GetArrayFromImage(moving)
    other = {
        "inverted": 1000 - values,
        "inverted within the head": np.where(values > 50, 1000 - values, 0),
        "not monotonic": np.where(values > 50, 200 + np.abs(values - 600), 0),
    }[contrast]
    truth = known_map.AFFINE_LPS
    images = prepared(fixed_of(truth)), prepared(known_map.MOVING.image(other.astype(np.float32)))
    result = search.align(pyramid(*images), centred(*images), "affine")
    assert error_mm(result.affine_lps, truth) < 4 * NEAR_MM


def halved(image: sitk.Image, lattice: known_map.Lattice) -> sitk.Image:
    """The half of an image that is nearer to the top of the head, as a smaller field of view."""
    axis = int(np.abs(lattice.direction[2]).argmax())
    middle = image.GetSize()[axis] // 2
    half = slice(middle, None) if lattice.direction[2, axis] > 0 else slice(None, middle)
    return image[tuple(half if a == axis else slice(None) for a in range(3))]


@pytest.mark.parametrize("which", ["fixed", "moving"])
def test_half_a_field_of_view_is_enough(which, moving):
    """The centres of the contents are some 30 mm apart then, and half of one image has no counterpart."""
    truth = affine_lps(known_map.rotation((9.0, -12.0, 7.0)))
    fixed = fixed_of(truth)
    if which == "fixed":
        images = prepared(halved(fixed, known_map.FIXED)), prepared(moving)
    else:
        images = prepared(fixed), prepared(halved(moving, known_map.MOVING))
    result = search.align(pyramid(*images), centred(*images), "rigid")
    assert error_mm(result.affine_lps, truth, above=known_map.CENTRE[2]) < 2 * NEAR_MM


@pytest.mark.parametrize("cut", [False, True])
def test_a_right_start_stays_right(cut, moving):
    """Also where half of the fixed head is missing."""
    truth = known_map.AFFINE_LPS
    fixed = fixed_of(truth)
    images = prepared(halved(fixed, known_map.FIXED) if cut else fixed), prepared(moving)
    for wide in (True, False):
        for stage in (search.align, search.polish):
            result = stage(pyramid(*images), [truth], "affine", wide=wide)
            assert error_mm(result.affine_lps, truth, above=known_map.CENTRE[2]) < NEAR_MM
            assert result.value >= pyramid(*images).fine.value(truth) - 1e-5  # sums are rounded


def test_images_without_anything_in_common_keep_the_start():
    """A constant image has no window that counts."""
    flat = known_map.FIXED.image(np.full(known_map.FIXED.size[::-1], 7.0, np.float32))
    images = prepared(flat), prepared(known_map.moving_image())
    start = affine_lps(np.eye(3))
    assert np.array_equal(search.polish(pyramid(*images), [start], "affine", wide=False).affine_lps, start)


def test_what_lies_outside_a_mask_does_not_count(moving):
    """A second, brighter head beside the first one, shifted otherwise, would win without the mask."""
    truth = affine_lps(known_map.rotation((9.0, -12.0, 7.0)))
    image = fixed_of(truth)
    values = sitk.GetArrayFromImage(image)
    values[:, :, :20] = np.random.default_rng(0).uniform(0, 900, values[:, :, :20].shape)
    mask = np.ones(values.shape, dtype=bool)
    mask[:, :, :20] = False
    fixed = prepared(known_map.FIXED.image(values), mask)
    objective = pyramid(fixed, prepared(moving)).coarse
    points = torch.nonzero(objective._valid).numpy()[:, ::-1] * objective.grid.spacing_mm[0]
    index = known_map.FIXED.index_of(points + np.array(objective.grid.origin_lps))
    assert len(index) > 100
    assert index[:, 0].min() > 20
    images = fixed, prepared(moving)
    assert error_mm(search.align(pyramid(*images), centred(*images), "rigid").affine_lps, truth) < 2 * NEAR_MM


def smooth_objective() -> Objective:
    """Blobs of 14 mm in air on a grid of 4 mm: differences of neighbouring voxels are nearly derivatives."""
    grid = Grid.centred([5.0, -10.0, 20.0], 4.0, (30, 32, 34))
    points = np.moveaxis(np.indices(grid.shape), 0, -1)[..., ::-1] * 4.0 + np.array(grid.origin_lps)

    def image(shift: np.ndarray) -> Side:
        rng = np.random.default_rng(3)
        values = sum(
            np.exp(-((points - shift - centre) ** 2).sum(-1) / 400)
            for centre in rng.uniform(-25, 25, (25, 3)) + grid.centre_lps
        )
        return Side(Volume(torch.from_numpy(values / values.max()).float()[None, None], grid.to_lps))

    return Objective(image(np.zeros(3)), image(np.array([3.0, -2.0, 4.0])), grid, 5)


def test_derivatives_are_those_of_the_value():
    objective = smooth_objective()
    here = starts.about(rotation_matrix(np.array([0.03, -0.02, 0.05])) * 1.03, *[objective.centre_lps] * 2)
    evaluation = objective.evaluate(here)
    assert evaluation.value == pytest.approx(objective.value(here), abs=1e-6)

    def value(step: np.ndarray) -> float:
        return objective.value(here @ step_lps(step, objective.centre_lps, objective.radius_mm))

    numeric = np.array([(value(0.2 * e) - value(-0.2 * e)) / 0.4 for e in np.eye(12)])
    assert np.abs(numeric - evaluation.gradient).max() < 0.1 * np.abs(numeric).max()
    cosine = numeric @ evaluation.gradient / np.linalg.norm(numeric) / np.linalg.norm(evaluation.gradient)
    assert cosine > 0.99
    assert np.linalg.eigvalsh(evaluation.curvature).min() > 0


def test_steps_of_six_and_of_twelve_parameters_agree_to_first_order():
    centre = np.array([3.0, 5.0, -7.0])
    rotation = np.array([0.1, -0.2, 0.15, 1.0, 2.0, 3.0])
    small = 1e-4 * rotation
    linear = np.zeros((3, 4))
    x, y, z = small[:3]
    linear[:, :3] = [[0, -z, y], [z, 0, -x], [-y, x, 0]]  # r x (x - c)
    linear[:, 3] = small[3:]
    assert np.allclose(step_lps(small, centre, 50.0), step_lps(linear.ravel(), centre, 50.0), atol=1e-9)


def test_the_penalty_by_hand_and_by_differences():
    """A stretch by 2 along x: C = 4, strain (4 - 1/4) / 4 = 15/16; a rotation costs nothing."""
    assert penalty(np.diag([2.0, 1, 1, 1])) == pytest.approx(0.02 * (15 / 16) ** 2)
    assert penalty(affine_lps(FAR)) == pytest.approx(0, abs=1e-12)
    here = known_map.AFFINE_LPS.copy()
    gradient, hessian = penalty_derivatives(here)

    def value(step: np.ndarray) -> float:
        moved = here.copy()
        moved[:3, :3] = here[:3, :3] @ (np.eye(3) + step.reshape(3, 3))
        return penalty(moved)

    numeric = [(value(1e-5 * e) - value(-1e-5 * e)) / 2e-5 for e in np.eye(9)]
    assert np.allclose(gradient, numeric, atol=1e-8)
    assert np.linalg.eigvalsh(hessian).min() > -1e-12


def test_a_field_of_view_ends_where_content_reaches_its_face():
    """Content touches the first slice along axis 0 alone: every other face is open."""
    data = torch.zeros(1, 1, 10, 12, 14)
    data[..., :6, 3:9, 3:9] = 1
    extent = Extent.of(Volume(data, np.eye(4)))
    assert extent.low.tolist() == [0, -np.inf, -np.inf]
    assert np.isinf(extent.high).all()
    inside = extent.contains(np.eye(4), (10, 12, 14), 2, data.device)
    assert inside is not None
    assert inside.any((1, 2)).tolist() == [False, False, *[True] * 8]
    assert replace(extent, low=np.full(3, -np.inf)).contains(np.eye(4), (10, 12, 14), 2, data.device) is None


def test_turns_leave_no_rotation_far_from_all():
    """42 degrees are what the optimiser must bridge."""
    rng = np.random.default_rng(1)
    quaternions = rng.normal(size=(500, 4))
    others = [sitk.VersorTransform() for _ in quaternions]
    for transform, q in zip(others, quaternions / np.linalg.norm(quaternions, axis=1, keepdims=True), strict=True):
        transform.SetRotation(q.tolist())
    matrices = np.array([np.array(t.GetMatrix()).reshape(3, 3) for t in others])
    turns = starts.turns()
    assert np.allclose(turns @ turns.transpose(0, 2, 1), np.eye(3))
    assert np.allclose(np.linalg.det(turns), 1)
    traces = np.einsum("aij,bij->ab", matrices, turns).max(1)
    assert np.rad2deg(np.arccos(np.clip((traces - 1) / 2, -1, 1))).max() < 42


def test_the_nearest_rigid_map_keeps_the_centre():
    stretched = affine_lps(FAR @ np.diag([1.2, 0.9, 1.1]))
    result = starts.nearest_rigid(stretched, known_map.CENTRE)
    assert np.allclose(result[:3, :3], FAR)
    assert np.allclose(result[:3, :3] @ known_map.CENTRE + result[:3, 3], known_map.CENTRE + known_map.SHIFT)


def test_the_optimiser_never_returns_less_than_it_was_given():
    objective = smooth_objective()
    for shift in np.random.default_rng(2).uniform(-40, 40, (5, 3)):
        start = starts.about(np.eye(3), objective.centre_lps, objective.centre_lps + shift)
        for kind in ("rigid", "affine"):
            result, value = optimise(objective, start, kind, 6)
            assert value >= objective.value(start) - 1e-7
            assert value == pytest.approx(objective.value(result), abs=1e-6)


def doubtful(objective: Objective, affine: np.ndarray) -> bool:
    return search.is_doubtful(objective, affine, objective.value(affine))


def test_what_makes_a_map_doubtful(moving, monkeypatch):
    """This head is nearly an ellipsoid: turned about its centre it agrees rather well."""
    monkeypatch.setattr(search, "CLEAR", 1.15)
    truth = affine_lps(np.eye(3))
    fixed = prepared(fixed_of(truth))
    whole, half = pyramid(fixed, prepared(moving)), pyramid(fixed, prepared(halved(moving, known_map.MOVING)))
    assert not doubtful(whole.coarse, truth)
    assert doubtful(whole.coarse, affine_lps(FAR))
    assert whole.coarse.overlap(truth) == 1
    assert 0.3 < half.coarse.overlap(truth) < 0.6
    assert doubtful(half.coarse, truth)
    monkeypatch.setattr(search, "CLEAR", 0.0)
    assert doubtful(whole.coarse, affine_lps(np.diag([1.0, 1.0, 0.7])))
    assert not doubtful(whole.coarse, affine_lps(0.7 * np.eye(3)))  # a child's head
