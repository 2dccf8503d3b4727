"""`ldr points`: map landmarks through a transform."""

from __future__ import annotations

import argparse
import csv

import numpy as np

from LDRCore import geometry
from LDRCore.cli.files import check_output_file, write_file
from LDRCore.cli.output import CommandOutput
from LDRCore.io.points import read_points
from LDRCore.io.transforms import read_transform


def run(options: argparse.Namespace) -> CommandOutput:
    """Map landmarks."""
    check_output_file(options.out, options.overwrite)
    lps_from_points = geometry.RAS_TO_LPS[:3, :3] if options.ras else np.eye(3)  # its own inverse
    points_lps = read_points(options.points) @ lps_from_points
    mapped = geometry.transform_points(points_lps, read_transform(options.transform)) @ lps_from_points
    write_file(options.out, lambda name: write_points(name, mapped))
    frame = "RAS" if options.ras else "LPS"
    return CommandOutput(
        {"file": str(options.out), "points": len(mapped), "frame": frame},
        f"written {options.out} ({len(mapped)} points, {frame} mm)",
    )


def write_points(name: str, points_mm: np.ndarray) -> None:
    """Write points (N, 3), mm, as a CSV with the header x,y,z."""
    with open(name, "w", newline="", encoding="utf-8") as stream:
        writer = csv.writer(stream)
        writer.writerow(["x", "y", "z"])
        writer.writerows([[f"{value:.6f}" for value in point] for point in points_mm])
