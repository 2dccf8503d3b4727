"""The affine stage with a stem that is a stub: how the steps of its passes are put together, and which one is kept."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest
import torch

from LDRCore import geometry
from LDRCore.alignment import starts
from LDRCore.geometry import Grid
from LDRCore.pipeline import affine
from LDRCore.pipeline.affine import predict_affine
from LDRCore.pipeline.intensities import Intensities
from LDRCore.pipeline.preprocess import PreparedImage, prepare
from LDRCore.transforms.volume import Volume
from Testing import known_map

CENTRE = np.array([10.0, -20.0, 30.0])  # x, y, z mm: of the stem's grid
SHAPE = (32, 48, 64)
SPACING_MM = 4.0
COS, SIN = np.cos(0.4), np.sin(0.4)
# A stem speaks of tensor axes (z, y, x): z' = cos z - sin y, y' = sin z + cos y
ROTATION = torch.tensor([[COS, -SIN, 0.0], [SIN, COS, 0.0], [0.0, 0.0, 1.0]])
TRANSLATION_VOX = torch.tensor([2.0, -1.0, 3.0])  # z, y, x
# The same written out in LPS mm (x, y, z), the rotation about CENTRE
ROTATION_LPS = np.eye(4)
ROTATION_LPS[:3, :3] = [[1, 0, 0], [0, COS, SIN], [0, -SIN, COS]]
ROTATION_LPS[:3, 3] = CENTRE - ROTATION_LPS[:3, :3] @ CENTRE
TRANSLATION_LPS = np.eye(4)
TRANSLATION_LPS[:3, 3] = 12.0, -4.0, 8.0


class StubStem:
    """Says a rotation at first, then a translation, then nothing; keeps what it was shown."""

    def __init__(self) -> None:
        self.shown: list[torch.Tensor] = []

    def predict(self, moving: torch.Tensor, fixed: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        steps = [(ROTATION, torch.zeros(3)), (torch.eye(3), TRANSLATION_VOX)]
        done = len(self.shown)
        self.shown.append(moving)
        matrix, translation = steps[done] if done < 2 else (torch.eye(3), torch.zeros(3))
        return matrix.float().expand(len(moving), 3, 3), translation.expand(len(moving), 3)


def model(stem: StubStem | None, passes: int) -> SimpleNamespace:
    grid = {"stem_shape": SHAPE, "stem_spacing_mm": SPACING_MM, "stem_passes": passes}
    return SimpleNamespace(stem=stem, card={"working_grid": grid})


def head(points: np.ndarray) -> np.ndarray:
    """Three blobs of different size in the moving image's space, 0 to 1."""
    blobs = (((0, 0, 0), 30, 0.6), ((25, -10, 15), 14, 0.4), ((-15, 30, -20), 18, 0.5))
    distances = [(((points - CENTRE - np.array(centre)) / width) ** 2).sum(-1) for centre, width, _ in blobs]
    return sum(height * np.exp(-d / 2) for d, (_, _, height) in zip(distances, blobs, strict=True))


def prepared(target_from_image: np.ndarray) -> PreparedImage:
    """``head(M x)`` on a grid of 3 mm about CENTRE."""
    grid = Grid.centred(CENTRE.tolist(), 3.0, (70, 72, 74))
    points = geometry.points_lps(grid.reference_image()) @ target_from_image[:3, :3].T + target_from_image[:3, 3]
    volume = Volume(torch.from_numpy(head(points)).float()[None, None], grid.to_lps)
    box = np.stack([CENTRE - 50, CENTRE + 50])
    return PreparedImage(volume, volume, volume, Intensities(0.0, 1.0), CENTRE, box)


def test_later_steps_are_applied_to_fixed_points_first():
    """moving(R x) is what the second pass sees; a step S affine_lps there makes it moving(R S x): the map is R S."""
    expected = ROTATION_LPS @ TRANSLATION_LPS
    assert np.abs(expected - TRANSLATION_LPS @ ROTATION_LPS).max() > 2  # mm: the order matters
    stem = StubStem()
    moving = prepared(np.eye(4))
    affine_lps = predict_affine(model(stem, 2), prepared(expected), moving, [np.eye(4)])
    assert np.abs(affine_lps - expected).max() < 1e-4
    grid = Grid.centred(CENTRE.tolist(), SPACING_MM, SHAPE)
    assert torch.allclose(stem.shown[0], moving.coarse.on(grid))
    assert torch.allclose(stem.shown[1], moving.coarse.on(grid, ROTATION_LPS), atol=1e-4)


def test_a_step_follows_the_initial_transform():
    """moving(T0 x) is shown; the step R makes it moving(T0 R x)."""
    initial = np.eye(4)
    initial[:3, 3] = 20.0, 10.0, -15.0
    expected = initial @ ROTATION_LPS
    affine_lps = predict_affine(model(StubStem(), 1), prepared(expected), prepared(np.eye(4)), [initial])
    assert np.abs(affine_lps - expected).max() < 1e-4


def test_the_best_correlated_of_all_candidates_and_passes_is_kept():
    """The stub's steps do harm here, and the second candidate is right as it is."""
    wrong = np.eye(4)
    wrong[:3, 3] = 30.0, 0.0, 0.0
    candidates = [wrong, TRANSLATION_LPS]
    affine_lps = predict_affine(model(StubStem(), 3), prepared(TRANSLATION_LPS), prepared(np.eye(4)), candidates)
    assert np.array_equal(affine_lps, TRANSLATION_LPS)
    assert candidates[0] is wrong  # and the list is the caller's


def test_without_a_stem_the_best_correlated_candidate_holds():
    for candidates in ([TRANSLATION_LPS, np.eye(4)], [np.eye(4), TRANSLATION_LPS]):
        affine_lps = predict_affine(model(None, 2), prepared(TRANSLATION_LPS), prepared(np.eye(4)), candidates)
        assert affine_lps is TRANSLATION_LPS


def test_only_the_best_candidate_goes_on_after_the_first_pass():
    stem = StubStem()
    predict_affine(model(stem, 2), prepared(np.eye(4)), prepared(np.eye(4)), [TRANSLATION_LPS, np.eye(4)])
    assert [len(moving) for moving in stem.shown] == pytest.approx([2, 1])


def test_a_stem_cannot_spoil_a_right_start(monkeypatch):
    """The stem predicts a turn by 100 degrees; half of the fixed head is cut off."""
    moving = prepare(known_map.moving_image(), None, fine_mm=2.0, coarse_mm=4.0)
    mapped = known_map.FIXED.points()[29:] @ known_map.MATRIX.T + known_map.AFFINE_LPS[:3, 3]
    image = known_map.FIXED.image(np.pad(known_map.intensity(mapped), ((29, 0), (0, 0), (0, 0))).astype(np.float32))
    fixed = prepare(image[:, :, 29:], None, fine_mm=2.0, coarse_mm=4.0)
    wrong = starts.about(known_map.rotation((0.0, 0.0, 100.0)), fixed.centroid_lps, moving.centroid_lps)
    monkeypatch.setattr(affine, "predict_affine", lambda *_: wrong)
    result = affine.estimate_affine(model(StubStem(), 3), fixed, moving, [known_map.AFFINE_LPS], wide=False)
    inside = mapped[known_map.intensity(mapped) > 300]  # in moving space
    back = (inside - known_map.AFFINE_LPS[:3, 3]) @ np.linalg.inv(known_map.MATRIX).T
    again = back @ result.affine_lps[:3, :3].T + result.affine_lps[:3, 3]
    assert np.linalg.norm(again - inside, axis=1).max() < 1.0
