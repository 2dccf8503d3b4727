r"""The paper's Tables I to IV and Figures 5 and 6 from evaluated rows, as HTML with embedded pictures and as Markdown.

    python -m Training.report --config Training/configs/evaluate-ixi.toml \
        --config Training/configs/evaluate-paper.toml --data DIR --out runs/tables

Reads OUT/rows.csv and OUT/costs.csv (made by `Training.evaluate` with the same configurations; `make tables` does
both), writes OUT/report.html, report.md and the pictures. Every row of the paper is there: one without weights or
without data says so. The paper's numbers stand beside ours only where the data set is the same.
"""

from __future__ import annotations

import argparse
import base64
import html
import json
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from LDRCore.errors import RegistrationError
from LDRCore.models import registry, weights
from Training import evaluate
from Training.evaluation import config, costs, datasets, figures, systems, tables
from Training.evaluation.config import System
from Training.evaluation.plan import Plan
from Training.evaluation.tables import Line

LAYOUT = Path(__file__).parent / "configs" / "paper-tables.toml"
SHORT = {"dice_mean": "Dice", "jaccard_mean": "Jacc", "folding_count": "|J| <= 0"}
DIGITS = {"dice_mean": (100, 1), "jaccard_mean": (100, 1), "folding_count": (1, 0)}
FIGURE6_DATASETS = 2  # pictures of the first data sets that have labels


@dataclass
class Found:
    """What was evaluated, over all configurations.

    Attributes:
        plans: one a configuration.
        lines: {data set: {system: its line}}.
        no_data: {data set: why}.
        captions: {data set: how it was measured}.
        costs: rows of costs.csv.
    """

    plans: list[Plan]
    lines: dict[str, dict[str, Line]] = field(default_factory=dict)
    no_data: dict[str, str] = field(default_factory=dict)
    captions: dict[str, str] = field(default_factory=dict)
    costs: list[dict[str, str]] = field(default_factory=list)

    def system(self, name: str) -> tuple[Plan, System] | None:
        """The system of a name as it runs on the first data set that is there, with its plan."""
        for plan in self.plans:
            for data in plan.config.datasets:
                for system in plan.config.systems:
                    if system.name == name and data.name in plan.pairs:
                        return plan, plan.system(data, system)
        return None

    def cost(self, name: str, device: str) -> dict[str, str] | None:
        """The measured cost of a system on the first data set that has one."""
        found = [r for r in self.costs if r["system"] == name and r["device"] == device and r["runs"] != "0"]
        order = list(self.lines)
        found = sorted((r for r in found if r["dataset"] in order), key=lambda r: order.index(r["dataset"]))
        return found[0] if found else None


def collect(plans: list[Plan], out: Path) -> Found:
    """Read what `Training.evaluate` left in a folder."""
    found = Found(plans, costs=costs.read(out / "costs.csv"))
    for plan in plans:
        rows = evaluate.current_rows(plan, out / "rows.csv")
        for name, lines in evaluate.summaries(plan, out / "rows.csv").items():
            found.lines[name] = {line.system: line for line in lines}
        found.no_data |= plan.no_data
        for data in plan.config.datasets:
            if data.name in rows:
                found.captions[data.name] = evaluate.caption(plan, data, rows[data.name])
    return found


Grid = list[list[str]]
"""A table: the first row holds the headings."""


def _numbers(values: list[Any], measures: list[str]) -> str:
    padded = [*values, *[None] * (len(measures) - len(values))]
    pairs = zip(padded, measures, strict=True)
    return " / ".join(f"{v:.{DIGITS[m][1]}f}" if isinstance(v, (int, float)) else "-" for v, m in pairs)


