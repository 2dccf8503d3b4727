"""The verdict on a result: each measure by hand, each reason on its own, and made failures end to end."""

from __future__ import annotations

import copy
import json

import numpy as np
import pytest
import SimpleITK as sitk
import torch

import LDRCore
from LDRCore import overview, report
from LDRCore.cli.main import main
from LDRCore.geometry import Grid
from LDRCore.pipeline import evidence, preprocess, verdict
from LDRCore.pipeline.inputs import Pair
from LDRCore.transforms.field import DenseField
from Testing import known_map

RIGHT = {
    "local_correlation": {"affine": 0.5, "after": 0.75},
    "clearness": {"affine": 2.0, "after": 2.8},
    "same_contrast": 0.93,
    "inside": 0.98,
    "missing": 0.003,
    "determinant": 1.05,
    "stretches": [0.95, 1.1],
    "extreme": 0.002,
    "folding": 0.0,
    "flat": {"fixed": 0.05, "moving": 0.01},
}


def judge(one_contrast: bool = True, **changes: object) -> dict:
    return verdict.judge(copy.deepcopy(RIGHT) | changes, one_contrast=one_contrast)


def test_a_usual_result_is_trusted_without_reasons():
    assert judge() == {"verdict": "trust", "reasons": []}


@pytest.mark.parametrize(
    ("changes", "word", "reason"),
    [
        ({"clearness": {"affine": 1.1, "after": 1.6}}, "failed", "hardly better than shifted"),
        ({"clearness": {"affine": 1.1, "after": 2.6}}, "look", "only 1.10 times as well"),
        ({"local_correlation": {"affine": 0.5, "after": 0.2}}, "failed", "took the images apart"),
        ({"local_correlation": {"affine": 0.5, "after": 0.45}}, "look", "fell from 0.50 to 0.45"),
        ({"local_correlation": {"affine": 0.05, "after": 0.1}}, "look", "little in common"),
        ({"local_correlation": {"affine": 0.1, "after": 0.25}}, "look", "correlation 0.10 with the affine map alone"),
        ({"inside": 0.05}, "failed", "only 5 % of the fixed content"),
        ({"inside": 0.0}, "failed", "nothing of the fixed content meets"),
        ({"inside": 0.4}, "look", "only 40 % of the fixed content"),
        ({"missing": 0.5}, "failed", "shows nothing at 50 %"),
        ({"missing": 0.2}, "look", "shows nothing at 20 %"),
        ({"determinant": 3.4}, "look", "changes the volume 3.40 times"),
        ({"determinant": -1.04}, "look", "the affine part mirrors the image"),
        ({"stretches": [0.7, 1.4]}, "look", "2.00 times as much as another"),
        ({"same_contrast": -0.9}, "look", "contrast of the images differs"),
        ({"flat": {"fixed": 0.05, "moving": 0.9}}, "look", "the moving image has regions of one value"),
        ({"folding": 0.02}, "look", "folds at 2 %"),
        ({"folding": 0.997}, "look", "folds at 99.7 %"),
        ({"folding": 1.0}, "look", "folds at 100 %"),
        ({"extreme": 0.06}, "look", "more than fivefold at 6 %"),
    ],
)
def test_each_measure_gives_its_reason_in_words(changes, word, reason):
    said = judge(**changes)
    assert said["verdict"] == word
    assert len(said["reasons"]) == 1
    assert reason in said["reasons"][0]


def test_other_contrast_matters_where_networks_expect_it():
    assert judge(one_contrast=False, same_contrast=-0.9)["verdict"] == "trust"


def test_an_image_unlike_the_models_is_a_reason_to_look():
    said = verdict.judge(RIGHT, one_contrast=True, more=["the fixed image looks like CT"])
    assert said == {"verdict": "look", "reasons": ["the fixed image looks like CT"]}


@pytest.mark.parametrize("why", ["networks_left_out", "refinement_skipped"])
def test_a_deformation_that_was_left_out_is_a_reason_to_look(why):
    measures = {why: "the contrasts differ", "dense_displacement_mm": {"max": 0.0}}
    assert report.doubts(measures) == ["nothing was deformed after the affine alignment: the contrasts differ"]
    measures["dense_displacement_mm"]["max"] = 3.0  # by what did run
    assert report.doubts(measures) == []
    assert report.doubts({"dense_displacement_mm": {"max": 0.0}}) == []  # nothing was asked for


def test_failures_come_before_doubts():
    said = judge(missing=0.5, folding=0.02)
    assert said["verdict"] == "failed"
    assert [("nothing" in said["reasons"][0]), ("folds" in said["reasons"][1])] == [True, True]


