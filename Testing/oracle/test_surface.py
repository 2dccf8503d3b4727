"""Surface distances against MONAI, SimpleITK and by hand."""

from __future__ import annotations

import numpy as np
import pytest
import SimpleITK as sitk
import torch
from monai.metrics import compute_average_surface_distance, compute_hausdorff_distance

from LDRCore.evaluation import surface

SPACING = (2.5, 0.8, 1.3)  # mm along the tensor axes


def ellipsoid(centre: tuple[float, ...], radii: tuple[float, ...], shape=(20, 24, 22)) -> np.ndarray:
    index = np.stack(np.meshgrid(*[np.arange(n) for n in shape], indexing="ij"), -1)
    return (((index - np.array(centre)) / np.array(radii)) ** 2).sum(-1) < 1


@pytest.fixture
def maps() -> tuple[np.ndarray, np.ndarray]:
    """Three structures each, the last one cut by the image's border, one that the first map lacks."""
    labels, truth = np.zeros((2, 20, 24, 22), np.int16)
    for label, (a, b) in {
        1: (((9, 8, 8), (5, 6, 4)), ((8, 9, 9), (4, 6, 5))),
        2: (((10, 18, 14), (3, 4, 5)), ((11, 17, 15), (4, 4, 4))),
        7: (((2, 3, 18), (4, 4, 5)), ((3, 4, 19), (4, 3, 5))),
    }.items():
        labels[ellipsoid(*a)] = label
        truth[ellipsoid(*b)] = label
    truth[19, 0, 0] = 9
    return labels, truth


def test_distances_are_monais(maps):
    labels, truth = maps
    ours = surface.surface_distances(labels, truth, SPACING)
    for label in (1, 2, 7):
        pair = [torch.from_numpy(m == label)[None, None] for m in maps]
        settings = {"include_background": True, "spacing": SPACING}
        assert ours[label].hd95_mm == pytest.approx(
            float(compute_hausdorff_distance(*pair, percentile=95, **settings)), abs=1e-4
        )
        assert ours[label].hausdorff_mm == pytest.approx(float(compute_hausdorff_distance(*pair, **settings)), abs=1e-4)
        assert ours[label].mean_mm == pytest.approx(
            float(compute_average_surface_distance(*pair, symmetric=True, **settings)), abs=1e-4
        )
    assert ours[9] is None


def test_largest_distance_is_simpleitks(maps):
    labels, truth = maps
    oracle = sitk.HausdorffDistanceImageFilter()
    for label, distance in surface.surface_distances(labels, truth, SPACING).items():
        if distance is None:
            continue
        images = [sitk.GetImageFromArray((m == label).astype(np.uint8)) for m in maps]
        for image in images:
            image.SetSpacing(SPACING[::-1])
        oracle.Execute(*images)
        assert distance.hausdorff_mm == pytest.approx(oracle.GetHausdorffDistance(), abs=1e-4)


def test_two_plates_by_hand():
    """Flat plates of one voxel, three planes of 2.5 mm apart: every distance is 7.5 mm."""
    labels, truth = np.zeros((2, 8, 5, 5), np.uint8)
    labels[1], truth[4] = 3, 3
    assert surface.surface_distances(labels, truth, SPACING) == {3: surface.SurfaceDistance(7.5, 7.5, 7.5)}


def test_equal_maps_have_distance_zero(maps):
    assert set(surface.surface_distances(maps[1], maps[1], SPACING).values()) == {surface.SurfaceDistance(0, 0, 0)}


def test_shapes_are_checked():
    with pytest.raises(ValueError, match=r"one shape, got \(2, 2, 2\) and \(2, 2, 3\)"):
        surface.surface_distances(np.zeros((2, 2, 2)), np.zeros((2, 2, 3)), SPACING)
