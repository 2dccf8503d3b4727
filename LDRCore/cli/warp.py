"""`ldr warp`."""

from __future__ import annotations

import argparse

import SimpleITK as sitk

from LDRCore import registration
from LDRCore.cli.files import Outcome, check_output_file, write_file
from LDRCore.io.transforms import read_transform


def run(options: argparse.Namespace) -> Outcome:
    """Warp one image."""
    check_output_file(options.out, options.overwrite)
    transform = read_transform(options.transform)
    kind = "nearest" if options.nearest else "linear"
    warped = registration.warp_image(options.image, transform, options.reference, kind)
    write_file(options.out, lambda name: sitk.WriteImage(warped, name, useCompression=True))
    return {"file": str(options.out), "interpolation": kind}, f"written {options.out} ({kind})"
