"""Summarises rows as tables: n, mean, standard deviation and a paired Wilcoxon test, in Markdown, LaTeX and JSON."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from LDRCore.errors import RegistrationError
from Training.evaluation.result_rows import Row


@dataclass(frozen=True)
class Column:
    """One measure in the tables: its row key, heading, factor and digits."""

    key: str
    title: str
    factor: float
    digits: int
    median: bool = False


COLUMNS = (
    Column("dice_mean", "Dice %", 100, 1),
    Column("jaccard_mean", "Jaccard %", 100, 1),
    Column("hd95_mm", "HD95 mm", 1, 2),
    Column("surface_mm", "surface mm", 1, 2),
    Column("tre_mm", "TRE mm", 1, 2),
    Column("folding_count", "folding voxels", 1, 0),
    Column("folding_fraction", "folding %", 100, 3),
    Column("sdlogj", "SDlogJ", 1, 3),
    Column("sdlogj_learn2reg", "SDlogJ (Learn2Reg)", 1, 3),
    Column("ndv_percent", "NDV %", 1, 3),
    Column("seconds", "s", 1, 2, median=True),
    Column("seconds_io", "s with I/O", 1, 2, median=True),
)
TESTED = ("dice_mean", "tre_mm")  # the Wilcoxon test uses the first of these that a data set has


@dataclass
class Line:
    """One system on one data set.

    Attributes:
        system: its name.
        done: number of pairs with a result.
        failed: number of pairs without, and the message of the first.
        unavailable: why it did not run at all, or "".
        values: {measure: {"mean", "std", "median", "n"}} in the units of the rows.
        wilcoxon: {"measure", "n", "difference" (median of this minus reference), "p"} against the reference, or None.
        notes: affine start and versions.
    """

    system: str
    done: int = 0
    failed: int = 0
    message: str = ""
    unavailable: str = ""
    values: dict[str, dict[str, float]] = field(default_factory=dict)
    wilcoxon: dict[str, Any] | None = None
    notes: str = ""


def summarise(rows: Iterable[Row], systems: list[str], unavailable: dict[str, str], reference: str = "") -> list[Line]:
    """Summarise the rows of one data set, one line for each system.

    Args:
        rows: of this data set.
        systems: names in the order of the table; every one gets a line.
        unavailable: {system: why it could not run}.
        reference: the system that the others are compared with on the pairs that both finished, or "".
    """
    grouped: dict[str, list[Row]] = {name: [] for name in systems}
    for row in rows:
        grouped.setdefault(row["system"], []).append(row)
    lines = []
    for name in systems:
        done = [r for r in grouped[name] if r["status"] == "done"]
        failed = [r for r in grouped[name] if r["status"] != "done"]
        line = Line(name, len(done), len(failed), failed[0]["message"] if failed else "")
        line.unavailable = unavailable.get(name, "") if not done else ""
        line.values = {c.key: v for c in COLUMNS if (v := _statistics(r.get(c.key) for r in done))}
        texts = [t for k in ("initial", "versions") if (t := next((r[k] for r in done if r.get(k)), ""))]
        line.notes = "; ".join(texts)
        if reference and name != reference:
            line.wilcoxon = _wilcoxon(done, [r for r in grouped.get(reference, []) if r["status"] == "done"])
        lines.append(line)
    return lines


def _statistics(values: Iterable[Any]) -> dict[str, float] | None:
    known = np.array([v for v in values if v is not None and not math.isnan(v)], dtype=float)
    if not known.size:
        return None
    return {
        "mean": float(known.mean()),
        "std": float(known.std()),
        "median": float(np.median(known)),
        "n": int(known.size),
    }


def need_scipy() -> Callable[..., Any]:
    """Return scipy's Wilcoxon test.

    Raises:
        RegistrationError: scipy is not installed.
    """
    try:
        from scipy.stats import wilcoxon
    except ImportError:
        raise RegistrationError(
            "the paired test needs the package scipy: install the extra `evaluate`, or leave out the reference"
        ) from None
    return wilcoxon


def _wilcoxon(ours: list[Row], theirs: list[Row]) -> dict[str, Any] | None:
    """Compute the paired two-sided signed-rank test over the pairs that both have; None with fewer than two."""
    other = {r["pair"]: r for r in theirs}
    for measure in TESTED:
        couples = [
            (r[measure], other[r["pair"]][measure])
            for r in ours
            if r["pair"] in other and r.get(measure) is not None and other[r["pair"]].get(measure) is not None
        ]
        if len(couples) < 2:
            continue
        a, b = np.array(couples, dtype=float).T
        p = 1.0 if np.all(a == b) else float(need_scipy()(a, b).pvalue)
        return {"measure": measure, "n": len(couples), "difference": float(np.median(a - b)), "p": p}
    return None


def used_columns(lines: list[Line]) -> list[Column]:
    """Return the columns for which some line has a value."""
    return [c for c in COLUMNS if any(c.key in line.values for line in lines)]


def cell(line: Line, column: Column, plus_minus: str = "±") -> str:
    """Format a value, e.g. "59.2 ± 5.1"; times as their median; "-" where there is none."""
    statistics = line.values.get(column.key)
    if not statistics:
        return "-"
    if column.median:
        return f"{statistics['median']:.{column.digits}f}"
    mean, std = (column.factor * statistics[k] for k in ("mean", "std"))
    return f"{mean:.{column.digits}f} {plus_minus} {std:.{column.digits}f}"


def p_text(line: Line) -> str:
    """Format the p value of the test, with the sign of the median difference."""
    test = line.wilcoxon
    if not test:
        return "-"
    sign = "+" if test["difference"] > 0 else "-" if test["difference"] < 0 else "="
    return f"{sign} {test['p']:.1e}"


def remark(line: Line) -> str:
    """Say why a line is empty or what failed."""
    if line.unavailable:
        return f"not run: {line.unavailable}"
    if line.failed:
        return f"{line.failed} failed ({line.message})"
    return "" if line.done else "not run yet"


def markdown(lines: list[Line], reference: str) -> str:
    """Format one data set as a Markdown table."""
    columns = used_columns(lines)
    heads = ["system", "n", *(c.title for c in columns), *([f"p against {reference}"] if reference else []), "remark"]
    out = ["| " + " | ".join(heads) + " |", "|" + "---|" * len(heads)]
    for line in lines:
        cells = [line.system, str(line.done), *(cell(line, c) for c in columns)]
        cells += [p_text(line)] if reference else []
        out.append("| " + " | ".join([*cells, remark(line).replace("|", "/")]) + " |")
    return "\n".join(out)


_LATEX = str.maketrans({"%": r"\%", "_": r"\_", "&": r"\&", "#": r"\#", "$": r"\$", "<": "$<$", ">": "$>$"})


def latex(lines: list[Line], reference: str) -> str:
    """Format one data set as a LaTeX tabular (package booktabs)."""
    columns = used_columns(lines)
    heads = ["system", "n", *(c.title for c in columns), *(["p"] if reference else [])]
    out = [rf"\begin{{tabular}}{{lr{'r' * (len(heads) - 2)}}}", r"\toprule"]
    out += [" & ".join(h.translate(_LATEX) for h in heads) + r" \\", r"\midrule"]
    for line in lines:
        cells = [line.system.translate(_LATEX), str(line.done), *(cell(line, c, r"$\pm$") for c in columns)]
        cells += [p_text(line)] if reference else []
        why = remark(line)
        out.append(" & ".join(cells) + r" \\" + (f" % {why}" if why else ""))
    return "\n".join([*out, r"\bottomrule", r"\end{tabular}"])


def as_json(lines: list[Line]) -> list[dict[str, Any]]:
    """Convert the lines of one data set to plain data."""
    return [dict(vars(line)) for line in lines]


def structures(rows: Iterable[Row]) -> dict[str, dict[int, dict[str, float]]]:
    """Average finished rows by structure: {system: {label: {measure: mean over pairs}}}."""
    collected: dict[str, dict[int, dict[str, list[float]]]] = {}
    for row in rows:
        for label, values in (row.get("structures") or {}).items():
            for measure, value in values.items():
                if value is not None:
                    collected.setdefault(row["system"], {}).setdefault(label, {}).setdefault(measure, []).append(value)
    return {
        system: {label: {m: float(np.mean(v)) for m, v in values.items()} for label, values in sorted(labels.items())}
        for system, labels in collected.items()
    }
