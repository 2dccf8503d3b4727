"""Geometry against SimpleITK and MONAI on oblique, anisotropic and flipped grids."""

from __future__ import annotations

import numpy as np
import pytest
import SimpleITK as sitk
import torch

from LDRCore import geometry
from LDRCore.geometry import Grid
from LDRCore.io.transforms import read_transform
from LDRCore.pipeline import preprocess
from LDRCore.sampling import torch_cpu
from LDRCore.transforms import resample, spatial
from LDRCore.transforms.field import DenseField, fade_out, invert_field
from LDRCore.transforms.volume import Volume

RANGE = 250  # of the intensities of `blob_image`
INTENSITY = 1e-3 * RANGE  # float32 coordinates of some 1e-5 voxel, times the steepest slope
MILLIMETRES = 1e-3  # float32 displacements of some mm, on coordinates of some 100 mm
DETERMINANT = 2e-4  # differences of float32 displacements over one voxel of about 1 mm
WAVE_DETERMINANT = 4e-4  # float32 and central differences of a sine: h^2 / 6 of its third derivative


def rotation(axis: int, degrees: float) -> np.ndarray:
    i, j = [a for a in range(3) if a != axis]
    out = np.eye(3)
    c, s = np.cos(np.deg2rad(degrees)), np.sin(np.deg2rad(degrees))
    out[i, i], out[j, j], out[i, j], out[j, i] = c, c, -s, s
    return out


GEOMETRIES = {
    "axis-aligned": (np.eye(3), (1.0, 1.0, 1.0)),
    "anisotropic": (np.eye(3), (0.7, 1.1, 2.5)),
    "flipped": (np.diag([-1.0, 1.0, 1.0]), (1.0, 1.2, 0.9)),
    "oblique": (rotation(0, 20) @ rotation(2, -35), (1.0, 1.3, 2.0)),
    "oblique, flipped, permuted": (
        (rotation(1, 25) @ rotation(0, 10))[:, [2, 0, 1]] @ np.diag([1.0, -1.0, 1.0]),
        (0.8, 2.1, 1.1),
    ),
}


def blob_image(name: str, size: tuple[int, int, int] = (24, 28, 20), centre=(5.0, -8.0, 12.0)) -> sitk.Image:
    """Smooth random content, range about 0 to 250, centred at a point in LPS mm."""
    direction, spacing = GEOMETRIES[name]
    noise = torch.from_numpy(np.random.default_rng(1).random((1, 1, 6, 6, 6))).float()
    values = torch.nn.functional.interpolate(noise, size=size[::-1], mode="trilinear", align_corners=True)
    image = sitk.GetImageFromArray((values[0, 0] * 250).numpy())
    image.SetSpacing(spacing)
    image.SetDirection(direction.ravel().tolist())
    half = direction @ (np.array(spacing) * (np.array(size) - 1) / 2)
    image.SetOrigin((np.array(centre) - half).tolist())
    return image


def random_field(grid: Grid, amplitude_vox: float, seed: int = 0) -> torch.Tensor:
    coarse = torch.from_numpy(np.random.default_rng(seed).normal(size=(1, 3, 4, 4, 4))).float()
    field = torch.nn.functional.interpolate(coarse, size=grid.shape, mode="trilinear", align_corners=True)
    return fade_out(field * amplitude_vox, 2)


AFFINE = geometry.linear_matrix(sitk.Euler3DTransform((5.0, -8.0, 12.0), 0.1, -0.15, 0.2, (3.0, -2.0, 1.5)))


def dense_field(amplitude_vox: float = 1.0) -> DenseField:
    grid = Grid.centred((5.0, -8.0, 12.0), 3.0, (12, 14, 12))
    return DenseField(random_field(grid, amplitude_vox), grid.padded(2), AFFINE)


@pytest.mark.parametrize("name", GEOMETRIES)
def test_index_to_lps_is_simpleitks(name):
    image = blob_image(name)
    k, j, i = 3, 7, 11
    expected = image.TransformIndexToPhysicalPoint((i, j, k))
    assert (geometry.index_to_lps(image) @ [k, j, i, 1])[:3] == pytest.approx(expected, abs=1e-9)


