"""`ldr convert`, chains with inverses in every command, and `ldr warp` of series, vectors and labels."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import SimpleITK as sitk

from LDRCore import RegistrationError, cli
from LDRCore.cli import chain

SHIFT = (2.0, -3.0, 4.0)  # voxels of 1 mm


def ldr(*arguments: object) -> int:
    return cli.main([str(a) for a in arguments])


def bump(points: np.ndarray) -> np.ndarray:
    """A smooth displacement, largest (4 mm along x) at (14, 15, 16)."""
    squared = ((points - (14, 15, 16)) ** 2).sum(-1, keepdims=True)
    return np.exp(-squared / 250) * (4.0, 0, 1.0)


@pytest.fixture
def data(tmp_path, monkeypatch) -> Path:
    """An image of 30 voxels of 1 mm, points, a shift and a smooth field."""
    k, j, i = np.meshgrid(*[np.arange(30)] * 3, indexing="ij")
    points = np.stack([i, j, k], -1).astype(float)
    sitk.WriteImage(sitk.GetImageFromArray((i + 30 * j + k % 7).astype(np.float32)), str(tmp_path / "a.nii.gz"))
    sitk.WriteTransform(sitk.TranslationTransform(3, SHIFT), str(tmp_path / "shift.tfm"))
    field = sitk.GetImageFromArray(bump(points).astype(np.float32), isVector=True)
    sitk.WriteImage(field, str(tmp_path / "field.nii.gz"))
    (tmp_path / "p.csv").write_text("10,11,12\n14,15,16\n")
    (tmp_path / "folder").mkdir()
    monkeypatch.chdir(tmp_path)
    return tmp_path


def mapped(*transforms: str) -> np.ndarray:
    options = [word for text in transforms for word in ("-t", text)]
    assert ldr("points", "p.csv", *options, "--out", "q.csv", "--overwrite") == 0
    return np.loadtxt("q.csv", delimiter=",", skiprows=1)


POINTS = np.array([[10.0, 11, 12], [14, 15, 16]])


def test_a_point_goes_through_a_chain_and_back(data):
    forth = bump(POINTS)
    assert np.abs(mapped("field.nii.gz", "shift.tfm") - (POINTS + forth + SHIFT)).max() < 1e-4
    assert np.abs(mapped("shift.tfm,inverse") - (POINTS - SHIFT)).max() < 1e-6
    assert (
        np.abs(mapped("field.nii.gz", "shift.tfm", "shift.tfm,inverse", "field.nii.gz,inverse") - POINTS).max() < 0.03
    )
    assert np.abs(mapped("field.nii.gz,itk,inverse", "field.nii.gz") - POINTS).max() < 0.03


def test_points_are_inverted_at_the_points(data, capfd):
    """Exactly, also where displacements grow faster than their distance, which no fixed point inverts."""
    sitk.WriteTransform(sitk.AffineTransform([1.2, 0.1, 0, 0, 0.9, 0, 0, 0, 1], [3, 2, 1]), "affine.tfm")
    forth = mapped("field.nii.gz", "affine.tfm")
    assert np.abs(mapped("field.nii.gz,inverse", "field.nii.gz") - POINTS).max() < 1e-5
    Path("p.csv").write_text("\n".join(",".join(f"{v:.6f}" for v in point) for point in forth))
    assert np.abs(mapped("affine.tfm,inverse", "field.nii.gz,inverse") - POINTS).max() < 1e-5
    spline = sitk.BSplineTransformInitializer(sitk.ReadImage("a.nii.gz"), (5, 6, 7))
    random = np.random.default_rng(0)
    spline.SetParameters(random.normal(0, 1.5, len(spline.GetParameters())).tolist())
    sitk.WriteTransform(spline, "spline.tfm")
    Path("p.csv").write_text("10,11,12\n29,1,3\n70,80,90\n")
    assert np.abs(mapped("spline.tfm") - [[10, 11, 12], [29, 1, 3], [70, 80, 90]]).max(1)[:2].min() > 0.1
    assert np.abs(mapped("spline.tfm", "spline.tfm,inverse") - [[10, 11, 12], [29, 1, 3], [70, 80, 90]]).max() < 1e-5
    k, j, i = np.meshgrid(*[np.arange(30.0)] * 3, indexing="ij")
    field = sitk.GetImageFromArray(1.5 * (np.stack([i, j, k], -1) - 15), isVector=True)
    sitk.WriteImage(field, "grows.nrrd")
    Path("p.csv").write_text("20,10,12.5\n90,-40,0\n")  # 15 + 2.5 (x - 15); the other lies beyond the field
    assert np.abs(mapped("grows.nrrd,inverse") - [[17, 13, 14], [90, -40, 0]]).max() < 1e-5


def test_one_file_has_one_format():
    with pytest.raises(RegistrationError, match=r"must name one format, got ants and greedy for f\.nii\.gz"):
        chain.parse("f.nii.gz,ants,greedy")
    assert chain.parse("f.nii.gz,ants,inverse").format_name == "ants"


def test_points_that_a_transform_does_not_lead_to(data, capfd):
    sitk.WriteImage(sitk.GetImageFromArray(np.full((9, 9, 9, 3), 5.0), isVector=True), "five.nrrd")
    Path("p.csv").write_text("8,9,7\n2,2,2\n50,50,50\n")  # nothing is mapped to 2, as the field begins at 0
    assert ldr("points", "p.csv", "-t", "five.nrrd,inverse", "--out", "q.csv") == 2
    assert (
        "got 1 of 3 that it does not lead to (it folds or ends there), the first is number 2" in capfd.readouterr().err
    )
    assert not Path("q.csv").exists()
    Path("p.csv").write_text("8,9,7\n50,50,50\n")
    assert mapped("five.nrrd,inverse").tolist() == [[3, 4, 2], [50, 50, 50]]


def test_converting_there_and_back(data):
    assert ldr("convert", "field.nii.gz", "shift.tfm", "y_all.nii", "--to", "spm", "--reference", "a.nii.gz") == 0
    assert np.abs(mapped("y_all.nii") - (POINTS + bump(POINTS) + SHIFT)).max() < 1e-4
    assert (
        ldr("convert", "y_all.nii", "w.nii.gz", "--to", "fsl", "--reference", "a.nii.gz", "--moving", "a.nii.gz") == 0
    )
    options = ("--reference", "a.nii.gz", "--moving", "a.nii.gz")
    assert ldr("points", "p.csv", "-t", "w.nii.gz", *options, "--out", "q.csv", "--overwrite") == 0
    assert np.abs(np.loadtxt("q.csv", delimiter=",", skiprows=1) - (POINTS + bump(POINTS) + SHIFT)).max() < 1e-4
    assert ldr("convert", "shift.tfm,inverse", "back.mat", "--to", "greedy") == 0
    assert np.loadtxt("back.mat")[:3, 3].tolist() == [2, -3, -4]  # -SHIFT is (-2, 3, -4) in LPS
    assert np.abs(mapped("back.mat,greedy,inverse") - (POINTS + SHIFT)).max() < 1e-6
    assert ldr("convert", "back.mat", "--from", "greedy", "again.h5") == 0
    assert np.abs(mapped("again.h5") - (POINTS - SHIFT)).max() < 1e-6


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("field.nii.gz w.nii.gz --to spm", "a deformation of SPM must come with the grid of the fixed image"),
        ("field.nii.gz w.nii.gz --to fsl --reference a.nii.gz", "must come with the grid of the moving image"),
        ("field.nii.gz w.nii.gz", "the format to write must be named"),
        ("field.nii.gz w.lta --to freesurfer --reference a.nii.gz --moving a.nii.gz", "must hold a linear transform"),
        ("p.csv w.h5", "must be an image that SimpleITK can read"),
        ("folder w.h5", "must be a file, got the folder folder: name the file in it"),
        ("none.h5,inverse w.h5", "must be an existing file, got none.h5"),
        ("none.h5,backwards w.h5", "must be an existing file, got none.h5,backwards"),
        ("shift.tfm shift.tfm --overwrite", "must not replace an input"),
        ("shift.tfm,inverse shift.tfm --overwrite", "must not replace an input"),
        ("shift.tfm a.nii.gz --to spm", "the output must not exist yet"),
        ("field.nii.gz w.dcm --reference a.nii.gz", "DICOM"),
        ("shift.tfm w.h5 --from sas", "the format of a transform must be one of afni, ants"),
    ],
)
def test_what_cannot_be_converted(data, capfd, arguments, message):
    before = sorted(p.name for p in data.iterdir())
    assert ldr("convert", *arguments.split()) == 2
    printed = capfd.readouterr().err
    assert message in printed
    assert printed.count("\n") == 1
    assert sorted(p.name for p in data.iterdir()) == before


CHAINED = """(Transform "TranslationTransform")
(NumberOfParameters 3)
(TransformParameters 1 2 3)
(InitialTransformParameterFileName "{initial}")
(HowToCombineTransforms "Compose")
"""


def test_an_output_replaces_no_file_that_is_read_on_the_way(data, capfd):
    """A member of elastix' chain, and a slice of a DICOM series."""
    Path("T.0.txt").write_text(CHAINED.format(initial="NoInitialTransform"))
    Path("T.1.txt").write_text(CHAINED.format(initial="T.0.txt"))
    Path("series").mkdir()
    scan = sitk.GetImageFromArray(np.ones((4, 5), np.int16))
    sitk.WriteImage(scan, "series/0.dcm")
    before = {path: path.read_bytes() for path in (Path("T.0.txt"), Path("series/0.dcm"))}
    for arguments in (
        "convert T.1.txt T.0.txt --to elastix --reference a.nii.gz",
        "convert T.1.txt,inverse T.0.txt --to greedy",
        "convert T.1.txt T.0.txt --from elastix --to greedy",
        "invert T.1.txt --reference a.nii.gz --out T.0.txt",
        "convert T.1.txt series/0.dcm --reference series",
    ):
        assert ldr(*arguments.split(), "--overwrite") == 2
        assert "must not replace an input" in capfd.readouterr().err
    assert all(path.read_bytes() == content for path, content in before.items())
    assert ldr("convert", "T.1.txt", "T.2.txt", "--to", "greedy") == 0
    assert np.loadtxt("T.2.txt")[:3, 3].tolist() == [-2, -4, 6]
    assert ldr("convert", "T.1.txt", "T.2.txt", "--to", "greedy", "--overwrite") == 0


