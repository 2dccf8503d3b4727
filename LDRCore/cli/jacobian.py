"""`ldr jacobian`."""

from __future__ import annotations

import argparse

import SimpleITK as sitk

from LDRCore import geometry
from LDRCore.cli.files import Outcome, check_output_file, write_file
from LDRCore.io import images
from LDRCore.io.transforms import read_transform


def run(options: argparse.Namespace) -> Outcome:
    """Map and summarise the Jacobian determinant."""
    if options.out is not None:
        check_output_file(options.out, options.overwrite)
    transform = read_transform(options.transform)
    reference = images.three_dimensional(images.read(options.reference, "reference"), "reference")
    determinant = geometry.jacobian_determinant_image(geometry.displacement_field_image(transform, reference))
    values = sitk.GetArrayViewFromImage(determinant)
    folding = float((values <= 0).mean())
    result = {
        "min": float(values.min()),
        "mean": float(values.mean()),
        "max": float(values.max()),
        "folding_count": int((values <= 0).sum()),
        "folding_fraction": folding,
        "file": str(options.out) if options.out else None,
    }
    if options.out is not None:
        write_file(options.out, lambda name: sitk.WriteImage(determinant, name, useCompression=True))
    text = (
        f"Jacobian determinant {result['min']:.3f} to {result['max']:.3f}, mean {result['mean']:.3f}; "
        f"{result['folding_count']} folding voxels ({100 * folding:.4f} %)"
    )
    return result, text + (f"; written {options.out}" if options.out else "")
