"""At the edge of the moving image's field of view each voxel counts as inside or outside as SimpleITK decides it.

The moving image is 1 everywhere and what lies outside is 0, so that one voxel that is decided otherwise is a difference
of 1. Coordinates of some hundred voxels have an error of some 1e-5 voxel in single precision: of 30 pairs with each
kind of map, some have a point that lies closer to the edge.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass

import numpy as np
import pytest
import SimpleITK as sitk
import torch

from LDRCore import geometry, sampling
from LDRCore.geometry import Grid
from LDRCore.transforms import resample
from LDRCore.transforms.field import DenseField, fade_out
from LDRCore.transforms.volume import Volume

PAIRS = 30
SHAPE = 56, 72, 75  # some 300,000 voxels
MOVING = torch.ones(1, 1, 500, 30, 600)
AFFINE, OBLIQUE, PARALLEL = "affine", "field oblique to the fixed image", "field parallel to the fixed image"


@dataclass(frozen=True)
class Pair:
    """Two grids, a map, and where SimpleITK finds the moving image."""

    to_lps: np.ndarray
    moving: Volume
    field: DenseField
    inside: np.ndarray


def rotation(rng: np.random.Generator) -> np.ndarray:
    turn = sitk.Euler3DTransform()
    turn.SetRotation(*rng.uniform(-0.6, 0.6, 3).tolist())
    return np.array(turn.GetMatrix()).reshape(3, 3)


def placed(
    values: torch.Tensor, spacing_mm: np.ndarray, direction: np.ndarray, centre: np.ndarray | float
) -> sitk.Image:
    image = sitk.GetImageFromArray(values.numpy())
    image.SetSpacing(spacing_mm.tolist())
    image.SetDirection(direction.ravel().tolist())
    image.SetOrigin((centre - direction @ (spacing_mm * (np.array(image.GetSize()) - 1) / 2)).tolist())
    return image


@functools.cache
def pairs(kind: str) -> list[Pair]:
    made = []
    for number in range(PAIRS):
        rng = np.random.default_rng((number, len(kind)))
        turn = np.eye(3)[:, [2, 0, 1]] * rng.choice([-1, 1], 3) if kind == PARALLEL else rotation(rng)
        fixed = placed(torch.empty(SHAPE), rng.uniform(1.8, 2.4, 3), turn, rng.uniform(-5, 5, 3))
        moving = placed(MOVING[0, 0], np.array([0.2, 2.5, 0.13]), rotation(rng), rng.uniform(-5, 5, 3))
        affine = np.eye(4)
        affine[:3, :3] = rotation(rng) @ np.diag(rng.uniform(0.9, 1.1, 3))
        affine[:3, 3] = rng.uniform(-6, 6, 3)
        grid = Grid.centred(rng.uniform(-4, 4, 3).tolist(), 9.0, (16, 17, 18))
        u = np.zeros((1, 3, *grid.shape)) if kind == AFFINE else rng.normal(0, 0.5, (1, 3, *grid.shape))
        field = DenseField(fade_out(torch.from_numpy(u.astype(np.float32)), 3), grid.padded(3), affine, 3)
        transform = field.affine() if kind == AFFINE else field.transform()
        inside = sitk.GetArrayFromImage(sitk.Resample(moving, fixed, transform, sitk.sitkLinear, 0.0)) > 0
        volume = Volume(MOVING, geometry.index_to_lps(moving), lowest=0.0)
        made.append(Pair(geometry.index_to_lps(fixed), volume, field, inside))
    return made


def differing(pair: Pair, values: np.ndarray) -> int:
    assert 0.05 < pair.inside.mean() < 0.95
    assert set(np.unique(values.round(4)).tolist()) == {0.0, 1.0}
    return int(((values > 0.5) != pair.inside).sum())


@pytest.mark.parametrize("kind", [AFFINE, OBLIQUE, PARALLEL])
def test_no_voxel_of_a_warped_image_is_decided_otherwise(kind, backend):
    counts = [differing(p, resample.warp(p.moving, SHAPE, p.to_lps, p.field)) for p in pairs(kind)]
    assert counts == [0] * PAIRS


def test_no_voxel_is_decided_otherwise_without_a_displacement(backend):
    counts = []
    for pair in pairs(AFFINE):
        matrix = pair.moving.from_lps @ pair.field.affine_lps @ pair.to_lps
        slabs = sampling.slabs_on_lattice(pair.moving.data[0, 0], SHAPE, matrix, padding="half")
        counts.append(differing(pair, np.concatenate([values.numpy() for _, values in slabs])))
    assert counts == [0] * PAIRS


def test_half_a_voxel_beyond_the_last_centre_is_outside_half_a_voxel_before_the_first_is_inside(backend):
    moving = placed(torch.ones(4, 5, 6), np.ones(3), np.eye(3), np.zeros(3))
    fixed = placed(torch.ones(4, 5, 10), np.ones(3), np.eye(3), np.array([0.5, 0, 0]))
    expected = sitk.GetArrayFromImage(sitk.Resample(moving, fixed, sitk.Transform(), sitk.sitkLinear, 0.0))
    assert expected[0, 0].tolist() == [0, 1, 1, 1, 1, 1, 1, 0, 0, 0]
    matrix = np.linalg.inv(geometry.index_to_lps(moving)) @ geometry.index_to_lps(fixed)
    slabs = sampling.slabs_on_lattice(torch.ones(4, 5, 6), (4, 5, 10), matrix, padding="half")
    assert np.array_equal(np.concatenate([values.numpy() for _, values in slabs]) > 0.5, expected > 0.5)


@pytest.mark.parametrize("displaced", [False, True])
@pytest.mark.parametrize("fixed_turned", [False, True])
def test_faces_that_graze_the_edge(displaced, fixed_turned, backend):
    """All six faces of the fixed grid lie half a voxel beyond the last centres, to within some 1e-6 voxel."""
    rng = np.random.default_rng(3)
    affine = np.eye(4)
    affine[:3, :3], affine[:3, 3] = rotation(rng), rng.uniform(-6, 6, 3)
    moving_turn = rotation(rng) if fixed_turned else affine[:3, :3]
    moving = placed(torch.ones(21, 23, 25), np.array([1.1, 0.9, 1.3]), moving_turn, rng.uniform(-5, 5, 3))
    shift = np.eye(4)
    shift[:3, :3] += rng.normal(0, 1e-7, (3, 3))
    shift[:3, 3] = -0.5 + 1e-8  # so that no point is on the edge itself
    grid = Grid.centred((0.0, 0.0, 0.0), 9.0, (12, 12, 12))
    u = np.zeros((1, 3, *grid.shape))
    if displaced:
        u += rng.normal(0.3, 1e-7, u.shape)
    field = DenseField(fade_out(torch.from_numpy(u.astype(np.float32)), 3), grid.padded(3), affine, 3)
    to_lps = np.linalg.inv(affine) @ geometry.index_to_lps(moving) @ shift
    to_lps[:3, 3] -= grid.to_lps[:3, :3] @ u.mean((0, 2, 3, 4))
    columns = to_lps[:3, 2::-1]  # along x, y, z
    fixed = placed(
        torch.empty(22, 24, 26), np.linalg.norm(columns, axis=0), columns / np.linalg.norm(columns, axis=0), 0
    )
    fixed.SetOrigin(to_lps[:3, 3].tolist())
    u_mm = geometry.displacement_to_lps(field.displacement_vox[0].numpy().astype(np.float64), field.grid)
    transform = geometry.dense_then_affine(u_mm, field.grid, affine)
    expected = sitk.GetArrayFromImage(sitk.Resample(moving, fixed, transform, sitk.sitkLinear, 0.0)) > 0
    assert 100 < expected[0].sum() + expected[:, 0].sum() + expected[:, :, 0].sum() < 1500
    volume = Volume(torch.ones(1, 1, 21, 23, 25), geometry.index_to_lps(moving), lowest=0.0)
    warped = resample.warp(volume, expected.shape, geometry.index_to_lps(fixed), field)
    assert int(((warped > 0.5) != expected).sum()) == 0
