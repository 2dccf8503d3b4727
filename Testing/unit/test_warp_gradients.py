"""Warping and up-sampling for training: values and derivatives of the plain functions."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from LDRCore import sampling
from LDRCore.transforms import gradients, spatial

pytestmark = pytest.mark.skipif(sampling.backend_name() != "numba", reason="numba is not installed")
SHAPE = (6, 7, 8)


def grid_sampled(image: torch.Tensor, displacement: torch.Tensor) -> torch.Tensor:
    """Torch's own sampler, with coordinates from -1 to 1 in the order x, y, z."""
    grid = spatial.identity_grid(displacement.shape[2:]) + displacement
    size = torch.tensor(image.shape[2:]).view(1, 3, 1, 1, 1)
    grid = (2 * grid / (size - 1) - 1).flip(1).permute(0, 2, 3, 4, 1)
    return F.grid_sample(image, grid, align_corners=True)


def test_a_warp_has_the_value_and_the_gradient_of_torchs_sampler():
    """Also where points lie outside, partly outside, or are not a number."""
    torch.manual_seed(0)
    image = torch.rand(2, 1, *SHAPE)
    still = 3 * torch.randn(2, 3, *SHAPE)
    towards = torch.rand(2, 1, *SHAPE)
    found = []
    for function in (spatial.warp, grid_sampled):
        displacement = still.clone().requires_grad_()
        warped = function(image, displacement)
        (warped * towards).sum().backward()
        found.append((warped.detach(), displacement.grad))
    assert gradients.can_take(image, displacement)
    for mine, torchs in zip(*found, strict=True):
        assert torch.allclose(mine, torchs, atol=1e-4)
    assert float(found[0][1].abs().max()) > 0.1


def test_a_warp_by_hand():
    """A ramp along the last axis has the slope 10 between voxels, and falls to zero beyond its end."""
    image = (10 * torch.arange(4.0)).expand(1, 1, 3, 3, 4)
    displacement = torch.zeros(1, 3, 3, 3, 4)
    displacement[:, 2] = 0.25
    displacement.requires_grad_()
    warped = spatial.warp(image, displacement)
    warped.sum().backward()
    assert warped[0, 0, 1, 1].tolist() == pytest.approx([2.5, 12.5, 22.5, 22.5])
    assert displacement.grad[0, 2, 1, 1].tolist() == pytest.approx([10, 10, 10, -30])
    assert not displacement.grad[0, :2, 1, 1, 0].any()  # at the first voxel nothing changes along the other axes


def test_what_is_not_a_number_is_zero_and_has_no_gradient():
    displacement = torch.zeros(1, 3, *SHAPE)
    displacement[0, 0, 2, 2, 2] = float("nan")
    displacement[0, 1, 3, 3, 3] = float("inf")
    displacement.requires_grad_()
    warped = spatial.warp(torch.ones(1, 1, *SHAPE), displacement)
    warped.sum().backward()
    assert (warped[0, 0, 2, 2, 2], warped[0, 0, 3, 3, 3], warped[0, 0, 1, 1, 1]) == (0, 0, 1)
    assert torch.isfinite(displacement.grad).all()


def test_an_image_with_a_gradient_gets_one():
    image, displacement = torch.rand(1, 1, *SHAPE), torch.zeros(1, 3, *SHAPE)
    assert not gradients.can_take(image.requires_grad_(), displacement.requires_grad_())
    spatial.warp(image, displacement).sum().backward()
    assert torch.allclose(image.grad, torch.ones_like(image))


@pytest.mark.parametrize("shape", [(12, 9, 8), (3, 14, 16)])
def test_up_sampling_has_the_value_and_the_gradient_of_torchs_interpolation(shape):
    torch.manual_seed(0)
    coarse = torch.randn(2, 3, *SHAPE)
    towards = torch.randn(2, 3, *shape)
    mine, torchs = coarse.clone().requires_grad_(), coarse.clone().requires_grad_()
    ratio = torch.tensor([(n - 1) / (m - 1) for n, m in zip(shape, SHAPE, strict=True)]).view(3, 1, 1, 1)
    fine = spatial.upsample(mine, shape)
    expected = F.interpolate(torchs * ratio, shape, mode="trilinear", align_corners=True)
    assert torch.allclose(fine, expected, atol=1e-5)
    (fine * towards).sum().backward()
    (expected * towards).sum().backward()
    assert torch.allclose(mine.grad, torchs.grad, atol=1e-4)
