"""Transforms that travel: every program's own point map or resampled image against ours, on oblique, flipped grids.

The programs run in the Python that LDR_PEER_PYTHON names (`make peers`); elastix is the system's program. Expected
values come from them alone.
"""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

import numpy as np
import pytest
import SimpleITK as sitk

from LDRCore import geometry
from LDRCore.io import transforms

SAME_MM = 1e-3  # two point maps
TURN = np.array([[0.36, 0.48, -0.8], [-0.8, 0.6, 0.0], [0.48, 0.64, 0.6]])
AFFINE = np.array([[1.05, 0.06, -0.02, 3.0], [-0.05, 0.95, 0.04, 2.0], [0.02, 0.01, 1.03, -4.0], [0, 0, 0, 1]])
CENTRE = np.array([10.0, -5.0, 20.0])
RAS = np.array([-1.0, -1.0, 1.0])


def scan(size: tuple[int, ...], spacing: tuple[float, ...], direction: np.ndarray, centre: np.ndarray) -> sitk.Image:
    """A smooth image about a centre, float32."""
    k, j, i = np.meshgrid(*[np.linspace(-1, 1, n) for n in size[::-1]], indexing="ij")
    waves = 1 + 0.3 * np.sin(5 * i + 1) * np.cos(4 * j) * np.sin(3 * k + 0.5)
    values = 100 * np.exp(-3 * (k**2 + 1.3 * j**2 + 0.8 * i**2 + 0.4 * i * j)) * waves
    image = sitk.GetImageFromArray(values.astype(np.float32))
    image.SetSpacing(spacing)
    image.SetDirection(direction.ravel().tolist())
    middle = image.TransformContinuousIndexToPhysicalPoint([(n - 1) / 2 for n in size])
    image.SetOrigin((centre - middle).tolist())
    return image


FIXED = scan((26, 30, 22), (2.5, 2.0, 3.0), TURN @ np.diag([1, -1, 1]), CENTRE)
MOVING = scan((28, 24, 30), (2.2, 2.8, 2.4), TURN[[1, 2, 0]], CENTRE + np.array([4, 3, -5]))


def displacement(points_lps: np.ndarray) -> np.ndarray:
    x, y, z = np.moveaxis((points_lps - CENTRE) / 20, -1, 0)
    return 3 * np.stack([np.sin(y) * np.cos(z), np.cos(x + z), np.sin(x * y)], -1)


def field_transform(reference: sitk.Image) -> sitk.DisplacementFieldTransform:
    field = sitk.GetImageFromArray(displacement(geometry.points_lps(reference)), isVector=True)
    field.CopyInformation(reference)
    return sitk.DisplacementFieldTransform(field)


def whole() -> sitk.CompositeTransform:
    """An affine map after a dense displacement on the fixed grid."""
    return sitk.CompositeTransform([geometry.affine_transform(AFFINE), field_transform(FIXED)])


def voxel_points(reference: sitk.Image) -> np.ndarray:
    """(N, 3) LPS mm of voxels of an image, where fields are exact whatever interpolates them; not on its border."""
    index = np.random.default_rng(0).integers(2, np.array(reference.GetSize()) - 2, (300, 3))
    return np.array([reference.TransformIndexToPhysicalPoint(one) for one in index.tolist()])


def mapped_by(transform: sitk.Transform, points: np.ndarray) -> np.ndarray:
    return np.array([transform.TransformPoint(point) for point in points.tolist()])


def apart_mm(first: np.ndarray, second: np.ndarray) -> float:
    return float(np.abs(first - second).max())


@pytest.fixture
def folder(tmp_path) -> Path:
    """Both images and points of the fixed one."""
    sitk.WriteImage(FIXED, str(tmp_path / "fixed.nii.gz"))
    sitk.WriteImage(MOVING, str(tmp_path / "moving.nii.gz"))
    np.save(tmp_path / "points.npy", voxel_points(FIXED))
    return tmp_path


