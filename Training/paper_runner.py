"""Runs the rows of `Training.paper` one after the other, and records on disk how far each is."""

from __future__ import annotations

import gc
import json
import sys
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from LDRCore.distillation.teacher_store import TeacherStore
from LDRCore.errors import RegistrationError
from Training import checkpoints, config, engine, export_weights, extract_teacher, train_student, train_teacher
from Training.config import ConfigError
from Training.data.scan_set import DataError
from Training.paper_rows import KINDS, Paper, Row

PROBE_STEPS = engine.RECENT + 4  # the first ones set up what later ones use
SAVE_EVERY_S = 60.0
VALIDATIONS = 4
EXPECTED = (ConfigError, DataError, RegistrationError, engine.NotFiniteError, OSError)
TRIAL = {"n_pairs": 2, "val_pairs": 1}
TRIAL_STEPS = 2


class InterruptedRunError(Exception):
    """The run was asked to stop, or its time is over; the same command goes on."""


class Runner:
    """Runs rows one after the other and keeps a record of them."""

    def __init__(
        self, paper: Paper, out: Path, data: str, *, minutes: float | None = None, trial: bool = False
    ) -> None:
        """Read the record.

        Args:
            paper: the configuration.
            out: folder of the whole run.
            data: what is trained on.
            minutes: stop after so many, all rows together.
            trial: two steps and two pairs a row, to see whether everything runs.

        Raises:
            ConfigError: the folder holds a row that was run with other keys.
        """
        self.paper, self.out, self.data, self.trial = paper, out, data, trial
        self._asked_to_stop = False  # while the last step of a row was made
        self._ends = None if minutes is None else time.monotonic() + 60 * minutes
        self._path = out / "state.json"
        self.state: dict[str, dict[str, Any]] = {}
        if self._path.exists():
            self.state = json.loads(self._path.read_text(encoding="utf-8"))
        for row in paper.rows:
            before = self.state.get(row.name, {}).get("identity")
            if before not in (None, self._identity(row)):
                raise ConfigError(f"row {row.name} must have the keys of the run in {out}, got others: use another out")

    def _identity(self, row: Row) -> str:
        return row.identity() + "-trial" * self.trial

    def record(self, row: Row, **facts: Any) -> None:
        """Add facts to a row's record, on disk."""
        entry = self.state.setdefault(row.name, {"identity": self._identity(row), "seconds": 0.0})
        entry |= facts
        self.out.mkdir(parents=True, exist_ok=True)
        part = self._path.with_suffix(".part")
        part.write_text(json.dumps(self.state, indent=1) + "\n", encoding="utf-8")
        part.replace(self._path)

    def run(self, retry_failed: bool = False) -> None:
        """Run all rows that are not done.

        Raises:
            InterruptedRunError: asked to stop, or out of time.
        """
        for row in self.paper.rows:
            status = self.state.get(row.name, {}).get("status")
            if status == "done" or (status == "failed" and not retry_failed):
                continue
            print(f"--- {row.name}", flush=True)
            began, spent = time.monotonic(), self.state.get(row.name, {}).get("seconds", 0.0)
            try:
                self._require_parts(row)
                facts = self._extract(row) if row.kind == "store" else self._train(row)
            except InterruptedRunError:
                self.record(row, status="begun", seconds=spent + time.monotonic() - began)
                raise
            except Exception as error:  # whatever goes wrong in a row, the others go on
                if not isinstance(error, EXPECTED):
                    traceback.print_exc(file=sys.stderr)
                message = str(error) if isinstance(error, EXPECTED) else f"{type(error).__name__}: {error}"
                if isinstance(error, engine.NotFiniteError):
                    message = message.partition(";")[0]  # what follows is advice for a single run
                facts = {"status": "failed", "message": " ".join(message.split())[:400]}
                print(f"failed: {row.name}: {facts['message']}", file=sys.stderr, flush=True)
            else:
                facts |= {"status": "done", "message": ""}
            self.record(row, **facts, seconds=spent + time.monotonic() - began)
            if self._asked_to_stop:
                raise InterruptedRunError(f"{row.name} is done")
            gc.collect()
            if torch.cuda.is_available():
                torch.cuda.empty_cache()

    def _require_parts(self, row: Row) -> None:
        for name in row.needs.values():
            if self.state.get(name, {}).get("status") != "done":
                raise ConfigError(f"row {row.name} needs row {name}, which failed")

    def checkpoint(self, name: str) -> Path:
        """The last checkpoint of a row."""
        return self.out / "runs" / f"{name}.pt"

    def store(self, name: str) -> Path:
        """The teacher deformations of a row."""
        return self.out / "stores" / f"{name}.h5"

    def _values(self, row: Row) -> dict[str, Any]:
        values: dict[str, Any] = {**row.keys, "data": self.data, "cache": self.out / "cache"} | (
            TRIAL if self.trial else {}
        )
        for key, name in row.needs.items():
            last = self.checkpoint(name)
            best = checkpoints.best_path(last)
            path = best if best.exists() else last
            values[key] = str(self.store(name) if key == "teacher" and row.kind == "student" else path)
        return values

    def _left_minutes(self) -> float | None:
        if self._ends is None:
            return None
        left = (self._ends - time.monotonic()) / 60
        if left <= 0:
            raise InterruptedRunError("the time is over")
        return left

    def _train(self, row: Row) -> dict[str, Any]:
        """Train a row, or go on with it; facts for its record."""
        values = self._values(row) | {"out": self.checkpoint(row.name)}
        train: Callable[[Any], engine.Run]
        train = train_teacher.train if row.kind == "teacher" else train_student.train
        known = self.state.get(row.name, {})
        step_s, steps = known.get("step_s"), known.get("steps")
        if steps is None:
            step_s = self._time_step(row, train, values)
            steps = TRIAL_STEPS if self.trial else row.keys.get("steps") or int(60 * row.minutes / step_s)
            if steps < 1:
                raise ConfigError(
                    f"a budget must hold one step, got {row.minutes:g} minutes where one takes {step_s:.1f} s"
                )
            self.record(row, steps=steps, step_s=step_s, status="begun")
        values |= {
            "steps": steps,
            "warmup": min(int(values.get("warmup", 100)), steps // 10),
            "val_every": -(-steps // VALIDATIONS),
            "save_every": max(1, int(SAVE_EVERY_S / step_s)),
            "minutes": self._left_minutes(),
        }
        run = train(config.build(KINDS[row.kind], values))
        if run.step < steps:
            raise InterruptedRunError(f"{row.name} stopped after step {run.step} of {steps}")
        self._asked_to_stop = run.asked_to_stop
        for path in (self.checkpoint(row.name), checkpoints.best_path(self.checkpoint(row.name))):
            drop_optimizers(path)
        return {"best": run.best, "train_s": round(run.seconds, 1)}

    def _time_step(self, row: Row, train: Callable[[Any], engine.Run], values: dict[str, Any]) -> float:
        """Seconds of a step, from a few that are thrown away."""
        out = self.out / "runs" / f"{row.name}.probe.pt"
        probe = {"out": out, "steps": TRIAL_STEPS if self.trial else PROBE_STEPS, "val_split": None, "init": None}
        settings = config.build(KINDS[row.kind], values | probe | {"minutes": self._left_minutes()})
        stale = [out, out.with_suffix(".curves.jsonl")]
        try:
            for path in stale:
                path.unlink(missing_ok=True)
            run = train(settings)
        finally:
            for path in stale:
                path.unlink(missing_ok=True)
        recent = list(run.recent_s)
        if run.step < settings.steps or run.asked_to_stop:
            raise InterruptedRunError(f"{row.name} stopped while its steps were timed")
        return max(sum(recent) / len(recent), 1e-6)

    def _extract(self, row: Row) -> dict[str, Any]:
        """Extract a row's store, or go on with it; facts for its record."""
        left, budget = self._left_minutes(), row.minutes
        if budget is not None:
            budget = max(0.0, budget - self.state.get(row.name, {}).get("seconds", 0.0) / 60)
        minutes = min((m for m in (left, budget) if m is not None), default=None)
        values = self._values(row) | {"out": self.store(row.name), "minutes": minutes}
        try:
            store = TeacherStore(extract_teacher.extract(config.build(KINDS["store"], values)))
        except KeyboardInterrupt:
            raise InterruptedRunError(f"{row.name} stopped while it was extracted") from None
        if minutes == left:
            self._left_minutes()  # the time of all rows together ended it, not its own budget
        summary = extract_teacher.summary(store)
        print(summary, flush=True)
        return {"pairs": len(store), "summary": summary}

    def export(self) -> Path:
        """Export every model that is trained; the folder."""
        folder = self.out / "models"
        for row in self.paper.rows:
            done = self.state.get(row.name, {}).get("status") == "done"
            if row.kind == "store" or not done or (folder / f"{row.name}.json").exists():
                continue
            run = checkpoints.read_checkpoint(self.checkpoint(row.name))["config"]
            own_stem = run["affine"] or run["initial"] in ("grid", "centred")
            export_weights.export(
                export_weights.ExportSettings(
                    dense=self.checkpoint(row.name),
                    stem=None if own_stem else run["stem"],
                    out=folder,
                    name=row.name,
                    summary=f"{row.system or row.name}: {self.paper.title}",
                    made_for="images like those that it was trained on",
                    licence="as the data",
                )
            )
        return folder


def drop_optimizers(path: Path) -> None:
    """Make a checkpoint of a finished row smaller by what only training needs."""
    if path.exists():
        state = checkpoints.read_checkpoint(path)
        checkpoints.save_atomically({k: v for k, v in state.items() if not k.endswith("optimizer")}, path)
