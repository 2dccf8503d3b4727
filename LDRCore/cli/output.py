"""What a command prints: its result as text or JSON, and a progress bar."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from typing import Any, NamedTuple


class CommandOutput(NamedTuple):
    """What a command has to say.

    Attributes:
        data: what --json prints. Sentences under "problems" make the exit code 1.
        text: what is printed otherwise.
    """

    data: dict[str, Any]
    text: str


def progress_bar(options: argparse.Namespace) -> Callable[[float, str], None] | None:
    """Make a progress bar on stderr; None where nobody watches (--json, or stderr is no terminal).

    Returns:
        A function to call with the fraction done, 0 to 1, and what is being done.
    """
    if options.json or not sys.stderr.isatty():
        return None
    from tqdm import tqdm

    bar = tqdm(total=100, bar_format="{l_bar}{bar}| {elapsed}", leave=False)

    def show(fraction: float, message: str) -> None:
        bar.set_description_str(f"{message:<28}")
        bar.update(round(100 * fraction) - bar.n)
        if fraction >= 1:
            bar.close()

    return show
