"""Greedy, compositive updates of a displacement by the closed-form gradient of local correlation.

Each iteration warps the moving image by the displacement so far, takes the gradient of squared local normalised
cross-correlation, smooths it, scales it so that its longest vector has a given length, composes it before the
displacement, and smooths the result. There is no line search, no momentum and no autograd.

Sources: Avants et al., Symmetric diffeomorphic image registration with cross-correlation, 2008 (similarity, greedy
composition); Vercauteren et al., Diffeomorphic Demons, 2009 (smoothing of update and total).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch

from LDRCore import sampling
from LDRCore.refinement.backend import operations
from LDRCore.refinement.similarity import Similarity


@dataclass(frozen=True)
class Settings:
    """How one level is optimised. Lengths are in voxels of its grid.

    Attributes:
        iterations: at most so many.
        step: length of the longest vector of an update.
        sigma_update, sigma_total: of the Gaussians on the update and on the displacement; 0 for none.
        stall: stop when the mean similarity grew by less than this share over `patience` iterations.
        patience: see `stall`.
    """

    iterations: int
    step: float = 1.0
    sigma_update: float = 0.7
    sigma_total: float = 0.4
    stall: float = 1e-3
    patience: int = 4


@dataclass(frozen=True)
class Outcome:
    """What the optimisation of one level ended with.

    Attributes:
        displacement: (3, D, H, W), voxels.
        similarity: mean similarity before each iteration, and at the end.
    """

    displacement: torch.Tensor
    similarity: list[float]

    @property
    def best(self) -> float:
        """Mean similarity of `displacement`."""
        return max(self.similarity)


@torch.no_grad()
def optimise(
    displacement: torch.Tensor,
    similarity: Similarity,
    settings: Settings,
    *,
    progress: Callable[[float], None] | None = None,
) -> Outcome:
    """Improve a displacement on one grid.

    Args:
        displacement: (3, D, H, W) float32, voxels. Not changed.
        similarity: of the pair, on the same grid.
        settings: see `Settings`.
        progress: called after every iteration with the fraction done; an exception raised in it cancels.

    Returns:
        The displacement of the largest similarity.
    """
    if not settings.iterations:
        return Outcome(displacement, [])
    backend, buffers = operations(displacement), _Buffers(displacement)
    best = displacement
    history: list[float] = []
    for done in range(settings.iterations + 1):
        gradient, value = similarity.gradient(displacement, buffers.other_than(displacement, best))
        history.append(value)
        if value >= max(history):
            best = displacement
        if done == settings.iterations or _stalled(history, settings):
            break
        step, longest = backend.smooth(
            gradient, settings.sigma_update, buffers.other_than(displacement, best, gradient)
        )
        if longest <= 1e-12:
            break
        step = step.mul_(settings.step / longest)
        composed = sampling.composed(displacement, step, buffers.other_than(displacement, best, step))
        displacement, _ = backend.smooth(composed, settings.sigma_total, buffers.other_than(composed, best))
        if progress is not None:
            progress((done + 1) / settings.iterations)
    return Outcome(best, history)


class _Buffers:
    """Displacements that are written again and again: new memory comes page by page, which takes longer than a step."""

    def __init__(self, like: torch.Tensor) -> None:
        self._like = like
        self._made: list[torch.Tensor] = []

    def other_than(self, *in_use: torch.Tensor) -> torch.Tensor:
        """Return a buffer that is none of those in use."""
        for buffer in self._made:
            if not any(buffer is tensor for tensor in in_use):
                return buffer
        self._made.append(torch.empty_like(self._like, memory_format=torch.contiguous_format))
        return self._made[-1]


def _stalled(history: list[float], settings: Settings) -> bool:
    """Whether the similarity grew too little over the last iterations."""
    if len(history) <= settings.patience:
        return False
    before = history[-1 - settings.patience]
    return history[-1] - before < settings.stall * abs(before)