def _ours(found: Found, data: str, system: str, measures: list[str]) -> str:
    if data in found.no_data or data not in found.lines:
        return "no data"
    line = found.lines[data].get(system)
    if line is None:
        return "not in the configuration"
    if not line.done:
        why = tables.remark(line).removeprefix("not run: ")
        return "no weights yet" if why.startswith("no weights yet") else why
    values = [line.values.get(m, {}).get("mean") for m in measures]
    text = _numbers([None if v is None else v * DIGITS[m][0] for v, m in zip(values, measures, strict=True)], measures)
    return f"{text} (n={line.done}{f', {line.failed} failed' if line.failed else ''})"


def table(found: Found, layout: dict[str, Any]) -> Grid:
    """One of the paper's tables: its columns, and ours for the data sets that are here."""
    measures, paper_sets = layout["measures"], layout["datasets"]
    what = " / ".join(SHORT[m] for m in measures)
    own_sets = [d for d in found.lines if d not in paper_sets and any(line.done for line in found.lines[d].values())]
    heads = ["system", *(f"{d}: {what}, ours; paper" for d in paper_sets), *(f"{d}: {what}" for d in own_sets)]
    with_costs = layout.get("costs", False)
    if with_costs:
        heads += ["CPU s", "CPU s with I/O", "GPU s", "peak MB", "parameters M, ours; paper", "multiply-adds G"]
    grid = [heads]
    for row in layout["row"]:
        name, paper = row["system"], row.get("paper", {})
        cells = [name]
        for data in paper_sets:
            theirs = f"; {_numbers(paper[data], measures)}" if data in paper else ""
            cells.append(_ours(found, data, name, measures) + theirs)
        cells += [_ours(found, data, name, measures) for data in own_sets]
        grid.append(cells + (_cost_cells(found, row, paper_sets) if with_costs else []))
    return grid


def _cost_cells(found: Found, row: dict[str, Any], paper_sets: list[str]) -> list[str]:
    name = row["system"]
    cells = []
    cpu, gpu = (found.cost(name, device) for device in ("cpu", "cuda"))
    same = cpu is not None and cpu["dataset"] in paper_sets  # the paper's seconds belong to its own images
    theirs = f"; {row['cpu_s']:g}" if same and "cpu_s" in row else ""
    cells.append(f"{float(cpu['seconds']):.2f}{theirs}" if cpu else "-")
    cells.append(f"{float(cpu['seconds_io']):.2f}" if cpu else "-")
    theirs = f"; {row['gpu_s']:g}" if same and "gpu_s" in row else ""
    cells.append(f"{float(gpu['seconds']):.3f}{theirs}" if gpu else "-")
    cells.append(f"{float(cpu['peak_mb']):.0f}" if cpu else "-")
    size = _size(found, row)
    paper = f"{row['params_m']:.2f}" if "params_m" in row else ""
    cells.append("; ".join([f"{size.parameters / 1e6:.2f}" if size else "-", *([paper] if paper else [])]))
    cells.append(f"{size.multiply_adds / 1e9:.1f}" if size else "-")
    return cells


def _size(found: Found, row: dict[str, Any]) -> costs.Size | None:
    """Counted from the model's card, or without weights from the architecture that the layout names."""
    place = found.system(row["system"])
    if place is not None and place[1].kind == "model" and not systems.unavailable(place[1], place[0].place):
        return costs.size(place[1], place[0].place)
    return costs.size_of(row["architecture"]) if "architecture" in row else None


def recipes(found: Found) -> Grid:
    """How every model that took part was trained, from its card."""
    grid = [["system", "model", "network", "teacher", "supervision and data"]]
    seen = set()
    for plan in found.plans:
        for data in plan.config.datasets:
            for listed in plan.config.systems:
                if data.name not in plan.pairs or listed.kind != "model" or listed.name in seen:
                    continue
                system = plan.system(data, listed)
                if systems.unavailable(system, plan.place):
                    continue
                seen.add(listed.name)
                card = weights.model_info(systems.find_model(system.model, plan.place.models))
                entries = registry.networks_of(card["architecture"])
                networks = [", ".join(str(v) for v in (n.name, *n.options.values())) for n in entries]
                about = card.get("data", {})
                grid.append(
                    [
                        listed.name,
                        card["name"],
                        "; ".join(dict.fromkeys(networks)),
                        teacher_name(card),
                        "; ".join(str(about[k]) for k in ("name", "labels") if about.get(k)),
                    ]
                )
    return grid


