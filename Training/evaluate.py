r"""Compare systems on the pairs of data sets, as a TOML says, and print tables.

    python -m Training.evaluate --config Training/configs/evaluate-ixi.toml --data DIR --out runs/evaluate

One row a pair and system goes to OUT/rows.csv as soon as it is finished; started again, only what is missing is
computed. A system that fails on a pair leaves a row with its message. Every table has the baselines "nothing" and
"affine only". Written to OUT as well: tables-NAME.md, .tex and .json, and costs.csv (seconds and memory of each system
alone on the machine).

Other programs come from the extra `peers`, or from another virtual environment (--peer-python). With --write-card the
results of the model given by --model go into its card.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import signal
import sys
import time
from pathlib import Path

from tqdm import tqdm

from LDRCore.errors import RegistrationError
from Training.evaluation import card_results, config, costs, result_rows, tables
from Training.evaluation.config import Config, DataSet
from Training.evaluation.plan import Plan, make_plan
from Training.evaluation.systems import Place
from Training.evaluation.workers import Task, run_all


def compute(plan: Plan, path: Path, workers: int, retry_failed: bool) -> None:
    """Make the rows that are missing."""
    finished = {result_rows.key(r) for r in result_rows.read(path) if not (retry_failed and r["status"] != "done")}
    wanted = [
        (data, pair, system, own_id)
        for data, pair, system, own_id in plan.runs()
        if (data.name, pair.name, system.name, own_id) not in finished
    ]
    tasks = [Task(data, pair, system, plan.place, tuple(plan.config.measures)) for data, pair, system, _ in wanted]
    path.parent.mkdir(parents=True, exist_ok=True)
    bar = tqdm(total=len(tasks), unit="row", disable=None, smoothing=0.05)
    for number, found in run_all(tasks, workers, plan.place.threads):
        data, pair, system, own_id = wanted[number]
        row = {"dataset": data.name, "pair": pair.name, "system": system.name, "id": own_id, **found}
        row |= {"threads": plan.place.threads, "workers": workers, "device": plan.place.device}
        result_rows.append(path, row)
        if row["status"] != "done":
            bar.write(f"failed: {system.name} on {data.name} {pair.name}: {row['message']}", file=sys.stderr)
        bar.set_postfix_str(f"{data.name} {system.name}")
        bar.update()
    bar.close()


def current_rows(plan: Plan, path: Path) -> dict[str, list[result_rows.Row]]:
    """{data set: rows} of this plan; of a row that was made twice, the last."""
    wanted = {(data.name, pair.name, system.name, own_id) for data, pair, system, own_id in plan.runs()}
    latest = {result_rows.key(r): r for r in result_rows.read(path) if result_rows.key(r) in wanted}
    found: dict[str, list[result_rows.Row]] = {name: [] for name in plan.pairs}
    for row in latest.values():
        found[row["dataset"]].append(row)
    return found


def summaries(plan: Plan, path: Path) -> dict[str, list[tables.Line]]:
    """{data set: lines of its table}."""
    names = [s.name for s in plan.config.systems]
    return {
        name: tables.summarise(found, names, plan.unavailable[name], plan.config.reference)
        for name, found in current_rows(plan, path).items()
    }


def caption(plan: Plan, data: DataSet, found: list[result_rows.Row]) -> str:
    """The sentence above a table: what was measured, how and where."""
    structures = {len(r["structures"]) for r in found if r.get("structures")}
    span = " to ".join(str(n) for n in sorted({min(structures), max(structures)})) if structures else ""
    labels = f"; {span} structures a pair" if structures else ""
    how = sorted({(int(r["threads"]), int(r["workers"])) for r in found if r.get("threads")})
    pace = ", ".join(f"{t} thread{'s' * (t > 1)} a system, {w} at a time" for t, w in how)
    note = f" {data.note.removesuffix('.')}." if data.note else ""
    count = len(plan.pairs[data.name])
    return (
        f"{count} pair{'s' * (count > 1)}{labels}; labels warped by the protocol {data.protocol!r}.{note} "
        f"Mean ± std over pairs; seconds are medians, warm ({pace or 'none yet'}). Folding, SDlogJ and NDV on the "
        "fixed grid."
    )


def write_tables(plan: Plan, out: Path, name: str) -> str:
    """Write tables-NAME.md, .tex and .json; returns the Markdown."""
    found, by_dataset = current_rows(plan, out / "rows.csv"), summaries(plan, out / "rows.csv")
    text, latex, data_out = [], [], {}
    for data in plan.config.datasets:
        text.append(f"## {data.name}\n")
        if data.name in plan.no_data:
            text.append(f"No data: {plan.no_data[data.name]}\n")
            continue
        lines, above = by_dataset[data.name], caption(plan, data, found[data.name])
        text.append(f"{above}\n\n{tables.markdown(lines, plan.config.reference)}\n")
        notes = [f"- {line.system}: {line.notes}" for line in lines if line.notes]
        text.append("\n".join(["Affine start and versions:", "", *notes, ""]) if notes else "")
        latex.append(f"% {data.name}: {above}\n{tables.latex(lines, plan.config.reference)}\n")
        data_out[data.name] = {
            "caption": above,
            "pairs": len(plan.pairs[data.name]),
            "lines": tables.as_json(lines),
            "structures": tables.structures(found[data.name]),
        }
    for ending, content in (
        (".md", "\n".join(text)),
        (".tex", "\n".join(latex)),
        (".json", json.dumps(data_out, indent=1) + "\n"),
    ):
        part = out / f"tables-{name}{ending}.part"
        part.write_text(content, encoding="utf-8")
        part.replace(out / f"tables-{name}{ending}")
    return "\n".join(text)


def arguments(parser: argparse.ArgumentParser) -> None:
    """The arguments that evaluating and reporting share."""
    parser.add_argument(
        "--config", type=Path, required=True, action="append", help="TOML with data sets and systems (may be repeated)"
    )
    parser.add_argument("--data", default="", help="folder that {data} in the TOML stands for")
    parser.add_argument("--model", default="", help="model that {model} in the TOML stands for")
    parser.add_argument("--models", action="append", default=[], help="folder with exported models (may be repeated)")
    parser.add_argument("--out", type=Path, required=True, help="folder for rows and tables")
    parser.add_argument("--pairs", type=int, help="only the first so many pairs of every data set")
    parser.add_argument("--threads", type=int, default=1, help="threads of every worker (default 1)")
    parser.add_argument("--peer-python", default=sys.executable, help="interpreter that has the peers' packages")
    parser.add_argument("--datasets", default="", help="comma-separated names: only these data sets")
    parser.add_argument("--systems", default="", help="comma-separated names: only these systems and the baselines")


def plans_of(a: argparse.Namespace) -> list[Plan]:
    """The plans that the shared arguments describe, one a configuration.

    Raises:
        RegistrationError: see `config.load` and `make_plan`; names that do not exist; no data set at all.
    """
    for name in ("threads", "workers", "pairs", "cost_threads"):
        if getattr(a, name, None) is not None and getattr(a, name) < 1:
            raise RegistrationError(f"--{name.replace('_', '-')} must be 1 or more, got {getattr(a, name)}")
    places = {k: v for k, v in (("data", a.data), ("model", a.model)) if v}
    every = [config.load(path, places) for path in a.config]
    for what in ("datasets", "systems"):
        known = {x.name for settings in every for x in getattr(settings, what)}
        unknown = [n for n in _names(getattr(a, what)) if n not in known]
        if unknown:
            raise RegistrationError(f"--{what} must be names of the configuration, got {unknown[0]!r}")
    peer_python = os.path.abspath(shutil.which(a.peer_python) or a.peer_python)  # also where the folder is another
    place = Place(tuple(a.models), peer_python, a.threads)
    plans = [make_plan(_chosen(settings, a), place, a.pairs) for settings in every]
    if not any(plan.pairs for plan in plans):
        reasons = [why for plan in plans for why in plan.no_data.values()]
        raise RegistrationError(
            f"at least one data set must be there, got none ({reasons[0] if reasons else 'chosen'})"
        )
    return plans


def _names(text: str) -> list[str]:
    return [n.strip() for n in text.split(",") if n.strip()]


def _chosen(settings: Config, a: argparse.Namespace) -> Config:
    """Only the data sets and systems that were asked for, and the baselines."""
    sets, names = _names(a.datasets), _names(a.systems)
    kept = [s for s in settings.systems if not names or s.name in names or s.kind in ("nothing", "affine")]
    reference = settings.reference if settings.reference in [s.name for s in kept] else ""
    chosen = [d for d in settings.datasets if not sets or d.name in sets]
    return Config(chosen, kept, settings.measures, reference)


def run(a: argparse.Namespace) -> int:
    """Evaluate; returns the number of failed rows."""
    plans = plans_of(a)
    if a.write_card:
        card_results.check(a.model)
    failed = 0
    for path, plan in zip(a.config, plans, strict=True):
        for data, why in plan.no_data.items():
            print(f"no data: {data}: {why}", file=sys.stderr)
        for data, missing in plan.unavailable.items():
            for name, why in missing.items():
                print(f"not run on {data}: {name}: {why}", file=sys.stderr)
        compute(plan, a.out / "rows.csv", a.workers, a.retry_failed)
        if not a.no_costs:
            costs.measure_missing(plan, a.out / "costs.csv", a.cost_threads)
        print(write_tables(plan, a.out, path.stem))
        found = summaries(plan, a.out / "rows.csv")
        if a.write_card:
            print(f"written {card_results.write(a.model, plan.config, found)}")
        failed += sum(line.failed for lines in found.values() for line in lines)
    return failed


def main(given: list[str] | None = None) -> int:
    """Command line; 0 all rows done, 1 some failed, 2 unusable input."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    arguments(parser)
    parser.add_argument("--workers", type=int, default=1, help="pairs at a time, each in its own process (default 1)")
    parser.add_argument("--retry-failed", action="store_true", help="compute failed rows again")
    parser.add_argument("--no-costs", action="store_true", help="do not time each system alone afterwards")
    parser.add_argument("--cost-threads", type=int, default=2, help="threads when timed alone (default 2)")
    parser.add_argument("--write-card", action="store_true", help="put the results of --model into its card")
    a = parser.parse_args(given)
    began = time.perf_counter()
    before = signal.signal(signal.SIGTERM, signal.default_int_handler)  # ended politely: as Ctrl-C
    try:
        failed = run(a)
    except RegistrationError as error:
        print(f"evaluate: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("interrupted; finished rows are kept, run the same command to go on", file=sys.stderr)
        return 130
    finally:
        signal.signal(signal.SIGTERM, before)
    print(f"{(time.perf_counter() - began) / 60:.1f} minutes", file=sys.stderr)
    return int(failed > 0)


if __name__ == "__main__":
    sys.exit(main())
