"""Training on from a shipped model: with its losses, and a comparison of before and after at the end."""

from __future__ import annotations

import json

import pytest
import torch

from LDRCore.models import weights
from Training import checkpoints, config, export_weights, fine_tuning, train_student
from Training.train_student import StudentSettings, from_card

MODEL = "brain-t1-small"


def pairs_csv(demo_pair, path, labels: bool = True):
    """The demo pair both ways, one to train on and one held out."""
    files = [[str(demo_pair[name]) for name in (side, f"{side}_labels")] for side in ("fixed", "moving")]
    rows = []
    for (image, label), (other, other_label), split in ((*files, "train"), (*files[::-1], "val")):
        rows.append([image, other, label, other_label if labels else "", split])
    text = "\n".join(",".join(row) for row in [["fixed", "moving", "fixed_labels", "moving_labels", "split"], *rows])
    path.write_text(text + "\n", encoding="utf-8")
    return path


def settings_of(*words: str) -> StudentSettings:
    return config.load(StudentSettings, [str(word) for word in words], "", from_card)


def test_the_losses_are_those_of_the_card(demo_pair, tmp_path):
    recipe = weights.model_info(MODEL)["recipe"]["networks"]["config"]
    labelled = pairs_csv(demo_pair, tmp_path / "my.csv")
    settings = settings_of("--init", MODEL, "--pairs", labelled)
    known = [key for key in fine_tuning.LOSSES if key in recipe]
    assert {"similarity", "every_cascade", "smooth", "fold", "dice", "detach"} <= set(known)
    assert {key: getattr(settings, key) for key in known} == {key: recipe[key] for key in known}
    assert settings.similarity == "local_ncc"  # not what a run from nothing would take
    without = pairs_csv(demo_pair, tmp_path / "images.csv", labels=False)
    assert settings_of("--init", MODEL, "--pairs", without).dice == 0
    assert settings_of("--init", MODEL, "--pairs", labelled, "--dice", "0.5").dice == 0.5  # what is given wins


def test_before_and_after_are_printed(demo_pair, tmp_path, capsys):
    settings = settings_of(
        *("--init", MODEL, "--pairs", pairs_csv(demo_pair, tmp_path / "my.csv"), "--out", tmp_path / "mine.pt"),
        *("--steps", 2, "--lr", 1e-4, "--warmup", 1, "--shape", "64,80,64", "--val_split", "val", "--val_every", 1),
        *("--device", "cpu", "--cache", tmp_path / "cache"),
    )
    train_student.train(settings)
    printed = [line for line in capsys.readouterr().out.splitlines() if not line.startswith("{")]
    first, trained, held_out, *rest = printed
    assert first == f"{MODEL} -> mine (best checkpoint), after the last cascade:"
    assert trained.startswith("  1 pairs trained on: Dice ")
    assert held_out.startswith("  1 held-out pairs: Dice ")
    figures = [float(text.split("->")[0].split()[-1]) for text in held_out.split("Dice ")[1:]]
    best = checkpoints.read_checkpoint(checkpoints.best_path(settings.out))["best"]["value"]
    assert f"-> {best:.4f}, correlation" in held_out  # of the checkpoint that an export takes
    assert 0.3 < figures[0] < 0.9
    advice = "worse than before on some", "the best checkpoint is what the run began with"
    assert all(any(text in line for text in advice) for line in rest)
    model = weights.model_info(MODEL)
    words = {"summary": "s", "made_for": "m", "licence": "l"}
    exported = export_weights.export(
        export_weights.ExportSettings(dense=settings.out, stem=MODEL, name="mine", out=tmp_path, **words)
    )
    card = json.loads(exported.read_text(encoding="utf-8"))
    started = {"name": MODEL, "sha256": model["sha256"], "labels": model["data"]["labels"]}
    assert card["recipe"]["networks"]["init"] == started
    assert card["data"]["labels"] == export_weights.SUPERVISION


def test_what_a_run_began_with_stays_the_best_where_no_step_is_better(demo_pair, tmp_path, capsys):
    settings = settings_of(
        *("--init", MODEL, "--pairs", pairs_csv(demo_pair, tmp_path / "my.csv"), "--out", tmp_path / "mine.pt"),
        *("--steps", 1, "--lr", 0.0, "--shape", "64,80,64", "--val_split", "val", "--device", "cpu"),
        *("--cache", tmp_path / "cache"),
    )
    train_student.train(settings)
    best = checkpoints.read_checkpoint(checkpoints.best_path(settings.out))
    assert best["step"] == best["best"]["step"] == 0
    assert "no step was better on the held-out pairs" in capsys.readouterr().out
    began = weights.load_cascade(MODEL).networks.state_dict()
    assert all(torch.equal(best["model"][f"networks.{name}"], value.float()) for name, value in began.items())
    assert checkpoints.read_checkpoint(settings.out)["step"] == 1


