"""The rows of `Training.paper`, read from two TOML files: what each trains, on whose results, within which budget.

A file of rows (`rows` of the configuration names it) holds `[keys]`, which all rows share, one `[[row]]` a model or
teacher store, and what the rows are evaluated on. The configuration holds `[keys]` that win over those, and
`[minutes]`.

A row has `name`; `kind`: "teacher", "student" or "store"; `system`: what tables call the model (none: not evaluated);
and any key of the script of its kind (`Training.train_teacher`, `train_student`, `extract_teacher`). Its `teacher`
and `init` may name earlier rows.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
from pathlib import Path
from typing import Any

import torch

from LDRCore.models import registry
from Training import config
from Training.config import ConfigError
from Training.evaluation import config as evaluation_config
from Training.extract_teacher import ExtractSettings
from Training.train_student import StudentSettings
from Training.train_teacher import TeacherSettings

KINDS: dict[str, type] = {"teacher": TeacherSettings, "student": StudentSettings, "store": ExtractSettings}
OWN = ("name", "kind", "system")  # keys of a row that are not keys of its script
FIXED = ("out", "data", "pairs", "cache", "minutes")  # what the runner decides


@dataclasses.dataclass(frozen=True)
class Row:
    """One model or store.

    Attributes:
        name: of its files.
        kind: a key of `KINDS`.
        system: the name of the model in tables, or "".
        minutes: its budget; None where its keys give the number of steps.
        keys: of its script, those that are shared included.
        needs: names of rows that it uses, by the key that names them ("teacher", "init").
    """

    name: str
    kind: str
    system: str
    minutes: float | None
    keys: dict[str, Any]
    needs: dict[str, str]

    def identity(self) -> str:
        """A text that changes with everything that the row's result depends on."""
        facts = {k: v for k, v in self.keys.items() if k not in ("device", "workers", "threads")}
        text = json.dumps([self.kind, sorted(facts.items()), sorted(self.needs.items())], default=str)
        return hashlib.sha256(text.encode()).hexdigest()[:16]


@dataclasses.dataclass(frozen=True)
class Paper:
    """A whole configuration.

    Attributes:
        title: of the report.
        rows: in the order in which they run.
        data: what is trained on, with {data} in it.
        layout: whether the report has the paper's Tables I to IV.
        evaluation: content of an evaluation's configuration, see `Training.evaluation.config`, without the models.
        path: the file of the rows, to which relative paths in `evaluation` are relative.
    """

    title: str
    rows: list[Row]
    data: str
    layout: bool
    evaluation: dict[str, Any]
    path: Path

    def systems(self) -> list[dict[str, Any]]:
        """The models that the rows make, as systems of an evaluation."""
        return [
            {"name": row.system, "kind": "model", "model": row.name, "cascades": int(row.keys.get("cascades", 1))}
            for row in self.rows
            if row.system
        ]


def load(path: Path, only: tuple[str, ...] = ()) -> Paper:
    """Read a configuration and its file of rows.

    Args:
        path: the configuration.
        only: names of rows to keep, with all that they need; all by default.

    Raises:
        ConfigError: a key, value, row or budget that cannot be used, as one sentence.
        RegistrationError: a file that is missing or not TOML.
    """
    own = evaluation_config.read_toml(path)
    unknown = sorted(set(own) - {"title", "rows", "keys", "minutes"})
    if unknown or not isinstance(own.get("rows"), str):
        raise ConfigError(f"{path.name} must name its rows and know title, rows, keys, minutes, got {unknown or own}")
    source = path.parent / own["rows"]
    shared = evaluation_config.read_toml(source)
    listed, keys = shared.pop("row", []), {**shared.pop("keys", {}), **own.get("keys", {})}
    data, layout = shared.pop("data", "{data}"), shared.pop("layout", False)
    minutes = own.get("minutes", {})
    fields = {kind: {f.name for f in dataclasses.fields(cls)} for kind, cls in KINDS.items()}
    for key in keys:
        if key in FIXED or not any(key in names for names in fields.values()):
            raise ConfigError(f"keys must be those of a training script and not {', '.join(FIXED)}, got {key!r}")
    rows: list[Row] = []
    for entry in listed:
        rows.append(_row(entry, keys, minutes, fields, {row.name: row.kind for row in rows}))
    names = [row.name for row in rows]
    for kind, given in (("minutes", set(minutes)), ("only", set(only))):
        if given - set(names):
            raise ConfigError(f"{kind} must name rows of {source.name}, got {sorted(given - set(names))[0]!r}")
    if only:
        wanted = set(only)
        for row in reversed(rows):
            wanted |= set(row.needs.values()) if row.name in wanted else set()
        rows = [row for row in rows if row.name in wanted]
    return Paper(own.get("title", path.stem), rows, data, bool(layout), shared, source)


def _row(
    entry: dict[str, Any],
    keys: dict[str, Any],
    minutes: dict[str, Any],
    fields: dict[str, set[str]],
    before: dict[str, str],
) -> Row:
    name, kind = entry.get("name"), entry.get("kind")
    if not isinstance(name, str) or not name or name in before:
        raise ConfigError(f"every row must have a name of its own, got {name!r}")
    if kind not in KINDS:
        raise ConfigError(f"kind of row {name} must be one of {sorted(KINDS)}, got {kind!r}")
    own = {key: value for key, value in entry.items() if key not in OWN}
    wrong = sorted(key for key in own if key not in fields[kind] or key in FIXED)
    if wrong:
        raise ConfigError(f"row {name} must have keys of a {kind}, got {wrong[0]!r}")
    needs = {key: own.pop(key) for key in ("teacher", "init") if own.get(key) in before}
    if kind == "student" and "teacher" in own:
        raise ConfigError(f"teacher of row {name} must be an earlier row, got {own['teacher']!r}")
    for key, other in needs.items():
        if (before[other] == "store") != (kind == "student" and key == "teacher"):
            raise ConfigError(f"{key} of row {name} must not be a row of kind {before[other]}, got {other!r}")
    merged = {key: value for key, value in keys.items() if key in fields[kind]} | own
    budget = minutes.get(name)
    if budget is not None and (isinstance(budget, bool) or not isinstance(budget, int | float) or not budget > 0):
        raise ConfigError(f"minutes of row {name} must be a number above 0, got {budget!r}")
    if budget is None and kind != "store" and "steps" not in merged:
        raise ConfigError(f"row {name} must have minutes or steps, got neither")
    if budget is not None and "steps" in merged:
        raise ConfigError(f"row {name} must have minutes or steps, got both")
    row = Row(name, kind, entry.get("system", ""), budget, merged, needs)
    trial = dict(merged) | {"out": "x", "data": "x"} | {key: "x" for key in needs}
    try:
        settings = config.build(KINDS[kind], trial)
        if not isinstance(settings, ExtractSettings):
            with torch.device("meta"):  # no weights, so no time
                registry.build_cascade(settings.architecture())
    except (ValueError, TypeError) as error:
        raise ConfigError(f"row {name}: {error}") from None
    return row