def teacher_name(card: dict[str, Any]) -> str:
    """Name the teacher of a model: of the run that its card records, or as a text in cards written by hand."""
    recipe = card.get("recipe", {})
    teacher = recipe.get("networks", recipe.get("cascades", {})).get("teacher")
    return str(teacher.get("teacher") if isinstance(teacher, dict) else teacher or "none")


def figure5(found: Found, layout: dict[str, Any], paper_tables: list[dict[str, Any]]) -> bytes:
    """Dice, CPU seconds and GPU seconds against the number of cascades."""
    families = layout["figure5"]["families"]
    paper = {row["system"]: row for t in paper_tables for row in t["row"] if "paper" in row}
    panels: dict[str, list[figures.Curve]] = {}
    for data, lines in found.lines.items():
        curves = []
        for family in families:
            known = [lines[s].values if s in lines else {} for s in family["systems"]]
            means = [values.get("dice_mean", {}).get("mean") for values in known]
            theirs = [paper.get(s, {}).get("paper", {}).get(data, [None])[0] for s in family["systems"]]
            curves.append(figures.Curve(family["name"], [None if m is None else 100 * m for m in means], theirs))
        if any(v is not None for c in curves for v in c.values):
            panels[f"{data}: Dice %"] = curves
    for device, title in (("cpu", "CPU"), ("cuda", "GPU")):
        measured = [(f["name"], [found.cost(s, device) for s in f["systems"]]) for f in families]
        curves = [figures.Curve(name, [float(c["seconds"]) if c else None for c in cost]) for name, cost in measured]
        threads = sorted({c["threads"] for _, cost in measured for c in cost if c})
        if any(v is not None for c in curves for v in c.values):
            panels[f"{title} seconds" + (f" ({'/'.join(threads)} threads)" if device == "cpu" else "")] = curves
    return figures.curves(panels)


def figure6(found: Found, layout: dict[str, Any]) -> dict[str, bytes | str]:
    """{data set: slices of warped images and masks, or why not}: first pair of the first data sets with labels."""
    pictures: dict[str, bytes | str] = {}
    for plan in found.plans:
        for data in plan.config.datasets:
            if data.name not in plan.pairs or len(pictures) == FIGURE6_DATASETS:
                continue
            able = [
                plan.system(data, s)
                for name in layout["figure6"]["systems"]
                for s in plan.config.systems
                if s.name == name and name not in plan.unavailable[data.name]
            ]
            try:
                pair = datasets.load(data, plan.pairs[data.name][0])
                if not able or pair.truth.fixed_labels is None or pair.truth.moving_labels is None:
                    continue
                transforms = {s.name: systems.run(s, pair, plan.place).transform for s in able}
                pictures[data.name] = figures.slices(pair, transforms)
            except RegistrationError as error:
                pictures[data.name] = f"{data.name}: no picture ({error})"
    return pictures


Part = tuple[str, str, Any]
"""(kind, title or text, content) with kind "head", "text", "table" or "picture" (content: file name and PNG)."""