def textured(edge: int = 40, seed: int = 0) -> sitk.Image:
    """A cube of smooth noise within a margin of air, 3 mm."""
    rng = np.random.default_rng(seed)
    noise = sitk.SmoothingRecursiveGaussian(sitk.GetImageFromArray(rng.normal(size=(edge,) * 3)), 1.5)
    values = sitk.GetArrayFromImage(noise)
    values = 500 + 200 * values / values.std()
    inner = np.zeros((edge,) * 3, dtype=bool)
    inner[6:-6, 6:-6, 6:-6] = True
    image = sitk.GetImageFromArray(np.where(inner, values, 0).astype(np.float32))
    image.SetSpacing((3.0, 3.0, 3.0))
    return image


def prepared(image: sitk.Image) -> preprocess.PreparedImage:
    return preprocess.prepare(image, None, fine_mm=2.0, coarse_mm=4.0)


def measured(fixed: sitk.Image, moving: sitk.Image, affine: np.ndarray | None = None, u: torch.Tensor | None = None):
    sides = prepared(fixed), prepared(moving)
    grid = Grid.around(*sides[0].box_lps, spacing_mm=3.0, margin_mm=6.0, multiple=1, max_voxels=10**6)
    u = torch.zeros(1, 3, *grid.shape) if u is None else u(grid.shape)
    field = DenseField(u, grid, np.eye(4) if affine is None else affine)
    return evidence.measure(Pair(*sides, sides[1].coarse), field)


def test_an_image_agrees_with_itself_and_hardly_with_itself_shifted():
    image = textured()
    found = measured(image, image)
    assert found["local_correlation"]["affine"] == pytest.approx(1, abs=0.03)
    assert found["same_contrast"] == pytest.approx(1, abs=0.03)
    assert found["clearness"]["affine"] > 3
    assert (found["inside"], found["missing"], found["determinant"]) == (1, 0, 1)
    assert found["stretches"] == [1, 1]
    shift = np.eye(4)
    shift[:3, 3] = 12, -9, 9
    assert measured(image, image, shift)["clearness"]["affine"] < 1.2


def test_an_inverted_contrast_keeps_its_local_correlation_but_not_its_sign():
    image = textured()
    values = sitk.GetArrayFromImage(image)
    inverted = sitk.GetImageFromArray(np.where(values > 0, 1100 - values, 0))
    inverted.CopyInformation(image)
    found = measured(image, inverted)
    assert found["local_correlation"]["affine"] > 0.5
    assert found["same_contrast"] < -0.2


def test_what_lies_outside_the_moving_field_of_view_is_not_compared():
    image = textured()
    found = measured(image, image[:, :, :20])
    assert found["inside"] == pytest.approx(0.5, abs=0.06)
    assert found["missing"] == pytest.approx(0, abs=0.01)
    assert found["local_correlation"]["affine"] == pytest.approx(1, abs=0.1)


def test_a_part_that_was_set_to_zero_is_missing():
    image = textured()
    values = sitk.GetArrayFromImage(image)
    values[:20] = 0
    half = sitk.GetImageFromArray(values)
    half.CopyInformation(image)
    assert measured(image, half)["missing"] == pytest.approx(0.5, abs=0.06)


def test_folding_and_extreme_volume_changes_are_those_of_the_field():
    image = textured()

    def mirrored(shape: tuple[int, ...]) -> torch.Tensor:  # x -> c - x: determinant -1 everywhere
        u = torch.zeros(1, 3, *shape)
        u[0, 0] = (shape[0] - 1 - 2 * torch.arange(float(shape[0])))[:, None, None]
        return u

    def squeezed(shape: tuple[int, ...]) -> torch.Tensor:  # x -> x / 10: determinant .1
        u = torch.zeros(1, 3, *shape)
        u[0, 0] = -0.9 * (torch.arange(float(shape[0])) - (shape[0] - 1) / 2)[:, None, None]
        return u

    for make, extreme, folding in ((mirrored, 1, 1), (squeezed, 1, 0)):
        found = measured(image, image, None, make)
        assert (found["extreme"], found["folding"]) == (extreme, folding)


def test_masks_are_flat_and_scans_are_not():
    image = textured()
    mask = sitk.Cast(image > 0, sitk.sitkUInt8)
    assert measured(image, mask)["flat"] == {"fixed": 0, "moving": pytest.approx(27 / 28, abs=0.005)}  # of 28 a row


@pytest.fixture(scope="module")
def heads() -> tuple[sitk.Image, sitk.Image]:
    return known_map.fixed_image(), known_map.moving_image()


