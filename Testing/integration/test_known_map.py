"""Every order, axis and unit against one map that is known by formula (see `known_map`), in millimetres.

The field's own grid is anisotropic, too. SimpleITK resamples and maps points through a transform that is put together
here, without the package.
"""

from __future__ import annotations

import numpy as np
import pytest
import SimpleITK as sitk
import torch

import LDRCore
from LDRCore import geometry
from LDRCore.evaluation import learn2reg
from LDRCore.geometry import Grid
from LDRCore.transforms import inversion, resample
from LDRCore.transforms.field import DenseField, invert_field
from LDRCore.transforms.volume import Volume
from Testing import known_map
from Testing.known_map import CENTRE, FIXED, MOVING, Lattice

FIELD = Lattice((78, 100, 62), (3.2, 2.5, 4.0), np.eye(3), CENTRE)  # covers FIXED
GRID = Grid(tuple(FIELD.origin_lps.tolist()), (4.0, 2.5, 3.2), (62, 100, 78))  # the same in the package's order

EXACT_MM = 1e-3  # float32 displacements, at voxels of their grid
BETWEEN_VOXELS_MM = 0.1  # linear interpolation: h^2 / 8 |u''| is 16 / 8 x 0.03 mm
LANDMARKS = known_map.landmarks()


@pytest.fixture(scope="module")
def displacement_mm() -> np.ndarray:
    """(k, j, i, 3): u by formula at the field's voxels, x, y, z in mm."""
    return known_map.displacement(FIELD.points())


@pytest.fixture(scope="module")
def displacement_vox(displacement_mm) -> np.ndarray:
    """(3, k, j, i): along tensor axes, in voxels, written out."""
    x, y, z = np.moveaxis(displacement_mm, -1, 0)
    return np.stack([z / 4.0, y / 2.5, x / 3.2])


@pytest.fixture(scope="module")
def dense(displacement_vox) -> DenseField:
    return DenseField(torch.from_numpy(displacement_vox).float()[None], GRID, known_map.AFFINE_LPS)


@pytest.fixture(scope="module")
def oracle(displacement_mm) -> sitk.CompositeTransform:
    """The same map by SimpleITK alone."""
    composite = sitk.CompositeTransform(3)
    composite.AddTransform(affine())
    composite.AddTransform(sitk.DisplacementFieldTransform(FIELD.image(displacement_mm)))  # applied first
    return composite


def affine() -> sitk.AffineTransform:
    return sitk.AffineTransform(known_map.MATRIX.ravel().tolist(), known_map.AFFINE_LPS[:3, 3].tolist())


def smooth(points: np.ndarray) -> np.ndarray:
    """An image by formula without edges, so that linear interpolation is good to 1: 40 to 160."""
    x, y, z = np.moveaxis(points - CENTRE, -1, 0)
    return 100 + 25 * np.sin(x / 13 + y / 40) + 20 * np.sin(y / 11 - z / 35) + 15 * np.sin(z / 12 + x / 45)


def inside_moving() -> np.ndarray:
    """(k, j, i) where T takes voxels of the fixed image into the moving image."""
    index = MOVING.index_of(known_map.map_points(FIXED.points()))
    return ((index > 0) & (index < np.array(MOVING.size) - 1)).all(-1)


def array(image: sitk.Image) -> np.ndarray:
    return sitk.GetArrayFromImage(image).astype(float)


def test_the_pair_is_awkward():
    for lattice, handed in ((FIXED, -1), (MOVING, 1)):
        assert np.abs(lattice.direction).max() < 0.999
        assert np.linalg.det(lattice.direction) == pytest.approx(handed)
        assert len(set(lattice.spacing_mm)) == len(set(lattice.size)) == 3
        index = np.array([7, 11, 13])
        point = lattice.image(np.zeros(lattice.size[::-1])).TransformIndexToPhysicalPoint(index.tolist())
        assert lattice.points()[13, 11, 7] == pytest.approx(point, abs=1e-9)
        assert lattice.index_of(np.array(point)) == pytest.approx(index)
    corners = FIXED.points()[:: FIXED.size[2] - 1, :: FIXED.size[1] - 1, :: FIXED.size[0] - 1]
    field_index = FIELD.index_of(corners)
    assert ((field_index > 0) & (field_index < np.array(FIELD.size) - 1)).all()  # FIELD covers FIXED
    assert np.abs(known_map.displacement(LANDMARKS)).max() > 4


