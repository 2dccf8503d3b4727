"""Writes the results of an evaluation into the card of the model."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from LDRCore.errors import RegistrationError
from LDRCore.models import weights
from Training.evaluation.config import Config
from Training.evaluation.tables import Line


def check(model: str) -> Path:
    """Return the path of the card to which results can be written, before anything is computed.

    Raises:
        RegistrationError: no model given, or it is not a file beside its card.
    """
    path = Path(model or ".pt").with_suffix(".json")
    if not path.is_file():
        raise RegistrationError(
            f"--write-card needs --model with the path of a .pt file beside its card, got {model!r}"
        )
    weights.model_info(model)
    return path


def write(model: str, settings: Config, lines_by_data: dict[str, list[Line]]) -> Path:
    """Store one entry for each data set under `results` of the card: the line "nothing" and every line of this model.

    A data set named SPLIT-VIEW ("test-whole") goes to results[SPLIT]["systems"][VIEW].
    """
    path = check(model)
    card = json.loads(path.read_text(encoding="utf-8"))
    own = {s.name for s in settings.systems if s.kind == "nothing" or s.model == model}
    for data in settings.datasets:
        if data.name not in lines_by_data:
            continue
        split, _, view = data.name.partition("-")
        entry: dict[str, Any] = card.setdefault("results", {}).get(split, {})
        systems = entry.get("systems", {})
        lines = [line for line in lines_by_data[data.name] if line.system in own and line.done]
        systems[view] = {line.system: _numbers(line) for line in lines}
        card["results"][split] = {
            "pairs": max(line.done for line in lines),
            "labels": data.note or f"mean over all labels of the fixed image, protocol {data.protocol}",
            "folding": "share of the fixed image's voxels, central differences",
            "seconds": "register() from images in memory to the warped image, warm",
            "systems": systems,
        }
    part = path.with_suffix(".part")
    part.write_text(json.dumps(card, indent=1) + "\n", encoding="utf-8")
    part.replace(path)
    return path


def _numbers(line: Line) -> dict[str, float]:
    folding = line.values.get("folding_fraction", {"mean": float("nan")})["mean"]
    dice = line.values["dice_mean"]
    return {
        "dice_mean": round(dice["mean"], 4),
        "dice_std": round(dice["std"], 4),
        "folding_percent": round(100 * folding, 4),
        "seconds_median": round(line.values["seconds"]["median"], 3),
    }
