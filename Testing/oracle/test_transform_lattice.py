"""Transforms of other programs as displacements of a working grid, against SimpleITK and by hand, in millimetres."""

from __future__ import annotations

import numpy as np
import pytest
import SimpleITK as sitk
import torch

from LDRCore import RegistrationError, geometry
from LDRCore.geometry import Grid
from LDRCore.io.transforms import transform_lattice
from LDRCore.transforms import spatial

GRID = Grid((-31.0, 12.0, 7.5), (3.0, 2.0, 1.5), (9, 12, 14))
MATRIX = np.array([[1.05, 0.1, -0.02, 3.0], [-0.08, 0.9, 0.05, -2.0], [0.03, 0.01, 1.1, 1.5], [0, 0, 0, 1]])
ROTATION = np.array([[0.36, 0.48, -0.8], [-0.8, 0.6, 0.0], [0.48, 0.64, 0.6]])


def oblique_image() -> sitk.Image:
    """An empty image that is oblique, flipped and anisotropic, and covers the grid with room to spare."""
    image = sitk.Image((60, 40, 50), sitk.sitkUInt8)
    image.SetSpacing((1.2, 2.5, 1.9))
    direction = ROTATION @ np.diag([1, -1, 1])
    image.SetDirection(direction.ravel().tolist())
    middle = np.array(image.TransformContinuousIndexToPhysicalPoint([(n - 1) / 2 for n in image.GetSize()]))
    image.SetOrigin((GRID.centre_lps - middle).tolist())
    return image


def transform_on_grid(transform, grid: Grid) -> np.ndarray:
    moved = transform_lattice(transform, grid.to_lps, grid.shape)
    return geometry.lps_to_displacement(moved - geometry.points_lps(grid.reference_image()), grid).astype(np.float32)


def affine() -> sitk.AffineTransform:
    return geometry.affine_transform(MATRIX)


def bspline() -> sitk.BSplineTransform:
    image = oblique_image()
    transform = sitk.BSplineTransformInitializer(image, (6, 5, 6))
    count = transform.GetNumberOfParameters()
    transform.SetParameters((8 * np.random.default_rng(0).standard_normal(count)).tolist())
    return transform


def points() -> np.ndarray:
    """(N, 3) LPS mm of all voxels of the grid, written out from its definition."""
    x, y, z = GRID.origin_lps
    k, j, i = np.meshgrid(*[np.arange(n) for n in GRID.shape], indexing="ij")
    return np.stack([x + 1.5 * i, y + 2.0 * j, z + 3.0 * k], -1).reshape(-1, 3)


def in_voxels(moved: np.ndarray) -> np.ndarray:
    """Images of `points` as the displacement that is expected."""
    u = (moved - points()).reshape(*GRID.shape, 3)
    return np.stack([u[..., 2] / 3.0, u[..., 1] / 2.0, u[..., 0] / 1.5])


def pointwise(transform: sitk.Transform) -> np.ndarray:
    return in_voxels(np.array([transform.TransformPoint(p) for p in points().tolist()]))


def test_an_affine_is_exact():
    displacement_vox = transform_on_grid(affine(), GRID)
    assert displacement_vox.shape == (3, 9, 12, 14)
    expected = in_voxels(points() @ MATRIX[:3, :3].T + MATRIX[:3, 3])
    assert np.abs(expected).max() > 2
    assert np.abs(displacement_vox - expected).max() < 2e-6


def test_a_shift_by_hand():
    shift = sitk.TranslationTransform(3, (1.5, -4.0, 9.0))  # x, y, z: one voxel, minus two, three
    displacement_vox = transform_on_grid(shift, GRID)
    assert [np.unique(component).tolist() for component in displacement_vox] == [[3.0], [-2.0], [1.0]]


@pytest.mark.parametrize("suffix", [".h5", ".tfm", ".mat"])
def test_transform_files(tmp_path, suffix):
    path = tmp_path / f"affine{suffix}"
    sitk.WriteTransform(affine(), str(path))
    assert np.abs(transform_on_grid(path, GRID) - transform_on_grid(affine(), GRID)).max() < 1e-6


def test_the_affine_class_that_ants_writes(tmp_path):
    path = tmp_path / "0GenericAffine.tfm"
    numbers = " ".join(str(v) for v in [*MATRIX[:3, :3].ravel(), *MATRIX[:3, 3]])
    path.write_text(
        "#Insight Transform File V1.0\n#Transform 0\nTransform: MatrixOffsetTransformBase_double_3_3\n"
        f"Parameters: {numbers}\nFixedParameters: 5 -3 2\n"
    )
    centre = np.array([5.0, -3.0, 2.0])
    expected = in_voxels((points() - centre) @ MATRIX[:3, :3].T + centre + MATRIX[:3, 3])
    assert np.abs(transform_on_grid(str(path), GRID) - expected).max() < 2e-6


@pytest.mark.parametrize("kind", ["bent", "composite"])
def test_bent_transforms_go_where_simpleitk_sends_every_point(tmp_path, kind):
    transform: sitk.Transform = bspline()
    if kind == "composite":
        transform = sitk.CompositeTransform([affine(), bspline()])
    path = tmp_path / "bent.h5"
    sitk.WriteTransform(transform, str(path))
    expected = pointwise(transform)
    assert np.abs(expected).max() > 2
    assert np.abs(transform_on_grid(path, GRID) - expected).max() < 1e-5


