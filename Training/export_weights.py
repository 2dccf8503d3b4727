r"""Put trained networks and an affine stem together into a model that `register` can load.

    python -m Training.export_weights --dense runs/student.pt --stem brain-t1 --name mine --out runs/export \
        --summary "T1 MRI of our scanner" --made_for "T1-weighted MRI of the head" --licence "as our data"

Takes the run's best checkpoint (runs/student.best.pt: highest Dice of the last cascade in validation, or correlation
without labels), and the last one where the run was not validated or with `--which last`; the card says which, and of
which step. Writes NAME.pt (half precision) and NAME.json (the model card: architecture, working grid, the whole
configuration of the run, its data's identity, steps and hours, the teacher, the model that it started from).
`Training.evaluate --write-card` adds results. Copy both files into LDRCore/bundled only when they beat what ships.
"""

from __future__ import annotations

import dataclasses
import platform
import sys
from pathlib import Path
from typing import Any

import torch

import LDRCore
from LDRCore.models import weights
from LDRCore.models.cards import MODALITIES
from Training import checkpoints, config, engine
from Training.config import ConfigError, option

SUPERVISION = "labels of the training subjects, used as supervision"


@dataclasses.dataclass(frozen=True, kw_only=True)
class ExportSettings:
    """What goes into the model and its card."""

    dense: Path = option(help="checkpoint of Training.train_student or train_teacher (its `out`)")
    which: str = option("best", '"best" (of the validation; the last where there was none) or "last"')
    stem: str | None = option(
        None,
        "model, or checkpoint of Training.train_stem, whose stem comes first; "
        "none where the checkpoint has a stem of its own, or none is wanted",
    )
    first: Path | None = option(None, "checkpoint that `dense` was started from (its steps and hours are recorded)")
    out: Path = option(help="folder to write NAME.pt and NAME.json into")
    name: str = option(help="of the model")
    summary: str = option(help="one line for users")
    made_for: str = option(help="what images it is for")
    title: str | None = option(None, 'what a list of models shows, as "T1 head"; none: made_for')
    modality: str | None = option(None, 'of the images that `model="any"` may run it on: "mr" or "ct"; none: never')
    extent_mm: tuple[float, float] = option((95.0, 350.0), "smallest and largest extent of the content of these images")
    one_contrast: bool = option(True, "whether it needs both images to have one contrast")
    licence: str = option(help="of the weights")
    data: str = option("", "where the training data come from")
    nonnegative: bool = option(True, "whether images for this model have no negative intensities (MRI, not CT)")
    margin_mm: float = option(8.0, "the working grid exceeds the fixed image's content by this")

    def __post_init__(self) -> None:
        if self.which not in ("best", "last"):
            raise ConfigError(f'which must be "best" or "last", got {self.which!r}')
        if self.modality not in (None, *MODALITIES):
            raise ConfigError(f"modality must be one of {MODALITIES} or none, got {self.modality!r}")


def read_dense(out: Path, which: str) -> dict[str, Any]:
    """Read the best or the last checkpoint of a run.

    Args:
        out: the last checkpoint; the best one, where there is one, lies beside it.
        which: "best" or "last".

    Raises:
        ConfigError: a missing or unreadable checkpoint, or a best one of another run.
    """
    state, best = checkpoints.read_checkpoint(out), checkpoints.best_path(out)
    if which == "last" or not best.exists():
        return state
    found = checkpoints.read_checkpoint(best)
    of_both = found["facts"].keys() & state["facts"].keys()  # a run that goes on may know more than it began with
    if any(found["facts"][k] != state["facts"][k] for k in of_both) or found["step"] > state["step"]:
        raise ConfigError(f"the best checkpoint must be of the run of {out}, got one of another run in {best}")
    return found


