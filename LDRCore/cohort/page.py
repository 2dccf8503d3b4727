"""index.html: one page by which a person judges a cohort. It holds everything itself and asks no network."""

from __future__ import annotations

import base64
import html
import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from LDRCore.cohort.settings import THUMBNAIL
from LDRCore.io import page_template
from LDRCore.io.writing import write_file

PAGE = "index.html"
MOST_ROWS = 20_000  # the worst; all are in the table
PICTURE_BYTES = 40_000_000  # of all thumbnails, as text
_COLUMNS = (
    *("name", "status", "error", "verdict", "reasons", "similarity_after", "folding_fraction", "jacobian_min"),
    *("jacobian_max", "dice_after", "tre_mm_after", "folder", "picture"),
)
_ORDER = {"failed": 0, "look": 1, "": 2, "trust": 3}  # of verdicts, the worst first


def write_page(out: Path, rows: Sequence[dict[str, Any]]) -> None:
    """Write the page; an earlier one stays where this one cannot be written.

    Args:
        out: folder of the cohort.
        rows: complete rows of its table.

    Raises:
        RegistrationError: it cannot be written.
    """
    text = make_page(out, rows)
    write_file(out / PAGE, lambda path: path.write_text(text, encoding="utf-8"))


def badness(row: dict[str, Any]) -> tuple[Any, ...]:
    """Return by what rows are sorted: failed pairs, verdicts, then the least similar; pairs that wait come last."""
    similarity = row.get("similarity_after")
    return (
        {"failed": 0, "done": 1}.get(row["status"], 2),
        _ORDER.get(row.get("verdict") or "", 2),
        math.inf if similarity is None else similarity,
        -(row.get("folding_fraction") or 0),
    )


def make_page(out: Path, rows: Sequence[dict[str, Any]]) -> str:
    """Return the page's text."""
    worst = sorted(rows, key=badness)[:MOST_ROWS]
    pictures = _read_thumbnails(out, worst)
    data = [
        [number if name == "picture" and number in pictures else row.get(name) for name in _COLUMNS]
        for number, row in enumerate(worst)
    ]
    folder = Path(__file__).parent
    script = (folder / "page.js").read_text(encoding="utf-8")
    notes = []
    if len(worst) < len(rows):
        notes.append(f"The {len(worst)} worst of {len(rows)} pairs; all are in results.csv.")
    without = sum(row["status"] == "done" for row in worst) - len(pictures)
    if without:
        notes.append(f"{without} pairs have no picture here: thumbnail.jpg lies in their folders.")
    parts = {
        "TITLE": html.escape(out.resolve().name),
        "COUNTS": html.escape(_count(rows)),
        "NOTE": " ".join(notes),
        "DATA": json.dumps({"columns": _COLUMNS, "rows": data}).replace("<", "\\u003c"),
        "SCRIPT": script,
        "THUMBNAILS": "\n".join(f'<script type="text/plain" id="t{n}">{text}</script>' for n, text in pictures.items()),
    }
    return page_template.fill(folder / "page.html", parts, [script])


def _count(rows: Sequence[dict[str, Any]]) -> str:
    counts: dict[str, int] = {}
    for row in rows:
        counts[row["status"]] = counts.get(row["status"], 0) + 1
    return ", ".join(f"{counts[status]} {status}" for status in ("done", "failed", "waiting") if status in counts)


def _read_thumbnails(out: Path, rows: Sequence[dict[str, Any]]) -> dict[int, str]:
    """Return {row: thumbnail in base64} until there are too many bytes."""
    pictures: dict[int, str] = {}
    size = 0
    for number, row in enumerate(rows):
        if row["status"] != "done":
            continue
        try:
            text = base64.b64encode((out / row["folder"] / THUMBNAIL).read_bytes()).decode()
        except OSError:
            continue
        size += len(text)
        if size > PICTURE_BYTES:
            break
        pictures[number] = text
    return pictures
