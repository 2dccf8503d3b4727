"""`register_many()`: registers a list of pairs in workers, goes on where an earlier run ended, and writes its table."""

from __future__ import annotations

import dataclasses
import json
import os
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, suppress
from pathlib import Path
from typing import Any

from LDRCore.cohort import page, plan, store, table
from LDRCore.cohort.pairs import CohortPair, make_pairs, read_cohort
from LDRCore.cohort.pool import Answer, Pool
from LDRCore.cohort.settings import DEFAULT_OUTPUTS, CohortSettings, check_settings
from LDRCore.errors import RegistrationError
from LDRCore.io.files import check_not_input, check_writable
from LDRCore.io.writing import write_file

COHORT = "cohort.json"
_TABLE_S = 60.0  # between two tables, at least
_TABLE_SHARE = 50  # and this many times as long as writing one took
_CHECKING = 256  # pairs that are checked ahead
_MEASURED = 10  # pairs of an earlier run tell better than an estimate what one takes on the disk

Progress = Callable[[float, str], None]


def register_many(
    pairs: str | os.PathLike[str] | Iterable[Mapping[str, str] | CohortPair],
    out: str | os.PathLike[str],
    *,
    outputs: Sequence[str] = DEFAULT_OUTPUTS,
    workers: int | None = None,
    threads: int | None = None,
    scheduler: str | None = None,
    frame: str = "lps",
    statistics: bool = False,
    overwrite: bool = False,
    progress: Progress | None = None,
    **options: Any,
) -> dict[str, Any]:
    """Register many pairs into one folder. The same call goes on where an earlier one ended.

    Args:
        pairs: path of a CSV with the columns fixed, moving and any others of `cohort.pairs.CohortPair`, or such rows.
        out: folder for `pairs/NAME/`, `results.csv` and `index.html`.
        outputs: names in `cohort.settings.FILES`. A report and a thumbnail are always written.
        workers, threads: processes, and threads of each; None: as many processes as cores and memory allow, of one
            thread.
        scheduler: address of a Dask scheduler whose workers do the work, instead of processes on this machine.
        frame: of landmark files: "lps", "ras" (mm) or "voxel".
        statistics: also write mean and standard deviation of warped images and log Jacobians onto one atlas.
        overwrite: register every pair anew where the folder holds results of other options.
        progress: called with the fraction of pairs done and what is being done.
        options: further keywords of `register` (kind, model, cascades, affine, initial, refine ...).

    Returns:
        pairs: a row for each pair, with name, status ("done", "failed", "waiting"), error, verdict and numbers;
        done, reused, failed: how many; problems: one sentence for each pair that failed; interrupted; seconds,
        pairs_per_minute; plan; files.

    Raises:
        RegistrationError: a list, an option or a folder that cannot be used, or a disk that is full. What was finished
            stays.
    """
    chosen = _choose_pairs(pairs)
    if statistics and len({pair.fixed for pair in chosen}) > 1:
        raise RegistrationError("statistics need one atlas, got several fixed images")
    if statistics:
        outputs = (*outputs, "warped", "jacobian")
    settings = check_settings(options, outputs, frame)
    folder = Path(out)
    _check_folder(folder, chosen)
    planned = plan.make_plan(chosen, settings, workers, threads)
    with store.only_run(folder):
        _check_settings_of(folder, settings, overwrite)
        run = _Run(chosen, settings, folder, planned, progress)
        run.reuse()
        plan.check_disk(folder, run.left, run.planned)
        facts = json.dumps({"settings": settings.as_dict(), "n": len(chosen)}, indent=1) + "\n"
        write_file(folder / COHORT, lambda path: path.write_text(facts, encoding="utf-8"))
        if run.left:
            run.work(scheduler)
        summary = run.finish()
        if statistics and not summary["interrupted"]:
            from LDRCore.cohort.statistics import write_statistics

            summary["files"] += write_statistics(folder, [pair.name for pair, row in run.done()], progress)
    return summary


