"""Which checkpoint of a run is exported, and what decides which one is best."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from LDRCore.models import registry, weights
from Training import checkpoints, export_weights, objectives
from Training.config import ConfigError

ARCHITECTURE = {"network": {"name": "ldr", "head": "half", "channels": (8, 8, 8, 8)}, "cascades": 1}
CONFIG = {"spacing_mm": 2.0, "shape": (32, 32, 32), "out": "runs/a.pt"}


def checkpoint(path: Path, step: int, bias: float, best: dict | None = None, identity: str = "0f") -> Path:
    """A run's checkpoint whose flow layer has one bias everywhere."""
    cascade = registry.build_cascade(ARCHITECTURE)
    torch.nn.init.constant_(cascade.networks[0].flow.bias, bias)
    state = {"model": cascade.state_dict(), "step": step, "seconds": 36.0 * step, "config": CONFIG}
    facts = {"architecture": ARCHITECTURE, "data_identity": identity}
    checkpoints.save_atomically(state | {"facts": facts} | ({"best": best} if best else {}), path)
    return path


def export(dense: Path, **changes) -> tuple[float, dict]:
    """Return (bias, the card's entry of the run) of the model that is written."""
    names = {"name": "m", "summary": "s", "made_for": "m", "licence": "l"}
    card = export_weights.export(export_weights.ExportSettings(dense=dense, out=dense.parent / "x", **names, **changes))
    bias = weights.load_cascade(card.with_suffix(".pt")).networks[0].flow.bias
    return float(bias[0].detach()), json.loads(card.read_text(encoding="utf-8"))["recipe"]["networks"]


BEST = {"step": 40, "criterion": "Dice, 1 cascades", "value": 0.75}


def test_the_best_checkpoint_is_exported_unless_the_last_is_asked_for(tmp_path):
    last = checkpoint(tmp_path / "a.pt", 100, 0.5)
    checkpoint(tmp_path / "a.best.pt", 40, 0.25, BEST)
    bias, recipe = export(last)
    assert (bias, recipe["checkpoint"], recipe["steps"], recipe["hours"]) == (0.25, "best", 40, 0.4)
    assert recipe["validation"] == BEST
    bias, recipe = export(last, which="last")
    assert (bias, recipe["checkpoint"], recipe["steps"]) == (0.5, "last", 100)
    assert "validation" not in recipe


def test_without_validation_the_last_checkpoint_is_exported(tmp_path):
    bias, recipe = export(checkpoint(tmp_path / "a.pt", 100, 0.5))
    assert (bias, recipe["checkpoint"], recipe["steps"]) == (0.5, "last", 100)


def test_a_best_checkpoint_of_another_run_is_not_exported(tmp_path):
    last = checkpoint(tmp_path / "a.pt", 100, 0.5)
    checkpoint(tmp_path / "a.best.pt", 40, 0.25, BEST, identity="f0")
    with pytest.raises(ConfigError, match=r"the best checkpoint must be of the run of .*a.pt, got one of another run"):
        export(last)
    checkpoint(tmp_path / "a.best.pt", 140, 0.25, BEST)
    with pytest.raises(ConfigError, match=r"the best checkpoint must be of the run of .*a.pt, got one of another run"):
        export(last)


def test_a_run_that_went_on_may_know_more_than_its_best_checkpoint(tmp_path):
    last = checkpoint(tmp_path / "a.pt", 100, 0.5)
    checkpoint(tmp_path / "a.best.pt", 40, 0.25, BEST)
    state = checkpoints.read_checkpoint(last)
    state["facts"]["init"] = {"name": "brain-t1"}
    checkpoints.save_atomically(state, last)
    assert export(last)[0] == 0.25


def test_another_word_is_refused(tmp_path):
    with pytest.raises(ConfigError, match='which must be "best" or "last", got \'newest\''):
        export(tmp_path / "a.pt", which="newest")


def test_dice_of_the_last_cascade_decides_and_correlation_without_labels():
    names = [f"{what}, {n}" for n in ("start", "1 cascades", "2 cascades") for what in ("Dice", "correlation")]
    figures = {name: 0.1 * k for k, name in enumerate([*names, "local correlation, 2 cascades", "folding_percent"])}
    assert objectives.criterion(figures, "local_ncc") == "Dice, 2 cascades"
    without = {name: value for name, value in figures.items() if not name.startswith("Dice")}
    assert objectives.criterion(without, "correlation") == "correlation, 2 cascades"
    assert objectives.criterion(without, "local_ncc") == "local correlation, 2 cascades"  # what is trained on


def test_the_mean_over_pairs_with_and_without_skull_decides():
    names = "whole Dice, start", "whole Dice, 1 cascades", "stripped Dice, 1 cascades", "Dice, 1 cascades"
    assert objectives.criterion(dict.fromkeys(names, 0.5), "correlation") == "Dice, 1 cascades"
