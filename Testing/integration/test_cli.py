"""`ldr` as a user types it: every command on the demo pair, and every refusal with exit code 2."""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import SimpleITK as sitk

from LDRCore import cli
from LDRCore.cli.output import describe_folding


def ldr(*arguments: object) -> int:
    return cli.main([str(a) for a in arguments])


@pytest.fixture(scope="module")
def demo_run(tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("demo") / "out"
    assert ldr("demo", "--out", out, "--json") == 0
    return out


def test_demo_writes_everything_and_files_load(demo_run, demo_pair):
    names = {p.name for p in demo_run.iterdir()}
    assert names == {
        "warped.nii.gz",
        "transform.h5",
        "inverse_transform.h5",
        "displacement_field.nii.gz",
        "jacobian_determinant.nii.gz",
        "report.json",
        "overview.png",
    }
    fixed = sitk.ReadImage(demo_pair["fixed"])
    for name in ("warped.nii.gz", "displacement_field.nii.gz", "jacobian_determinant.nii.gz"):
        image = sitk.ReadImage(str(demo_run / name))
        assert image.GetSize() == fixed.GetSize()
        assert image.GetDirection() == pytest.approx(fixed.GetDirection(), abs=1e-5)
    again = sitk.Resample(
        sitk.ReadImage(demo_pair["moving"]), fixed, sitk.ReadTransform(str(demo_run / "transform.h5")), sitk.sitkLinear
    )
    warped = sitk.ReadImage(str(demo_run / "warped.nii.gz"))
    off = np.abs(sitk.GetArrayFromImage(again).astype(int) - sitk.GetArrayFromImage(warped))
    assert (off > 1).mean() < 1e-4


def test_overview_shows_every_column(demo_run):
    picture = sitk.GetArrayFromImage(sitk.ReadImage(str(demo_run / "overview.png")))
    assert picture.shape[1] > 1200
    columns = np.array_split(picture[..., :3].astype(float), 8, axis=1)
    assert all(c.std() > 10 for c in columns)


def test_demo_dice_rises(tmp_path, capsys):
    assert ldr("demo", "--out", tmp_path / "o", "--json", "--no-overview") == 0
    dice = json.loads(capsys.readouterr().out)["dice"]
    assert dice["nothing"] < dice["affine"] < dice["deformable"]


def test_a_second_run_writes_the_same_numbers(demo_run, demo_pair, tmp_path):
    out = tmp_path / "again"
    assert ldr("register", demo_pair["fixed"], demo_pair["moving"], "--out", out, "--no-overview") == 0
    for name in ("warped.nii.gz", "displacement_field.nii.gz", "jacobian_determinant.nii.gz"):
        a, b = (sitk.GetArrayFromImage(sitk.ReadImage(str(f / name))) for f in (demo_run, out))
        assert np.array_equal(a, b), name


def test_warp_points_invert_jacobian(demo_run, demo_pair, tmp_path, capsys):
    transform = demo_run / "transform.h5"
    labels = tmp_path / "labels.nii.gz"
    fixed = demo_pair["fixed"]
    arguments = ("--transform", transform, "--reference", fixed, "--out", labels, "--nearest")
    assert ldr("warp", demo_pair["moving_labels"], *arguments) == 0
    kept = np.unique(sitk.GetArrayFromImage(sitk.ReadImage(str(labels))))
    assert set(kept) <= set(np.unique(sitk.GetArrayFromImage(sitk.ReadImage(demo_pair["moving_labels"]))))

    image = sitk.ReadImage(fixed)
    point = image.TransformIndexToPhysicalPoint((40, 50, 30))
    (tmp_path / "p.csv").write_text("x,y,z\n" + ",".join(map(str, point)) + "\n")
    assert ldr("points", tmp_path / "p.csv", "--transform", transform, "--out", tmp_path / "q.csv") == 0
    expected = sitk.ReadTransform(str(transform)).TransformPoint(point)
    assert np.loadtxt(tmp_path / "q.csv", delimiter=",", skiprows=1) == pytest.approx(expected, abs=1e-5)

    for source in (transform, demo_run / "displacement_field.nii.gz"):
        inverse = tmp_path / f"{source.name}.inverse.h5"
        assert ldr("invert", source, "--reference", fixed, "--out", inverse) == 0
        back = sitk.ReadTransform(str(inverse)).TransformPoint(expected)
        assert back == pytest.approx(point, abs=0.5)

    capsys.readouterr()
    out = tmp_path / "j.nii.gz"
    assert ldr("jacobian", transform, "--reference", fixed, "--out", out, "--json") == 0
    summary = json.loads(capsys.readouterr().out)
    assert summary["min"] < 1 < summary["max"]
    np.testing.assert_allclose(
        sitk.GetArrayFromImage(sitk.ReadImage(str(out))),
        sitk.GetArrayFromImage(sitk.ReadImage(str(demo_run / "jacobian_determinant.nii.gz"))),
        atol=2e-3,  # straight from the dense field, or through ITK
    )


def test_an_earlier_result_can_be_the_start_of_the_next(demo_run, demo_pair, tmp_path):
    out = tmp_path / "out"
    arguments = ("--out", out, "--initial", demo_run / "transform.h5", "--cascades", 1, "--no-overview")
    assert ldr("register", demo_pair["fixed"], demo_pair["moving"], *arguments) == 0
    again = sitk.ReadTransform(str(out / "transform.h5"))
    field = sitk.ReadImage(str(out / "displacement_field.nii.gz"))
    point = field.TransformIndexToPhysicalPoint((40, 50, 30))
    assert np.add(point, field[40, 50, 30]) == pytest.approx(again.TransformPoint(point), abs=1e-3)


def test_points_in_ras(demo_run, demo_pair, tmp_path):
    point = np.array(sitk.ReadImage(demo_pair["fixed"]).TransformIndexToPhysicalPoint((40, 50, 30)))
    flip = np.array([-1, -1, 1])
    np.savetxt(tmp_path / "p.csv", [point * flip], delimiter=",")
    transform = demo_run / "transform.h5"
    assert ldr("points", tmp_path / "p.csv", "--ras", "--transform", transform, "--out", tmp_path / "q.csv") == 0
    expected = np.array(sitk.ReadTransform(str(transform)).TransformPoint(point.tolist())) * flip
    assert np.loadtxt(tmp_path / "q.csv", delimiter=",", skiprows=1) == pytest.approx(expected, abs=1e-5)


def test_models_lists_cards_and_costs(capsys):
    assert ldr("models") == 0
    text = capsys.readouterr().out
    assert "brain-t1" in text
    assert "1,548,643" in text
    assert "280,659" in text
    assert "brain-t1-gradient  0 to 9 cascades" in text


def test_doctor_is_content_here(capsys):
    assert ldr("doctor") == 0
    assert "all well" in capsys.readouterr().out


def test_doctor_names_extras_that_are_missing(capsys, monkeypatch):
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "pydicom" else find(name))
    assert ldr("doctor", "--json") == 0
    facts = json.loads(capsys.readouterr().out)["facts"]
    told = "not installed: pip install 'LDRCore[transforms]' (transform files of X5 and DICOM)"
    assert facts["extra transforms"] == told


