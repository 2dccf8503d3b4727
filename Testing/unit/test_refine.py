"""Instance optimisation: improves the pair at hand, leaves everything else alone, can be watched and cancelled."""

from __future__ import annotations

import pytest
import torch

from LDRCore import losses
from LDRCore.pipeline import refine
from LDRCore.transforms import spatial

SHAPE = (16, 18, 20)


def pair() -> tuple[torch.Tensor, torch.Tensor]:
    """A textured image, and the same moved by one voxel along the last axis."""
    noise = torch.rand(1, 1, 8, 9, 10, generator=torch.Generator().manual_seed(0))
    moving = torch.nn.functional.interpolate(noise, size=SHAPE, mode="trilinear", align_corners=True)
    shift = torch.zeros(1, 3, *SHAPE)
    shift[:, 2] = 1.0
    return moving, spatial.warp(moving, shift, padding="border")


def test_it_finds_a_shift_and_does_not_fold():
    moving, fixed = pair()
    start = torch.zeros(1, 3, *SHAPE)
    refined = refine.refine(start, moving, fixed, 60)
    before = float(losses.local_ncc(moving, fixed))
    after = float(losses.local_ncc(spatial.warp(moving, refined), fixed))
    assert after < 0.3 * before
    assert float(refined[0, 2, 4:-4, 4:-4, 4:-4].mean()) == pytest.approx(1.0, abs=0.25)
    assert spatial.folding_count(refined) == 0
    assert not start.any()


def test_no_steps_change_nothing():
    moving, fixed = pair()
    start = torch.randn(1, 3, *SHAPE)
    assert refine.refine(start, moving, fixed, 0) is start


def test_it_never_ends_worse_than_it_began(monkeypatch):
    monkeypatch.setattr(refine, "RATE_VOX", 50.0)  # steps that only do harm
    moving, _ = pair()
    start = torch.zeros(1, 3, *SHAPE)
    assert torch.equal(refine.refine(start, moving, moving, 3), start)


def test_it_works_where_gradients_are_off():
    moving, fixed = pair()
    with torch.no_grad():
        refined = refine.refine(torch.zeros(1, 3, *SHAPE), moving, fixed, 3)
    assert refined.any()
    assert not refined.requires_grad


def test_progress_is_told_and_can_cancel():
    moving, fixed = pair()
    seen: list[float] = []
    refine.refine(torch.zeros(1, 3, *SHAPE), moving, fixed, 4, progress=seen.append)
    assert seen == [0.25, 0.5, 0.75, 1.0]

    class CancelledError(Exception):
        pass

    def cancel(fraction: float) -> None:
        raise CancelledError

    with pytest.raises(CancelledError):
        refine.refine(torch.zeros(1, 3, *SHAPE), moving, fixed, 4, progress=cancel)
