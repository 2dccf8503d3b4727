"""`ldr warp`: resample another image of the moving patient on the fixed grid."""

from __future__ import annotations

import argparse

from LDRCore import geometry, registration
from LDRCore.cli import chain
from LDRCore.cli.files import check_image_name, check_output_file
from LDRCore.cli.output import CommandOutput
from LDRCore.io import images, side_record
from LDRCore.io.writing import write_file, write_image


def run(options: argparse.Namespace) -> CommandOutput:
    """Warp one image."""
    files = chain.paths(options.transform)
    check_output_file(options.out, options.overwrite, [options.image, options.reference, *files])
    check_image_name(options.out)
    transform = chain.read_chain(options.transform, options.reference, options.image)
    image = images.read(options.image, "image")
    volumes = geometry.volumes_of(image)
    is_labels = len(volumes) == 1 and images.looks_like_labels(images.three_dimensional(volumes[0], "image"))
    interpolation = options.nearest or options.interpolation
    if interpolation == "auto":
        interpolation = "nearest" if is_labels else "linear"
    warnings = []
    if is_labels and interpolation in ("linear", "cubic"):
        warnings = [
            f"the image looks like labels, whose values {interpolation} interpolation mixes: --nearest keeps them"
        ]
    reference = images.read(options.reference, "reference")
    backwards = side_record.warning_for_reference(options.transform, reference)
    warnings += [backwards] if backwards else []
    warped = registration.warp_image(image, transform, reference, interpolation)
    write_file(options.out, lambda path: write_image(warped, path))
    return CommandOutput(
        {"file": str(options.out), "interpolation": interpolation, "warnings": warnings},
        "\n".join([*(f"warning: {text}" for text in warnings), f"written {options.out} ({interpolation})"]),
    )
