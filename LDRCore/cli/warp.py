"""`ldr warp`: resample another image of the moving patient on the fixed grid."""

from __future__ import annotations

import argparse

import SimpleITK as sitk

from LDRCore import registration
from LDRCore.cli.files import check_output_file, write_file
from LDRCore.cli.output import CommandOutput
from LDRCore.io.transforms import read_transform


def run(options: argparse.Namespace) -> CommandOutput:
    """Warp one image."""
    check_output_file(options.out, options.overwrite)
    transform = read_transform(options.transform)
    interpolation = "nearest" if options.nearest else "linear"
    warped = registration.warp_image(options.image, transform, options.reference, interpolation)
    write_file(options.out, lambda name: sitk.WriteImage(warped, name, useCompression=True))
    return CommandOutput(
        {"file": str(options.out), "interpolation": interpolation}, f"written {options.out} ({interpolation})"
    )
