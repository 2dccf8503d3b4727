"""A registration's report in words, for the panel and the clipboard, and a model's card."""

from __future__ import annotations

import html
from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

import numpy as np
from slicer.i18n import tr as _

Rows = list[tuple[str, str]]
# by what LDRCore says of a result: the heading and its colour, readable on light and dark panels
VERDICTS = {
    "trust": ("The result looks right.", "#15803d"),
    "look": ("Check the result.", "#b45309"),
    "failed": ("The registration failed: do not use the result.", "#dc2626"),
}


def sentence(text: str) -> str:
    """Return a message with a capital letter and a full stop."""
    text = text.strip()
    return text[:1].upper() + text[1:] + ("" if text.endswith((".", "!", "?")) else ".")


def counted(count: int, one: str, many: str) -> str:
    """Return a number with its noun: 1 voxel, 2 voxels."""
    return f"{count} {one if count == 1 else many}"


def rows(report: dict[str, Any], titles: Mapping[str, str] = MappingProxyType({})) -> Rows:
    """Return the rows (name, value) of a report, none for an empty one.

    Args:
        report: of LDRCore.
        titles: of models in plain words, by name.
    """
    if not report:
        return []
    similarity = report["similarity"]
    after = _("{after:.3f} (affine alone {affine:.3f})") if _deforms(report) else "{after:.3f}"
    shown = [
        (_("Similarity before"), _("{before:.3f} (correlation)").format(**similarity)),
        (_("Similarity after"), after.format(**similarity)),
        *(_deformation(report) if _deforms(report) else _linear_map(report)),
        (_("Device"), _device(report)),
        _networks(report, titles) if _deforms(report) and "model_chosen" in report else (_("Model"), _model(report)),
    ]
    if report.get("refinement"):
        shown.append((_("Refinement"), _refinement(report)))
    if "similarity_chosen" in report:
        shown.append((_("Compared by"), _("{name}: {why}").format(**report["similarity_chosen"])))
    if "inverse_consistency_mm" in report:
        text = _("off by {mean:.3f} mm on average, {p99_9:.2f} mm at 99.9 % of the points, {max:.2f} mm at most")
        shown.append((_("Inverse"), text.format(**report["inverse_consistency_mm"])))
    elif "inverse_residual_mm" in report:  # of an earlier version, from a saved scene
        shown.append((_("Inverse"), _("exact to {mm:.3f} mm").format(mm=report["inverse_residual_mm"])))
    return shown + [(_("Warning"), text) for text in warnings(report)]


def _deforms(report: dict[str, Any]) -> bool:
    """Whether the transform may deform; reports of an earlier version do not say."""
    return report.get("kind", "deformable") == "deformable"


def _deformation(report: dict[str, Any]) -> Rows:
    """Describe how regular a deformation is."""
    count = report["folding_count"]
    folding = _("{voxels} ({percent:.3f} %)").format(
        voxels=counted(count, _("voxel"), _("voxels")), percent=100 * report["folding_fraction"]
    )
    change = _("{min:.2f} to {max:.2f} (Jacobian)").format(**report["jacobian_determinant"])
    return [(_("Folding"), folding if count else _("none")), (_("Volume change"), change)]


def _linear_map(report: dict[str, Any]) -> Rows:
    """Describe a rigid or affine transform: how far it turns and stretches, and how far the anatomy agrees under it."""
    left, stretch, right = np.linalg.svd(np.array(report["affine_matrix_lps"])[:3, :3])
    degrees = np.rad2deg(np.arccos(np.clip((np.trace(left @ right) - 1) / 2, -1, 1)))  # of the nearest rotation
    if report["kind"] == "rigid":
        text = _("rigid, 6 parameters: turned by {degrees:.1f}°, no volume change")
    else:
        text = _("affine: turned by {degrees:.1f}°, stretched by {low:.2f} to {high:.2f}, volume times {volume:.2f}")
    volume = report["jacobian_determinant"]["max"]
    text = text.format(degrees=degrees, low=stretch.min(), high=stretch.max(), volume=volume)
    shown = [(_("Transform"), text)]
    agreement = report.get("alignment", {}).get("local_agreement")
    if agreement is not None:
        text = _("local similarity {value:.2f} of 1; what deforms can only be matched by a deformable alignment")
        shown.append((_("Left over"), text.format(value=agreement)))
    return shown


