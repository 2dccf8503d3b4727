"""Stage 1, affine: the model's stem, then `LDRCore.alignment`, which improves its map or, without a stem, finds one.

The stem aligns 4 mm images on a cube about the fixed image's centre, in several passes. Each pass sees the moving image
aligned by the passes before it. Torch, no files.
"""

from __future__ import annotations

import itertools

import numpy as np
import torch

from LDRCore import geometry
from LDRCore.alignment import search
from LDRCore.alignment.objective import Side
from LDRCore.alignment.search import Alignment
from LDRCore.alignment.starts import nearest_rigid
from LDRCore.geometry import Grid
from LDRCore.losses import correlation_coefficient
from LDRCore.pipeline.inputs import Pair
from LDRCore.pipeline.model import Model
from LDRCore.pipeline.options import Options
from LDRCore.pipeline.preprocess import PreparedImage

WITHIN = 0.2  # of the best start's correlation; of 32 validation pairs the later winner was at most .045 behind
NEAR_MM = 12.0  # a pass whose step moves no corner of the content further is the last: what is left is to be polished


def centring_candidates(fixed: PreparedImage, moving: PreparedImage) -> list[np.ndarray]:
    """Return translations (4x4, LPS mm) that bring the contents together, in the order in which they are preferred.

    They are: foreground centroid onto centroid; because fields of view often end at different heights of the neck, the
    centroid in plane with the tops of the foregrounds aligned; the scanner coordinates as they are.
    """
    by_centroid = np.eye(4)
    by_centroid[:3, 3] = moving.centroid_lps - fixed.centroid_lps
    by_top = by_centroid.copy()
    by_top[2, 3] = moving.box_lps[1, 2] - fixed.box_lps[1, 2]
    return [by_centroid, by_top, np.eye(4)]


def run(model: Model, pair: Pair, candidates: list[np.ndarray], options: Options) -> Alignment:
    """Align a pair as the options of a registration say; without `options.affine` the first candidate is taken.

    Args:
        model, candidates: see `estimate_affine`.
        pair: prepared.
        options: of the registration. It stays near an initial transform that was given.
    """
    if options.affine:
        wide = options.initial_matrix is None
        return estimate_affine(model, pair.fixed, pair.moving, candidates, options.linear_kind, wide=wide)
    first = candidates[0]
    return Alignment(nearest_rigid(first, pair.fixed.centroid_lps) if options.kind == "rigid" else first)


@torch.no_grad()
def estimate_affine(
    model: Model,
    fixed: PreparedImage,
    moving: PreparedImage,
    candidates: list[np.ndarray],
    kind: str = "affine",
    *,
    wide: bool = True,
) -> Alignment:
    """Estimate the rigid or affine map fixed -> moving.

    Args:
        model: its stem goes first; without one the alignment starts from the candidates.
        fixed, moving: prepared.
        candidates: 4x4, LPS mm, fixed -> moving.
        kind: "rigid" or "affine".
        wide: search elsewhere where the result looks doubtful; otherwise stay near the best candidate.
    """
    masks = (None, None) if fixed.mask and moving.mask else (fixed.mask, moving.mask)
    # the edge of one mask alone is no anatomy, but those of two masks correspond
    spacing = search.fine_spacing(fixed.box_lps)
    fixed_side, moving_side = Side(fixed.copy_for(spacing), masks[0]), Side(moving.copy_for(spacing), masks[1])
    pyramid = search.Pyramid(fixed_side, moving_side, fixed.box_lps)
    if model.stem is None:
        return search.align(pyramid, candidates, kind, wide=wide)
    predicted = predict_affine(model, fixed, moving, candidates)
    return search.polish(pyramid, [predicted, *candidates], kind, wide=wide)


@torch.no_grad()
def predict_affine(
    model: Model, fixed: PreparedImage, moving: PreparedImage, candidates: list[np.ndarray]
) -> np.ndarray:
    """Predict the affine map fixed -> moving by the stem, from the best of several initial maps.

    All candidates that may still win run as one batch through the first pass; the one that then correlates best goes on
    alone. Of all candidates and all passes the best correlated wins, so a stem that was made for other images cannot
    make the alignment worse than where it began.

    Args:
        model: its stem; without one the best candidate is returned.
        fixed, moving: prepared.
        candidates: 4x4, LPS mm, fixed -> moving.

    Returns:
        4x4, LPS mm.
    """
    settings = model.card["working_grid"]
    shape = tuple(settings["stem_shape"])
    extent = float((fixed.box_lps[1] - fixed.box_lps[0]).max())
    spacing = max(settings["stem_spacing_mm"], extent / (max(shape) - 4))
    grid = Grid.centred(fixed.centroid_lps.tolist(), spacing, shape)
    fixed_image = fixed.coarse.on(grid)
    totals = list(candidates)
    corners = np.array(list(itertools.product(*fixed.box_lps.T, [1.0]))).T
    best, best_score, furthest = candidates[0], -np.inf, np.inf
    passes = 0 if model.stem is None else settings["stem_passes"]
    for done in range(passes + 1):
        moved = torch.cat([moving.coarse.on(grid, t) for t in totals])
        scores = correlation_coefficient(moved, fixed_image)
        leader = int(scores.argmax())
        if float(scores[leader]) > best_score:
            best, best_score = totals[leader], float(scores[leader])
        if model.stem is None or done == passes or furthest < NEAR_MM:
            break
        # the first pass takes every start that may still win, later ones the best
        kept = [leader] if done else (scores > scores[leader] - WITHIN).nonzero()[:, 0].tolist()
        totals, moved = [totals[k] for k in kept], moved[kept]
        matrix, translation = model.stem.predict(moved, fixed_image.expand_as(moved))
        furthest = 0.0
        for k in range(len(totals)):
            step = geometry.tensor_affine_to_lps(matrix[k].cpu().numpy(), translation[k].cpu().numpy(), grid)
            totals[k] = totals[k] @ step
            furthest = max(furthest, float(np.linalg.norm((step - np.eye(4)) @ corners, axis=0).max()))
    return best
