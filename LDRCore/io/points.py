"""Reads and writes landmark files of users: CSV, Slicer's .fcsv and .mrk.json."""

from __future__ import annotations

import csv
import dataclasses
import io
import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from LDRCore.errors import RegistrationError
from LDRCore.geometry import RAS_TO_LPS
from LDRCore.io.files import read_text

_AXES = {("x", "y", "z"): "", ("i", "j", "k"): "", ("l", "p", "s"): "lps", ("r", "a", "s"): "ras"}  # names -> frame
_FRAMES = {"lps": "lps", "1": "lps", "ras": "ras", "0": "ras"}  # as Slicer names them
_FCSV_COLUMNS = "id,x,y,z,ow,ox,oy,oz,vis,sel,lock,label,desc,associatedNodeID"


@dataclass(frozen=True, eq=False)
class PointTable:
    """Landmarks with everything else that their file says of them.

    Attributes:
        points: (N, 3), along x, y, z.
        frame: "lps" or "ras" where the file says so, otherwise "".
        columns: names of all columns.
        axes: which of them are x, y and z.
        rows: the cells of every line.
    """

    points: np.ndarray
    frame: str
    columns: list[str]
    axes: list[int]
    rows: list[list[str]]

    def moved(self, points: np.ndarray) -> PointTable:
        """Return the table with other coordinates, (N, 3) in the same frame."""
        rows = [list(row) for row in self.rows]
        for row, point in zip(rows, points.tolist(), strict=True):
            for axis, value in zip(self.axes, point, strict=True):
                row[axis] = f"{value:.6f}"
        return dataclasses.replace(self, points=points, rows=rows)


def read_points(path: Path, frame: str = "lps") -> np.ndarray:
    """Read points as (N, 3) in a frame.

    Args:
        path: see `read_point_table`.
        frame: "lps", "ras" or "voxel": that of files that name none; others are converted.

    Raises:
        RegistrationError: see `read_point_table`; or voxel indices wanted of a file in mm.
    """
    table = read_point_table(path)
    if table.frame and frame not in ("lps", "ras"):
        raise RegistrationError(f"points must be voxel indices, got {path}, which says {table.frame.upper()} mm")
    return table.points @ RAS_TO_LPS[:3, :3] if table.frame and table.frame != frame else table.points


def read_point_table(path: Path) -> PointTable:
    """Read points and what belongs to them.

    Args:
        path: of a CSV with three columns, or with named columns x, y, z (or l, p, s; r, a, s; i, j, k) in any order and
            others; of an .fcsv or a .mrk.json of Slicer. Lines that start with # are comments.

    Raises:
        RegistrationError: missing or not text, no point, columns that are not named, or a point without three finite
            numbers.
    """
    text = read_text(path, "points", "CSV file")
    if path.suffix.lower() == ".json":
        return _read_markups(text, path)
    comments = dict(re.findall(r"^#\s*(\w+)\s*=\s*(.*?)\s*$", text, re.MULTILINE))
    columns = comments.get("columns", _FCSV_COLUMNS if path.suffix.lower() == ".fcsv" else "").split(",")
    columns = [column.strip() for column in columns if column.strip()]
    rows: list[list[str]] = []
    points: list[list[float]] = []
    axes, frame = _find_axes(columns, path) if columns else ([], "")
    try:
        lines = [(number, row) for number, row in enumerate(csv.reader(io.StringIO(text)), start=1)]
    except csv.Error as error:
        raise RegistrationError(f"points must be a CSV file, got {path} ({error})") from None
    for number, row in lines:
        if not "".join(row).strip() or row[0].lstrip().startswith("#"):
            continue
        if not columns:
            named = not any(_is_number(cell) for cell in row)
            columns = [cell.strip() for cell in row] if named else ["x", "y", "z"]
            axes, frame = _find_axes(columns, path)
            if named:
                continue
        rows.append([cell.strip() for cell in row] + [""] * (len(columns) - len(row)))
        points.append(_point(row, columns, axes, number))
    if not rows:
        raise RegistrationError(f"points must have at least one line x,y,z, got none in {path}")
    frame = _frame(comments["CoordinateSystem"], path) if "CoordinateSystem" in comments else frame
    return PointTable(np.array(points), frame, columns, axes, rows)


def write_points(path: Path, table: PointTable) -> None:
    """Write points as a CSV with named columns, and with the frame where the file that was read had it."""
    with path.open("w", newline="", encoding="utf-8") as stream:
        if table.frame:
            stream.write(f"# CoordinateSystem = {table.frame.upper()}\n")
        writer = csv.writer(stream)
        writer.writerow(table.columns)
        writer.writerows(table.rows)


def _is_number(cell: str) -> bool:
    try:
        float(cell)
    except ValueError:
        return False
    return True


def _find_axes(columns: list[str], path: Path) -> tuple[list[int], str]:
    """Return which columns are x, y and z, and the frame if their names tell it.

    Raises:
        RegistrationError: there are no such columns.
    """
    lower = [column.lower() for column in columns]
    for names, frame in _AXES.items():
        if all(lower.count(name) == 1 for name in names):
            return [lower.index(name) for name in names], frame
    raise RegistrationError(f"points must have columns named x, y and z, got {columns[:8]} in {path}")


def _point(row: list[str], columns: list[str], axes: list[int], number: int) -> list[float]:
    """Return x, y, z of a line.

    Raises:
        RegistrationError: more cells than columns, or not three finite numbers.
    """
    shown = ",".join(row)[:60]
    if len(row) > len(columns):
        raise RegistrationError(
            f"points must have {len(columns)} cells a line, or a first line that names more columns, got {shown!r} "
            f"in line {number}"
        )
    try:
        point = [float(row[axis]) for axis in axes]
    except (ValueError, IndexError):
        point = [float("nan")]
    if not np.isfinite(point).all():
        raise RegistrationError(f"points must have three numbers a line (x,y,z in mm), got {shown!r} in line {number}")
    return point


def _frame(text: str, path: Path) -> str:
    if text.lower() not in _FRAMES:
        raise RegistrationError(f"the coordinate system of points must be LPS or RAS, got {text!r} in {path}")
    return _FRAMES[text.lower()]


def _read_markups(text: str, path: Path) -> PointTable:
    """Read Slicer's .mrk.json.

    Raises:
        RegistrationError: not one list of control points with positions.
    """
    try:
        markups: list[dict[str, Any]] = json.loads(text)["markups"]
        (markup,) = markups
        frame = _frame(str(markup.get("coordinateSystem", "LPS")), path)
        controls = markup["controlPoints"]
        points = np.array([control["position"] for control in controls], dtype=float)
        rows = [[str(control.get(key, "")) for key in ("id", "label")] + [""] * 3 for control in controls]
    except RegistrationError:
        raise
    except (ValueError, KeyError, TypeError, AttributeError):
        raise RegistrationError(f"points must be one list of control points with positions, got {path}") from None
    if points.ndim != 2 or points.shape[1] != 3 or not np.isfinite(points).all():
        raise RegistrationError(f"points must have three finite numbers each, got others or none in {path}")
    table = PointTable(points, frame, ["id", "label", "x", "y", "z"], [2, 3, 4], rows)
    return table.moved(points)
