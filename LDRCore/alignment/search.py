"""Aligns two images from several starts, coarse to fine: the best of everything that was tried is the result.

Without a network: `align`. Behind one, or from a map that the user gave: `polish`, which searches only where the map
that it was given looks doubtful.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from LDRCore.alignment import starts
from LDRCore.alignment.objective import TEXTURE, Objective, Side
from LDRCore.alignment.optimiser import optimise, rotation_matrix
from LDRCore.geometry import Grid
from LDRCore.refinement import torch_ops
from LDRCore.transforms.volume import Volume

COARSE_VOXELS, FINE_VOXELS = 8_000, 48_000  # of a grid over the content: some 8 and 4.5 mm for a head
COARSE_WINDOW, FINE_WINDOW = 3, 5
RIGID_STEPS, AFFINE_STEPS = 15, 10
POLISHING_STEPS = 4  # on the coarse grid, which saves as many on the fine one
TRIED_TURNS, TRIED_SHIFTS, FIRST_STEPS, PURSUED = 16, 4, 6, 6  # of a search
KEPT = 3  # rigid maps that go on as affine ones
MARGIN_VOXELS = 2
CLEAR = 1.4  # times the best of six turned maps: right maps of validation pairs came to 1.42 to 2.0, wrong ones to 1.3
UNEVEN = 1.3  # largest over smallest stretch; stems' maps of validation pairs came to 1.16
ENOUGH_OVERLAP = 0.7  # of the fixed windows; whole heads that end at different heights of the neck came to 0.86
AGREE = 0.02  # of the value: two starts that end so close have found the same

_TURNED = [np.diag(d) for d in ([1.0, -1, -1], [-1.0, 1, -1], [-1.0, -1, 1])]
_TURNED += [rotation_matrix(axis * np.pi / 2) for axis in np.eye(3)]


@dataclass(frozen=True)
class Alignment:
    """The result of an alignment.

    Attributes:
        affine_lps: 4x4, fixed -> moving, LPS mm; exactly rigid where that was asked for.
        value: the objective on the fine grid; None where nothing was optimised.
        searched: whether turns and shifts were searched through.
    """

    affine_lps: np.ndarray
    value: float | None = None
    searched: bool = False

    def facts(self) -> dict[str, Any]:
        """Return what a report says of it."""
        agreement = None if self.value is None else round(max(self.value, 0.0), 4)
        return {"alignment": {"local_agreement": agreement, "searched": self.searched}}


class Pyramid:
    """The objectives of one pair on a coarse and on a fine grid, the latter made when first needed."""

    def __init__(self, fixed: Side, moving: Side, box_lps: np.ndarray) -> None:
        """Take the pair.

        Args:
            fixed, moving: at a resolution no coarser than that of the fine grid, see `fine_spacing`.
            box_lps: (2, 3), bounds of the fixed content.
        """
        self._box, spacing = box_lps, fine_spacing(box_lps)
        self._fixed, self.moving = fixed.averaged(spacing), moving.averaged(spacing)
        self.coarse = self._objective(COARSE_VOXELS, COARSE_WINDOW)

    @functools.cached_property
    def fine(self) -> Objective:
        """On the fine grid."""
        return self._objective(FINE_VOXELS, FINE_WINDOW)

    @property
    def extent_mm(self) -> np.ndarray:
        """(3,), of the fixed content."""
        extent: np.ndarray = self._box[1] - self._box[0]
        return extent

    def _objective(self, voxels: int, window: int) -> Objective:
        spacing = _spacing(self._box, voxels)
        grid = Grid.around(
            *self._box, spacing_mm=spacing, margin_mm=MARGIN_VOXELS * spacing, multiple=1, max_voxels=8 * voxels
        )
        return Objective(self._fixed.averaged(spacing), self.moving.averaged(spacing), grid, window)


def _spacing(box_lps: np.ndarray, voxels: int) -> float:
    """Return the spacing, mm, at which a box holds so many voxels."""
    return float((math.prod(np.maximum(box_lps[1] - box_lps[0], 1.0)) / voxels) ** (1 / 3))


def fine_spacing(box_lps: np.ndarray) -> float:
    """Return the spacing of the fine grid, mm, for fixed content within bounds (2, 3)."""
    return _spacing(box_lps, FINE_VOXELS)


@torch.no_grad()
def align(pyramid: Pyramid, candidates: Sequence[np.ndarray], kind: str, *, wide: bool = True) -> Alignment:
    """Align from several starts.

    Args:
        pyramid: of the pair.
        candidates: 4x4, LPS mm, fixed -> moving.
        kind: "rigid" or "affine".
        wide: also start from the centres of what has texture, and search through turns and shifts unless the starts
            agree on a clear result; otherwise stay near the candidates.
    """
    coarse = pyramid.coarse
    rigid = [starts.nearest_rigid(c, coarse.centre_lps) for c in candidates]
    begin = rigid
    if wide:
        centre = texture_centre(pyramid.moving.averaged(coarse.grid.spacing_mm[0]).volume)
        begin = [*rigid, starts.about(np.eye(3), coarse.centre_lps, centre)]
    found = _sorted([optimise(coarse, start, "rigid", RIGID_STEPS) for start in begin])
    searched = False
    if wide:
        agreed = len(found) > 1 and found[1][1] > (1 - AGREE) * found[0][1]
        searched = not agreed or is_doubtful(coarse, *found[0])
        if searched:
            found = _sorted(found + search(pyramid, centre))
    if kind == "rigid":
        return _finest(pyramid, [found[0][0], *rigid], kind, searched)
    found = _sorted([optimise(coarse, affine, kind, AFFINE_STEPS) for affine, _ in found[:KEPT]])
    return _finest(pyramid, [found[0][0], *candidates], kind, searched)


@torch.no_grad()
def polish(pyramid: Pyramid, candidates: Sequence[np.ndarray], kind: str, *, wide: bool = True) -> Alignment:
    """Improve the best of some maps, one of which is thought to be right; align where even that one looks doubtful.

    Args:
        pyramid, candidates, kind, wide: see `align`.
    """
    if kind == "rigid":
        candidates = [starts.nearest_rigid(c, pyramid.coarse.centre_lps) for c in candidates]
    values = pyramid.coarse.values(candidates)
    best = candidates[int(np.argmax(values))]
    if is_doubtful(pyramid.coarse, best, max(values)):
        return align(pyramid, candidates, kind, wide=wide)
    near, _ = optimise(pyramid.coarse, best, kind, POLISHING_STEPS)
    affine, value = optimise(pyramid.fine, near, kind, AFFINE_STEPS)
    if pyramid.fine.value(best) > value:
        affine, value = optimise(pyramid.fine, best, kind, AFFINE_STEPS)
    return Alignment(affine, value)


def _finest(pyramid: Pyramid, candidates: Sequence[np.ndarray], kind: str, searched: bool) -> Alignment:
    """Improve the best of some maps on the fine grid."""
    values = pyramid.fine.values(candidates) if len(candidates) > 1 else [0.0]
    affine, value = optimise(pyramid.fine, candidates[int(np.argmax(values))], kind, AFFINE_STEPS)
    return Alignment(affine, value, searched)


def texture_centre(volume: Volume) -> np.ndarray:
    """Return the centre of what has texture, (3,) LPS mm, whether it is bright or dark; the middle if nothing has."""
    _, variance = torch_ops.window_statistics(volume.data[0, 0], COARSE_WINDOW, 0.0)
    index = (variance > TEXTURE).nonzero().double()
    middle = (np.array(volume.data.shape[2:]) - 1) / 2
    centre: np.ndarray = volume.to_lps @ np.append(index.mean(0).cpu().numpy() if len(index) else middle, 1)
    return centre[:3]


def search(pyramid: Pyramid, moving_centre_lps: np.ndarray) -> list[tuple[np.ndarray, float]]:
    """Try turns about the contents' centres and shifts of these, improve some, and the best of these further."""
    coarse, centre = pyramid.coarse, moving_centre_lps
    turned = [starts.about(turn, coarse.centre_lps, centre) for turn in starts.turns()]
    shifted = [starts.about(np.eye(3), coarse.centre_lps, centre + s) for s in starts.shifts(pyramid.extent_mm)]
    best = []
    for maps, count in ((turned, TRIED_TURNS), (shifted, TRIED_SHIFTS)):
        values = coarse.values(maps)
        best += [maps[k] for k in np.argsort(values)[::-1][:count]]
    found = _sorted([optimise(coarse, m, "rigid", FIRST_STEPS) for m in best])
    return [optimise(coarse, m, "rigid", RIGID_STEPS) for m, _ in found[:PURSUED]]


def is_doubtful(objective: Objective, affine_lps: np.ndarray, value: float) -> bool:
    """Return whether a map of that value looks wrong.

    It does if it leaves much of the fixed content without a counterpart, stretches one direction much more than
    another, or is hardly better than the same map after half and quarter turns about the content's centre.
    """
    stretches = np.linalg.svd(affine_lps[:3, :3], compute_uv=False)
    if stretches[0] > UNEVEN * stretches[-1] or objective.overlap(affine_lps) < ENOUGH_OVERLAP:
        return True
    centre = objective.centre_lps
    turned = objective.values([affine_lps @ starts.about(turn, centre, centre) for turn in _TURNED])
    return not value > CLEAR * max(turned)


def _sorted(found: list[tuple[np.ndarray, float]]) -> list[tuple[np.ndarray, float]]:
    return sorted(found, key=lambda item: -item[1])
