"""`ldr points`."""

from __future__ import annotations

import argparse
import csv

import numpy as np

from LDRCore import geometry
from LDRCore.cli.files import Outcome, check_output_file, write_file
from LDRCore.io.points import read_points
from LDRCore.io.transforms import read_transform


def run(options: argparse.Namespace) -> Outcome:
    """Map landmarks."""
    check_output_file(options.out, options.overwrite)
    points = read_points(options.points)
    lps_from_file = geometry.RAS_TO_LPS[:3, :3] if options.ras else np.eye(3)  # its own inverse
    mapped = geometry.transform_points(points @ lps_from_file, read_transform(options.transform)) @ lps_from_file

    def write(name: str) -> None:
        with open(name, "w", newline="", encoding="utf-8") as stream:
            writer = csv.writer(stream)
            writer.writerow(["x", "y", "z"])
            writer.writerows([[f"{v:.6f}" for v in row] for row in mapped])

    write_file(options.out, write)
    frame = "RAS" if options.ras else "LPS"
    result = {"file": str(options.out), "points": len(mapped), "frame": frame}
    return result, f"written {options.out} ({len(mapped)} points, {frame} mm)"