def _choose_pairs(pairs: Any) -> list[CohortPair]:
    if isinstance(pairs, (str, os.PathLike)):
        return read_cohort(Path(pairs))
    rows = [{k: v for k, v in dataclasses.asdict(p).items() if v} if isinstance(p, CohortPair) else p for p in pairs]
    return make_pairs(rows)


def _check_folder(folder: Path, pairs: Sequence[CohortPair]) -> None:
    if folder.exists() and not folder.is_dir():
        raise RegistrationError(f"the output must be a folder, got the file {folder}")
    check_writable(folder)
    inside = os.path.join(os.path.realpath(folder), store.PAIRS, "")
    for pair in pairs:
        for name in ("fixed", "moving"):
            if os.path.realpath(getattr(pair, name)).startswith(inside):
                check_not_input([Path(getattr(pair, name))], [getattr(pair, name)])


def _check_settings_of(folder: Path, settings: CohortSettings, overwrite: bool) -> None:
    """Refuse a folder with results of other options."""
    try:
        earlier = json.loads((folder / COHORT).read_text(encoding="utf-8"))["settings"]
    except (OSError, ValueError, KeyError, TypeError):
        return
    now = settings.as_dict()
    flat = [value | value.pop("options") for value in (dict(earlier), dict(now))]
    different = next((name for name in flat[1] if flat[0].get(name) != flat[1][name]), None)
    if different is not None and not overwrite:
        raise RegistrationError(
            f"the output folder must hold results of the same options (or overwrite must be set), got {folder} with "
            f"{different} {flat[0].get(different)!r} instead of {flat[1][different]!r}"
        )


