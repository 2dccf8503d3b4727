"""Aligns two images from several starts, coarse to fine: the best of everything that was tried is the result.

Without a network: `align`. Behind one, or from a map that the user gave: `polish`, which searches only where the map
that it was given looks doubtful.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from LDRCore.alignment import starts
from LDRCore.alignment.objective import Objective, Side
from LDRCore.alignment.optimiser import optimise, rotation_matrix
from LDRCore.geometry import Grid

COARSE_VOXELS, FINE_VOXELS = 8_000, 48_000  # of a grid over the content: some 8 and 4.5 mm for a head
COARSE_WINDOW, FINE_WINDOW = 3, 5
RIGID_STEPS, AFFINE_STEPS = 15, 10
TRIED_TURNS, TRIED_SHIFTS, KEPT = 6, 3, 3
MARGIN_VOXELS = 2
CLEAR = 1.35  # times the best of six turned maps: of validation pairs right maps came to 1.3 to 1.75, wrong ones to 1.3
AGREE = 0.02  # of the value: two starts that end so close have found the same

_TURNED = [np.diag(d) for d in ([1.0, -1, -1], [-1.0, 1, -1], [-1.0, -1, 1])]
_TURNED += [rotation_matrix(axis * np.pi / 2) for axis in np.eye(3)]


@dataclass(frozen=True)
class Alignment:
    """The result of an alignment.

    Attributes:
        affine_lps: 4x4, fixed -> moving, LPS mm; exactly rigid where that was asked for.
        value: the objective on the fine grid.
        searched: whether turns and shifts were searched through.
    """

    affine_lps: np.ndarray
    value: float
    searched: bool


class Pyramid:
    """The objectives of one pair on a coarse and on a fine grid, made when first needed."""

    def __init__(self, fixed: Side, moving: Side, box_lps: np.ndarray, moving_centre_lps: np.ndarray) -> None:
        """Take the pair.

        Args:
            fixed, moving: at a resolution no coarser than that of the fine grid.
            box_lps: (2, 3), bounds of the fixed content.
            moving_centre_lps: (3,), of the moving content.
        """
        self._pair, self._box, self.moving_centre_lps = (fixed, moving), box_lps, moving_centre_lps
        self.coarse = self._objective(COARSE_VOXELS, COARSE_WINDOW)
        self._fine: Objective | None = None

    @property
    def fine(self) -> Objective:
        """On the fine grid."""
        if self._fine is None:
            self._fine = self._objective(FINE_VOXELS, FINE_WINDOW)
        return self._fine

    @property
    def extent_mm(self) -> np.ndarray:
        """(3,), of the fixed content."""
        extent: np.ndarray = self._box[1] - self._box[0]
        return extent

    def _objective(self, voxels: int, window: int) -> Objective:
        fixed, moving = self._pair
        spacing = max(math.prod(np.maximum(self.extent_mm, 1.0)) / voxels, 1e-9) ** (1 / 3)
        grid = Grid.around(
            *self._box, spacing_mm=spacing, margin_mm=MARGIN_VOXELS * spacing, multiple=1, max_voxels=4 * voxels
        )
        return Objective(fixed.averaged(spacing), moving.averaged(spacing), grid, window)


@torch.no_grad()
def align(pyramid: Pyramid, candidates: Sequence[np.ndarray], kind: str) -> Alignment:
    """Align from several starts; turns and shifts are searched through unless the starts agree on a clear result."""
    coarse = pyramid.coarse
    rigid = [starts.nearest_rigid(c, coarse.centre_lps) for c in candidates]
    found = _sorted([optimise(coarse, start, "rigid", RIGID_STEPS) for start in rigid])
    agreed = len(found) > 1 and found[1][1] > (1 - AGREE) * found[0][1]
    searched = not agreed or is_doubtful(coarse, found[0][0])
    if searched:
        found = _sorted(found + search(pyramid))
    if kind == "affine":
        found = _sorted([optimise(coarse, affine, "affine", AFFINE_STEPS) for affine, _ in found[:KEPT]])
    return _finest(pyramid, [found[0][0], *(candidates if kind == "affine" else rigid)], kind, searched)


@torch.no_grad()
def polish(pyramid: Pyramid, candidates: Sequence[np.ndarray], kind: str, *, search_if_doubtful: bool) -> Alignment:
    """Improve the best of some maps, and search only where it looks doubtful.

    Args:
        pyramid: of the pair.
        candidates: 4x4; the first is the likeliest.
        kind: "rigid" or "affine".
        search_if_doubtful: otherwise never search.
    """
    if kind == "rigid":
        candidates = [starts.nearest_rigid(c, pyramid.coarse.centre_lps) for c in candidates]
    values = [pyramid.coarse.value(c) for c in candidates]
    best = candidates[int(np.argmax(values))]
    if search_if_doubtful and is_doubtful(pyramid.coarse, best):
        return align(pyramid, candidates, kind)
    return _finest(pyramid, [best], kind, False)


def _finest(pyramid: Pyramid, candidates: Sequence[np.ndarray], kind: str, searched: bool) -> Alignment:
    """Improve the best of some maps on the fine grid."""
    if len(candidates) > 1:
        values = [pyramid.fine.value(c) for c in candidates]
        candidates = [candidates[int(np.argmax(values))]]
    affine, value = optimise(pyramid.fine, candidates[0], kind, AFFINE_STEPS)
    return Alignment(affine, value, searched)


def search(pyramid: Pyramid) -> list[tuple[np.ndarray, float]]:
    """Try turns about the contents' centres, and shifts of these; improve the best."""
    coarse, centre = pyramid.coarse, pyramid.moving_centre_lps
    turned = [starts.about(turn, coarse.centre_lps, centre) for turn in starts.turns()]
    shifted = [starts.about(np.eye(3), coarse.centre_lps, centre + s) for s in starts.shifts(pyramid.extent_mm)]
    best = []
    for maps, count in ((turned, TRIED_TURNS), (shifted, TRIED_SHIFTS)):
        values = [coarse.value(m) for m in maps]
        best += [maps[k] for k in np.argsort(values)[::-1][:count]]
    return [optimise(coarse, m, "rigid", RIGID_STEPS) for m in best]


def is_doubtful(objective: Objective, affine_lps: np.ndarray) -> bool:
    """Return whether a map is hardly better than the same map turned about the content's centre."""
    centre = objective.centre_lps
    turned = [objective.value(affine_lps @ starts.about(turn, centre, centre)) for turn in _TURNED]
    return not objective.value(affine_lps) > CLEAR * max(turned)


def _sorted(found: list[tuple[np.ndarray, float]]) -> list[tuple[np.ndarray, float]]:
    return sorted(found, key=lambda item: -item[1])
