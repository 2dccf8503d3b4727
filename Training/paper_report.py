"""The report of `Training.paper`: how far every row is, all models on the test pairs, the paper's tables."""

from __future__ import annotations

import argparse
from pathlib import Path

from Training import evaluate, report
from Training.evaluation import config as evaluation_config
from Training.evaluation import costs
from Training.evaluation.plan import make_plan
from Training.evaluation.systems import Place
from Training.paper_runner import Runner

HEADS = ["row", "in the tables", "kind", "uses", "budget, minutes", "spent, minutes", "steps", "s a step", "result"]


def rows_table(runner: Runner) -> report.Grid:
    """How far every row is: its budget, what it took, its best validation, or why it failed."""
    grid = [HEADS]
    for row in runner.paper.rows:
        state = runner.state.get(row.name, {})
        status = state.get("status", "not run yet")
        result = {"failed": f"failed: {state.get('message')}", "begun": "not finished"}.get(status, status)
        if status == "done" and row.kind == "store":
            result = state["summary"]
        elif status == "done":
            best = state.get("best")
            result = f"{best['criterion']} {best['value']:.4f} at step {best['step']}" if best else "not validated"
        grid.append(
            [
                row.name,
                row.system or "-",
                row.kind,
                ", ".join(row.needs.values()) or "-",
                "-" if row.minutes is None else f"{row.minutes:g}",
                f"{state['seconds'] / 60:.1f}" if "seconds" in state else "-",
                str(state.get("steps", "-")),
                f"{state['step_s']:.3f}" if state.get("step_s") else "-",
                result,
            ]
        )
    return grid


def write(runner: Runner, models: Path, a: argparse.Namespace) -> Path:
    """Evaluate all models on the test pairs and write the report.

    Args:
        runner: after the rows were run.
        models: folder with the exported models.
        a: arguments of `Training.paper`.

    Returns:
        OUT/report.md.

    Raises:
        RegistrationError: the evaluation's configuration cannot be used, or its data are missing and not optional.
    """
    paper, out = runner.paper, runner.out
    table = {**paper.evaluation, "system": [*paper.evaluation.get("system", []), *paper.systems()]}
    places = {"data": a.data} if a.data else {}
    settings = evaluation_config.from_table(table, paper.path, places)
    plan = make_plan(settings, Place((str(models),), a.peer_python, a.threads), 1 if a.trial else a.pairs)
    for row in paper.rows:
        for missing in plan.unavailable.values():
            if row.system in missing and runner.state.get(row.name, {}).get("status") == "failed":
                missing[row.system] = f"no weights yet: row {row.name} failed ({runner.state[row.name]['message']})"
    evaluate.compute(plan, out / "rows.csv", a.workers, a.retry_failed)
    if not (a.no_costs or a.trial):
        costs.measure_missing(plan, out / "costs.csv", a.threads)
    comparison = evaluate.write_tables(plan, out, "paper")
    content: list[report.Part] = [
        ("head", f"Rows: {paper.title}", None),
        ("table", "", rows_table(runner)),
        ("head", "All systems on the test pairs", None),
        ("text", "Every weight was trained by this run, except those of rows whose system names another model.", None),
        ("text", comparison.replace("\n## ", "\n### ").replace("## ", "### ", 1), None),
    ]
    if paper.layout:
        content += report.parts(report.collect([plan], out))
    report.write(content, out)
    return out / "report.md"
