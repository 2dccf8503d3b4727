"""The table of a cohort: a row for each pair, written whole, in the order of the list."""

from __future__ import annotations

import csv
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from LDRCore.cohort.pairs import CohortPair
from LDRCore.cohort.store import PAIRS
from LDRCore.io.writing import write_file

TABLE = "results.csv"
DONE, FAILED, WAITING = "done", "failed", "waiting"
COLUMNS = (
    *("name", "status", "error", "verdict", "reasons", "similarity_before", "similarity_after", "folding_fraction"),
    *("jacobian_min", "jacobian_max", "dice_before", "dice_after", "tre_mm_before", "tre_mm_after", "seconds"),
    *("bytes", "folder", "fixed", "moving"),
)


def complete_row(pair: CohortPair, row: dict[str, Any] | None) -> dict[str, Any]:
    """Return a row with the pair's names and its status; None stands for a pair that was not registered yet."""
    status = WAITING if row is None else FAILED if "error" in row else DONE
    folder = f"{PAIRS}/{pair.name}" if status == DONE else ""
    return {"name": pair.name, "status": status, "folder": folder, "fixed": pair.fixed, "moving": pair.moving} | (
        row or {}
    )


def write_table(out: Path, pairs: Sequence[CohortPair], rows: Sequence[dict[str, Any] | None]) -> None:
    """Write the table; an earlier one stays where this one cannot be written.

    Raises:
        RegistrationError: it cannot.
    """
    write_file(out / TABLE, lambda path: _write(path, zip(pairs, rows, strict=True)))


def _write(path: Path, rows: Iterable[tuple[CohortPair, dict[str, Any] | None]]) -> None:
    with path.open("w", newline="", encoding="utf-8") as stream:
        writer = csv.DictWriter(stream, COLUMNS, extrasaction="ignore", restval="")
        writer.writeheader()
        for pair, row in rows:
            complete = complete_row(pair, row)
            writer.writerow({name: _cell(complete.get(name)) for name in COLUMNS})


def _cell(value: Any) -> Any:
    return "" if value is None else f"{value:.6g}" if isinstance(value, float) else value
