"""LDRCore.spatial against values worked out by hand, gradients, and properties that must always hold."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from LDRCore.transforms import separable, spatial

SHAPE = (7, 8, 9)


def smooth_field(seed: int, amplitude_vox: float, shape: tuple[int, int, int] = (16, 18, 20)) -> torch.Tensor:
    """A folding-free random field: coarse noise, up-sampled, zero at the border."""
    generator = torch.Generator().manual_seed(seed)
    coarse = torch.randn(1, 3, 5, 5, 5, generator=generator)
    coarse[:, :, [0, -1]] = coarse[:, :, :, [0, -1]] = coarse[:, :, :, :, [0, -1]] = 0
    field = torch.nn.functional.interpolate(coarse, size=shape, mode="trilinear", align_corners=True)
    return field * (amplitude_vox / field.abs().max())


def test_identity_grid_holds_the_index_of_every_axis():
    grid = spatial.identity_grid((2, 3, 4))
    assert grid.shape == (1, 3, 2, 3, 4)
    assert grid[0, :, 1, 2, 3].tolist() == [1, 2, 3]


def test_warp_pulls():
    image = torch.arange(9.0).view(1, 1, 1, 1, 9).expand(1, 1, 7, 8, 9).contiguous()
    displacement = torch.zeros(1, 3, *SHAPE)
    displacement[:, 2] = 2.0
    warped = spatial.warp(image, displacement)
    assert warped[0, 0, 3, 3].tolist() == pytest.approx([2, 3, 4, 5, 6, 7, 8, 0, 0])
    border = spatial.warp(image, displacement, padding="border")
    assert border[0, 0, 3, 3].tolist() == pytest.approx([2, 3, 4, 5, 6, 7, 8, 8, 8])


def test_warp_interpolates_between_the_eight_neighbours():
    image = torch.zeros(1, 1, *SHAPE)
    image[0, 0, 3, 4, 5] = 8.0
    displacement = torch.full((1, 3, *SHAPE), 0.5)
    assert spatial.warp(image, displacement)[0, 0, 2:4, 3:5, 4:6].flatten().tolist() == pytest.approx(
        [1.0] * 8, abs=1e-5
    )


def test_warp_nearest_keeps_label_values():
    labels = torch.randint(0, 200, (1, 1, *SHAPE)).float()
    warped = spatial.warp(labels, torch.full((1, 3, *SHAPE), 0.3), interpolation="nearest")
    assert torch.equal(warped, labels)


def test_compose_of_two_translations_adds_them():
    first, second = torch.zeros(1, 3, *SHAPE), torch.zeros(1, 3, *SHAPE)
    first[:, 0], second[:, 1] = 1.5, -0.5
    total = spatial.compose(first, second)
    assert total[0, :, 3, 4, 4].tolist() == pytest.approx([1.5, -0.5, 0])


def test_compose_order_is_first_then_second():
    """u1 scales by 2 about the origin, u2 shifts by 1: first u1 then u2 gives 2 (x + 1) - x = x + 2."""
    first = spatial.identity_grid(SHAPE).clone()
    second = torch.ones(1, 3, *SHAPE)
    total = spatial.compose(first, second)
    x = spatial.identity_grid(SHAPE)
    inner = (slice(None), slice(None), slice(0, 5), slice(0, 5), slice(0, 5))
    assert torch.allclose(total[inner], (x + 2)[inner], atol=1e-4)


def test_warping_twice_equals_warping_by_the_composition():
    first, second = smooth_field(1, 1.0), smooth_field(2, 1.0)
    ramp = spatial.identity_grid((16, 18, 20))[:, :1]  # linear, so that two interpolations lose nothing
    twice = spatial.warp(spatial.warp(ramp, first, padding="border"), second, padding="border")
    once = spatial.warp(ramp, spatial.compose(first, second), padding="border")
    assert torch.allclose(twice, once, atol=1e-4)


def test_upsample_uses_the_exact_factor():
    displacement = torch.ones(1, 3, 4, 5, 6)
    up = spatial.upsample(displacement, (8, 10, 12))
    assert up[0, :, 3, 3, 3].tolist() == pytest.approx([7 / 3, 9 / 4, 11 / 5])


def test_upsample_of_an_affine_field_is_that_affine_field():
    matrix = torch.eye(3)[None] + 0.1 * torch.randn(1, 3, 3, generator=torch.Generator().manual_seed(3))
    shape, fine = (5, 5, 5), (9, 9, 9)
    coarse_field = spatial.affine_to_displacement(matrix, torch.tensor([[1.0, 2.0, 3.0]]), shape)
    fine_field = spatial.affine_to_displacement(matrix, torch.tensor([[2.0, 4.0, 6.0]]), fine)
    assert torch.allclose(spatial.upsample(coarse_field, fine), fine_field, atol=1e-5)


@pytest.mark.parametrize("shape", [(10, 11, 12), (5, 12, 7)])
def test_shrink_keeps_corners_and_linear_images(shape):
    """Corners coincide, so a ramp stays a ramp to a fraction of a voxel, except where boxes are cut at the border."""
    k, j, i = torch.meshgrid(*[torch.arange(float(n)) for n in (20, 24, 22)], indexing="ij")
    ramp = (2 * k - j + 0.5 * i)[None, None]
    shrunk = separable.shrink(ramp, shape)
    ratio = [(n - 1) / (m - 1) for n, m in zip((20, 24, 22), shape, strict=True)]
    d, h, w = torch.meshgrid(*[torch.arange(m) * r for m, r in zip(shape, ratio, strict=True)], indexing="ij")
    inner = (slice(1, -1),) * 3
    assert torch.allclose(shrunk[0, 0][inner], (2 * d - h + 0.5 * w).float()[inner], atol=0.1)
    assert separable.shrink(torch.ones(2, 3, 20, 24, 22), shape).sub(1).abs().max() < 1e-5


def test_shrink_averages_noise_and_leaves_the_same_size_alone():
    noise = torch.randn(1, 1, 32, 32, 32)
    assert 0.2 < float(separable.shrink(noise, (16, 16, 16)).std()) < 8**-0.5  # of eight voxels or a few more
    assert separable.shrink(noise, (32, 32, 32)) is noise


def test_affine_to_displacement_turns_about_the_centre():
    quarter = torch.tensor([[[0.0, -1, 0], [1, 0, 0], [0, 0, 1]]])
    displacement = spatial.affine_to_displacement(quarter, torch.zeros(1, 3), (5, 5, 5))
    assert displacement[0, :, 2, 2, 2].tolist() == [0, 0, 0]
    target = torch.tensor([4.0, 2, 2]) + displacement[0, :, 4, 2, 2]
    assert target.tolist() == [2, 4, 2]


def test_jacobian_determinant_of_an_affine_map_is_its_determinant():
    matrix = torch.tensor([[[1.2, 0.1, 0], [0, 0.9, 0.2], [0.1, 0, 1.1]]])
    displacement = spatial.affine_to_displacement(matrix, torch.zeros(1, 3), SHAPE)
    expected = float(torch.linalg.det(matrix[0]))
    assert torch.allclose(spatial.jacobian_determinant(displacement), torch.full((1, 1, *SHAPE), expected), atol=1e-5)


def test_folding_is_counted_where_the_map_turns_over():
    displacement = torch.zeros(1, 3, *SHAPE)
    assert spatial.folding_count(displacement) == 0
    displacement[:, 0] = -2.0 * torch.arange(7.0).view(1, 7, 1, 1)  # x -> -x
    assert spatial.folding_count(displacement) == 7 * 8 * 9
    assert spatial.folding_fraction(displacement) == 1.0


def test_integrate_of_a_constant_velocity_is_that_translation():
    velocity = torch.full((1, 3, *SHAPE), 0.7)
    assert torch.allclose(spatial.integrate(velocity), velocity, atol=1e-5)


def test_integrate_of_a_linear_velocity_is_the_exponential():
    rate = 0.1
    centre = (torch.tensor(SHAPE, dtype=torch.float32) - 1) / 2
    velocity = rate * (spatial.identity_grid(SHAPE) - centre.view(1, 3, 1, 1, 1))
    out = spatial.integrate(velocity, steps=10)
    expected = (torch.tensor(rate).exp() - 1) * 1.0
    assert float(out[0, 0, 4, 3, 4]) == pytest.approx(float(expected), abs=2e-3)


@settings(max_examples=15, deadline=None)
@given(seed=st.integers(0, 10_000), amplitude=st.floats(0.1, 1.5))
def test_inverse_undoes_a_smooth_field(seed: int, amplitude: float):
    displacement = smooth_field(seed, amplitude)
    inverse, residual = spatial.invert(displacement, iterations=60)
    assert residual < 5e-3
    assert spatial.compose(displacement, inverse).abs().max() < 5e-3


@settings(max_examples=15, deadline=None)
@given(seed=st.integers(0, 10_000))
def test_composition_with_zero_changes_nothing(seed: int):
    displacement = smooth_field(seed, 2.0)
    zero = torch.zeros_like(displacement)
    assert torch.allclose(spatial.compose(displacement, zero), displacement, atol=1e-6)
    assert torch.allclose(spatial.compose(zero, displacement), displacement, atol=1e-6)


@settings(max_examples=10, deadline=None)
@given(seed=st.integers(0, 10_000))
def test_velocity_and_its_negative_are_inverse(seed: int):
    velocity = smooth_field(seed, 1.0)
    forth, back = spatial.integrate(velocity), spatial.integrate(-velocity)
    left = spatial.compose(forth, back)  # interpolation leaves something at the kinks of the coarse field
    assert left.abs().mean() < 0.02 * forth.abs().max()


def test_invert_reports_a_large_residual_where_the_field_folds():
    displacement = smooth_field(5, 9.0)
    assert spatial.folding_count(displacement) > 0
    _, residual = spatial.invert(displacement)
    assert residual > 0.1


@pytest.mark.parametrize(
    "function",
    [
        lambda u, image: spatial.warp(image, u),
        lambda u, image: spatial.compose(u, 0.5 * u),
        lambda u, image: spatial.upsample(u, (5, 6, 7)),
        lambda u, image: spatial.integrate(u, steps=2),
        lambda u, image: spatial.jacobian_determinant(u),
    ],
    ids=["warp", "compose", "upsample", "integrate", "jacobian"],
)
def test_gradients(function):
    generator = torch.Generator().manual_seed(0)
    # away from voxel centres, where linear interpolation has a kink
    displacement = 0.25 + 0.1 * torch.rand(1, 3, 3, 4, 4, generator=generator, dtype=torch.float64)
    image = torch.rand(1, 1, 3, 4, 4, generator=generator, dtype=torch.float64)
    displacement.requires_grad_()
    assert torch.autograd.gradcheck(lambda u: function(u, image), (displacement,), eps=1e-6, atol=1e-5)


def test_gradient_of_affine_to_displacement():
    matrix = torch.eye(3, dtype=torch.float64)[None].requires_grad_()
    translation = torch.zeros(1, 3, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda a, b: spatial.affine_to_displacement(a, b, (3, 4, 5)), (matrix, translation))


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: spatial.warp(torch.zeros(1, 1, 4, 4, 4), torch.zeros(1, 2, 4, 4, 4)), r"\(B, 3, D, H, W\).*1, 2, 4"),
        (lambda: spatial.warp(torch.zeros(1, 1, 4, 4, 4), torch.zeros(1, 3, 4, 4, 5)), "share one grid"),
        (
            lambda: spatial.warp(torch.zeros(1, 1, 4, 4, 4), torch.zeros(1, 3, 4, 4, 4), interpolation="cubic"),
            "interpolation must be one of.*cubic",
        ),
        (lambda: spatial.affine_to_displacement(torch.eye(3), torch.zeros(1, 3), (4, 4, 4)), r"\(B, 3, 3\)"),
        (lambda: spatial.integrate(torch.zeros(1, 3, 4, 4, 4), steps=-1), "0 or more, got -1"),
        (lambda: spatial.jacobian_determinant(torch.zeros(1, 3, 1, 4, 4)), "at least 2 voxels"),
    ],
)
def test_wrong_shapes_are_named(call, message):
    with pytest.raises(ValueError, match=message):
        call()