def test_a_series_and_a_vector_image_are_warped_volume_by_volume(data):
    image = sitk.ReadImage("a.nii.gz")
    series = sitk.JoinSeries([image, 2 * image, image + 5], 1.5, 0.7)
    sitk.WriteImage(series, "series.nii.gz")
    sitk.WriteImage(sitk.Compose([image, 2 * image]), "vectors.mha")
    arguments = ("-t", "field.nii.gz", "-t", "shift.tfm", "--reference", "a.nii.gz", "--out")
    for name, out in (("a.nii.gz", "w.nii.gz"), ("series.nii.gz", "ws.nii.gz"), ("vectors.mha", "wv.mha")):
        assert ldr("warp", name, *arguments, out) == 0
    single = sitk.GetArrayFromImage(sitk.ReadImage("w.nii.gz"))
    warped = sitk.ReadImage("ws.nii.gz")
    assert (warped.GetSize(), warped.GetSpacing()[3]) == ((30, 30, 30, 3), pytest.approx(0.7))
    volumes = sitk.GetArrayFromImage(warped)
    inside = single > 0
    assert inside.mean() > 0.5
    assert np.abs(volumes[0] - single).max() < 1e-3
    assert np.abs(volumes[1] - 2 * single).max() < 1e-3
    assert np.abs(volumes[2] - single - 5)[inside].max() < 1e-3
    components = sitk.GetArrayFromImage(sitk.ReadImage("wv.mha"))
    assert np.abs(components[..., 1] - 2 * single).max() < 1e-3


