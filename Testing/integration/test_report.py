"""`Training.report`: every row of the paper's tables, honest cells, pictures that show what they say."""

from __future__ import annotations

import base64
import re
import sys
from pathlib import Path

import numpy as np
import pytest
import SimpleITK as sitk

from LDRCore.evaluation import scoring
from Training import evaluate, report
from Training.evaluation import config, costs, figures
from Training.evaluation.datasets import Loaded

LAYOUT = config.read_toml(report.LAYOUT)
CONFIGS = report.LAYOUT.parent


def decode(png: bytes, tmp_path: Path) -> np.ndarray:
    (tmp_path / "p.png").write_bytes(png)
    return sitk.GetArrayFromImage(sitk.ReadImage(str(tmp_path / "p.png")))[..., :3]


def test_the_papers_rows_are_complete_and_every_system_exists():
    counts = [len([r for r in t["row"] if "paper" in r]) for t in LAYOUT["table"]]
    assert counts == [10, 6, 7, 7]
    known = {s.name for s in config.load(CONFIGS / "evaluate-ixi.toml", {"data": "x"}).systems}
    used = {r["system"] for t in LAYOUT["table"] for r in t["row"]}
    used |= {s for f in LAYOUT["figure5"]["families"] for s in f["systems"]} | set(LAYOUT["figure6"]["systems"])
    assert used <= known
    first = {r["system"]: r for r in LAYOUT["table"][0]["row"]}
    for row in LAYOUT["table"][1]["row"]:  # Table II repeats Table I's Dice where ALDK is on
        if "ALDK" in row["system"] and "paper" in row:
            assert {k: v[:1] for k, v in first[row["system"]]["paper"].items()} == row["paper"]


@pytest.mark.parametrize("name", ["VTN (ADDD)", "RCN 1-cas", "RCN 2-cas", "RCN 3-cas", "student RCN"])
def test_architectures_count_the_papers_parameters(name):
    row = next(r for t in LAYOUT["table"] for r in t["row"] if r["system"] == name and "architecture" in r)
    assert costs.size_of(row["architecture"]).parameters / 1e6 == pytest.approx(row["params_m"], rel=1e-3)


@pytest.fixture
def made(tmp_path, blob) -> list[str]:
    """Arguments of an evaluation of one blob pair under the name of one of the paper's data sets."""
    labels = sitk.BinaryThreshold(blob, 1, 10000, 1, 0)
    moved = sitk.Image(blob)
    for image, name in ((blob, "f"), (moved, "m"), (labels, "l")):
        sitk.WriteImage(image, str(tmp_path / f"{name}.nii.gz"))
    (tmp_path / "pairs.csv").write_text(
        "fixed,moving,fixed_labels,moving_labels\n" + "f.nii.gz,m.nii.gz,l.nii.gz,l.nii.gz\n"
    )
    text = f"""
systems = "{CONFIGS / "systems.toml"}"
measures = ["overlap", "regularity"]
[[dataset]]
name = "SLIVER"
kind = "csv"
root = "{tmp_path}"
pairs = "pairs.csv"
domain = "brain-t1"
[[dataset]]
name = "LiTS"
kind = "rcn"
root = "{tmp_path}/none.json"
pairs = "lits"
optional = true
"""
    (tmp_path / "c.toml").write_text(text)
    shared = ["--config", str(tmp_path / "c.toml"), "--out", str(tmp_path / "out"), "--peer-python", "no-python"]
    assert evaluate.main([*shared, "--systems", "LDR 1-cas", "--no-costs"]) == 0
    row = {"dataset": "SLIVER", "system": "LDR 1-cas", "id": "x", "device": "cpu", "threads": 2, "runs": 3}
    costs._append(tmp_path / "out" / "costs.csv", row | {"seconds": 0.5, "seconds_io": 0.75, "peak_mb": 512})
    return shared


