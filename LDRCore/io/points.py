"""Reads landmark files of users."""

from __future__ import annotations

import csv
from pathlib import Path

import numpy as np

from LDRCore.errors import RegistrationError


def read_points(path: Path) -> np.ndarray:
    """Read points from a CSV file with three columns x,y,z: (N, 3).

    A header line and lines that start with # are passed over.

    Raises:
        RegistrationError: missing file, no point, or a line without three numbers.
    """
    if not path.is_file():
        raise RegistrationError(f"points must be an existing CSV file, got {path} (not found)")
    rows: list[list[float]] = []
    with path.open(newline="", encoding="utf-8", errors="replace") as stream:
        for number, row in enumerate(csv.reader(stream), start=1):
            if not row or row[0].lstrip().startswith("#"):
                continue
            try:
                x, y, z = (float(v) for v in row[:3])  # ValueError also when there are fewer than three
                rows.append([x, y, z])
            except ValueError:
                if number == 1:  # a header
                    continue
                raise RegistrationError(
                    f"points must have three numbers a line (x,y,z in mm), got {','.join(row)!r} in line {number}"
                ) from None
    if not rows:
        raise RegistrationError(f"points must have at least one line x,y,z, got none in {path}")
    return np.array(rows)