@pytest.mark.parametrize("fixed_name", GEOMETRIES)
@pytest.mark.parametrize("moving_name", ["anisotropic", "oblique, flipped, permuted"])
def test_native_warp_equals_simpleitks_resample(fixed_name, moving_name):
    fixed, moving = blob_image(fixed_name), blob_image(moving_name, (30, 22, 26))
    dense = dense_field()
    transform = geometry.dense_then_affine(dense.displacement_mm(), dense.grid, dense.affine_lps)
    volume = Volume(preprocess.to_tensor(moving), geometry.index_to_lps(moving))
    expected = sitk.GetArrayFromImage(sitk.Resample(moving, fixed, transform, sitk.sitkLinear, volume.minimum))
    ours = resample.warp(volume, fixed.GetSize()[::-1], geometry.index_to_lps(fixed), dense)
    assert (expected == volume.minimum).mean() < 0.9  # the test sees content
    # a sample point on the very edge of the image may fall on either side in single precision
    off = np.abs(ours - expected) > INTENSITY
    assert off.mean() < 1e-4


@pytest.mark.parametrize("name", GEOMETRIES)
def test_jacobian_determinant_of_a_known_map_on_every_grid(name):
    """T(x) = M x + a sin wave: the analytic determinant at every voxel."""
    image = blob_image(name)
    matrix = np.array([[1.1, 0.1, 0.0], [0.0, 0.95, 0.05], [0.1, 0.0, 1.0]])
    points = sitk.GetArrayFromImage(
        sitk.PhysicalPointSource(
            sitk.sitkVectorFloat64, image.GetSize(), image.GetOrigin(), image.GetSpacing(), image.GetDirection()
        )
    )
    wave, length = 1.5, 60.0
    shift = points @ (matrix - np.eye(3)).T
    shift[..., 0] += wave * np.sin(points[..., 1] / length)
    field = sitk.GetImageFromArray(shift, isVector=True)
    field.CopyInformation(image)
    jacobian = np.broadcast_to(matrix, (*shift.shape[:3], 3, 3)).copy()
    jacobian[..., 0, 1] += wave / length * np.cos(points[..., 1] / length)
    ours = sitk.GetArrayFromImage(geometry.jacobian_determinant_image(field))
    inner = (slice(1, -1),) * 3
    assert np.abs(ours - np.linalg.det(jacobian))[inner].max() < WAVE_DETERMINANT


def test_jacobian_agrees_with_simpleitk_where_simpleitk_is_right():
    """Its filter ignores the direction, so only identity directions can be compared."""
    image = blob_image("anisotropic")
    dense = dense_field()
    transform = geometry.dense_then_affine(dense.displacement_mm(), dense.grid, dense.affine_lps)
    field = geometry.displacement_field_image(transform, image)
    theirs = sitk.GetArrayFromImage(sitk.DisplacementFieldJacobianDeterminant(sitk.Cast(field, sitk.sitkVectorFloat64)))
    ours = sitk.GetArrayFromImage(geometry.jacobian_determinant_image(field))
    inner = (slice(1, -1),) * 3
    assert np.abs(ours - theirs)[inner].max() < DETERMINANT


@pytest.mark.parametrize("name", GEOMETRIES)
@pytest.mark.parametrize("slab", [1 << 18, 2000])
def test_native_jacobian_equals_that_of_the_transform(name, slab, monkeypatch):
    """The Jacobian straight from the dense field is that of the field that ITK makes of the same transform."""
    monkeypatch.setattr(torch_cpu, "SLAB_POINTS", slab)
    image, dense = blob_image(name), dense_field()
    transform = geometry.dense_then_affine(dense.displacement_mm(), dense.grid, dense.affine_lps)
    field = geometry.displacement_field_image(transform, image)
    lattice = image.GetSize()[::-1], geometry.index_to_lps(image), dense
    determinant = sitk.GetArrayFromImage(geometry.jacobian_determinant_image(field))
    assert determinant.std() > 0.02
    assert np.abs(resample.jacobian_determinant(*lattice) - determinant).max() < DETERMINANT


def test_jacobian_in_slabs_equals_one_pass(monkeypatch):
    image = blob_image("oblique", (90, 80, 40))
    dense = dense_field()
    transform = geometry.dense_then_affine(dense.displacement_mm(), dense.grid, dense.affine_lps)
    field = geometry.displacement_field_image(transform, image)
    whole = sitk.GetArrayFromImage(geometry.jacobian_determinant_image(field))
    monkeypatch.setattr(geometry.jacobian, "SLAB_VOXELS", 90 * 80 * 3)
    assert np.array_equal(sitk.GetArrayFromImage(geometry.jacobian_determinant_image(field)), whole)