def test_the_report_says_what_is_there_and_what_is_not(made, tmp_path):
    assert report.main(made) == 0
    text = (tmp_path / "out" / "report.md").read_text(encoding="utf-8")
    assert re.search(r"\| LDR 1-cas \| \d+\.\d \(n=1\); 87\.8 \| no data; 82\.9 \|", text)
    assert "| RCN 3-cas | no weights yet; 94.3 / 89.3 | no data; 90.0 / 82.7 |" in text
    assert "98.92; 98.89" in text
    assert "| LDR 1-cas | brain-t1 | ldr, half | none |" in text
    assert "LiTS: no data here" in text
    page = (tmp_path / "out" / "report.html").read_text(encoding="utf-8")
    pictures = re.findall(r'src="data:image/png;base64,([^"]+)"', page)
    assert len(pictures) == 2
    assert base64.b64decode(pictures[0]) == (tmp_path / "out" / "figure5.png").read_bytes()
    assert page.count("<table>") == 5
    assert page.count("<tr>") == text.count("\n| ")
    assert "http" not in page
    results = report.Found([], costs=costs.read(tmp_path / "out" / "costs.csv"), lines={"SLIVER": {}})
    assert results.cost("LDR 1-cas", "cpu")["seconds_io"] == "0.75"
    assert results.cost("LDR 1-cas", "cuda") is None


def test_a_pair_that_cannot_be_read_costs_its_picture_only(made, tmp_path):
    (tmp_path / "m.nii.gz").unlink()
    assert report.main(made) == 0
    text = (tmp_path / "out" / "report.md").read_text(encoding="utf-8")
    assert "SLIVER: no picture (image must be an existing file" in text
    assert "| LDR 1-cas |" in text


def test_no_data_at_all_is_one_sentence(tmp_path, capsys):
    given = ["--config", str(CONFIGS / "evaluate-paper.toml"), "--data", str(tmp_path), "--out", str(tmp_path / "o")]
    assert report.main([*given, "--peer-python", sys.executable]) == 2
    assert "at least one data set must be there, got none (the data set's JSON must exist" in capsys.readouterr().err
    assert not (tmp_path / "o").exists()


def test_agreement_colours_by_hand():
    results, truth = np.array([0, 1, 2, 2, 0]), np.array([0, 1, 2, 3, 4])
    white, red, black = [1, 1, 1], [1, 0, 0], [0, 0, 0]
    assert figures.agreement(results, truth).tolist() == [black, white, white, red, red]


def test_slices_show_white_where_labels_match_and_red_where_not(blob, tmp_path):
    labels = sitk.Cast(sitk.BinaryThreshold(blob, 1, 10000, 1, 0), sitk.sitkInt32)
    pair = Loaded(blob, blob, scoring.Truth(blob, labels, labels))
    systems = {"same": sitk.Transform(3, sitk.sitkIdentity), "shifted": sitk.TranslationTransform(3, (12.0, 0, 0))}
    picture = decode(figures.slices(pair, systems), tmp_path).astype(int)
    columns = np.array_split(picture[picture.shape[0] // 2 :], 3, axis=1)
    red = [int(((c[..., 0] > 200) & (c[..., 1] < 50)).sum()) for c in columns]
    white = [int((c.min(-1) > 200).sum()) for c in columns]
    assert red[0] == red[1] == 0
    assert red[2] > 100
    assert white[0] == pytest.approx(white[1], rel=0.05)
    assert white[2] < white[1]
    with pytest.raises(ValueError, match="need the labels of both images"):
        figures.slices(Loaded(blob, blob, scoring.Truth(blob)), systems)


def test_curves_draw_ours_and_the_papers(tmp_path):
    curves = [figures.Curve("a", [1, 2, 3], [1, 1.5, 2]), figures.Curve("b", [None, None, None])]
    picture = decode(figures.curves({"one": curves, "two": curves}), tmp_path)
    assert picture.shape[1] > 600
    assert picture.std() > 10