def run(task: str, folder: Path) -> None:
    """Run one task of another program; skip where it is not there."""
    if "LDR_PEER_PYTHON" not in os.environ:
        pytest.skip("LDR_PEER_PYTHON names no Python with other registration programs")
    script = Path(__file__).with_name("transform_programs.py")
    done = subprocess.run(
        [os.environ["LDR_PEER_PYTHON"], script, task, folder], capture_output=True, encoding="utf-8", cwd=folder
    )
    if done.returncode == 3:
        pytest.skip(done.stdout.strip())
    assert done.returncode == 0, done.stderr[-2000:]


def write(transform: sitk.Transform, path: Path, name: str) -> None:
    transforms.write(transform, path, name, fixed=path.parent / "fixed.nii.gz", moving=path.parent / "moving.nii.gz")


def read(path: Path, name: str = "auto") -> sitk.Transform:
    context = transforms.Context(path.parent / "fixed.nii.gz", path.parent / "moving.nii.gz")
    return transforms.read_transform(path, format_name=name, context=context)


def assert_same_image(file: Path, transform: sitk.Transform, tolerance: float) -> None:
    """The image that another program warped is ours where points fall well inside the moving image.

    At its border programs differ in what they take for outside.
    """
    ours = sitk.GetArrayFromImage(sitk.Resample(MOVING, FIXED, transform, sitk.sitkLinear))
    theirs = sitk.GetArrayFromImage(sitk.ReadImage(str(file)))
    core = MOVING[2:-2, 2:-2, 2:-2] * 0 + 1
    inside = sitk.GetArrayFromImage(sitk.Resample(core, FIXED, transform, sitk.sitkLinear)) == 1
    inside[[0, -1]] = inside[:, [0, -1]] = inside[:, :, [0, -1]] = False
    assert ours[inside].std() > 5
    assert inside.mean() > 0.2
    assert np.abs(ours - theirs)[inside].max() < tolerance


def test_ants_maps_our_pair_and_our_composite_as_we_do(folder):
    points = np.load(folder / "points.npy")
    write(geometry.affine_transform(AFFINE), folder / "affine.mat", "ants")
    write(field_transform(FIXED), folder / "warp.nii.gz", "ants")
    run("ants-affine-warp", folder)
    assert apart_mm(np.load(folder / "mapped.npy"), mapped_by(whole(), points)) < SAME_MM
    write(whole(), folder / "transform.h5", "ants")
    run("ants-composite", folder)
    assert apart_mm(np.load(folder / "mapped.npy"), mapped_by(whole(), points)) < SAME_MM
    write(whole(), folder / "warp.nii.gz", "ants")
    run("ants-warp", folder)
    assert apart_mm(np.load(folder / "mapped.npy"), mapped_by(whole(), points)) < SAME_MM


def test_a_registration_by_ants(folder):
    run("ants-registers", folder)
    pair = transforms.read_transform([folder / "warp.nii.gz", folder / "affine.mat"])
    points = np.load(folder / "points.npy")
    assert apart_mm(np.load(folder / "mapped.npy"), points) > 1
    assert apart_mm(np.load(folder / "mapped.npy"), mapped_by(pair, points)) < SAME_MM
    assert_same_image(folder / "warped.nii.gz", pair, 1e-2)


def test_greedy_warps_by_our_files_as_we_do(folder):
    write(geometry.affine_transform(AFFINE), folder / "affine.mat", "greedy")
    write(field_transform(FIXED), folder / "warp.nii.gz", "greedy")
    run("greedy-reslices", folder)
    assert_same_image(folder / "warped.nii.gz", whole(), 2e-3)


def test_a_registration_by_greedy(folder):
    run("greedy-registers", folder)
    context = transforms.Context(FIXED, MOVING)
    affine = transforms.read_transform(folder / "affine.mat", format_name="greedy", context=context)
    pair = geometry.compose_transforms(affine, transforms.read_transform(folder / "warp.nii.gz"))
    assert apart_mm(mapped_by(pair, voxel_points(FIXED)), voxel_points(FIXED)) > 1
    assert_same_image(folder / "warped.nii.gz", pair, 2e-3)


