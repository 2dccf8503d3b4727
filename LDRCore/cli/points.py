"""`ldr points`: map landmarks through a transform."""

from __future__ import annotations

import argparse

import numpy as np

from LDRCore import geometry
from LDRCore.cli import chain
from LDRCore.cli.files import check_output_file
from LDRCore.cli.output import CommandOutput
from LDRCore.errors import RegistrationError
from LDRCore.io import side_record
from LDRCore.io.points import read_point_table, write_points
from LDRCore.io.writing import write_file


def run(options: argparse.Namespace) -> CommandOutput:
    """Map landmarks; other columns are kept."""
    check_output_file(options.out, options.overwrite, [options.points, *chain.paths(options.transform)])
    if options.out.suffix.lower() in (".json", ".fcsv"):
        raise RegistrationError(f"points are written as .csv, got {options.out.name}")
    table = read_point_table(options.points)
    frame = table.frame or ("ras" if options.ras else "lps")
    if options.ras and frame != "ras":
        raise RegistrationError(f"--ras is for files in RAS, got {options.points}, which says {frame.upper()}")
    lps_from_points = geometry.RAS_TO_LPS[:3, :3] if frame == "ras" else np.eye(3)  # its own inverse
    points_lps = table.points @ lps_from_points
    mapped_lps = chain.map_points(points_lps, options.transform, options.reference, options.moving)
    mapped = table.moved(mapped_lps @ lps_from_points)
    backwards = side_record.warning_for_points(options.transform, points_lps)
    warnings = [backwards] if backwards else []
    write_file(options.out, lambda path: write_points(path, mapped))
    return CommandOutput(
        {"file": str(options.out), "points": len(mapped.rows), "frame": frame.upper(), "warnings": warnings},
        "\n".join(
            [
                *(f"warning: {text}" for text in warnings),
                f"written {options.out} ({len(mapped.rows)} points, {frame.upper()} mm)",
            ]
        ),
    )
