"""A transform that is given the wrong way round is told by the report beside it."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import SimpleITK as sitk

from LDRCore import cli
from LDRCore.io import images


@pytest.fixture
def result(tmp_path, monkeypatch) -> Path:
    """A folder as `ldr register` writes it; the images lie 500 mm apart and differ in size and direction."""
    rng = np.random.default_rng(0)
    described = {}
    for name, shape, x, direction in (
        ("fixed", (8, 9, 10), 0.0, (1, 0, 0, 0, 1, 0, 0, 0, 1)),
        ("moving", (11, 12, 7), 500.0, (0, 1, 0, -1, 0, 0, 0, 0, 1)),
    ):
        image = sitk.GetImageFromArray(rng.normal(size=shape).astype(np.float32))
        image.SetOrigin((x, 10, 20))
        image.SetSpacing((1.1, 1.3, 2.0))
        image.SetDirection(direction)
        sitk.WriteImage(image, str(tmp_path / f"{name}.nii.gz"))
        described[name] = images.describe(image)
        point = image.TransformContinuousIndexToPhysicalPoint((3, 3, 3))
        (tmp_path / f"{name}.csv").write_text(",".join(map(str, point)) + "\n")
    shift = sitk.TranslationTransform(3, (500.0, 0.0, 0.0))
    sitk.WriteTransform(shift, str(tmp_path / "transform.h5"))
    sitk.WriteTransform(shift.GetInverse(), str(tmp_path / "inverse_transform.h5"))
    (tmp_path / "report.json").write_text(json.dumps(described))
    monkeypatch.chdir(tmp_path)
    return tmp_path


def warnings_of(capsys, *arguments: str) -> list[str]:
    assert cli.main([*arguments, "--json", "--overwrite"]) == 0
    found: list[str] = json.loads(capsys.readouterr().out)["warnings"]
    return found


def warp(capsys, transform: str, reference: str) -> list[str]:
    arguments = ("--transform", transform, "--reference", f"{reference}.nii.gz", "--out", "o.nii.gz")
    return warnings_of(capsys, "warp", "moving.nii.gz", *arguments)


def test_warp_warns_where_the_reference_lies_on_the_other_grid(result, capsys):
    assert warp(capsys, "transform.h5", "fixed") == []
    assert warp(capsys, "inverse_transform.h5", "moving") == []
    (said,) = warp(capsys, "transform.h5", "moving")
    assert said.startswith("the reference lies on the moving image's grid")
    assert said.endswith("inverse_transform.h5 is for the other way")
    (said,) = warp(capsys, "inverse_transform.h5", "fixed")
    assert said.startswith("the reference lies on the fixed image's grid")


def test_points_warn_where_most_lie_in_the_other_image(result, capsys):
    def points(transform: str, name: str) -> list[str]:
        return warnings_of(capsys, "points", f"{name}.csv", "--transform", transform, "--out", "o.csv")

    assert points("transform.h5", "fixed") == points("inverse_transform.h5", "moving") == []
    (said,) = points("transform.h5", "moving")
    assert said.startswith("most points lie in the moving image")
    assert len(points("inverse_transform.h5", "fixed")) == 1


@pytest.mark.parametrize(
    "text", ["{", "[]", "{}", '{"fixed": {"size": 3}, "moving": null}', '{"fixed": 1, "moving": 2}']
)
def test_reports_of_others_are_passed_over(result, capsys, text):
    (result / "report.json").write_text(text)
    assert warp(capsys, "transform.h5", "moving") == []
    (result / "report.json").unlink()
    assert warp(capsys, "transform.h5", "moving") == []


def test_a_grid_of_ones_own_is_no_mistake(result, capsys):
    image = sitk.ReadImage("moving.nii.gz")
    image.SetOrigin((480.0, 10.0, 20.0))
    sitk.WriteImage(image, "own.nii.gz")
    assert warp(capsys, "transform.h5", "own") == []