def test_nitransforms_maps_our_x5_as_we_do(folder):
    points = np.load(folder / "points.npy")
    for transform in (geometry.affine_transform(AFFINE), whole()):
        write(transform, folder / "transform.x5", "x5")
        run("nitransforms-maps", folder)
        assert apart_mm(np.load(folder / "mapped.npy"), mapped_by(transform, points)) < SAME_MM
        assert apart_mm(mapped_by(read(folder / "transform.x5"), points), mapped_by(transform, points)) < SAME_MM


def test_what_nitransforms_writes(folder):
    points = np.load(folder / "points.npy")
    np.save(folder / "matrix.npy", geometry.RAS_TO_LPS @ AFFINE @ geometry.RAS_TO_LPS)
    np.save(folder / "field.npy", (displacement(geometry.points_lps(FIXED)) * RAS).transpose(2, 1, 0, 3))
    run("nitransforms-writes", folder)
    for name, expected in (
        ("linear", points @ AFFINE[:3, :3].T + AFFINE[:3, 3]),
        ("dense", points + displacement(points)),
    ):
        assert apart_mm(np.load(folder / f"{name}.npy"), expected) < SAME_MM
        assert apart_mm(mapped_by(read(folder / f"{name}.x5"), points), expected) < SAME_MM


def test_fslpy_maps_our_matrix_and_our_warp_as_we_do(folder):
    points = np.load(folder / "points.npy")
    write(geometry.affine_transform(AFFINE), folder / "flirt.mat", "fsl")
    write(whole(), folder / "warp.nii.gz", "fsl")
    run("fslpy-maps", folder)
    assert apart_mm(np.load(folder / "flirt.npy"), mapped_by(geometry.affine_transform(AFFINE), points)) < SAME_MM
    assert apart_mm(np.load(folder / "warp.npy"), mapped_by(whole(), points)) < SAME_MM


def test_fnirts_coefficients_as_fslpy_reads_them(folder):
    """Also where knots are missing at the far ends, which count as zero."""
    rng = np.random.default_rng(1)
    np.save(folder / "knots.npy", rng.normal(0, 3, (8, 8, 9, 3)))
    matrix = np.array([[1.02, 0.05, 0, 1.5], [-0.04, 0.98, 0.02, -2], [0.01, 0, 1.01, 3], [0, 0, 0, 1]])
    np.save(folder / "matrix.npy", matrix)
    run("fslpy-writes", folder)
    theirs = np.load(folder / "coefficients.npy")
    ours = mapped_by(read(folder / "coefficients.nii.gz"), np.load(folder / "points.npy"))
    known = np.isfinite(theirs).all(axis=1)
    assert known.mean() > 0.9
    assert apart_mm(ours[known], theirs[known]) < SAME_MM


def test_surfa_reads_our_matrix_and_our_warp_as_we_do(folder):
    points = np.load(folder / "points.npy")
    write(geometry.affine_transform(AFFINE), folder / "transform.lta", "freesurfer")
    write(whole(), folder / "warp.mgz", "freesurfer")
    run("surfa-maps", folder)
    assert apart_mm(np.load(folder / "mapped.npy"), mapped_by(geometry.affine_transform(AFFINE), points)) < SAME_MM
    coordinates = np.load(folder / "abs_ras.npy").transpose(2, 1, 0, 3) * RAS
    expected = geometry.points_lps(FIXED) + sitk.GetArrayFromImage(geometry.displacement_field_image(whole(), FIXED))
    assert apart_mm(coordinates, expected) < SAME_MM
    for name in ("abs_crs", "disp_crs", "abs_ras", "disp_ras"):
        again = read(folder / f"{name}.mgz")
        assert apart_mm(mapped_by(again, points), mapped_by(whole(), points)) < SAME_MM


def test_a_matrix_between_voxels_by_surfa(folder):
    np.save(folder / "matrix.npy", np.linalg.inv(geometry.RAS_TO_LPS @ AFFINE @ geometry.RAS_TO_LPS))
    run("surfa-writes", folder)
    points = np.load(folder / "points.npy")
    expected = points @ AFFINE[:3, :3].T + AFFINE[:3, 3]
    assert apart_mm(mapped_by(read(folder / "voxels.lta"), points), expected) < SAME_MM