def test_a_card_names_the_labels_that_the_first_model_learned_from(tmp_path):
    facts = {"architecture": weights.model_info(MODEL)["architecture"], "init": {"name": MODEL, "labels": "of others"}}
    state = {"model": weights.load_cascade(MODEL).state_dict(), "step": 1, "seconds": 1.0, "facts": facts}
    checkpoints.save_atomically(state | {"config": {"spacing_mm": 2.0, "dice": 0.0}}, tmp_path / "a.pt")
    words = {"name": "mine", "summary": "s", "made_for": "m", "licence": "l"}
    settings = export_weights.ExportSettings(dense=tmp_path / "a.pt", stem=MODEL, out=tmp_path / "x", **words)
    assert json.loads(export_weights.export(settings).read_text(encoding="utf-8"))["data"]["labels"] == "of others"


def test_only_a_model_is_recorded_as_what_a_run_started_from(tmp_path):
    assert fine_tuning.started_from(None) == fine_tuning.started_from(str(tmp_path / "a.pt")) == {}
    assert fine_tuning.started_from(MODEL)["init"]["name"] == MODEL


def test_pairs_without_labels_are_judged_by_their_similarity(demo_pair, tmp_path, capsys):
    settings = settings_of(
        *("--init", MODEL, "--pairs", pairs_csv(demo_pair, tmp_path / "my.csv", labels=False)),
        *("--out", tmp_path / "mine.pt", "--steps", 1, "--lr", 0.0, "--shape", "64,80,64", "--device", "cpu"),
        *("--cache", tmp_path / "cache"),
    )
    train_student.train(settings)
    first, trained, advice = (x for x in capsys.readouterr().out.splitlines() if not x.startswith("{"))
    assert "(last checkpoint)" in first
    name, figures = trained.split(": ")
    assert name == "  1 pairs trained on"
    before, after = figures.removeprefix("correlation ").split(",")[0].split(" -> ")
    assert before == after  # nothing was learned at a learning rate of zero
    assert advice.startswith("  no held-out pairs: give a column `split`")


@pytest.mark.parametrize("text", ["", "fixed,moving\na,b\n", "fixed,moving,fixed_labels,moving_labels\na,b,c,\n"])
def test_labels_that_are_missing_somewhere_are_not_trained_on(tmp_path, text):
    (tmp_path / "my.csv").write_text(text, encoding="utf-8")
    card = {"recipe": {"networks": {"config": {"dice": 1.5, "smooth": 0.5, "lr": 1.0}}}}
    assert fine_tuning.losses_of_card(card, {"pairs": tmp_path / "my.csv"}) == {"smooth": 0.5}
    assert fine_tuning.losses_of_card(card, {"pairs": tmp_path / "missing.csv"}) == {"smooth": 0.5}
    assert fine_tuning.losses_of_card(card, {"data": tmp_path}) == {"smooth": 0.5, "dice": 1.5}
    assert fine_tuning.losses_of_card({}, {}) == {}


def test_a_run_that_went_on_compares_with_its_very_beginning(demo_pair, tmp_path, capsys):
    words = (
        *("--init", MODEL, "--pairs", pairs_csv(demo_pair, tmp_path / "my.csv"), "--out", tmp_path / "mine.pt"),
        *("--steps", 2, "--lr", 1e-4, "--warmup", 1, "--shape", "64,80,64", "--device", "cpu"),
        *("--cache", tmp_path / "cache"),
    )
    printed = []
    for _ in range(3):
        train_student.train(settings_of(*words, "--minutes", "0"))
        printed.append([line for line in capsys.readouterr().out.splitlines() if "trained on:" in line])
    assert printed[0] == []  # it stopped before its end
    before = torch.load(tmp_path / "mine.pt", weights_only=True)["model"]
    assert not torch.equal(before["networks.0.flow.weight"], weights.load_cascade(MODEL).networks[0].flow.weight)
    values = printed[2][0].split("Dice ")[1].split(",")[0].split(" -> ")
    assert values[0] != values[1]
