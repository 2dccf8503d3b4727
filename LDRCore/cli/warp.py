"""`ldr warp`: resample another image of the moving patient on the fixed grid."""

from __future__ import annotations

import argparse

from LDRCore import registration
from LDRCore.cli.files import check_output_file
from LDRCore.cli.output import CommandOutput
from LDRCore.io import images
from LDRCore.io.transforms import read_transform
from LDRCore.io.writing import write_file, write_image


def run(options: argparse.Namespace) -> CommandOutput:
    """Warp one image."""
    check_output_file(options.out, options.overwrite, [options.image, options.reference, *options.transform])
    transform = read_transform(options.transform)
    image = images.three_dimensional(images.read(options.image, "image"), "image")
    is_labels = images.looks_like_labels(image)
    interpolation = "nearest" if options.nearest else options.interpolation
    if interpolation == "auto":
        interpolation = "nearest" if is_labels else "linear"
    warnings = []
    if is_labels and interpolation == "linear":
        warnings = ["the image looks like labels, whose values linear interpolation mixes: --nearest keeps them"]
    warped = registration.warp_image(image, transform, options.reference, interpolation)
    write_file(options.out, lambda path: write_image(warped, path))
    return CommandOutput(
        {"file": str(options.out), "interpolation": interpolation, "warnings": warnings},
        "\n".join([*(f"warning: {text}" for text in warnings), f"written {options.out} ({interpolation})"]),
    )