def stem_of(source: str | None) -> tuple[dict[str, torch.Tensor], dict[str, Any], dict[str, Any], Any]:
    """(state with prefix "stem.", architecture, working-grid keys, recipe) of the stem.

    Raises:
        ConfigError: no such model or checkpoint, or one without stem.
    """
    if source is None:
        return {}, {}, {}, None
    if checkpoints.is_checkpoint(source):
        found = checkpoints.read_checkpoint(Path(source))
        facts = found["facts"]
        state = {f"stem.{k}": v for k, v in found["model"].items()}
        return state, {"stem": facts["stem"]}, facts["working_grid"], run_facts(found)
    card = weights.model_info(source)
    state = {k: v for k, v in weights.load_cascade(source).state_dict().items() if k.startswith("stem.")}
    if not state:
        raise ConfigError(f"stem must name a model with a stem, got {source!r} without one")
    grid = {k: v for k, v in card["working_grid"].items() if k.startswith("stem_")}
    return state, {"stem": card["architecture"]["stem"]}, grid, card.get("recipe", {}).get("stem")


def run_facts(state: dict[str, Any]) -> dict[str, Any]:
    """Say what a card records: best or last checkpoint, configuration without paths, steps, hours, and its facts.

    Those are the data's identity, the teacher, and the model that it started from.
    """
    paths = ("out", "data", "more_data", "pairs", "cache", "tensorboard", "device", "minutes", "init", "teacher")
    settings = {k: list(v) if isinstance(v, tuple) else v for k, v in state["config"].items() if k not in paths}
    facts = {k: v for k, v in state["facts"].items() if k in ("data_identity", "teacher", "init")}
    which = {"checkpoint": "best", "validation": state["best"]} if state.get("best") else {"checkpoint": "last"}
    return {"steps": state["step"], "hours": round(state["seconds"] / 3600, 3), **which, **facts, "config": settings}


def export(settings: ExportSettings) -> Path:
    """Write the model's two files and return the card's path."""
    dense = read_dense(settings.dense, settings.which)
    stem_state, architecture, stem_grid, stem_recipe = stem_of(settings.stem)
    run = dense["config"]
    architecture = {**dense["facts"]["architecture"], **architecture}
    if architecture.get("stem") and not stem_state:  # trained along with the networks, on their own window
        stem_grid = {"stem_spacing_mm": run["spacing_mm"], "stem_shape": list(run["shape"]), "stem_passes": 1}
    grid = {"spacing_mm": run["spacing_mm"], "margin_mm": settings.margin_mm, "stem_spacing_mm": 4.0, **stem_grid}
    recipe: dict[str, Any] = {"networks": run_facts(dense)}
    if settings.first:
        recipe = {"first": run_facts(checkpoints.read_checkpoint(settings.first)), **recipe}
    if stem_recipe:
        recipe = {"stem": stem_recipe, **recipe}
    labels = SUPERVISION if run.get("dice") else dense["facts"].get("init", {}).get("labels")
    supervision = {"labels": labels} if labels else {}
    card = {
        "name": settings.name,
        "version": LDRCore.__version__,
        "summary": settings.summary,
        "made_for": settings.made_for,
        "expects_nonnegative": settings.nonnegative,
        "architecture": architecture,
        "working_grid": grid,
        "data": {"name": settings.data, "split_sha256": dense["facts"].get("data_identity")} | supervision,
        "licence": settings.licence,
        "recipe": recipe | {"torch": torch.__version__, "python": platform.python_version()},
    }
    if settings.title:
        card["title"] = settings.title
    if settings.modality:
        extent = list(settings.extent_mm)
        card["fits"] = {"modality": settings.modality, "one_contrast": settings.one_contrast, "extent_mm": extent}
    return weights.save_model(settings.out, card, {**stem_state, **dense["model"]})


def main() -> None:
    """Read the arguments and export."""
    print(export(config.load(ExportSettings, sys.argv[1:], __doc__)))


if __name__ == "__main__":
    engine.run_script(main)
