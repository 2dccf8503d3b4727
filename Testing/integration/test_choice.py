"""The model that chooses by the images: which networks it takes, and what it says of them."""

from __future__ import annotations

import json

import numpy as np
import pytest
import SimpleITK as sitk

import LDRCore
from LDRCore import cli
from LDRCore.evaluation.metrics import mean_dice
from LDRCore.models import weights
from LDRCore.pipeline import choice


def remapped(path: str, curve: dict[float, float]) -> sitk.Image:
    """An image whose brightness, as a share of the 99th percentile of what is not background, goes through a curve."""
    image = sitk.ReadImage(path)
    values = sitk.GetArrayFromImage(image).astype(np.float32)
    share = values / np.percentile(values[values > 0], 99)
    out = sitk.GetImageFromArray(np.where(share > 0.05, 900 * np.interp(share, *zip(*curve.items(), strict=True)), 0))
    out.CopyInformation(image)
    return out


INVERTED = {0.0: 1.0, 1.0: 0.1}
T2_LIKE = {0.05: 0.2, 0.25: 1.0, 0.5: 0.7, 0.75: 0.4, 1.0: 0.3}


def dice(pair: dict, transform: sitk.Transform) -> float:
    fixed = sitk.ReadImage(pair["fixed_labels"])
    warped = LDRCore.warp_image(pair["moving_labels"], transform, fixed, "nearest")
    return mean_dice(sitk.GetArrayFromImage(warped), sitk.GetArrayFromImage(fixed))


@pytest.fixture(scope="module")
def inverted_pair(demo_pair) -> dict:
    return demo_pair | {"moving_image": remapped(demo_pair["moving"], INVERTED)}


def test_heads_of_one_contrast_get_the_networks_that_know_them(demo_pair):
    result = LDRCore.register(demo_pair["fixed"], demo_pair["moving"], model="any")
    report = result.report
    assert report["model"] == "any"
    assert report["model_chosen"]["name"] == "brain-t1-gradient"
    assert "contrasts agree" in report["model_chosen"]["why"]
    assert report["cascades"] == 9
    assert report["refine"] == "fast"
    assert len(report["refinement"]) == 2
    alone = LDRCore.register(demo_pair["fixed"], demo_pair["moving"])
    assert dice(demo_pair, result.transform) > dice(demo_pair, alone.transform) + 0.005


@pytest.mark.parametrize("curve", [INVERTED, T2_LIKE], ids=["inverted", "T2"])
def test_heads_of_unlike_contrast_get_the_networks_for_any(demo_pair, curve):
    moving = remapped(demo_pair["moving"], curve)
    result = LDRCore.register(demo_pair["fixed"], moving, model="any")
    report = result.report
    assert report["model_chosen"] == {"name": "head-any", "why": "MR of a fitting size, of any contrast"}
    assert report["cascades"] == 6
    assert len(report["refinement"]) == 2
    assert report["folding_fraction"] == 0
    without = LDRCore.register(demo_pair["fixed"], moving, model="none")
    assert len(without.report["refinement"]) == 3  # the coarse levels that the networks stand for otherwise
    assert dice(demo_pair, without.transform) > dice(demo_pair, result.affine) + 0.08
    assert dice(demo_pair, result.transform) > dice(demo_pair, without.transform) + 0.01


def test_a_model_for_one_contrast_does_not_spoil_the_alignment_of_another(inverted_pair):
    """Run nevertheless, the networks took mean Dice from .53 to .22 on such pairs."""
    result = LDRCore.register(inverted_pair["fixed"], inverted_pair["moving_image"], model="brain-t1-small")
    assert result.report["cascades"] == 0
    assert any("contrasts differ" in text for text in result.report["warnings"])
    said = result.report["verdict"]  # a reader who sees the picture alone sees this
    assert said["verdict"] == "look"
    assert any(text.startswith("nothing was deformed") for text in said["reasons"])
    assert dice(inverted_pair, result.transform) == pytest.approx(dice(inverted_pair, result.affine), abs=1e-3)


@pytest.mark.parametrize(("alike", "word"), [(0.69, "look"), (0.71, "trust")])
def test_a_contrast_that_may_differ_is_a_reason_to_look(demo_pair, monkeypatch, alike, word):
    """A whole head and a FLAIR-like one came to .58; the default's networks took mean Dice from .48 to .42."""
    monkeypatch.setattr(choice, "contrast_agreement", lambda *_: alike)
    report = LDRCore.register(demo_pair["fixed"], demo_pair["moving"], cascades=1).report
    assert report["cascades"] == 1
    assert report["verdict"]["verdict"] == word
    assert any("contrasts may differ" in text for text in report["verdict"]["reasons"]) == (word == "look")


