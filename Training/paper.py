r"""Train everything that the paper's Tables I to IV need, each row within its budget, evaluate it, and write a report.

    python -m Training.paper --config Training/configs/paper.toml --data DIR --out runs/paper --workers 2
    python -m Training.paper --config Training/configs/paper-gpu.toml --prepared FILE.npz --out runs/paper --stage train

One command, which goes on where it stopped. The budgets are minutes of the TOML (`Training.paper_rows` says how it is
written): a row's first steps are timed, and the number of steps that its budget holds is kept for the whole run, so
that its learning rate ends where it should. A row that fails (a loss that is not finite, a budget below one step, too
little memory) is reported as failed, as are rows that need it; all others go on. Started again, failed rows stay failed
unless --retry-failed is given.

OUT/state.json tells how far every row is; OUT/runs, OUT/stores and OUT/models hold checkpoints, teacher deformations
and models that `register(model=...)` loads; OUT/report.md is the report. `--stage train` needs neither SimpleITK nor
labels beyond the data's (a GPU box); `--stage report` does the rest, where the scans of the test pairs are.
"""

from __future__ import annotations

import argparse
import signal
import sys
from pathlib import Path

from LDRCore.errors import RegistrationError
from Training.config import ConfigError
from Training.data.scan_set import DataError
from Training.paper_rows import load
from Training.paper_runner import InterruptedRunError, Runner


def _raise_interrupt(*_: object) -> None:
    raise KeyboardInterrupt


def main(given: list[str] | None = None) -> int:
    """Command line; 0 done, 1 some rows failed, 2 unusable input, 130 interrupted."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", type=Path, required=True, help="TOML with budgets, which names a TOML of rows")
    parser.add_argument("--data", default="", help="folder that {data} stands for: to train on, and of the test pairs")
    parser.add_argument("--prepared", default="", help="what to train on instead: a file of Training.prepare_data")
    parser.add_argument("--out", type=Path, required=True, help="folder for everything")
    parser.add_argument("--stage", choices=("all", "train", "report"), default="all")
    parser.add_argument("--only", default="", help="comma-separated names of rows: only these, and what they need")
    parser.add_argument("--minutes", type=float, help="stop training after so many, all rows together")
    parser.add_argument("--trial", action="store_true", help="two steps a row and one test pair: does all of it run?")
    parser.add_argument("--retry-failed", action="store_true", help="run failed rows again")
    parser.add_argument("--pairs", type=int, help="evaluate on the first so many test pairs only")
    parser.add_argument("--workers", type=int, default=1, help="test pairs at a time (default 1)")
    parser.add_argument("--threads", type=int, default=1, help="threads of every worker (default 1)")
    parser.add_argument("--no-costs", action="store_true", help="do not time each system alone")
    parser.add_argument("--peer-python", default=sys.executable, help="interpreter that has other programs' packages")
    a = parser.parse_args(given)
    before = signal.signal(signal.SIGTERM, _raise_interrupt)
    try:
        return _run(a)
    except (ConfigError, RegistrationError, DataError) as error:
        print(f"paper: {error}", file=sys.stderr)
        return 2
    except (InterruptedRunError, KeyboardInterrupt) as error:
        print(f"interrupted ({error}); run the same command to go on", file=sys.stderr)
        return 130
    finally:
        signal.signal(signal.SIGTERM, before)


def _run(a: argparse.Namespace) -> int:
    paper = load(a.config, tuple(name.strip() for name in a.only.split(",") if name.strip()))
    if not (a.prepared or a.data):
        raise ConfigError("one of --data and --prepared must be given, got neither")
    runner = Runner(paper, a.out, a.prepared or paper.data.replace("{data}", a.data), minutes=a.minutes, trial=a.trial)
    if a.stage != "report":
        if not Path(runner.data).exists():  # a mistake of the whole run, not of its rows
            raise ConfigError(f"the data to train on must exist, got {runner.data} (not found)")
        runner.run(a.retry_failed)
    folder = runner.export()
    if a.stage != "train":
        from Training import paper_report  # needs SimpleITK

        print(paper_report.write(runner, folder, a))
    failed = [row.name for row in paper.rows if runner.state.get(row.name, {}).get("status") == "failed"]
    if failed:
        print(f"failed: {', '.join(failed)} (see {a.out / 'state.json'})", file=sys.stderr)
    return int(bool(failed))


if __name__ == "__main__":
    sys.exit(main())
