"""`ldr invert`: write the inverse of a transform."""

from __future__ import annotations

import argparse

import SimpleITK as sitk

from LDRCore.cli.files import check_output_file, check_transform_name, write_file
from LDRCore.cli.output import CommandOutput
from LDRCore.io import images
from LDRCore.io.transforms import read_transform
from LDRCore.transforms import inversion


def run(options: argparse.Namespace) -> CommandOutput:
    """Invert a transform and say what residual is left."""
    check_output_file(options.out, options.overwrite)
    check_transform_name(options.out)
    transform = read_transform(options.transform)
    reference = images.three_dimensional(images.read(options.reference, "reference"), "reference")
    inverse, residual_mm = inversion.invert_transform(transform, reference)
    write_file(options.out, lambda name: sitk.WriteTransform(inverse, name))
    return CommandOutput(
        {"file": str(options.out), "residual_mm": residual_mm},
        f"written {options.out} (largest residual {residual_mm:.4f} mm)",
    )