@pytest.mark.parametrize("keywords", [{"model": "none"}, {"kind": "rigid", "model": "none"}, {}])
def test_a_pair_that_is_brought_together_is_trusted(heads, keywords):
    said = LDRCore.register(*heads, **keywords).report["verdict"]
    assert said == {"verdict": "trust", "reasons": []}


def test_a_wrong_start_that_is_kept_fails(heads):
    turned = sitk.Euler3DTransform(known_map.CENTRE.tolist(), 0.4, 1.2, 0.2)
    for keywords in ({"model": "none"}, {}):
        said = LDRCore.register(*heads, affine=False, initial=turned, **keywords).report["verdict"]
        assert said["verdict"] == "failed"


def test_half_a_head_is_not_trusted(heads):
    fixed, moving = heads
    values = sitk.GetArrayFromImage(moving)
    values[:, : values.shape[1] // 2] = 0
    half = sitk.GetImageFromArray(values)
    half.CopyInformation(moving)
    said = LDRCore.register(fixed, half).report["verdict"]
    assert said["verdict"] != "trust"


def test_networks_on_an_inverted_contrast_are_not_trusted(heads):
    fixed, moving = heads
    assert LDRCore.register(fixed, 900 - moving).report["verdict"]["verdict"] != "trust"


def test_a_wrong_spacing_is_told(heads):
    fixed, moving = heads
    wrong = sitk.Image(moving)
    wrong.SetSpacing([1.5 * s for s in moving.GetSpacing()])
    said = LDRCore.register(fixed, wrong, model="none").report["verdict"]
    assert said["verdict"] != "trust"
    assert any("are both spacings right?" in reason for reason in said["reasons"])


def test_the_verdict_is_printed_stored_and_drawn(heads, tmp_path, capsys, monkeypatch):
    drawn = []
    monkeypatch.setattr("LDRCore.overview.write_overview", lambda *given: drawn.append(given[-1]))
    paths = [str(tmp_path / f"{name}.nii.gz") for name in ("fixed", "moving")]
    for image, path in zip(heads, paths, strict=True):
        sitk.WriteImage(image, path)
    turned = sitk.Euler3DTransform(known_map.CENTRE.tolist(), 0.4, 1.2, 0.2)
    sitk.WriteTransform(turned, str(tmp_path / "turned.tfm"))
    extra = ["--out", str(tmp_path / "out"), "--initial", str(tmp_path / "turned.tfm"), "--no-affine"]
    assert main(["register", *paths, *extra]) == 0
    said = capsys.readouterr().out.splitlines()
    stored = json.loads((tmp_path / "out" / "report.json").read_text(encoding="utf-8"))["verdict"]
    assert said[0] == "verdict      failed"
    assert said[1] == f"             - {stored['reasons'][0]}"
    assert stored["verdict"] == "failed"
    assert drawn == [stored]


def test_the_pictures_line_names_the_first_reason():
    assert overview.describe_verdict({"verdict": "trust", "reasons": []}) == "trust"
    assert overview.describe_verdict({"verdict": "look", "reasons": ["a"]}) == "look: a"
    assert overview.describe_verdict({"verdict": "failed", "reasons": ["a", "b", "c"]}) == "failed: a (and 2 more)"


def test_the_picture_names_the_patients_sides(tmp_path, monkeypatch):
    from matplotlib.axes import Axes

    values = np.zeros((20, 20, 20), np.float32)
    values[4:16, 4:16, 4:16] = 100
    values[4:16, 4:16, 12:16] = 200  # at high i: the patient's right, as i runs to the right here
    image = sitk.GetImageFromArray(values)
    image.SetSpacing((2.0, 2.0, 2.0))
    image.SetDirection((-1, 0, 0, 0, 1, 0, 0, 0, 1))
    words, pictures = {}, []
    monkeypatch.setattr(Axes, "text", lambda self, x, y, word, **_: words.setdefault(word, []).append((x, y)))
    draw = Axes.imshow
    monkeypatch.setattr(Axes, "imshow", lambda self, *a, **k: pictures.append((a[0], k)) or draw(self, *a, **k))
    overview.write_overview(tmp_path / "o.png", image, image, sitk.Transform(3, sitk.sitkIdentity))
    axial, place = pictures[0]
    assert axial[:, : axial.shape[1] // 2].mean() > axial[:, axial.shape[1] // 2 :].mean()
    left, right, bottom, top = place["extent"]
    assert words["R"][0] == (left, (bottom + top) / 2)
    assert words["L"][0] == (right, (bottom + top) / 2)
    assert [len(words[side]) for side in "RLAP"] == [2, 2, 1, 1]