def test_the_formula_of_the_jacobian_is_the_derivative_of_the_map():
    step = 1e-4
    columns = [
        known_map.map_points(LANDMARKS + step * e) - known_map.map_points(LANDMARKS - step * e) for e in np.eye(3)
    ]
    expected = np.linalg.det(np.stack(columns, -1) / (2 * step))
    assert known_map.jacobian_determinant(LANDMARKS) == pytest.approx(expected, abs=1e-8)


def test_a_grid_lies_where_its_voxels_are():
    assert (GRID.to_lps @ [13, 11, 7, 1])[:3] == pytest.approx(FIELD.points()[13, 11, 7])
    assert np.allclose(geometry.points_lps(GRID.reference_image()), FIELD.points())
    assert np.allclose(geometry.points_lps(FIXED.image(np.zeros(FIXED.size[::-1]))), FIXED.points())


def test_voxels_and_millimetres_of_a_displacement(displacement_mm, displacement_vox):
    assert np.abs(geometry.displacement_to_lps(displacement_vox, GRID) - displacement_mm).max() < 1e-9
    assert np.abs(geometry.lps_to_displacement(displacement_mm, GRID) - displacement_vox).max() < 1e-9


def test_a_field_image_on_an_oblique_grid_in_voxels():
    """``field_in_voxels``: A^-1 (T(x) - x) along the image's own axes, against the index that T(x) has in it."""
    points = FIXED.points()
    field = FIXED.image(known_map.map_points(points) - points)
    moved = FIXED.index_of(known_map.map_points(points)) - FIXED.index_of(points)
    assert np.abs(geometry.field_in_voxels(field) - np.moveaxis(moved[..., ::-1], -1, 0)).max() < EXACT_MM


def test_the_transform_of_a_dense_field_is_the_map(dense, oracle):
    transform = dense.transform()
    voxels = FIELD.points()[5:-5:9, 5:-5:9, 5:-5:9].reshape(-1, 3)
    assert np.abs(LDRCore.transform_points(voxels, transform) - known_map.map_points(voxels)).max() < EXACT_MM
    moved = LDRCore.transform_points(LANDMARKS, transform)
    assert np.abs(moved - known_map.map_points(LANDMARKS)).max() < BETWEEN_VOXELS_MM
    assert np.abs(moved - [oracle.TransformPoint(p) for p in LANDMARKS.tolist()]).max() < EXACT_MM
    assert np.allclose(geometry.linear_matrix(dense.affine()), known_map.AFFINE_LPS, atol=1e-12)


def test_the_warped_image_is_the_moving_image_seen_through_the_map(dense, oracle):
    moving = MOVING.image(smooth(MOVING.points()).astype(np.float32))
    fixed = FIXED.image(np.zeros(FIXED.size[::-1], np.float32))
    volume = Volume(torch.from_numpy(sitk.GetArrayFromImage(moving))[None, None], geometry.index_to_lps(moving))
    warped = resample.warp(volume, FIXED.size[::-1], geometry.index_to_lps(fixed), dense)
    inside = inside_moving()
    assert 0.3 < inside.mean() < 0.99
    assert np.abs(warped - smooth(known_map.map_points(FIXED.points())))[inside].max() < 2.5
    theirs = array(sitk.Resample(moving, fixed, oracle, sitk.sitkLinear, float(array(moving).min())))
    assert (
        np.abs(warped - theirs) > 0.1
    ).mean() < 1e-4  # of a range of 120; a point on the very edge may fall either way
    by_transform = array(LDRCore.warp_image(moving, dense.transform(), fixed))
    assert (np.abs(by_transform - theirs) > 0.1).mean() < 1e-4


def test_the_jacobian_determinant_is_that_of_the_map(dense):
    points = FIXED.points()
    expected = known_map.jacobian_determinant(points)
    assert expected.max() - expected.min() > 0.8
    image = FIXED.image(np.zeros(FIXED.size[::-1]))
    of_dense = resample.jacobian_determinant(FIXED.size[::-1], geometry.index_to_lps(image), dense)
    inner = (slice(1, -1),) * 3
    # the derivative of a linearly interpolated u is off by up to h / 2 |u''|, 2 x 0.03
    assert np.abs(of_dense - expected)[inner].max() < 0.1
    assert np.abs(of_dense - expected)[inner].mean() < 0.01
    of_field = array(geometry.jacobian_determinant_image(FIXED.image(known_map.map_points(points) - points)))
    assert np.abs(of_field - expected)[inner].max() < 0.01