def test_cubic_and_label_interpolation(data):
    """Half a voxel's shift of a parabola: cubic is exact, linear is 1/4 too large; labels keep their values."""
    k, j, i = np.meshgrid(*[np.arange(30.0)] * 3, indexing="ij")
    sitk.WriteImage(sitk.GetImageFromArray(((i - 15) ** 2 + 0 * j + 0 * k).astype(np.float32)), "parabola.nii.gz")
    labels = np.where((i - 15) ** 2 + (j - 15) ** 2 + (k - 15) ** 2 < 80, 7, 0) + np.where(i > 20, 3, 0)
    sitk.WriteImage(sitk.GetImageFromArray(labels.astype(np.int16)), "labels.nii.gz")
    sitk.WriteTransform(sitk.TranslationTransform(3, (0.5, 0, 0)), "half.tfm")
    arguments = ("-t", "half.tfm", "--reference", "a.nii.gz", "--overwrite", "--out", "w.nii.gz")
    wanted = (9.5 - 15) ** 2
    for kind, value in (("cubic", wanted), ("linear", wanted + 0.25)):
        assert ldr("warp", "parabola.nii.gz", *arguments, "--interpolation", kind) == 0
        assert sitk.ReadImage("w.nii.gz")[9, 15, 15] == pytest.approx(value, abs=2e-3)
    for kind in ("label-gaussian", "label-majority", "nearest"):
        assert ldr("warp", "labels.nii.gz", *arguments, "--interpolation", kind) == 0
        warped = sitk.GetArrayFromImage(sitk.ReadImage("w.nii.gz"))
        assert set(np.unique(warped).tolist()) <= {0, 3, 7, 10}
        assert (warped == labels).mean() > 0.9
    assert ldr("warp", "labels.nii.gz", *arguments, "--nearest", "auto") == 0
    assert ldr("warp", "parabola.nii.gz", *arguments, "--interpolation", "label-majority") == 0


