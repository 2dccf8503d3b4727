"""`ldr evaluate`: one pair, a CSV of pairs, given transforms, landmarks, and every refusal."""

from __future__ import annotations

import csv
import json
from pathlib import Path

import numpy as np
import pytest
import SimpleITK as sitk

from LDRCore import cli
from LDRCore.io.points import read_points


def ldr(*arguments: object) -> int:
    return cli.main([str(a) for a in arguments])


@pytest.fixture
def folder(tmp_path, blob) -> Path:
    """A blob, its copy 6 mm to the left in the header, labels, landmarks and the right transform."""
    labels = sitk.Cast(sitk.BinaryThreshold(blob, 1, 10000, 1, 0), sitk.sitkUInt8)
    moved = [sitk.Image(i) for i in (blob, labels)]
    for image in moved:
        image.SetOrigin((6.0, 0.0, 0.0))
    for image, name in zip((blob, labels, *moved), ("f", "fl", "m", "ml"), strict=True):
        sitk.WriteImage(image, str(tmp_path / f"{name}.nii.gz"))
    sitk.WriteTransform(sitk.TranslationTransform(3, (6.0, 0, 0)), str(tmp_path / "t.tfm"))
    (tmp_path / "fp.csv").write_text("x,y,z\n30,40,50\n45,50,20\n")
    (tmp_path / "mp.csv").write_text("36,40,50\n51,50,23\n")
    return tmp_path


def labels(folder: Path) -> tuple[object, ...]:
    return "--fixed-labels", folder / "fl.nii.gz", "--moving-labels", folder / "ml.nii.gz"


def test_a_given_transform_by_hand(folder, capsys):
    points = ("--fixed-landmarks", folder / "fp.csv", "--moving-landmarks", folder / "mp.csv")
    pair = (folder / "f.nii.gz", folder / "m.nii.gz")
    assert ldr("evaluate", *pair, *labels(folder), *points, "--transform", folder / "t.tfm", "--json") == 0
    evaluation = json.loads(capsys.readouterr().out)
    after = evaluation["pairs"][0]["after"]
    assert after["dice_mean"] == 1
    assert after["hd95_mm"] == 0
    assert after["tre_mm"] == pytest.approx(1.5)  # landmark errors 0 and 3
    assert after["seconds"] is None
    assert evaluation["pairs"][0]["before"]["tre_mm"] == pytest.approx((6 + np.hypot(6, 3)) / 2)
    assert "affine" not in evaluation["pairs"][0]
    assert evaluation["summary"]["tre_mm"] == pytest.approx({"n": 1, "mean": 1.5, "std": 0})
    # the same landmarks in other frames
    (folder / "fv.csv").write_text("10,13.3333333333,16.6666666667\n15,16.6666666667,6.6666666667\n")
    (folder / "mv.csv").write_text("10,13.3333333333,16.6666666667\n15,16.6666666667,7.6666666667\n")
    voxels = ("--fixed-landmarks", folder / "fv.csv", "--moving-landmarks", folder / "mv.csv", "--frame", "voxel")
    assert ldr("evaluate", *pair, *voxels, "--transform", folder / "t.tfm", "--json") == 0
    assert json.loads(capsys.readouterr().out)["pairs"][0]["after"]["tre_mm"] == pytest.approx(1.5)


def test_one_pair_is_registered(folder, capsys):
    assert ldr("evaluate", folder / "f.nii.gz", folder / "m.nii.gz", *labels(folder), "--cascades", 1) == 0
    text = capsys.readouterr().out
    assert text.startswith("f.nii.gz <- m.nii.gz: Dice 0.")
    assert " before, " in text
    assert " affine, " in text
    assert "ndv_percent" in text