def test_points_go_where_simpleitk_sends_them_and_the_inverse_brings_them_back():
    dense = dense_field(0.6)
    inverse = invert_field(dense)
    forth = geometry.dense_then_affine(dense.displacement_mm(), dense.grid, dense.affine_lps)
    back = geometry.affine_then_dense(inverse.displacement_mm(), inverse.grid, inverse.affine_lps)
    # the inverse is interpolated between the voxels where it was solved, so exact only on those
    points = dense.grid.to_lps[:3, :3] @ np.random.default_rng(0).integers(4, 10, (3, 40)) + dense.grid.to_lps[:3, 3:]
    there = geometry.transform_points(points.T, geometry.affine_transform(dense.affine_lps))
    returned = geometry.transform_points(geometry.transform_points(there, back), forth)
    # the inversion stops at 1e-3 voxel of 3 mm
    assert np.abs(returned - there).max() < 5 * MILLIMETRES


def test_working_grid_warp_equals_simpleitk():
    """spatial.warp on a working grid is Resample with the exported field."""
    grid = Grid.centred((0.0, 0.0, 0.0), 2.0, (16, 18, 20))
    values = torch.rand(1, 1, *grid.shape, generator=torch.Generator().manual_seed(2))
    field = random_field(Grid.centred((0, 0, 0), 2.0, (12, 14, 16)), 1.5)
    image = sitk.GetImageFromArray(values[0, 0].numpy())
    image.SetOrigin(grid.origin_lps)
    image.SetSpacing(grid.spacing_mm[::-1])
    transform = geometry.dense_then_affine(geometry.displacement_to_lps(field[0].numpy(), grid), grid, np.eye(4))
    expected = sitk.GetArrayFromImage(sitk.Resample(image, image, transform, sitk.sitkLinear, 0.0))
    ours = spatial.warp(values, field)[0, 0].numpy()
    inner = (slice(3, -3),) * 3
    assert np.abs(ours - expected)[inner].max() < 1e-3  # of a range of 1


def test_composition_equals_simpleitks_composite():
    grid = Grid.centred((0.0, 0.0, 0.0), 2.0, (16, 16, 16))
    small = Grid.centred((0.0, 0.0, 0.0), 2.0, (12, 12, 12))
    first, second = random_field(small, 1.0, 1), random_field(small, 1.0, 2)
    transforms = [
        sitk.DisplacementFieldTransform(geometry.field_image(geometry.displacement_to_lps(f[0].numpy(), grid), grid))
        for f in (first, second)
    ]
    composite = sitk.CompositeTransform(3)
    for transform in transforms:
        composite.AddTransform(transform)  # the last one is applied first: x -> T1(T2(x))
    ours = geometry.displacement_to_lps(spatial.compose(first, second)[0].numpy(), grid)
    reference = sitk.Image(grid.shape[::-1], sitk.sitkUInt8)
    reference.SetOrigin(grid.origin_lps)
    reference.SetSpacing(grid.spacing_mm[::-1])
    theirs = sitk.GetArrayFromImage(geometry.displacement_field_image(composite, reference))
    inner = (slice(3, -3),) * 3
    assert np.abs(ours - theirs)[inner].max() < MILLIMETRES


@pytest.mark.parametrize("name", GEOMETRIES)
def test_a_covering_field_is_the_transform_at_every_voxel_of_the_fixed_image(name):
    fixed, moving = blob_image(name), blob_image("anisotropic", (60, 50, 30), (15.0, -3.0, 4.0))
    dense = dense_field()
    transform = geometry.dense_then_affine(dense.displacement_mm(), dense.grid, dense.affine_lps)
    field = geometry.covering_field_image(transform, fixed, moving)
    at_fixed = sitk.GetArrayFromImage(sitk.Resample(field, fixed))
    expected = sitk.GetArrayFromImage(geometry.displacement_field_image(transform, fixed))
    assert np.abs(expected).max() > 2
    assert np.abs(at_fixed - expected).max() < MILLIMETRES
    assert np.prod(field.GetSize()) > np.prod(fixed.GetSize())  # it was grown


