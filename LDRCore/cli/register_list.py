"""`ldr register --pairs` and `--fixed --moving`: many pairs in one run."""

from __future__ import annotations

import argparse
from dataclasses import replace
from pathlib import Path
from typing import Any

from LDRCore.cli.output import LIST_LINE_S, CommandOutput, progress_bar
from LDRCore.errors import RegistrationError

_ONLY_LISTS = ("outputs", "workers", "threads", "scheduler", "statistics")
_SHOWN = 20  # failed pairs that are printed; all are in the table


def is_list(options: argparse.Namespace) -> bool:
    """Return whether a list of pairs was asked for."""
    return options.pairs is not None or options.atlas is not None or options.pattern is not None


def check_pair(options: argparse.Namespace) -> None:
    """Refuse arguments that do not name one pair.

    Raises:
        RegistrationError: an image is missing, or an option that only lists know.
    """
    if options.fixed is None or options.moving is None:
        raise RegistrationError("register takes a fixed and a moving image, --pairs CSV, or --fixed and --moving")
    given = next((name for name in _ONLY_LISTS if getattr(options, name) not in (None, False)), None)
    if given is not None:
        raise RegistrationError(f"--{given} is for a list of pairs (--pairs, or --fixed and --moving), got one pair")


def run(options: argparse.Namespace, model_keywords: dict[str, Any]) -> CommandOutput:
    """Register the pairs of a list, going on where an earlier run ended.

    Args:
        options: of the command.
        model_keywords: of `LDRCore.register`, that the options of a model stand for.
    """
    from LDRCore.cohort.pairs import pairs_of_pattern, read_cohort
    from LDRCore.cohort.runner import register_many
    from LDRCore.cohort.settings import DEFAULT_OUTPUTS

    _check(options)
    pairs = read_cohort(options.pairs) if options.pairs else pairs_of_pattern(options.atlas, options.pattern)
    if options.fixed_mask:
        mask = str(Path(options.fixed_mask).absolute())
        pairs = [replace(pair, fixed_mask=mask) for pair in pairs]
    outputs = list(DEFAULT_OUTPUTS) if options.outputs is None else [n.strip() for n in options.outputs.split(",")]
    summary = register_many(
        pairs,
        options.out,
        outputs=[*outputs, *(["inverse"] if options.inverse else [])],
        workers=options.workers,
        threads=options.threads,
        scheduler=options.scheduler,
        frame=options.frame,
        statistics=options.statistics,
        overwrite=options.overwrite,
        progress=progress_bar(options, LIST_LINE_S),
        affine=not options.no_affine,
        initial=(options.initial or ["center"])[0],
        **model_keywords,
    )
    page = Path(options.out, "index.html").absolute().as_uri()
    return CommandOutput(summary, _describe(summary), (lambda: _open(page)) if options.open else None)


def _open(page: str) -> None:
    import webbrowser

    webbrowser.open(page)


def _check(options: argparse.Namespace) -> None:
    """Refuse arguments that contradict each other."""
    if options.pairs is not None and (options.atlas is not None or options.pattern is not None):
        raise RegistrationError("a list comes from --pairs or from --fixed and --moving, got both")
    if options.pairs is None and (options.atlas is None or options.pattern is None):
        raise RegistrationError("--fixed and --moving belong together, got one of them")
    if options.fixed is not None:
        raise RegistrationError("a list of pairs takes no further image, got one: write the pattern in quotes")
    if len(options.initial or ()) > 1 or options.write:
        raise RegistrationError("--write and several --initial are for one pair, got a list of pairs")
    if options.moving_mask is not None or (options.fixed_mask is not None and options.pairs is not None):
        raise RegistrationError("masks of a list belong into its columns fixed_mask and moving_mask, got an option")


def _describe(summary: dict[str, Any]) -> str:
    rows = summary["pairs"]
    verdicts = {name: sum(row.get("verdict") == name for row in rows) for name in ("trust", "look", "failed")}
    told = ", ".join(f"{number} {name}" for name, number in verdicts.items() if number)
    earlier = f" ({summary['reused']} of them by an earlier run)" if summary["reused"] else ""
    speed = f", {summary['pairs_per_minute']:.3g} pairs a minute" if summary["pairs_per_minute"] else ""
    lines = [
        f"pairs        {summary['done']} of {len(rows)} done{earlier}, {summary['failed']} failed",
        *([f"verdicts     {told}"] if told else []),
        f"time         {summary['seconds']:.1f} s with {summary['plan']['workers']} worker(s){speed}",
        *[f"problem      {text}" for text in summary["problems"][:_SHOWN]],
        "written      " + ", ".join(summary["files"]),
    ]
    if len(summary["problems"]) > _SHOWN:
        lines.insert(-1, f"problem      {len(summary['problems']) - _SHOWN} more, see the table")
    return "\n".join(lines)
