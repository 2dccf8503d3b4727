"""What a command prints: its result as text or JSON, and a progress bar."""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable
from typing import Any, NamedTuple

LINE_S = 5.0  # between two lines of progress


class CommandOutput(NamedTuple):
    """What a command has to say.

    Attributes:
        data: what --json prints. Sentences under "problems" make the exit code 1.
        text: what is printed otherwise.
    """

    data: dict[str, Any]
    text: str


def progress_lines(clock: Callable[[], float]) -> Callable[[float, str], None]:
    """Make what prints a line on stderr every `LINE_S` seconds: the fraction done and the seconds left.

    Args:
        clock: returns seconds.
    """
    began_s = printed_s = clock()

    def show(fraction: float, message: str) -> None:
        nonlocal printed_s
        now_s = clock()
        if now_s - printed_s < LINE_S:
            return
        printed_s = now_s
        left = f", about {(now_s - began_s) * (1 - fraction) / fraction:.0f} s left" if fraction > 0 else ""
        print(f"{100 * fraction:3.0f} % {message}{left}", file=sys.stderr, flush=True)

    return show


def progress_bar(options: argparse.Namespace) -> Callable[[float, str], None] | None:
    """Make a progress bar on stderr, or a line every `LINE_S` seconds where stderr is no terminal; None with --json.

    Returns:
        A function to call with the fraction done, 0 to 1, and what is being done.
    """
    if options.json:
        return None
    if not sys.stderr.isatty():
        return progress_lines(time.monotonic)
    from tqdm import tqdm

    bar = tqdm(total=100, bar_format="{l_bar}{bar}| {elapsed}, {remaining} left", leave=False)

    def show(fraction: float, message: str) -> None:
        bar.set_description_str(f"{message:<28}")
        bar.update(round(100 * fraction) - bar.n)
        if fraction >= 1:
            bar.close()

    return show
