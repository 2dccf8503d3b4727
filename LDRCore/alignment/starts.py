"""Maps to start an alignment from: turns about the contents' centres, and shifts."""

from __future__ import annotations

import itertools

import numpy as np

TURNS = 160  # spread evenly: no turn is more than 40 degrees from one of them
SHIFT = 0.25  # of the content's extent


def turns(count: int = TURNS) -> np.ndarray:
    """Return rotations spread evenly over all there are, (count, 3, 3).

    Source: Alexa, Super-Fibonacci spirals: fast, low-discrepancy sampling of SO(3), 2022.
    """
    psi = 1.533751168755204288118041  # the positive solution of psi^4 = psi + 4
    s = np.arange(count) + 0.5
    angle = 2 * np.pi * s
    outer, inner = np.sqrt(s / count), np.sqrt(1 - s / count)
    a, b = angle / np.sqrt(2), angle / psi
    x, y, z, w = outer * np.sin(a), outer * np.cos(a), inner * np.sin(b), inner * np.cos(b)
    rows = [
        [1 - 2 * (y * y + z * z), 2 * (x * y - z * w), 2 * (x * z + y * w)],
        [2 * (x * y + z * w), 1 - 2 * (x * x + z * z), 2 * (y * z - x * w)],
        [2 * (x * z - y * w), 2 * (y * z + x * w), 1 - 2 * (x * x + y * y)],
    ]
    return np.moveaxis(np.array(rows), -1, 0)


def about(rotation: np.ndarray, from_lps: np.ndarray, to_lps: np.ndarray) -> np.ndarray:
    """Return the rigid 4x4 that takes one point to another and turns about it."""
    out = np.eye(4)
    out[:3, :3] = rotation
    out[:3, 3] = to_lps - rotation @ from_lps
    return out


def shifts(extent_mm: np.ndarray) -> list[np.ndarray]:
    """Return translations (3,) by `SHIFT` of a box's extent along each axis, both ways, in all combinations."""
    steps = itertools.product((0, -SHIFT, SHIFT), repeat=3)
    return [np.array(step) * extent_mm for step in steps][1:]


def nearest_rigid(affine_lps: np.ndarray, centre_lps: np.ndarray) -> np.ndarray:
    """Return the rigid map nearest to an affine one: its rotation by polar decomposition, with one point's image kept.

    Args:
        affine_lps: 4x4.
        centre_lps: (3,), the point.
    """
    left, _, right = np.linalg.svd(affine_lps[:3, :3])
    rotation = left @ np.diag([1.0, 1.0, np.sign(np.linalg.det(left @ right))]) @ right
    return about(rotation, centre_lps, affine_lps[:3, :3] @ centre_lps + affine_lps[:3, 3])