def test_a_list_of_pairs_goes_on_after_a_bad_one(folder, capsys):
    rows = ["fixed,moving,fixed_labels,moving_labels,transform"]
    rows += ["f.nii.gz,m.nii.gz,fl.nii.gz,ml.nii.gz,t.tfm", "f.nii.gz,gone.nii.gz,,,t.tfm", "f.nii.gz,m.nii.gz,,,t.tfm"]
    (folder / "pairs.csv").write_text("\n".join(rows) + "\n")
    out = folder / "rows.csv"
    assert ldr("evaluate", "--pairs", folder / "pairs.csv", "--out", out, "--json", "--no-surface") == 1
    evaluation = json.loads(capsys.readouterr().out)
    assert len(evaluation["pairs"]) == 3
    assert len(evaluation["problems"]) == 1
    assert "moving image must be an existing file" in evaluation["problems"][0]
    assert evaluation["summary"]["dice_mean"]["n"] == 1
    assert evaluation["summary"]["folding_count"]["n"] == 2
    with out.open() as stream:
        written = list(csv.DictReader(stream))
    assert [r["dice_mean"] for r in written] == ["1", "", ""]
    assert [r["hd95_mm"] for r in written] == ["", "", ""]
    assert "must be an existing file" in written[1]["error"]
    assert float(written[0]["dice_mean_before"]) < 0.9
    assert ldr("evaluate", "--pairs", folder / "pairs.csv", "--out", out) == 2  # never overwritten silently
    assert ldr("evaluate", "--pairs", folder / "pairs.csv") == 1
    assert "f.nii.gz <- gone.nii.gz: FAILED: moving image must be" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "either a fixed and a moving image or --pairs CSV"),
        (["f.nii.gz"], "either a fixed and a moving image or --pairs CSV"),
        (["f.nii.gz", "m.nii.gz", "--pairs", "pairs.csv"], "either a fixed and a moving image or --pairs CSV"),
        (["--pairs", "none.csv"], "the list of pairs must be an existing CSV file"),
        (["--pairs", "pairs.csv", "--fixed-labels", "fl.nii.gz"], "got also --fixed-labels"),
        (["--pairs", "bad.csv"], "must have the columns fixed, moving and any of"),
        (["--pairs", "empty.csv"], "must name a fixed and a moving image in every line"),
        (["--pairs", "long.csv"], "must have 2 cells in every line, got one with more"),
        (["--pairs", "pairs.csv", "--protocol", "x"], "protocol must be one of"),
        (["--pairs", "pairs.csv", "--frame", "mni"], "the frame of landmarks must be one of"),
        (["--pairs", "pairs.csv", "--cascades", "99"], "cascades must be 0 to 9"),
        (["--pairs", "pairs.csv", "--learn2reg", "f.nii.gz"], "the output must be a folder, got the file f.nii.gz"),
        (["f.nii.gz", "m.nii.gz", "--fixed-labels", "fl.nii.gz"], "labels must be given for both images or for none"),
        (
            ["f.nii.gz", "m.nii.gz", "--fixed-labels", "fl.nii.gz", "--moving-labels", "other.nii.gz"],
            "must have a structure in common, got [1] and [7]",
        ),
        (
            ["f.nii.gz", "m.nii.gz", "--fixed-labels", "f.nii.gz", "--moving-labels", "float.nii.gz"],
            "moving labels must hold whole numbers",
        ),
        (
            ["f.nii.gz", "m.nii.gz", "--fixed-landmarks", "fp.csv", "--moving-landmarks", "far.csv"],
            "moving landmarks must lie inside their image, got 1 of 2 outside",
        ),
        (
            ["f.nii.gz", "m.nii.gz", "--fixed-landmarks", "fp.csv", "--moving-landmarks", "one.csv"],
            "landmarks must correspond one to one, got 2 and 1",
        ),
        (
            ["f.nii.gz", "m.nii.gz", "--fixed-landmarks", "fp.csv", "--moving-landmarks", "mp.csv", "--frame", "mni"],
            "the frame of landmarks must be one of",
        ),
        (
            [
                *["f.nii.gz", "m.nii.gz", "--fixed-labels", "fl.nii.gz", "--moving-labels", "ml.nii.gz"],
                "--protocol",
                "x",
            ],
            "protocol must be one of",
        ),
        (["f.nii.gz", "m.nii.gz", "--learn2reg", "sub"], "needs images named ..._CCCC_MMMM.nii.gz"),
    ],
)
def test_bad_input_is_one_sentence_and_code_2(folder, monkeypatch, capsys, blob, arguments, message):
    monkeypatch.chdir(folder)
    files = {"bad": "fixed,labels\na,b\n", "empty": "fixed,moving\n", "pairs": "fixed,moving\nf.nii.gz,m.nii.gz\n"}
    files |= {"far": "36,40,50\n900,0,0\n", "one": "36,40,50\n", "long": "fixed,moving\nf.nii.gz,m.nii.gz,fl.nii.gz\n"}
    for name, text in files.items():
        (folder / f"{name}.csv").write_text(text)
    values = sitk.GetArrayFromImage(sitk.ReadImage("fl.nii.gz"))
    for name, array in (("other", values * 7), ("float", values * np.float32(0.5))):
        image = sitk.GetImageFromArray(array)
        image.CopyInformation(blob)
        sitk.WriteImage(image, f"{name}.nii.gz")
    given = (
        [*arguments, "--transform", "t.tfm"] if "m.nii.gz" in arguments and "--pairs" not in arguments else arguments
    )
    assert ldr("evaluate", *given) == 2
    printed = capsys.readouterr()
    assert message in printed.err
    assert printed.err.count("\n") == 1
    assert printed.out == ""
    assert not (folder / "sub").exists()


def test_points_of_a_csv_may_have_comments(tmp_path):
    (tmp_path / "p.csv").write_text("# mine\n1,2,3\n")
    assert read_points(tmp_path / "p.csv").tolist() == [[1, 2, 3]]
