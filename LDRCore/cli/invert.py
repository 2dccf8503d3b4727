"""`ldr invert`."""

from __future__ import annotations

import argparse

import SimpleITK as sitk

from LDRCore.cli.files import Outcome, check_output_file, check_transform_name, write_file
from LDRCore.io import images
from LDRCore.io.transforms import read_transform
from LDRCore.transforms import inversion


def run(options: argparse.Namespace) -> Outcome:
    """Invert a transform."""
    check_output_file(options.out, options.overwrite)
    check_transform_name(options.out)
    transform = read_transform(options.transform)
    reference = images.three_dimensional(images.read(options.reference, "reference"), "reference")
    inverse, residual_mm = inversion.invert_transform(transform, reference)
    write_file(options.out, lambda name: sitk.WriteTransform(inverse, name))
    result = {"file": str(options.out), "residual_mm": residual_mm}
    return result, f"written {options.out} (largest residual {residual_mm:.4f} mm)"