def test_dipy_warps_by_our_mapping_as_we_do(folder):
    write(whole(), folder / "mapping.nii.gz", "dipy")
    run("dipy-maps", folder)
    assert_same_image(folder / "warped.nii.gz", whole(), 2e-3)


def test_a_registration_by_dipy(folder):
    run("dipy-registers", folder)
    made = read(folder / "mapping.nii.gz")
    assert apart_mm(mapped_by(made, voxel_points(FIXED)), voxel_points(FIXED)) > 0.5
    assert_same_image(folder / "warped.nii.gz", made, 2e-3)


def test_voxelmorph_warps_by_our_field_as_we_do(folder):
    """Arrays of one size; the field is drawn in voxels, so the moving image is seen on the fixed image's size."""
    moving = sitk.Resample(MOVING, FIXED)
    transform = field_transform(FIXED)
    transforms.write(transform, folder / "field.npy", "voxelmorph", fixed=FIXED, moving=moving)
    np.save(folder / "moving.npy", sitk.GetArrayFromImage(moving).T[None])
    run("voxelmorph-warps", folder)
    ours = sitk.GetArrayFromImage(sitk.Resample(moving, FIXED, transform, sitk.sitkLinear)).T
    theirs = np.load(folder / "warped.npy").reshape(ours.shape)
    inner = (slice(4, -4),) * 3
    assert ours[inner].std() > 5
    assert np.abs(ours - theirs)[inner].max() < 2e-3


def test_a_shift_that_convexadam_finds(folder):
    """Its field is short by 1 - 1/(N // 2): two shifted arrays tell, once the loss has settled."""
    fixed = sitk.Image((48, 40, 32), sitk.sitkFloat32)
    sitk.WriteImage(fixed, str(folder / "fixed.nii.gz"))
    rng = np.random.default_rng(0)
    noise = sitk.GetImageFromArray(rng.normal(0, 1, (52, 60, 68)).astype(np.float32))
    texture = sitk.GetArrayFromImage(sitk.DiscreteGaussian(noise, 2.0)).T * 100
    first, shift = texture[10:58, 10:50, 10:42], np.array([6, 4, 0])
    second = texture[10 - 6 : 58 - 6, 10 - 4 : 50 - 4, 10:42]  # second[i + 6, j + 4] = first[i, j]
    np.save(folder / "blocks.npy", np.stack([first, second]).astype(np.float32))
    run("convexadam-registers", folder)
    context = transforms.Context(fixed, fixed)
    made = transforms.read_transform(folder / "disp.nii.gz", format_name="convexadam", context=context)
    raw = sitk.GetArrayFromImage(sitk.ReadImage(str(folder / "disp.nii.gz")))  # (3, z, y, x)
    places = [(i, j, k) for i in range(14, 34, 4) for j in range(14, 26, 4) for k in range(12, 20, 4)]
    stored = np.median([raw[:, k, j, i] for i, j, k in places], axis=0)
    moved = np.median([np.subtract(made.TransformPoint(tuple(map(float, p))), p) for p in places], axis=0)
    assert np.abs(moved - shift).max() < 0.1
    assert np.abs(moved - shift).max() < np.abs(stored - shift).max() / 2


ELASTIX = """(FixedImageDimension 3)(MovingImageDimension 3)(Registration "MultiResolutionRegistration")
(FixedInternalImagePixelType "float")(MovingInternalImagePixelType "float")(UseDirectionCosines "true")
(Interpolator "LinearInterpolator")(ResampleInterpolator "FinalBSplineInterpolator")(Resampler "DefaultResampler")
(Metric "AdvancedMeanSquares")(Optimizer "AdaptiveStochasticGradientDescent")(NumberOfResolutions 1)
(FixedImagePyramid "FixedSmoothingImagePyramid")(MovingImagePyramid "MovingSmoothingImagePyramid")
(MaximumNumberOfIterations 60)(NumberOfSpatialSamples 2000)(ImageSampler "RandomCoordinate")
(NewSamplesEveryIteration "true")(AutomaticTransformInitialization "false")(AutomaticScalesEstimation "true")
(HowToCombineTransforms "COMBINED")(Transform "KIND")(FinalGridSpacingInPhysicalUnits 14 12 16)
(BSplineTransformSplineOrder ORDER)(WriteResultImage "true")(ResultImageFormat "nii.gz")
"""


