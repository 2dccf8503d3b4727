"""Reads and appends the rows of an evaluation: one CSV, which may be interrupted at any moment and continued."""

from __future__ import annotations

import csv
import io
import json
import os
from pathlib import Path
from typing import Any

from LDRCore.errors import RegistrationError
from LDRCore.evaluation import scoring

NUMBERS = (*scoring.NUMBERS, "seconds", "seconds_io", "peak_mb", "threads", "workers")
TEXTS = ("dataset", "pair", "system", "id", "status", "message", "device", "initial", "versions")
COLUMNS = (*TEXTS, *NUMBERS, "structures")
_PER_STRUCTURE = ("dice", "jaccard", "hd95_mm", "surface_mm")

Row = dict[str, Any]


def key(row: Row) -> tuple[str, str, str, str]:
    """Return what identifies a row: data set, pair, system, and the id of the system's definition and protocol."""
    return row["dataset"], row["pair"], row["system"], row["id"]


def read(path: Path) -> list[Row]:
    """Read all complete rows of a file whose last line may be cut off; an empty list where there is no file.

    Raises:
        RegistrationError: the file has other columns.
    """
    if not path.exists():
        return []
    text = path.read_text(encoding="utf-8")
    whole = text[: text.rfind("\n") + 1]
    reader = csv.DictReader(io.StringIO(whole))
    if reader.fieldnames is not None and tuple(reader.fieldnames) != COLUMNS:
        raise RegistrationError(f"{path} must be the rows of an evaluation, got other columns: use another --out")
    rows = []
    for stored in reader:
        row: Row = {k: stored[k] for k in TEXTS}
        row |= {k: float(stored[k]) if stored[k] else None for k in NUMBERS}
        packed = json.loads(stored["structures"] or "{}")
        row["structures"] = {
            int(label): dict(zip(_PER_STRUCTURE, values, strict=True)) for label, values in packed.items()
        }
        rows.append(row)
    if whole != text:  # drop the incomplete line, so that the next row begins on its own
        part = path.with_suffix(".part")
        part.write_text(whole, encoding="utf-8")
        part.replace(path)
    return rows


def append(path: Path, row: Row) -> None:
    """Append a row in one write, flushed to the disk; the header comes with the first."""
    stored = {k: "" if row.get(k) is None else row[k] for k in COLUMNS}
    packed = {
        label: [None if values.get(k) is None else round(values[k], 4) for k in _PER_STRUCTURE]
        for label, values in (row.get("structures") or {}).items()
    }
    stored["structures"] = json.dumps(packed, separators=(",", ":")) if packed else ""
    stored["message"] = " ".join(str(stored["message"]).split())
    text = io.StringIO()
    writer = csv.DictWriter(text, COLUMNS, lineterminator="\n")
    if not path.exists() or not path.stat().st_size:
        writer.writeheader()
    writer.writerow(stored)
    with path.open("a", encoding="utf-8") as stream:
        stream.write(text.getvalue())
        stream.flush()
        os.fsync(stream.fileno())