def test_help_needs_nothing_heavy():
    code = "import sys; from LDRCore import cli\ntry: cli.main(['register', '--help'])\nexcept SystemExit: pass\n"
    code += "print([m for m in ('torch', 'SimpleITK', 'numpy', 'matplotlib') if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, encoding="utf-8", check=True)
    assert done.stdout.strip().endswith("[]")


def test_a_missing_package_is_named(monkeypatch, demo_pair, tmp_path, capsys):
    monkeypatch.setitem(sys.modules, "LDRCore.report", None)
    monkeypatch.setitem(sys.modules, "torch", None)  # import torch now fails as if it were not installed
    assert ldr("register", demo_pair["fixed"], demo_pair["moving"], "--out", tmp_path / "o", "--no-overview") == 1
    assert "the package torch must be installed" in capsys.readouterr().err
    assert not (tmp_path / "o").exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "ldr: the following arguments are required: COMMAND (see ldr --help)\n"),
        (
            ["warp", "i", "--reference", "r", "--out", "o"],
            "warp: the following arguments are required: --transform",
        ),
        (
            ["register", "f", "m", "--out", "o", "--cascades", "x"],
            "register: argument --cascades: invalid int value",
        ),
        (["demo", "--sharp"], "unrecognized arguments: --sharp"),
    ],
)
def test_wrong_arguments_are_one_sentence_and_code_2(capsys, arguments, message):
    with pytest.raises(SystemExit) as caught:
        ldr(*arguments)
    assert caught.value.code == 2
    printed = capsys.readouterr()
    assert message in printed.err
    assert printed.err.count("\n") == 1
    assert printed.out == ""


def test_doctor_names_what_is_missing(monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "SimpleITK", None)  # as if it were not installed
    assert ldr("doctor") == 1
    printed = capsys.readouterr()
    assert "PROBLEM        SimpleITK is not installed" in printed.out
    assert printed.err == ""


def test_every_command_has_help(capsys):
    for command in ("demo", "register", "warp", "points", "invert", "jacobian", "evaluate", "models", "doctor"):
        with pytest.raises(SystemExit) as caught:
            ldr(command, "--help")
        assert caught.value.code == 0
        assert len(capsys.readouterr().out) > 100