@pytest.mark.parametrize("suffix", [".nii.gz", ".mha", ".nrrd"])
def test_a_field_on_an_oblique_anisotropic_grid(tmp_path, suffix):
    """SimpleITK samples an affine map there; linear interpolation of it is exact: the grid must see the map again."""
    image = oblique_image()
    field = sitk.TransformToDisplacementField(
        affine(), sitk.sitkVectorFloat64, image.GetSize(), image.GetOrigin(), image.GetSpacing(), image.GetDirection()
    )
    path = tmp_path / f"field{suffix}"
    sitk.WriteImage(field, str(path))
    expected = in_voxels(points() @ MATRIX[:3, :3].T + MATRIX[:3, 3])
    assert np.abs(transform_on_grid(path, GRID) - expected).max() < 1e-5  # NIfTI headers are float32


def test_a_bent_field_is_interpolated_linearly(tmp_path):
    """Against trilinear interpolation written out in numpy, on the field's own oblique axes."""
    image = oblique_image()
    field = geometry.displacement_field_image(bspline(), image)
    path = tmp_path / "1Warp.nii.gz"
    sitk.WriteImage(field, str(path))
    vectors = sitk.GetArrayFromImage(field).astype(float)
    direction = np.array(image.GetDirection()).reshape(3, 3)
    index = ((points() - image.GetOrigin()) @ direction / image.GetSpacing())[:, ::-1]  # k, j, i
    low = np.floor(index).astype(int)
    share = index - low
    moved = points()
    for corner in np.ndindex(2, 2, 2):
        weight = np.prod(np.where(corner, share, 1 - share), axis=1)
        moved += weight[:, None] * vectors[tuple((low + corner).T)]
    expected = in_voxels(moved)
    assert np.abs(expected).max() > 1
    assert np.abs(transform_on_grid(path, GRID) - expected).max() < 1e-4


def test_warping_by_it_is_resampling_by_simpleitk():
    """The convention end to end: a picture on the grid, pulled by tensors and by ITK."""
    values = np.random.default_rng(1).standard_normal(GRID.shape).astype(np.float32)
    picture = sitk.GetImageFromArray(values)
    picture.CopyInformation(GRID.reference_image())
    theirs = sitk.GetArrayFromImage(sitk.Resample(picture, picture, bspline(), sitk.sitkLinear, np.nan))
    displacement_vox = torch.from_numpy(transform_on_grid(bspline(), GRID))[None]
    ours = spatial.warp(torch.from_numpy(values)[None, None], displacement_vox, padding="border")[0, 0].numpy()
    inside = np.zeros(GRID.shape, bool)
    mapped = np.stack(np.meshgrid(*[np.arange(n) for n in GRID.shape], indexing="ij")) + displacement_vox[0].numpy()
    inside[:] = ((mapped > 0) & (mapped < np.array(GRID.shape).reshape(3, 1, 1, 1) - 1)).all(0)
    assert inside.mean() > 0.3
    assert np.abs(ours - theirs)[inside].max() < 1e-4


def test_a_field_that_does_not_cover_the_grid_moves_nothing_outside():
    small = GRID.padded(-3).reference_image()
    shifted = geometry.displacement_field_image(sitk.TranslationTransform(3, (1.5, 2.0, 3.0)), small)
    field = sitk.DisplacementFieldTransform(sitk.Cast(shifted, sitk.sitkVectorFloat64))
    displacement_vox = transform_on_grid(field, GRID)
    assert np.all(displacement_vox[:, 3:-3, 3:-3, 3:-3] == 1)
    assert not displacement_vox[:, :2].any()


def test_a_coarser_grid_has_its_own_voxels():
    coarse = GRID.coarser(2)
    u = transform_on_grid(sitk.TranslationTransform(3, (1.5, 2.0, 3.0)), coarse)
    assert u[:, 0, 0, 0] == pytest.approx(
        [3 / coarse.spacing_mm[0], 2 / coarse.spacing_mm[1], 1.5 / coarse.spacing_mm[2]]
    )


def broken_field(tmp_path, suffix: str) -> str:
    vectors = np.zeros((*GRID.shape, 3), np.float32)
    vectors[4, 5, 6, :2] = np.nan, np.inf
    image = sitk.GetImageFromArray(vectors, isVector=True)
    image.CopyInformation(GRID.reference_image())
    sitk.WriteImage(image, str(tmp_path / f"nan{suffix}"))
    return str(tmp_path / f"nan{suffix}")


def broken_transform(tmp_path) -> sitk.Transform:
    return sitk.TranslationTransform(3, (float("nan"), 0.0, 0.0))


def elastix_parameters(tmp_path) -> str:
    (tmp_path / "TransformParameters.0.txt").write_text('(Transform "BSplineTransform")\n(NumberOfParameters 3)\n')
    return str(tmp_path / "TransformParameters.0.txt")


@pytest.mark.parametrize(
    ("source", "message"),
    [
        (lambda _: "no/such/1Warp.nii.gz", r"must be an existing file, got .*1Warp\.nii\.gz \(not found\)"),
        (lambda _: sitk.AffineTransform(2), "the transform must be 3D, got 2D"),
        (lambda folder: broken_field(folder, ".mha"), r"must hold only finite values, got 2 others in .*nan\.mha"),
        (lambda folder: broken_field(folder, ".nii.gz"), r"only finite values, got 2 others in .*nan\.nii\.gz"),
        (broken_transform, r"must hold only finite values, got 1 others in memory"),
        (elastix_parameters, r"must have 3 numbers GridSize in .*TransformParameters\.0\.txt, got 0 words"),
    ],
)
def test_what_is_no_transform(tmp_path, source, message):
    with pytest.raises(RegistrationError, match=message):
        transform_on_grid(source(tmp_path), GRID)