def test_ct_and_small_content_get_no_head_network(blob):
    hounsfield = sitk.Cast(blob, sitk.sitkInt16) - 1000
    chosen = LDRCore.register(hounsfield, hounsfield, model="any").report["model_chosen"]
    assert chosen["name"] == "none"
    assert "the fixed image looks like CT, not like MR" in chosen["why"]
    chosen = LDRCore.register(blob, blob, model="any").report["model_chosen"]  # of 54 x 72 x 60 mm
    assert "is not within 95 to 350 mm" in chosen["why"]


def test_what_was_asked_for_wins(blob):
    report = LDRCore.register(blob, blob, model="any", cascades=0, refine="none").report
    assert report["model_chosen"] == {"name": "none", "why": "no network was asked for"}
    assert "refinement" not in report
    assert LDRCore.register(blob, blob, model="any", kind="rigid").report["refine"] == "none"
    report = LDRCore.register(blob, blob, model="none", refine_steps=2).report
    assert [level["iterations"] <= 2 for level in report["refinement"]] == [True] * 3
    assert LDRCore.register(blob, blob).report["model_chosen"]["why"] == "it was asked for"


def test_without_networks_a_deformable_registration_deforms(blob):
    assert LDRCore.register(blob, blob, model="none").report["refine"] == "fast"
    assert LDRCore.register(blob, blob).report["refine"] == "none"


def test_the_command_line_says_what_was_chosen(demo_pair, tmp_path, capsys):
    arguments = ["register", demo_pair["fixed"], demo_pair["moving"], "--out", str(tmp_path / "out"), "--no-overview"]
    assert cli.main([*arguments, "--model", "any"]) == 0
    printed = capsys.readouterr().out
    assert "networks     brain-t1-gradient: MR of a fitting size, contrasts agree" in printed
    assert "refinement" in printed
    report = json.loads((tmp_path / "out" / "report.json").read_text())
    assert report["model_chosen"]["name"] == "brain-t1-gradient"


def test_titles_are_in_the_order_to_offer():
    names = ["any", "brain-t1-gradient", "brain-t1", "brain-t1-distilled", "brain-t1-small", "head-any", "none"]
    assert list(weights.model_titles()) == names
    assert weights.model_titles()["none"] == "Any anatomy (no network)"
    assert weights.model_titles()["brain-t1-gradient"] == "T1 head"
    assert weights.model_titles()["head-any"] == "Head, any contrast"


@pytest.fixture(scope="module")
def second_scan(demo_pair):
    """The demo's fixed image scanned again: brighter, with noise, nothing moved."""
    first = sitk.ReadImage(str(demo_pair["fixed"]))
    values = sitk.GetArrayFromImage(first).astype(np.float32)
    noise = np.random.default_rng(0).normal(0, 0.02 * values.max(), values.shape)
    image = sitk.GetImageFromArray(np.clip(1.1 * values + noise * (values > 0), 0, None).astype(np.float32))
    image.CopyInformation(first)
    return image


@pytest.mark.parametrize("model", ["brain-t1-small", "brain-t1-gradient"])
def test_networks_that_make_two_scans_of_one_head_agree_less_are_left_out(demo_pair, second_scan, model):
    report = LDRCore.register(demo_pair["fixed"], second_scan, model=model, refine="none").report
    assert report["dense_displacement_mm"]["max"] == 0
    assert "would lower local correlation from 0.9" in report["networks_left_out"]
    assert report["evidence"]["local_correlation"]["affine"] == report["evidence"]["local_correlation"]["after"]
    assert report["verdict"]["verdict"] == "look"
    assert report["verdict"]["reasons"][0].startswith("nothing was deformed after the affine alignment: the networks'")


def test_refinement_starts_from_the_affine_map_where_networks_are_left_out(demo_pair, second_scan):
    report = LDRCore.register(demo_pair["fixed"], second_scan, model="brain-t1-small", refine="fast").report
    assert "networks_left_out" in report
    assert 0 < report["dense_displacement_mm"]["mean"] < 0.5  # by the networks it is 1.2
    assert report["verdict"]["verdict"] == "trust"
