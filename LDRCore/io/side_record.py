"""What report.json says of the transforms beside it: from which image's points to which, and where the two images lie.

`ldr warp` and `ldr points` warn by it where a transform was given the wrong way round.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import SimpleITK as sitk

from LDRCore import geometry

SIDES = {"transform.h5": ("fixed", "moving"), "inverse_transform.h5": ("moving", "fixed")}  # points of, to points of
OTHERS = {"transform.h5": "inverse_transform.h5", "inverse_transform.h5": "transform.h5"}
SAME = 0.1  # grids are the same where their corners are closer, in voxels
MOST = 0.5  # of the points


def warning_for_reference(paths: Sequence[str], reference: sitk.Image) -> str | None:
    """Say that an image is warped the wrong way round: the reference lies on the grid that the transform leads to."""
    record = _record(paths)
    if record is None or reference.GetDimension() != 3:
        return None
    name, own, other = record
    corners = geometry.corners_lps(reference)
    if _same(corners, _corners(own), reference) or not _same(corners, _corners(other), reference):
        return None
    source, target = SIDES[name]
    return (
        f"the reference lies on the {target} image's grid, but {name} warps the {target} image onto the {source} "
        f"image's grid: {OTHERS[name]} is for the other way"
    )


def warning_for_points(paths: Sequence[str], points_lps: np.ndarray) -> str | None:
    """Say that points are mapped the wrong way round: most lie in the other image alone."""
    record = _record(paths)
    if record is None or not len(points_lps):
        return None
    name, own, other = record
    source, target = SIDES[name]
    if _share_inside(own, points_lps) >= MOST or _share_inside(other, points_lps) <= MOST:
        return None
    return (
        f"most points lie in the {target} image, not in the {source} image, whose points {name} maps: "
        f"{OTHERS[name]} is for the other way"
    )


def _record(paths: Sequence[str]) -> tuple[str, dict[str, Any], dict[str, Any]] | None:
    """Name of a transform and the grids that it leads from and to; None for several, or where none is known."""
    if len(paths) != 1 or Path(paths[0]).name not in SIDES:
        return None
    try:
        report = json.loads(Path(paths[0]).with_name("report.json").read_text(encoding="utf-8"))
        source, target = (report[side] for side in SIDES[Path(paths[0]).name])
        for grid in (source, target):
            if not np.isfinite(_corners(grid) @ np.linalg.inv(_lps_from_index(grid)[:3, :3])).all():
                return None
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        return None  # of an earlier version, or another's
    return Path(paths[0]).name, source, target


def _lps_from_index(grid: dict[str, Any]) -> np.ndarray:
    """4x4, index in the order i, j, k -> LPS mm, of an image that a report describes."""
    matrix = np.eye(4)
    matrix[:3, :3] = np.array(grid["direction"], dtype=float).reshape(3, 3) * np.array(grid["spacing_mm"], dtype=float)
    matrix[:3, 3] = grid["origin_lps"]
    return matrix


def _corners(grid: dict[str, Any]) -> np.ndarray:
    last = np.array(grid["size"], dtype=float).reshape(3) - 1
    index = np.array([[last[axis] * ((k >> axis) & 1) for axis in range(3)] for k in range(8)])
    matrix = _lps_from_index(grid)
    corners: np.ndarray = index @ matrix[:3, :3].T + matrix[:3, 3]
    return corners


def _same(corners: np.ndarray, others: np.ndarray, image: sitk.Image) -> bool:
    return bool(np.abs(corners - others).max() < SAME * min(image.GetSpacing()))


def _share_inside(grid: dict[str, Any], points_lps: np.ndarray) -> float:
    matrix = np.linalg.inv(_lps_from_index(grid))
    index = points_lps @ matrix[:3, :3].T + matrix[:3, 3]
    return float(((index >= -0.5) & (index <= np.array(grid["size"]) - 0.5)).all(1).mean())