def parts(found: Found) -> list[Part]:
    """The whole report, in order."""
    layout = config.read_toml(LAYOUT)
    out: list[Part] = [
        ("head", "Tables and figures", None),
        ("text", "Cells hold ours, and after a semicolon the paper's number where the data set is the same.", None),
    ]
    out += [("text", f"{name}: {text}", None) for name, text in found.captions.items()]
    out += [("text", f"{name}: no data here ({why})", None) for name, why in found.no_data.items()]
    threads = sorted({r["threads"] for r in found.costs})
    out.append(
        (
            "text",
            f"Seconds and memory: each system alone on the machine, {'/'.join(threads) or 'no'} threads, models warm, "
            "from images in memory to the warped image, and with reading two files and writing the result; other "
            "programs with their own affine, I/O is their whole process. Multiply-adds: networks at 128^3, the stem on "
            "its own grid. Paper: Xeon E5-2690 v4, GTX 1080 Ti.",
            None,
        )
    )
    for one in layout["table"]:
        out += [("head", one["title"], None), ("table", "", table(found, one))]
    out += [("head", "How the models were trained", None), ("table", "", recipes(found))]
    out.append(("head", "Figure 5: Dice and speed against the number of cascades", None))
    out.append(("picture", "Dice and speed", ("figure5.png", figure5(found, layout, layout["table"]))))
    out.append(("head", "Figure 6: warped images and labels (same label white, mismatch red)", None))
    for name, picture in figure6(found, layout).items():
        if isinstance(picture, str):
            out.append(("text", picture, None))
        else:
            out.append(("picture", name, (f"figure6-{name.replace(' ', '-')}.png", picture)))
    return out


def as_markdown(content: list[Part]) -> str:
    """Markdown with pictures as files beside it."""
    out = []
    for kind, text, what in content:
        if kind == "head":
            out.append(f"## {text}\n")
        elif kind == "text":
            out.append(f"{text}\n")
        elif kind == "picture":
            out.append(f"![{text}]({what[0]})\n")
        else:
            rows = [[c.replace("|", r"\|") for c in row] for row in what]
            lines = ["| " + " | ".join(row) + " |" for row in rows]
            out.append("\n".join([lines[0], "|" + "---|" * len(rows[0]), *lines[1:]]) + "\n")
    return "\n".join(out)


_STYLE = (
    "body{font:14px sans-serif;margin:2em;max-width:110em}table{border-collapse:collapse;margin:1em 0}"
    "td,th{border:1px solid #bbb;padding:3px 7px;text-align:left;vertical-align:top}th{background:#eee}"
    "img{max-width:100%}"
)


def as_html(content: list[Part]) -> str:
    """One file with everything in it."""
    out = [
        f"<!DOCTYPE html><html lang=en><meta charset=utf-8><title>Registration tables</title><style>{_STYLE}</style>"
    ]
    for kind, text, what in content:
        safe = html.escape(text)
        if kind == "head":
            out.append(f"<h2>{safe}</h2>")
        elif kind == "text":
            out.append(f"<p>{safe}</p>")
        elif kind == "picture":
            data = base64.b64encode(what[1]).decode()
            out.append(f'<p><img alt="{safe}" src="data:image/png;base64,{data}"></p>')
        else:
            for number, row in enumerate(what):
                tag = "td" if number else "th"
                cells = "".join(f"<{tag}>{html.escape(c)}</{tag}>" for c in row)
                out.append(("" if number else "<table>") + f"<tr>{cells}</tr>")
            out.append("</table>")
    return "\n".join([*out, "</html>\n"])


def write(content: list[Part], out: Path) -> list[Path]:
    """report.html, report.md and the pictures."""
    out.mkdir(parents=True, exist_ok=True)
    files: dict[str, bytes] = {what[0]: what[1] for kind, _, what in content if kind == "picture"}
    files |= {"report.md": as_markdown(content).encode(), "report.html": as_html(content).encode()}
    for name, data in files.items():
        part = out / f"{name}.part"
        part.write_bytes(data)
        part.replace(out / name)
    return [out / name for name in files]


def main(given: list[str] | None = None) -> int:
    """Command line; 0 done, 2 unusable input."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    evaluate.arguments(parser)
    a = parser.parse_args(given)
    try:
        files = write(parts(collect(evaluate.plans_of(a), a.out)), a.out)
    except RegistrationError as error:
        print(f"report: {error}", file=sys.stderr)
        return 2
    print(json.dumps([str(f) for f in files], indent=1))
    return 0


if __name__ == "__main__":
    sys.exit(main())
