"""Instance optimisation: a few gradient steps on one pair's own displacement. Never touches a model's weights."""

from __future__ import annotations

from collections.abc import Callable

import torch

from LDRCore import losses
from LDRCore.transforms import spatial

SMOOTHNESS = 1.0
FOLDING = 10.0
RATE_VOX = 0.1


def refine(
    displacement: torch.Tensor,
    moving: torch.Tensor,
    fixed: torch.Tensor,
    steps: int,
    *,
    progress: Callable[[float], None] | None = None,
) -> torch.Tensor:
    """Improve a displacement by Adam on local NCC + smoothness + folding.

    Args:
        displacement: (1, 3, D, H, W), voxels; where the networks left it. Not changed.
        moving, fixed: (1, 1, D, H, W) on the displacement's grid, intensities about 0 to 1.
        steps: number of Adam steps; 0 returns the displacement as it came.
        progress: called after every step with the fraction done; an exception raised in it cancels.

    Returns:
        (1, 3, D, H, W), the step with the smallest loss (the start, if nothing helped).
    """
    best, best_loss = displacement, float("inf")
    current = displacement.detach().clone().requires_grad_()
    optimizer = torch.optim.Adam([current], lr=RATE_VOX)
    for step in range(steps + 1):
        with torch.enable_grad():
            loss = (
                losses.local_ncc(spatial.warp(moving, current), fixed)
                + SMOOTHNESS * losses.smoothness(current)
                + FOLDING * losses.folding_penalty(current)
            )
        if float(loss.detach()) < best_loss:
            best, best_loss = current.detach().clone(), float(loss.detach())
        if step == steps:
            break
        optimizer.zero_grad()
        loss.backward()
        with torch.device("cpu"):  # Adam counts its steps in a tensor on the default device
            optimizer.step()
        if progress is not None:
            progress((step + 1) / steps)
    return best if steps else displacement
