"""Stage 1, affine: the stem aligns 4 mm images on a cube about the fixed image's centre, in several passes.

Each pass sees the moving image aligned by the passes before it. Torch, no files.
"""

from __future__ import annotations

import numpy as np
import torch

from LDRCore import geometry
from LDRCore.geometry import Grid
from LDRCore.losses import correlation_coefficient
from LDRCore.pipeline.model import Model
from LDRCore.pipeline.preprocess import PreparedImage

WITHIN = 0.2  # of the best start's correlation; of 32 validation pairs the later winner was at most .045 behind


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


@torch.no_grad()
def estimate_affine(
    model: Model, fixed: PreparedImage, moving: PreparedImage, candidates: list[np.ndarray]
) -> np.ndarray:
    """Estimate the affine map fixed -> moving from the best of several initial maps.

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
    best, best_score = candidates[0], -np.inf
    passes = 0 if model.stem is None else settings["stem_passes"]
    for done in range(passes + 1):
        moved = torch.cat([moving.coarse.on(grid, t) for t in totals])
        scores = correlation_coefficient(moved, fixed_image)
        leader = int(scores.argmax())
        if float(scores[leader]) > best_score:
            best, best_score = totals[leader], float(scores[leader])
        if model.stem is None or done == passes:
            break
        # the first pass takes every start that may still win, later ones the best
        kept = [leader] if done else (scores > scores[leader] - WITHIN).nonzero()[:, 0].tolist()
        totals, moved = [totals[k] for k in kept], moved[kept]
        matrix, translation = model.stem.predict(moved, fixed_image.expand_as(moved))
        for k in range(len(totals)):
            step = geometry.tensor_affine_to_lps(matrix[k].cpu().numpy(), translation[k].cpu().numpy(), grid)
            totals[k] = totals[k] @ step
    return best
