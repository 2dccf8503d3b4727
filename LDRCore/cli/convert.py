"""`ldr convert`: write transforms of one program, or a chain of them, as the file of another."""

from __future__ import annotations

import argparse

from LDRCore.cli import chain
from LDRCore.cli.files import check_output_file
from LDRCore.cli.output import CommandOutput
from LDRCore.io import transforms
from LDRCore.io.writing import write_file


def run(options: argparse.Namespace) -> CommandOutput:
    """Convert transforms."""
    chosen = transforms.check_target(options.out, options.to)
    files = chain.paths(options.transforms, options.from_format)
    check_output_file(options.out, options.overwrite, [*files, options.reference, options.moving])
    context = transforms.Context(options.reference, options.moving)
    transform = chain.read_chain(options.transforms, options.reference, options.moving, format_name=options.from_format)
    write_file(options.out, transforms.writer(chosen, transform, context))
    return CommandOutput(
        {"file": str(options.out), "format": chosen.name, "linear": transform.IsLinear()},
        f"written {options.out} ({'linear, ' if transform.IsLinear() else ''}{chosen.title})",
    )
