"""Rows that survive interruption; tables from rows; the paired test."""

from __future__ import annotations

import json

import numpy as np
import pytest

from LDRCore.errors import RegistrationError
from Training import evaluate
from Training.evaluation import config, result_rows, tables
from Training.evaluation.plan import Plan
from Training.evaluation.systems import Place


def row(system: str, pair: str, dice: float | None, **more) -> result_rows.Row:
    made = {"dataset": "d", "pair": pair, "system": system, "id": "i", "status": "done", "dice_mean": dice}
    return made | {"seconds": 1.5, "folding_fraction": 0.001} | more


def test_rows_come_back_and_half_a_line_is_dropped(tmp_path):
    path = tmp_path / "rows.csv"
    assert result_rows.read(path) == []
    structures = {4: {"dice": 0.5, "jaccard": 1 / 3, "hd95_mm": None, "surface_mm": 2.0}}
    result_rows.append(path, row("a", "p<-q", 0.25, structures=structures, tre_mm=float("nan")))
    result_rows.append(path, row("b", "p<-q", None, status="failed", message="went\nwrong, badly"))
    first, second = result_rows.read(path)
    assert result_rows.key(first) == ("d", "p<-q", "a", "i")
    assert first["dice_mean"] == 0.25
    assert np.isnan(first["tre_mm"])
    assert first["structures"][4] == {"dice": 0.5, "jaccard": 0.3333, "hd95_mm": None, "surface_mm": 2.0}
    assert second["message"] == "went wrong, badly"
    assert second["dice_mean"] is None
    whole = path.read_bytes()
    for cut in (5, len(whole) // 2):
        path.write_bytes(whole + whole[:cut])  # interrupted while a third row was written
        assert len(result_rows.read(path)) == 2
        assert path.read_bytes() == whole


def test_other_files_are_refused(tmp_path):
    path = tmp_path / "rows.csv"
    path.write_text("a,b\n1,2\n")
    with pytest.raises(RegistrationError, match="must be the rows of an evaluation, got other columns"):
        result_rows.read(path)


def example() -> list[result_rows.Row]:
    ours = [row("a", f"p{k}", d, initial="stem") for k, d in enumerate((0.5, 0.6, 0.7, 0.8, 0.65, 0.55))]
    theirs = [row("b", f"p{k}", d) for k, d in enumerate((0.45, 0.5, 0.72, 0.6, 0.6, 0.5))]
    return [*ours, *theirs, row("b", "p9", None, status="failed", message="out of | luck")]


def test_a_line_by_hand():
    a, b, c = tables.summarise(example(), ["a", "b", "c"], {"c": "package c is missing", "a": "ignored"}, "b")
    assert (a.done, a.failed, b.done, b.failed, c.done) == (6, 0, 6, 1, 0)
    assert a.values["dice_mean"]["mean"] == pytest.approx(3.8 / 6)
    assert b.values["dice_mean"]["std"] == pytest.approx(np.std([0.45, 0.5, 0.72, 0.6, 0.6, 0.5]))
    assert a.values["dice_mean"]["n"] == 6
    assert a.notes == "stem"
    assert tables.remark(a) == ""
    assert tables.remark(b) == "1 failed (out of | luck)"
    assert tables.remark(c) == "not run: package c is missing"
    assert b.wilcoxon is None


def test_the_paired_test_is_exact_by_hand():
    """Differences .05 .1 -.02 .2 .05 .05: the one negative has rank 1 of 6, so p is 4 in 64 assignments of signs.

    (Rank sums of 0 or 1 on either side; the ties do not touch rank 1.)
    """
    pytest.importorskip("scipy")
    (a, _) = tables.summarise(example(), ["a", "b"], {}, "b")
    assert a.wilcoxon["measure"] == "dice_mean"
    assert a.wilcoxon["n"] == 6
    assert a.wilcoxon["difference"] == pytest.approx(0.05)
    assert a.wilcoxon["p"] == pytest.approx(4 / 64, abs=0.01)
    same = [row(s, f"p{k}", 0.5) for s in "ab" for k in range(4)]
    assert tables.summarise(same, ["a", "b"], {}, "b")[0].wilcoxon["p"] == 1
    assert tables.summarise(same[:5], ["a", "b"], {}, "b")[0].wilcoxon is None  # one pair in common


def test_markdown_latex_and_json():
    lines = tables.summarise(example(), ["a", "b", "c"], {"c": "no weights yet"}, "")
    text = tables.markdown(lines, "").splitlines()
    assert text[0] == "| system | n | Dice % | folding % | s | remark |"
    assert text[2] == "| a | 6 | 63.3 ± 9.9 | 0.100 ± 0.000 | 1.50 |  |"
    assert text[3].endswith("| 1 failed (out of / luck) |")
    assert text[4] == "| c | 0 | - | - | - | not run: no weights yet |"
    latex = tables.latex(lines, "")
    assert r"system & n & Dice \% & folding \% & s \\" in latex
    assert r"a & 6 & 63.3 $\pm$ 9.9 & 0.100 $\pm$ 0.000 & 1.50 \\" in latex
    assert "% not run: no weights yet" in latex
    json.dumps(tables.as_json(lines))


def test_means_of_structures():
    means = tables.structures(
        [
            row("a", "p", 0.1, structures={1: {"dice": 0.2, "hd95_mm": None}}),
            row("a", "q", 0.1, structures={1: {"dice": 0.4, "hd95_mm": 3.0}, 2: {"dice": 1.0}}),
        ]
    )
    assert means == {"a": {1: {"dice": pytest.approx(0.3), "hd95_mm": 3.0}, 2: {"dice": 1.0}}}


@pytest.mark.parametrize("note", ["Manual labels", "Manual labels."])
def test_a_note_is_a_sentence_of_the_caption(note):
    data = config.DataSet("d", "csv", "root", note=note)
    plan = Plan(config.Config([data], []), Place((), "python", 1), {"d": [None]}, {}, {})
    assert "the protocol 'nearest'. Manual labels. Mean ± std over pairs" in evaluate.caption(plan, data, [])
