"""Output files and progress of the commands."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from LDRCore.errors import RegistrationError
from LDRCore.result import check_output_folder

Outcome = tuple[dict[str, Any], str]
"""(what --json prints, text)."""


def progress_bar(options: argparse.Namespace) -> Callable[[float, str], None] | None:
    """A progress bar on stderr, where someone is looking."""
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


def check_output_file(path: Path, overwrite: bool) -> None:
    """Refuse an output file before any work is done for it."""
    if path.is_dir():
        raise RegistrationError(f"the output must be a file, got the folder {path}")
    if path.exists() and not overwrite:
        raise RegistrationError(f"the output must not exist yet (or --overwrite must be given), got {path}")
    check_output_folder(path.resolve().parent, overwrite=True)


def write_file(path: Path, writer: Callable[[str], None]) -> None:
    """Write a file under a temporary name of the same kind, then rename it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f".part-{path.name}")
    try:
        writer(str(part))
        part.replace(path)
    except RuntimeError as error:
        reason = str(error).strip().splitlines()[-1]
        raise RegistrationError(
            f"the output must have a file type that SimpleITK writes, got {path} ({reason})"
        ) from None
    except OSError as error:
        raise RegistrationError(f"the output must be writable, got {path} ({error})") from None
    finally:
        part.unlink(missing_ok=True)


def check_transform_name(path: Path) -> None:
    """Refuse a file name that SimpleITK writes no transform to."""
    if path.suffix.lower() not in (".h5", ".hdf5", ".tfm", ".txt"):
        raise RegistrationError(f"a transform is written as .h5 or .tfm, got {path.name}")