@pytest.mark.skipif(shutil.which("elastix") is None, reason="the program elastix is not installed")
@pytest.mark.parametrize(
    ("kinds", "combined", "order"),
    [
        (("EulerTransform", "AffineTransform", "BSplineTransform"), "Compose", 3),
        (("AffineTransform", "BSplineTransform"), "Compose", 2),
        (("TranslationTransform", "BSplineTransform"), "Add", 1),
    ],
)
def test_chains_of_elastix(folder, kinds, combined, order):
    arguments = ["elastix", "-f", "fixed.nii.gz", "-m", "moving.nii.gz", "-out", ".", "-threads", "1"]
    for kind in kinds:
        text = ELASTIX.replace(")(", ")\n(").replace("COMBINED", combined).replace("KIND", kind)
        (folder / f"{kind}.txt").write_text(text.replace("ORDER", str(order)))
        arguments += ["-p", f"{kind}.txt"]
    subprocess.run(arguments, cwd=folder, check=True, capture_output=True)
    last = f"TransformParameters.{len(kinds) - 1}.txt"
    made = read(folder / last)
    assert_transformix_agrees(folder, last, made)
    assert apart_mm(mapped_by(made, voxel_points(FIXED)), voxel_points(FIXED)) > 0.5


@pytest.mark.skipif(shutil.which("transformix") is None, reason="the program transformix is not installed")
def test_transformix_maps_our_files_as_we_do(folder):
    for transform in (geometry.affine_transform(AFFINE), whole()):
        write(transform, folder / "ours.txt", "elastix")
        assert_transformix_agrees(folder, "ours.txt", transform)


def assert_transformix_agrees(folder: Path, parameters: str, transform: sitk.Transform) -> None:
    arguments = ["transformix", "-in", "moving.nii.gz", "-tp", parameters, "-def", "all", "-out", ".", "-threads", "1"]
    subprocess.run(arguments, cwd=folder, check=True, capture_output=True)
    (file,) = folder.glob("deformationField.*")
    theirs = sitk.GetArrayFromImage(sitk.ReadImage(str(file)))
    ours = sitk.GetArrayFromImage(geometry.displacement_field_image(transform, FIXED))
    assert apart_mm(ours[1:-1, 1:-1, 1:-1], theirs[1:-1, 1:-1, 1:-1]) < SAME_MM
    assert apart_mm(mapped_by(read(file), voxel_points(FIXED)), mapped_by(transform, voxel_points(FIXED))) < SAME_MM
    file.unlink()


def dicom_series(folder: Path, image: sitk.Image, frame: str) -> None:
    """Write an image as a series of CT slices with the identifiers that a registration needs."""
    folder.mkdir()
    writer = sitk.ImageFileWriter()
    writer.KeepOriginalImageUIDOn()
    axes = np.array(image.GetDirection()).reshape(3, 3)
    orientation = "\\".join(f"{v:.12g}" for v in (*axes[:, 0], *axes[:, 1]))
    for k in range(image.GetSize()[2]):
        part = sitk.Cast(image[:, :, k], sitk.sitkInt16)
        position = image.TransformIndexToPhysicalPoint((0, 0, k))
        for tag, value in {
            **{"0008|0060": "CT", "0020|000d": "1.2.3.4", "0020|000e": f"1.2.3.{frame}", "0020|0052": f"1.2.9.{frame}"},
            **{"0008|0016": "1.2.840.10008.5.1.4.1.1.2", "0008|0018": f"1.2.3.{frame}.{k + 1}", "0020|0013": str(k)},
            **{"0020|0032": "\\".join(f"{v:.12g}" for v in position), "0020|0037": orientation, "0010|0020": "P1"},
            **{"0018|0050": f"{image.GetSpacing()[2]:.12g}", "0010|0010": "Doe^Jane"},
        }.items():
            part.SetMetaData(tag, value)
        writer.SetFileName(str(folder / f"{k:03}.dcm"))
        writer.Execute(part)


