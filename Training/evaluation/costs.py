"""Costs of a system: counts parameters and multiply-adds, measures seconds and memory of a run alone."""

from __future__ import annotations

import csv
import dataclasses
import statistics
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from LDRCore.models import weights
from Training.evaluation import systems
from Training.evaluation.config import System
from Training.evaluation.plan import Plan
from Training.evaluation.systems import Place
from Training.evaluation.workers import Task, run_all

REPEATS = {"affine": 3, "model": 3, "peer": 1, "command": 1}
COLUMNS = (
    *("dataset", "system", "id", "device", "threads", "runs", "seconds", "seconds_min", "seconds_max", "seconds_io"),
    *("peak_mb", "message"),
)


@dataclass(frozen=True)
class Size:
    """Parameters of stem and networks, and multiply-adds of one registration at 128^3.

    The stem runs on its own small grid, `stem_passes` times (see the card); the networks at 128^3.
    """

    parameters: int
    multiply_adds: int


def size(system: System, place: Place) -> Size:
    """Count a model's parameters and multiply-adds as `system` runs it."""
    card = weights.model_info(systems.find_model(system.model, place.models))
    grid = card["working_grid"]
    chosen = {**card["architecture"], "cascades": system.cascades}
    return size_of(chosen, tuple(grid["stem_shape"]), grid["stem_passes"])


def size_of(
    architecture: dict[str, Any], stem_shape: tuple[int, int, int] = (128, 128, 128), stem_passes: int = 1
) -> Size:
    """Count an architecture as model cards describe it (`stem`, `network`, `cascades`), with or without weights."""
    from LDRCore.models import registry

    count = architecture["cascades"]  # 0: the stem alone
    cascade = registry.build_cascade({**architecture, "cascades": max(count, 1)})
    parameters = adds = 0
    if cascade.stem is not None:
        stem = registry.cost(cascade.stem, stem_shape)
        parameters, adds = stem.parameters, stem.multiply_adds * stem_passes
    parts = zip(cascade.networks, cascade.image_strides, cascade.repeats, strict=True)
    for network, stride, repeat in parts if count else ():
        dense = registry.cost(network, (128 // stride,) * 3)  # type: ignore[arg-type]
        parameters, adds = parameters + dense.parameters, adds + dense.multiply_adds * repeat
    return Size(parameters, adds)


def read(path: Path) -> list[dict[str, str]]:
    """Read all measured costs; an empty list where there is no file."""
    if not path.exists():
        return []
    with path.open(newline="", encoding="utf-8") as stream:
        return list(csv.DictReader(stream))


def _devices() -> list[str]:
    import torch

    return ["cpu", "cuda"] if torch.cuda.is_available() else ["cpu"]


def measure_missing(plan: Plan, path: Path, threads: int) -> None:
    """Run every system alone, in a fresh process, on the first pair of every data set; skip what has been measured.

    Models run three times, after one run that is not counted; other programs run once, as each run is a new process.
    Peak memory is that of the whole process.
    """
    known = {(r["dataset"], r["system"], r["id"], r["device"], r["threads"]) for r in read(path)}
    for data in plan.config.datasets:
        pair = next(iter(plan.pairs.get(data.name, [])), None)
        for listed in plan.config.systems:
            if pair is None or listed.kind == "nothing" or listed.name in plan.unavailable[data.name]:
                continue
            system = plan.system(data, listed)
            for device in _devices() if system.kind == "model" else ["cpu"]:
                place = dataclasses.replace(plan.place, threads=threads, device=device)
                own_id = systems.fingerprint(system, place)
                if (data.name, system.name, own_id, device, str(threads)) in known:
                    continue
                print(f"timing {system.name} alone on {data.name} ({device}, {threads} threads)", file=sys.stderr)
                tasks = [Task(data, pair, system, place, ())] * REPEATS[system.kind]
                rows = [row for _, row in run_all(tasks, 1, threads)]
                own = {"dataset": data.name, "system": system.name, "id": own_id, "device": device, "threads": threads}
                _append(path, own | _numbers(rows))


def _numbers(rows: list[dict[str, Any]]) -> dict[str, Any]:
    done = [r for r in rows if r["status"] == "done"]
    if not done:
        return {"runs": 0, "message": rows[0]["message"]}
    seconds = [r["seconds"] for r in done]
    return {
        "runs": len(done),
        "seconds": statistics.median(seconds),
        "seconds_min": min(seconds),
        "seconds_max": max(seconds),
        "seconds_io": statistics.median(r["seconds_io"] for r in done),
        "peak_mb": max(r["peak_mb"] or r["process_mb"] for r in done),
    }


def _append(path: Path, row: dict[str, Any]) -> None:
    fresh = not path.exists()
    with path.open("a", newline="", encoding="utf-8") as stream:
        writer = csv.DictWriter(stream, COLUMNS, lineterminator="\n")
        if fresh:
            writer.writeheader()
        writer.writerow(row)
