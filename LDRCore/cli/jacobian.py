"""`ldr jacobian`: map and summarise the Jacobian determinant of a transform."""

from __future__ import annotations

import argparse

import SimpleITK as sitk

from LDRCore import geometry
from LDRCore.cli import chain
from LDRCore.cli.files import check_image_name, check_output_file
from LDRCore.cli.output import CommandOutput, describe_folding
from LDRCore.evaluation import metrics
from LDRCore.io import images
from LDRCore.io.writing import write_file, write_image


def run(options: argparse.Namespace) -> CommandOutput:
    """Map and summarise the Jacobian determinant."""
    if options.out is not None:
        check_output_file(options.out, options.overwrite, [*chain.paths(options.transform), options.reference])
        check_image_name(options.out)
    transform = chain.read_chain(options.transform, options.reference, options.moving)
    reference = images.three_dimensional(images.read(options.reference, "reference"), "reference")
    determinant = geometry.jacobian_determinant_image(geometry.displacement_field_image(transform, reference))
    values = sitk.GetArrayViewFromImage(determinant)
    count, fraction = metrics.folding(values)
    data = {
        "min": float(values.min()),
        "mean": float(values.mean()),
        "max": float(values.max()),
        "folding_count": count,
        "folding_fraction": fraction,
        "file": str(options.out) if options.out else None,
    }
    text = (
        f"Jacobian determinant {data['min']:.3f} to {data['max']:.3f}, mean {data['mean']:.3f}; "
        f"{describe_folding(count, fraction)}"
    )
    if options.out is not None:
        write_file(options.out, lambda path: write_image(determinant, path))
        text += f"; written {options.out}"
    return CommandOutput(data, text)