def warnings(report: dict[str, Any]) -> list[str]:
    """Return what a careful reader would want to be told about a result, a sentence each."""
    if not report:
        return []
    found = [sentence(text) for text in report["warnings"]]
    similarity = report["similarity"]
    if similarity["after"] < similarity["affine"]:
        text = _("The deformable result is less similar ({after:.3f}) than affine alone ({affine:.3f}).")
        found.insert(0, text.format(**similarity))
    return found


def verdict_as_html(report: dict[str, Any]) -> str:
    """Say in colour whether to trust a result, and every reason and warning, a line each; empty without any."""
    verdict, warned = report.get("verdict", {}), warnings(report)
    texts = list(dict.fromkeys([*map(sentence, verdict.get("reasons", [])), *warned]))
    judged = verdict.get("verdict", "trust")
    if judged == "trust" and warned:
        judged = "look"
    if judged not in VERDICTS or not (verdict or texts):
        return ""
    heading, colour = VERDICTS[judged]
    lines = [f"<b>{html.escape(_(heading))}</b>", *map(html.escape, texts)]
    return f'<span style="color:{colour}">{"<br>".join(lines)}</span>'


def _device(report: dict[str, Any]) -> str:
    if report["device"] == "cpu":
        return _("CPU, {threads}").format(threads=counted(report["threads"], _("thread"), _("threads")))
    return _("GPU ({name})").format(name=report["device"])


def _model(report: dict[str, Any]) -> str:
    parts = [report["model"]]
    if _deforms(report):
        parts.append(counted(report["cascades"], _("cascade"), _("cascades")))
    if report["refine_steps"] and "refinement" not in report:  # of an earlier version, from a saved scene
        parts.append(counted(report["refine_steps"], _("refinement step"), _("refinement steps")))
    return ", ".join(parts)


def _networks(report: dict[str, Any], titles: Mapping[str, str]) -> tuple[str, str]:
    """Say which networks ran, and why."""
    chosen = report["model_chosen"]
    if not report["cascades"]:
        return _("Networks"), _("none: {why}").format(why=report.get("networks_left_out", chosen["why"]))
    name, count = chosen["name"], counted(report["cascades"], _("cascade"), _("cascades"))
    shown = _("{title} ({name})").format(title=titles[name], name=name) if name in titles else name
    return _("Networks"), _("{model}, {cascades}: {why}").format(model=shown, cascades=count, why=chosen["why"])


def _refinement(report: dict[str, Any]) -> str:
    """Say which refinement, its iterations at each level, the local correlation and the seconds."""
    levels = report["refinement"]
    iterations = [
        _("{count} at {mm:.1f} mm").format(
            count=counted(level["iterations"], _("iteration"), _("iterations")), mm=min(level["spacing_mm"])
        )
        for level in levels
    ]
    name = {"fast": _("Accurate"), "best": _("Best")}.get(report["refine"], _("Fast"))
    if report["refine_steps"]:
        name = _("{steps} steps").format(steps=report["refine_steps"])
    return _(
        "{name}: {iterations}; local similarity {before:.3f} to {after:.3f} at the finest; {seconds:.2f} s"
    ).format(
        name=name,
        iterations=", ".join(iterations),
        before=levels[-1]["similarity"][0],
        after=levels[-1]["similarity"][1],
        seconds=report["times_s"]["refine"],
    )


def as_html(shown: Rows) -> str:
    """Format rows as an HTML table."""
    lines = []
    for name, value in shown:
        if name == _("Warning"):  # stands beside Apply
            continue
        lines.append(
            f'<tr><td style="padding:1px 10px 1px 0"><b>{html.escape(name)}</b></td>'
            f'<td style="padding:1px 0">{html.escape(value)}</td></tr>'
        )
    return f"<table>{''.join(lines)}</table>" if lines else ""


def as_text(shown: Rows) -> str:
    """Format rows as plain text: a line for each row, a tab between name and value."""
    return "\n".join(f"{name}\t{value}" for name, value in shown)


def card_text(card: dict[str, Any]) -> str:
    """Summarise a model card: purpose, training data, licence."""
    parts = [
        card.get("summary", card["name"]),
        _("Trained on {data}").format(data=card["data"]["name"]) if card.get("data") else "",
        _("Licence: {licence}").format(licence=card["licence"].split(";")[0]) if card.get("licence") else "",
        _("Research software, not a medical device"),
    ]
    return " ".join(sentence(part) for part in parts if part)