@pytest.fixture
def files(tmp_path, blob) -> dict[str, Path]:
    """One good image and one of each bad kind."""
    values = sitk.GetArrayFromImage(blob)
    bad = {
        "good": blob,
        "two": sitk.GetImageFromArray(values[0]),
        "four": sitk.JoinSeries([blob, blob]),
        "colour": sitk.GetImageFromArray(np.stack([values] * 3, -1).astype(np.uint8), isVector=True),
        "constant": sitk.GetImageFromArray(np.zeros_like(values)),
        "emptymask": sitk.GetImageFromArray(np.zeros(values.shape, np.uint8)),
        "othermask": sitk.GetImageFromArray(np.ones((5, 6, 7), np.uint8)),
    }
    floats = values.astype(np.float32)
    floats[0, 0, 0] = np.nan
    bad["nan"] = sitk.GetImageFromArray(floats)
    bad["emptymask"].CopyInformation(blob)
    paths = {}
    for name, image in bad.items():
        paths[name] = tmp_path / f"{name}.nii.gz"
        sitk.WriteImage(image, str(paths[name]))
    paths["text"] = tmp_path / "text.nii.gz"
    paths["text"].write_text("hello")
    paths["missing"] = tmp_path / "missing.nii.gz"
    paths["folder"] = tmp_path / "empty-folder"
    paths["folder"].mkdir()
    return paths


@pytest.mark.parametrize(
    ("fixed", "extra", "message"),
    [
        ("missing", [], "must be an existing file"),
        ("text", [], "must be an image that SimpleITK can read"),
        ("two", [], "must be 3D, got 2D"),
        ("four", [], "must be 3D, got 4D"),
        ("colour", [], "one value a voxel, got 3"),
        ("nan", [], "only finite values, got 1 voxels"),
        ("constant", [], "constant image"),
        ("folder", [], "one DICOM series"),
        ("good", ["--fixed-mask", "emptymask"], "empty mask"),
        ("good", ["--fixed-mask", "othermask"], "grid of its image"),
        ("good", ["--model", "liver"], "model must be one of"),
        ("good", ["--cascades", "99"], "cascades must be 0 to 9"),
        ("good", ["--initial", "missing"], "transform must be an existing file"),
    ],
)
def test_bad_input_is_one_sentence_code_2_and_nothing_written(files, tmp_path, capsys, fixed, extra, message):
    out = tmp_path / "out"
    extra = [str(files.get(e, e)) for e in extra]
    assert ldr("register", files[fixed], files["good"], "--out", out, *extra) == 2
    printed = capsys.readouterr()
    assert message in printed.err
    assert printed.err.count("\n") == 1
    assert printed.out == ""
    assert not out.exists()


def test_output_is_never_overwritten_silently(files, tmp_path, capsys):
    out = tmp_path / "out"
    out.mkdir()
    (out / "warped.nii.gz").write_text("mine")
    assert ldr("register", files["good"], files["good"], "--out", out) == 2
    assert "must not hold an earlier result" in capsys.readouterr().err
    assert (out / "warped.nii.gz").read_text(encoding="utf-8") == "mine"
    assert ldr("register", files["good"], files["good"], "--out", files["text"]) == 2
    assert "must be a folder, got the file" in capsys.readouterr().err


def test_bad_points_and_transforms(files, tmp_path, capsys):
    points = tmp_path / "p.csv"
    points.write_text("x,y,z\n1,2,3\n4,five,6\n")
    transform = tmp_path / "t.tfm"
    sitk.WriteTransform(sitk.TranslationTransform(3, (1, 2, 3)), str(transform))
    out = tmp_path / "q.csv"
    assert ldr("points", points, "--transform", transform, "--out", out) == 2
    assert "three numbers a line" in capsys.readouterr().err
    points.write_text("4,5,6\n1,2\n")
    assert ldr("points", points, "--transform", transform, "--out", out) == 2
    assert "three numbers a line (x,y,z in mm), got '1,2' in line 2" in capsys.readouterr().err
    points.write_text("1,2,3\n")
    assert ldr("points", points, "--transform", files["good"], "--out", out) == 2
    assert "3 components a voxel" in capsys.readouterr().err
    assert ldr("invert", transform, "--reference", files["good"], "--out", tmp_path / "t.png") == 2
    assert "written as .h5 or .tfm" in capsys.readouterr().err
    assert not out.exists()
    for command in (["warp", files["good"], "--transform"], ["jacobian"]):
        assert ldr(*command, transform, "--reference", files["good"], "--out", tmp_path / "x.qqq") == 2
        assert "an image is written as .nii.gz, .nrrd, .mha" in capsys.readouterr().err
        assert not (tmp_path / "x.qqq").exists()


def test_few_folding_voxels_are_not_rounded_to_none():
    assert describe_folding(0, 0.0) == "0 folding voxels"
    assert describe_folding(1, 1 / 1_296_000) == "1 folding voxel (7.72e-05 %)"
    assert describe_folding(200, 0.02) == "200 folding voxels (2 %)"
    assert describe_folding(64_000, 1.0) == "64000 folding voxels (100 %)"
