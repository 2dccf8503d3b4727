"""What a command prints: its result as text or JSON, and a progress bar."""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable
from typing import Any, NamedTuple

LINE_S = 5.0  # between two lines of progress
LIST_LINE_S = 60.0  # the same for work of hours


class CommandOutput(NamedTuple):
    """What a command has to say.

    Attributes:
        data: what --json prints. Sentences under "problems" make the exit code 1.
        text: what is printed otherwise.
        after: what is done once that is printed, until Ctrl-C; or None.
    """

    data: dict[str, Any]
    text: str
    after: Callable[[], None] | None = None


def describe_folding(count: int, fraction: float) -> str:
    """Say how many voxels fold, and what share that is: a few of millions are a share that rounds to nothing."""
    return f"{count} folding voxel{'s' * (count != 1)}" + (f" ({100 * fraction:.3g} %)" if count else "")


def progress_lines(clock: Callable[[], float], line_s: float = LINE_S) -> Callable[[float, str], None]:
    """Make what prints a line on stderr every few seconds: the fraction done and the time left.

    Args:
        clock: returns seconds.
        line_s: between two lines.
    """
    began_s = printed_s = clock()

    def show(fraction: float, message: str) -> None:
        nonlocal printed_s
        now_s = clock()
        if now_s - printed_s < line_s:
            return
        printed_s = now_s
        left = f", about {_duration((now_s - began_s) * (1 - fraction) / fraction)} left" if fraction > 0 else ""
        print(f"{100 * fraction:3.0f} % {message}{left}", file=sys.stderr, flush=True)

    return show


def _duration(seconds: float) -> str:
    """Return a time for a person: seconds up to five minutes, else hours and minutes."""
    if seconds < 300:
        return f"{seconds:.0f} s"
    return f"{int(seconds // 3600)} h {int(seconds % 3600 // 60)} min"


def progress_bar(options: argparse.Namespace, line_s: float = LINE_S) -> Callable[[float, str], None] | None:
    """Make a progress bar on stderr, or a line every `line_s` seconds where stderr is no terminal; None with --json.

    Returns:
        A function to call with the fraction done, 0 to 1, and what is being done.
    """
    if options.json:
        return None
    if not sys.stderr.isatty():
        return progress_lines(time.monotonic, line_s)
    from tqdm import tqdm

    bar = tqdm(total=100, bar_format="{l_bar}{bar}| {elapsed}, {remaining} left", leave=False)

    def show(fraction: float, message: str) -> None:
        bar.set_description_str(f"{message:<28}")
        bar.update(round(100 * fraction) - bar.n)
        if fraction >= 1:
            bar.close()

    return show