def test_a_covering_field_reaches_all_that_comes_to_lie_in_the_moving_image():
    fixed, moving = blob_image("oblique, flipped, permuted"), blob_image("anisotropic", (60, 50, 30), (15.0, -3.0, 4.0))
    dense = dense_field()
    transform = geometry.dense_then_affine(dense.displacement_mm(), dense.grid, dense.affine_lps)
    field = geometry.covering_field_image(transform, fixed, moving, spacing_mm=2.0)
    assert field.GetSpacing() == pytest.approx((0.8 * 2, 2.1, 1.1))  # every second voxel of 0.8 mm
    index = np.array(field.TransformPhysicalPointToContinuousIndex(fixed.GetOrigin()))
    assert np.abs(index - np.rint(index)).max() < 1e-4
    affine_back = geometry.affine_transform(np.linalg.inv(dense.affine_lps))
    for corner in geometry.transform_points(geometry.corners_lps(moving), affine_back):
        index = np.array(field.TransformPhysicalPointToContinuousIndex(corner.tolist()))
        assert (index > -0.5).all()
        assert (index < np.array(field.GetSize()) - 0.5).all()


def test_a_covering_field_of_a_large_image_is_coarser(monkeypatch):
    fixed, moving = blob_image("oblique"), blob_image("anisotropic", (60, 50, 30))
    rotated = sitk.Euler3DTransform((5.0, -8.0, 12.0), 0.1, 0.2, -0.3, (1.0, 2.0, 3.0))
    monkeypatch.setattr(geometry.fields, "COVERING_VOXELS", 24 * 28 * 20)
    field = geometry.covering_field_image(rotated, fixed, moving)
    assert field.GetSize() == fixed.GetSize()  # not grown
    index = (7, 11, 13)
    point = np.array(fixed.TransformIndexToPhysicalPoint(index))
    assert point + field[index] == pytest.approx(rotated.TransformPoint(point.tolist()), abs=1e-4)
    monkeypatch.setattr(geometry.fields, "COVERING_VOXELS", 24 * 28 * 20 - 1)
    assert geometry.covering_field_image(rotated, fixed, moving).GetSpacing() == pytest.approx((2.0, 1.3, 2.0))


@pytest.mark.parametrize("suffix", [".h5", ".tfm"])
def test_transform_files_come_back_the_same(tmp_path, suffix):
    dense = dense_field()
    transform = geometry.dense_then_affine(dense.displacement_mm(), dense.grid, dense.affine_lps)
    path = tmp_path / f"t{suffix}"
    sitk.WriteTransform(transform, str(path))
    again = read_transform(str(path))
    points = np.random.default_rng(0).uniform(-30, 30, (50, 3))
    before, after = (geometry.transform_points(points, t) for t in (transform, again))
    assert np.abs(before - after).max() < MILLIMETRES
    assert np.abs(before - points).max() > 1


def test_displacement_field_file_is_the_transform(tmp_path):
    image = blob_image("oblique, flipped, permuted")
    dense = dense_field()
    transform = geometry.dense_then_affine(dense.displacement_mm(), dense.grid, dense.affine_lps)
    path = tmp_path / "field.nii.gz"
    sitk.WriteImage(geometry.displacement_field_image(transform, image), str(path))
    again = read_transform(str(path))
    voxels = [(5, 6, 7), (12, 3, 9), (20, 20, 10)]
    points = np.array([image.TransformIndexToPhysicalPoint(v) for v in voxels])
    before, after = (geometry.transform_points(points, t) for t in (transform, again))
    assert np.abs(before - after).max() < MILLIMETRES


@pytest.mark.parametrize(("ours", "theirs"), [("linear", "bilinear"), ("nearest", "nearest")])
def test_warp_equals_monais(ours, theirs):
    monai = pytest.importorskip("monai.networks.blocks", reason="MONAI is an optional second oracle (make test)")
    generator = torch.Generator().manual_seed(0)
    image = torch.rand(2, 3, 9, 10, 11, generator=generator)
    displacement = torch.randn(2, 3, 9, 10, 11, generator=generator)
    # no point halfway between two voxels, where rounding decides which is nearest
    displacement = displacement.round() + 0.8 * (torch.rand(2, 3, 9, 10, 11, generator=generator) - 0.5)
    expected = monai.Warp(mode=theirs, padding_mode="border")(image, displacement)
    warped = spatial.warp(image, displacement, interpolation=ours, padding="border")
    assert torch.allclose(warped, expected, atol=1e-5)