def test_the_inverse_brings_mapped_points_back():
    """On a coarser field, whose inverse takes a third of the time: h^2 / 8 |u''| is 36 / 8 x 0.03 mm."""
    lattice = Lattice((52, 64, 42), (4.8, 4.0, 6.0), np.eye(3), CENTRE)
    grid = Grid(tuple(lattice.origin_lps.tolist()), (6.0, 4.0, 4.8), (42, 64, 52))
    u = geometry.lps_to_displacement(known_map.displacement(lattice.points()).astype(np.float32), grid)
    coarse = DenseField(torch.from_numpy(u)[None], grid, known_map.AFFINE_LPS)
    mapped = known_map.map_points(LANDMARKS)
    inverse = invert_field(coarse)
    by_field = geometry.affine_then_dense(inverse.displacement_mm(), inverse.grid, inverse.affine_lps)
    by_transform, told = inversion.invert_transform(coarse.transform(), FIXED.image(np.zeros(FIXED.size[::-1])))
    assert 0 < told.mean < told.p99_9 <= told.max < 0.3
    for back in (by_field, by_transform):
        assert np.abs(LDRCore.transform_points(mapped, back) - LANDMARKS).max() < 0.3


def test_any_transform_is_inverted_on_a_grid_of_its_own(oracle):
    """Behind one more linear transform it is none of the package's own, so it is sampled first."""
    shift = np.array([3.0, -4.0, 5.0])
    other = sitk.CompositeTransform([sitk.TranslationTransform(3, shift.tolist()), oracle])
    back, _ = inversion.invert_transform(other, FIXED.image(np.zeros(FIXED.size[::-1])))
    mapped = known_map.map_points(LANDMARKS) + shift
    assert np.abs(LDRCore.transform_points(mapped, back) - LANDMARKS).max() < 2 * BETWEEN_VOXELS_MM


def test_learn2reg_counts_voxels_of_the_moving_array(dense):
    fixed, moving = (lattice.image(np.zeros(lattice.size[::-1])) for lattice in (FIXED, MOVING))
    points = FIXED.points()
    expected = MOVING.index_of(known_map.map_points(points)) - np.rint(FIXED.index_of(points))
    displacement_vox = learn2reg.displacement_in_voxels(dense.transform(), fixed, moving)
    assert displacement_vox.shape == (*FIXED.size, 3)
    assert (
        np.abs(displacement_vox.transpose(2, 1, 0, 3) - expected).max() < BETWEEN_VOXELS_MM / min(MOVING.spacing_mm) * 2
    )


@pytest.fixture(scope="module")
def pair() -> tuple[sitk.Image, sitk.Image]:
    return known_map.fixed_image(), known_map.moving_image()


def error_mm(transform: sitk.Transform) -> float:
    """Mean distance of the landmarks from where the map takes them."""
    off = LDRCore.transform_points(LANDMARKS, transform) - known_map.map_points(LANDMARKS)
    return float(np.linalg.norm(off, axis=1).mean())


def test_registration_finds_the_map(pair):
    """22 mm at first, 8 after the affine stage, 5 at the end: large smooth parts of the head show no motion."""
    result = LDRCore.register(*pair, inverse=True)
    before, aligned, after = (
        error_mm(t) for t in (sitk.Transform(3, sitk.sitkIdentity), result.affine, result.transform)
    )
    assert aligned < before / 2
    assert after < 0.75 * aligned
    assert after < before / 4
    back = LDRCore.transform_points(LDRCore.transform_points(LANDMARKS, result.transform), result.inverse_transform)
    assert np.linalg.norm(back - LANDMARKS, axis=1).mean() < 0.2
    points = geometry.points_lps(result.displacement_field)[20:40:5, 30:70:10, 30:60:10].reshape(-1, 3)
    field = array(result.displacement_field)[20:40:5, 30:70:10, 30:60:10].reshape(-1, 3)
    assert np.abs(LDRCore.transform_points(points, result.transform) - points - field).max() < EXACT_MM


def test_the_dense_stage_finds_what_a_known_affine_leaves(pair):
    """Only u is left: 3.9 mm, then 2.5."""
    result = LDRCore.register(*pair, initial=affine(), affine=False)
    assert error_mm(result.affine) == pytest.approx(error_mm(affine()), abs=1e-6)
    assert error_mm(result.transform) < 0.75 * error_mm(affine())
