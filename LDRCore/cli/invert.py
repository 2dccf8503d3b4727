"""`ldr invert`: write the inverse of a transform."""

from __future__ import annotations

import argparse
import dataclasses

from LDRCore.cli import chain
from LDRCore.cli.files import check_output_file, check_transform_name
from LDRCore.cli.output import CommandOutput
from LDRCore.io import images
from LDRCore.io.writing import write_file, write_transform
from LDRCore.transforms import inversion


def run(options: argparse.Namespace) -> CommandOutput:
    """Invert a transform and measure it."""
    check_output_file(options.out, options.overwrite, [*chain.paths(options.transform), options.reference])
    check_transform_name(options.out)
    transform = chain.read_chain(options.transform, options.reference, options.moving)
    reference = images.three_dimensional(images.read(options.reference, "reference"), "reference")
    inverse, consistency = inversion.invert_transform(transform, reference)
    write_file(options.out, lambda path: write_transform(inverse, path))
    return CommandOutput(
        {"file": str(options.out), "inverse_consistency_mm": dataclasses.asdict(consistency)},
        f"written {options.out} (distance of T^-1(T(x)) from x: {consistency})",
    )
