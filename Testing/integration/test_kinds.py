"""Rigid, affine and deformable alignment: what each returns, and what is refused."""

from __future__ import annotations

import json

import numpy as np
import pytest
import SimpleITK as sitk

import LDRCore
from LDRCore import cli
from LDRCore.evaluation import scoring
from Testing import known_map

RIGID = np.eye(4)
RIGID[:3, :3] = known_map.rotation((8.0, -11.0, 6.0))
RIGID[:3, 3] = known_map.CENTRE + known_map.SHIFT - RIGID[:3, :3] @ known_map.CENTRE


def mapped(matrix: np.ndarray, points: np.ndarray) -> np.ndarray:
    return points @ matrix[:3, :3].T + matrix[:3, 3]


@pytest.fixture(scope="module")
def rigid_pair() -> tuple[sitk.Image, sitk.Image]:
    values = known_map.intensity(mapped(RIGID, known_map.FIXED.points()))
    return known_map.FIXED.image(values.astype(np.float32)), known_map.moving_image()


@pytest.mark.parametrize("model", ["none", "brain-t1-small"])
def test_a_rigid_result_has_six_parameters_and_keeps_volumes(rigid_pair, model):
    fixed, moving = rigid_pair
    result = LDRCore.register(fixed, moving, kind="rigid", model=model, inverse=True)
    assert isinstance(result.transform, sitk.Euler3DTransform)
    assert result.transform.GetNumberOfParameters() == 6
    linear = np.array(result.transform.GetMatrix()).reshape(3, 3)
    assert np.abs(linear.T @ linear - np.eye(3)).max() < 1e-12
    points = known_map.landmarks(50)
    moved = LDRCore.transform_points(points, result.transform)
    assert np.linalg.norm(moved - mapped(RIGID, points), axis=1).max() < 1.0
    back = LDRCore.transform_points(moved, result.inverse_transform)
    assert np.abs(back - points).max() < 1e-9
    assert result.report["kind"] == "rigid"
    assert result.report["cascades"] == 0
    assert result.report["jacobian_determinant"] == {"min": 1.0, "max": 1.0}
    assert np.abs(sitk.GetArrayFromImage(result.jacobian_determinant) - 1).max() < 1e-6
    by_itk = sitk.GetArrayFromImage(sitk.Resample(moving, fixed, result.transform, sitk.sitkLinear, 0.0))
    assert np.abs(by_itk - sitk.GetArrayFromImage(result.warped)).max() < 1.0  # of 900


def test_an_affine_result_is_one_affine_transform(tmp_path):
    """The pair's true map deforms by up to some 6 mm on top of its affine part."""
    fixed, moving = known_map.fixed_image(), known_map.moving_image()
    result = LDRCore.register(fixed, moving, kind="affine", model="none")
    assert isinstance(result.transform, sitk.AffineTransform)
    assert result.transform.GetParameters() == result.affine.GetParameters()
    determinant = result.report["jacobian_determinant"]
    assert determinant["min"] == determinant["max"] == pytest.approx(np.linalg.det(known_map.MATRIX), rel=0.03)
    result.save(tmp_path / "out")
    read = sitk.ReadTransform(str(tmp_path / "out" / "transform.h5"))
    points = known_map.landmarks(20)
    again = LDRCore.transform_points(points, read)
    assert np.allclose(again, LDRCore.transform_points(points, result.transform), atol=1e-9)


def test_affine_improves_on_rigid_and_deformable_on_affine(demo_pair):
    images = demo_pair["fixed"], demo_pair["moving"]
    labels = [scoring.load_labels(demo_pair[f"{side}_labels"], side) for side in ("fixed", "moving")]
    truth = scoring.Truth(sitk.ReadImage(images[0]), *labels)
    dice = []
    for kind in ("rigid", "affine", "deformable"):
        transform = LDRCore.register(*images, kind=kind).transform
        dice.append(scoring.score(transform, truth, measures=("overlap",))["dice_mean"])
    assert dice[0] + 0.02 < dice[1] < dice[2] - 0.02


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"kind": "bspline"}, "kind must be one of"),
        ({"kind": "rigid", "refine": "fast"}, "refine must be \"none\" for kind 'rigid'"),
        ({"kind": "affine", "refine_steps": 5}, "refine must be \"none\" for kind 'affine'"),
        ({"kind": "affine", "cascades": 2}, "cascades must be 0 .* for kind 'affine', got 2"),
        ({"kind": "rigid", "initial": sitk.BSplineTransform(3)}, "initial must be linear for kind 'rigid'"),
    ],
)
def test_what_only_deforms_is_refused(blob, options, message):
    with pytest.raises(LDRCore.RegistrationError, match=message):
        LDRCore.register(blob, blob, **options)


@pytest.mark.parametrize("affine", [True, False])
def test_a_rigid_result_starts_from_the_rotation_of_an_affine_initial(rigid_pair, affine):
    """The rotation of R S with S a stretch is R; about the content's centre nothing else changes."""
    stretched = RIGID.copy()
    stretched[:3, :3] = RIGID[:3, :3] @ np.diag([1.1, 0.95, 1.0])
    stretched[:3, 3] = known_map.CENTRE + known_map.SHIFT - stretched[:3, :3] @ known_map.CENTRE
    initial = sitk.AffineTransform(3)
    initial.SetMatrix(stretched[:3, :3].ravel().tolist())
    initial.SetTranslation(stretched[:3, 3].tolist())
    result = LDRCore.register(*rigid_pair, kind="rigid", model="none", initial=initial, affine=affine)
    linear = np.array(result.transform.GetMatrix()).reshape(3, 3)
    assert np.abs(linear - RIGID[:3, :3]).max() < (0.01 if affine else 1e-9)


def test_images_that_share_nothing_still_end_in_a_report(blob):
    """Noise against an ellipsoid: no window correlates for long, and nothing fails."""
    noise = sitk.GetImageFromArray(np.random.default_rng(0).integers(0, 500, (20, 24, 9)).astype(np.int16))
    result = LDRCore.register(blob, noise, kind="affine", model="none")
    assert np.isfinite(result.report["affine_matrix_lps"]).all()
    assert result.report["alignment"]["searched"]


def test_the_command_takes_a_kind(demo_pair, tmp_path, capsys):
    out = tmp_path / "out"
    arguments = [demo_pair["fixed"], demo_pair["moving"], "--out", str(out), "--kind", "rigid", "--no-overview"]
    assert cli.main(["register", *arguments]) == 0
    told = dict(line.split(None, 1) for line in capsys.readouterr().out.splitlines())
    assert " rigid" in told["correlation"]
    assert "deformed" not in told["correlation"]  # there is no such stage
    assert told["Jacobian"] == "1.00 to 1.00, 0 folding voxels in the fixed image"
    assert json.loads((out / "report.json").read_text())["kind"] == "rigid"
    assert sitk.ReadTransform(str(out / "transform.h5")).GetNumberOfParameters() == 6
    assert cli.main(["register", *arguments, "--overwrite", "--refine", "fast"]) == 2
    assert "refine must be" in capsys.readouterr().err