class _Run:
    """The rows of a run as they come."""

    def __init__(
        self,
        pairs: Sequence[CohortPair],
        settings: CohortSettings,
        folder: Path,
        planned: plan.Plan,
        progress: Progress | None,
    ) -> None:
        self._pairs, self._settings, self._folder, self.planned = pairs, settings, folder, planned
        self._progress = progress
        self._rows: list[dict[str, Any] | None] = [None] * len(pairs)
        self._reused = self._failed = self._peak_bytes = 0
        self._began_s, self._seconds = time.monotonic(), 0.0
        self._interrupted = False

    @property
    def left(self) -> int:
        """How many pairs are still to be registered."""
        return sum(row is None for row in self._rows)

    def done(self) -> list[tuple[CohortPair, dict[str, Any]]]:
        """The pairs that are finished, with their rows."""
        return [(p, r) for p, r in zip(self._pairs, self._rows, strict=True) if r is not None and "error" not in r]

    def _tell(self, fraction: float, message: str) -> None:
        if self._progress is not None:
            self._progress(fraction, message)

    def reuse(self) -> None:
        """Take over the pairs that an earlier run finished, after checking their files."""
        if not (self._folder / store.PAIRS).exists():
            return

        def check(pair: CohortPair) -> dict[str, Any] | None:
            return store.finished_row(self._folder, pair, self._settings)

        with ThreadPoolExecutor(max(2, plan.available_cores())) as pool:
            ahead: deque[Any] = deque()
            for number, pair in enumerate(self._pairs):
                ahead.append((number, pool.submit(check, pair)))
                while len(ahead) > _CHECKING or (number + 1 == len(self._pairs) and ahead):
                    known, future = ahead.popleft()
                    self._rows[known] = future.result()
                    if known % 100 == 0:
                        self._tell(0.0, f"checking finished pairs, {known} of {len(self._pairs)}")
        self._reused = len(self._pairs) - self.left
        written = [row["bytes"] for row in self._rows if row is not None]
        if len(written) >= _MEASURED:
            self.planned = dataclasses.replace(self.planned, pair_bytes=sum(written) // len(written))

    def _engine(self, scheduler: str | None) -> Callable[[Iterable[tuple[int, CohortPair]]], Iterator[Answer]]:
        """Return what performs pairs: processes of this machine, or the workers of a scheduler."""
        planned = self.planned
        if scheduler is None:
            pool = Pool(self._settings, self._folder, planned.workers, planned.threads, compiled=planned.compiled)
            return pool.run
        from LDRCore.cohort.cluster import Cluster

        cluster = Cluster(scheduler, self._settings, self._folder, planned.threads)
        self.planned = dataclasses.replace(planned, workers=cluster.workers)
        return cluster.run

    def work(self, scheduler: str | None) -> None:
        """Register what is left; an interruption ends it early.

        Raises:
            RegistrationError: the disk is full, or no worker can work.
        """
        engine = self._engine(scheduler)
        self._began_s = time.monotonic()
        table_s, table_took_s = self._began_s, 0.0
        count, total = 0, self.left
        waiting = ((n, pair) for n, pair in enumerate(self._pairs) if self._rows[n] is None)
        failure: RegistrationError | None = None
        self._tell(0.0, f"{total} pairs, starting {self.planned.workers} worker(s)")
        try:
            with closing(engine(waiting)) as answers:  # type: ignore[type-var]
                for answer in answers:
                    full = answer.row.pop("unwritten", False) and self._disk_is_full()
                    if full:
                        failure = RegistrationError(
                            f"the disk of {self._folder} must have room for every pair, got a full one after "
                            f"{count + self._reused} of {len(self._pairs)} pairs: free "
                            f"{plan.amount((total - count) * self.planned.pair_bytes)} and run the same command again"
                        )
                        break
                    self._rows[answer.number] = answer.row
                    self._failed += "error" in answer.row
                    self._peak_bytes = max(self._peak_bytes, answer.peak_bytes)
                    count += 1
                    now_s = time.monotonic()
                    self._tell(count / total, self._describe(count, total, now_s))
                    if now_s - table_s > max(_TABLE_S, _TABLE_SHARE * table_took_s):
                        with suppress(RegistrationError):
                            table.write_table(self._folder, self._pairs, self._rows)
                        table_s = time.monotonic()
                        table_took_s = table_s - now_s
        except KeyboardInterrupt:
            self._interrupted = True
        except RegistrationError as error:
            failure = error
        self._seconds = time.monotonic() - self._began_s
        if failure is not None:
            with suppress(RegistrationError):
                self._write()
            raise failure

    def _disk_is_full(self) -> bool:
        return plan.free_bytes(self._folder) < 2 * self.planned.workers * self.planned.pair_bytes

    def _describe(self, count: int, total: int, now_s: float) -> str:
        rate = 60 * count / max(now_s - self._began_s, 1e-6)
        failed = f", {self._failed} failed" if self._failed else ""
        return f"{count} of {total} pairs, {rate:.3g} a minute{failed}"

    def _write(self) -> list[dict[str, Any]]:
        """Write table and page, and return the complete rows."""
        table.write_table(self._folder, self._pairs, self._rows)
        rows = [table.complete_row(pair, row) for pair, row in zip(self._pairs, self._rows, strict=True)]
        page.write_page(self._folder, rows)
        return rows

    def finish(self) -> dict[str, Any]:
        """Write table and page, and return what `register_many` returns."""
        rows = self._write()
        problems = [f"{row['name']}: {row['error']}" for row in rows if row["status"] == table.FAILED]
        done = sum(row["status"] == table.DONE for row in rows)
        if self._interrupted:
            problems.append(f"interrupted after {done} of {len(rows)} pairs: the same command goes on from there")
        registered = done - self._reused
        self._tell(1.0, "done")
        return {
            "pairs": rows,
            "done": done,
            "reused": self._reused,
            "failed": sum(row["status"] == table.FAILED for row in rows),
            "problems": problems,
            "interrupted": self._interrupted,
            "seconds": round(self._seconds, 2),
            "pairs_per_minute": round(60 * registered / self._seconds, 2) if self._seconds else None,
            "peak_memory_of_a_worker_mb": round(self._peak_bytes / 1e6) or None,
            "plan": dataclasses.asdict(self.planned),
            "files": [str(self._folder / name) for name in (table.TABLE, page.PAGE, COHORT)],
        }