@pytest.fixture
def scanned(folder) -> Path:
    """The same as DICOM series; their direction is right-handed, as DICOM's always is."""
    right = sitk.Image(FIXED)
    right.SetDirection(TURN.ravel().tolist())
    dicom_series(folder / "fixed_dicom", right, "1")
    dicom_series(folder / "moving_dicom", MOVING, "2")
    return folder


def test_a_dicom_registration_as_pydicomrt_parses_it(scanned):
    pydicom = pytest.importorskip("pydicom")
    transforms.write(
        whole(), scanned / "registration.dcm", fixed=scanned / "fixed_dicom", moving=scanned / "moving_dicom"
    )
    run("dicom-parses", scanned)
    made = np.load(scanned / "parsed.npz")
    assert (str(made["registered"]), str(made["source"])) == ("1.2.9.1", "1.2.9.2")
    assert np.array_equal(made["before"], np.eye(4).ravel())
    assert np.array_equal(made["after"], np.eye(4).ravel())
    assert "'result': True" in str(made["checked"]), str(made["checked"])
    d, h, w, _ = made["vectors"].shape
    k, j, i = np.meshgrid(np.arange(d), np.arange(h), np.arange(w), indexing="ij")
    along, across = made["orientation"].reshape(2, 3)
    a, b, c = made["resolution"]
    places = i[..., None] * a * along + j[..., None] * b * across + k[..., None] * c * np.cross(along, across)
    places = (places + made["position"]).reshape(-1, 3)
    mapped = (places + made["vectors"].reshape(-1, 3))[::7]
    assert apart_mm(mapped, mapped_by(whole(), places[::7])) < SAME_MM
    again = transforms.read_transform(scanned / "registration.dcm")
    assert apart_mm(mapped_by(again, places[::7]), mapped) < SAME_MM
    dataset = pydicom.dcmread(scanned / "registration.dcm")
    assert (str(dataset.PatientName), dataset.StudyInstanceUID, dataset.Modality) == ("Doe^Jane", "1.2.3.4", "REG")


def test_a_dicom_registration_by_plastimatch(scanned):
    pytest.importorskip("pydicom")
    reader = sitk.ImageSeriesReader()
    reader.SetFileNames(sitk.ImageSeriesReader.GetGDCMSeriesFileNames(str(scanned / "fixed_dicom")))
    fixed = reader.Execute()
    sitk.WriteImage(geometry.displacement_field_image(whole(), fixed), str(scanned / "field.mha"))
    run("plastimatch-writes", scanned)
    (made,) = (scanned / "out_dicom").rglob("*.dcm")
    read_back = transforms.read_transform(made)
    points = voxel_points(fixed)
    assert apart_mm(mapped_by(read_back, points), mapped_by(whole(), points)) < SAME_MM


def test_matrices_around_a_dicom_field(scanned):
    """PS3.3 C.20.3.1.1: after (before x + d(x))."""
    pydicom = pytest.importorskip("pydicom")
    right = transforms.Context(scanned / "fixed_dicom").fixed
    transforms.write(
        field_transform(right), scanned / "r.dcm", fixed=scanned / "fixed_dicom", moving=scanned / "moving_dicom"
    )
    dataset = pydicom.dcmread(scanned / "r.dcm")
    item = dataset.DeformableRegistrationSequence[0]
    before = np.array([[0, -1, 0, 1], [1, 0, 0, 2], [0, 0, 1, 3], [0, 0, 0, 1]], float)
    item.PreDeformationMatrixRegistrationSequence[0].FrameOfReferenceTransformationMatrix = before.ravel().tolist()
    item.PostDeformationMatrixRegistrationSequence[0].FrameOfReferenceTransformationMatrix = AFFINE.ravel().tolist()
    dataset.save_as(scanned / "r.dcm")
    points = voxel_points(right)
    expected = (points @ before[:3, :3].T + before[:3, 3] + displacement(points)) @ AFFINE[:3, :3].T + AFFINE[:3, 3]
    assert apart_mm(mapped_by(transforms.read_transform(scanned / "r.dcm"), points), expected) < SAME_MM
