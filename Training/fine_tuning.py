"""Training on from a shipped model: the losses it was trained with, and what the training changed."""

from __future__ import annotations

import copy
import csv
from pathlib import Path
from typing import Any

from LDRCore.models import weights
from LDRCore.models.cascade import Cascade
from Training import checkpoints, objectives
from Training.pairs import PairSource

LOSSES = (
    *("similarity", "window", "every_cascade", "smooth", "smooth_each", "fold", "dice"),
    *("determinant", "orthogonality", "loss_stride", "detach"),
)
"""Keys of a card's recipe that say what its networks minimised."""
_FOLDING = "folding_percent"  # a figure of `objectives.validate`

_SAME = 1e-4  # by which Dice and correlation may differ and are printed alike


def losses_of_card(card: dict[str, Any], given: dict[str, Any]) -> dict[str, Any]:
    """The losses that a model's networks were trained with last, for keys of a configuration.

    Args:
        card: of the model.
        given: keys of the user: with pairs of which some have no labels, the labels' term is left out.
    """
    recipe = card.get("recipe", {}).get("networks", {}).get("config", {})
    found = {key: recipe[key] for key in LOSSES if key in recipe}
    if given.get("pairs") and not _all_have_labels(Path(given["pairs"])):
        found.pop("dice", None)
    return found


def started_from(init: str | None) -> dict[str, Any]:
    """What a card says of the model that a run started from: its name, its weights, labels that it learned from.

    Args:
        init: as in `ModelSettings`; a checkpoint is no model, and is recorded by `Training.export_weights --first`.
    """
    if init is None or checkpoints.is_checkpoint(init):
        return {}
    card = weights.model_info(init)
    labels = card.get("data", {}).get("labels")
    return {"init": {"name": card["name"], "sha256": card.get("sha256")} | ({"labels": labels} if labels else {})}


def _all_have_labels(pairs: Path) -> bool:
    """Whether a CSV names labels for every scan; a file that cannot be read is refused by what reads it later."""
    try:
        rows = list(csv.DictReader(pairs.read_text(encoding="utf-8-sig").splitlines()))
    except (OSError, ValueError):
        return False
    columns = ("labels",) if rows and "image" in rows[0] else ("fixed_labels", "moving_labels")
    return bool(rows) and all((row.get(column) or "").strip() for row in rows for column in columns)


def compare(settings: Any, model: Cascade, source: PairSource, validation: dict[str, PairSource] | None) -> list[str]:
    """Compare a model before and after its training, on pairs that it was trained on and on held-out ones.

    Args:
        settings: a `StudentSettings`; `init` says what it began as.
        model: after the training, on the run's device. Where there is a best checkpoint it is used instead.
        source: pairs trained on; the first `val_pairs` of a finite list are looked at.
        validation: held-out pairs, from `validation_pairs`.

    Returns:
        Lines to print.
    """
    device = next(model.parameters()).device
    began = objectives.build(settings, settings, settings.shape).to(device)
    ended, which, unchanged = model, "last", False
    best = checkpoints.best_path(settings.out)
    if best.exists():
        which, ended, kept = "best", copy.deepcopy(model), checkpoints.read_checkpoint(best)
        ended.load_state_dict(kept["model"])
        unchanged = kept["step"] == 0
    groups: dict[str, dict[str, PairSource]] = {}
    if source.pairs:
        few = copy.copy(source)
        few.pairs = source.pairs[: settings.val_pairs]
        groups[f"{len(few.pairs)} pairs trained on"] = {"": few}
    if validation:
        count = len(next(iter(validation.values())).pairs or [])
        groups[f"{count} held-out pairs"] = validation
    lines = [f"{settings.init} -> {settings.out.stem} ({which} checkpoint), after the last cascade:"]
    worse = False
    for name, sources in groups.items():
        before, after = (objectives.validate(m, sources) for m in (began, ended))
        figures = ", ".join(f"{key.split(',')[0]} {before[key]:.4f} -> {after[key]:.4f}" for key in _last(after))
        lines.append(f"  {name}: {figures}, folding {before[_FOLDING]:.4f} -> {after[_FOLDING]:.4f} %")
        judged = objectives.criterion(after, settings.similarity)
        worse |= after[judged] < before[judged] - _SAME
    if unchanged:
        lines.append("  no step was better on the held-out pairs: the best checkpoint is what the run began with")
    if not validation:
        lines.append("  no held-out pairs: give a column `split` and --val_split, as pairs trained on flatter a model")
    if worse:
        lines.append("  worse than before on some: a lower --lr, fewer --steps, or more pairs may help")
    return lines


def _last(figures: dict[str, float]) -> list[str]:
    """The names of the last cascade's Dice, correlation and local correlation, means over all kinds of pairs."""
    found = []
    for word in ("Dice, ", "correlation, ", "local correlation, "):
        names = [name for name in figures if name.startswith(word) and not name.endswith("start")]
        found += names[-1:]
    return found