def test_labels_must_be_whole_numbers(data, capfd):
    sitk.WriteImage(sitk.ReadImage("a.nii.gz") + 0.5, "half.nii.gz")
    arguments = ("-t", "shift.tfm", "--reference", "a.nii.gz", "--out", "w.nii.gz", "--interpolation", "label-gaussian")
    assert ldr("warp", "half.nii.gz", *arguments) == 2
    assert "labels must be whole numbers, got others" in capfd.readouterr().err


def test_register_writes_for_other_programs(data, blob, capfd):
    pytest.importorskip("h5py")
    sitk.WriteImage(blob, "f.nii.gz")
    sitk.WriteTransform(sitk.TranslationTransform(3, (4, 0, 0)), "four.tfm")
    assert ldr("warp", "f.nii.gz", "-t", "four.tfm", "--reference", "f.nii.gz", "--out", "m.nii.gz") == 0
    arguments = ("register", "f.nii.gz", "m.nii.gz", "--cascades", 1, "--no-overview", "--out", "out")
    assert ldr(*arguments, "--write", "ants,fsl,spm,x5", "--initial", "four.tfm,inverse") == 0
    names = {path.name for path in Path("out").glob("transform*")}
    assert names == {
        "transform.h5",
        "transform_ants.nii.gz",
        "transform_fsl.nii.gz",
        "transform_spm.nii",
        "transform_x5.x5",
    }
    Path("p.csv").write_text("40,45,41\n36,51,45\n")
    Path("at.csv").write_text("39,45,42\n36,51,45\n")  # voxels of 3 mm
    results = []
    for name in sorted(names):
        options = ("--reference", "f.nii.gz", "--moving", "m.nii.gz", "--out", "q.csv", "--overwrite")
        assert ldr("points", "at.csv", "-t", f"out/{name}", *options) == 0
        results.append(np.loadtxt("q.csv", delimiter=",", skiprows=1))
    assert all(np.abs(one - results[0]).max() < 1e-3 for one in results)
    assert np.abs(results[0] - [[39, 45, 42], [36, 51, 45]]).max() > 1
    capfd.readouterr()
    assert ldr(*arguments, "--overwrite", "--write", "dicom") == 2
    assert "DICOM" in capfd.readouterr().err
    assert ldr(*arguments, "--overwrite", "--write", "sas") == 2
    assert ldr(*arguments, "--overwrite") == 0
    assert {path.name for path in Path("out").glob("transform*")} == {"transform.h5"}
