"""Instance optimisation: right gradients, both backends alike, nothing done where nothing is known."""

from __future__ import annotations

import numpy as np
import pytest
import scipy.ndimage
import torch

from LDRCore import sampling
from LDRCore.pipeline import options, preprocess, refine
from LDRCore.refinement import torch_ops
from LDRCore.refinement.backend import operations
from LDRCore.refinement.optimiser import Settings, optimise
from LDRCore.refinement.similarity import LocalCorrelation, Mind, mind
from LDRCore.transforms import spatial
from LDRCore.transforms.volume import Volume

SHAPE = (32, 36, 40)
SAME_VOX = 0.01  # by which the two backends' displacements may differ


def texture(*shape: int, seed: int = 0) -> torch.Tensor:
    """Smooth noise, 0 to 1, (D, H, W)."""
    noise = torch.rand(1, 1, *(n // 3 for n in shape), generator=torch.Generator().manual_seed(seed))
    return torch.nn.functional.interpolate(noise, size=shape, mode="trilinear", align_corners=True)[0, 0]


def bend(shape: tuple[int, ...], voxels: float) -> torch.Tensor:
    """A smooth displacement of up to so many voxels, (3, D, H, W), zero at the border."""
    axes = torch.meshgrid(*[torch.linspace(0, torch.pi, n) for n in shape], indexing="ij")
    bump = torch.sin(axes[0]) * torch.sin(axes[1]) * torch.sin(axes[2])
    return voxels * torch.stack((bump, -0.7 * bump, 0.8 * bump))


def upper(stop: int) -> torch.Tensor:
    """Where an image is known that ends before a slice, (D, H, W) boolean."""
    inside = torch.ones(SHAPE, dtype=torch.bool)
    inside[stop:] = False
    return inside


def cut_warper(moving: torch.Tensor, first: int, unknown: float = -1e9):
    """Warp an image that is not known below a slice."""
    image = moving.clone()
    image[:first] = unknown
    return warper(image)


def warper(moving: torch.Tensor):
    return lambda u: spatial.warp(moving[None, None], u[None], padding="border")[0, 0]


def similarity_of(warped: torch.Tensor, fixed: torch.Tensor, window: int, epsilon: float) -> torch.Tensor:
    """Squared local correlation of every window, sums by a convolution: differentiable, any precision."""
    kernel = torch.full((1, 1, window, window, window), 1 / window**3, dtype=warped.dtype)

    def mean(image: torch.Tensor) -> torch.Tensor:
        return torch.nn.functional.conv3d(image[None, None], kernel, padding=window // 2)[0, 0]

    covariance = mean(warped * fixed) - mean(warped) * mean(fixed)
    variances = [(mean(i * i) - mean(i) ** 2).clamp_min(0) + epsilon for i in (warped, fixed)]
    return covariance**2 / (variances[0] * variances[1])


@pytest.mark.parametrize("window", [3, 5])
def test_the_closed_form_is_autograds_gradient(window):
    generator = torch.Generator().manual_seed(1)
    warped, fixed = (torch.rand(9, 8, 10, generator=generator, dtype=torch.float64) for _ in range(2))
    warped.requires_grad_()
    total = similarity_of(warped, fixed, window, 1e-3).sum()
    total.backward()
    total = total.detach()
    mean, square = torch_ops.window_means(torch.stack((fixed, fixed * fixed)), window)
    variance = (square - mean * mean).clamp_min(0) + 1e-3
    with torch.no_grad():
        values, force = torch_ops.correlation_force(warped, fixed, mean, variance, window, 1e-3)
    assert float(values.sum()) == pytest.approx(float(total), rel=1e-12)
    assert torch.allclose(force, warped.grad, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("window", [3, 5])
@pytest.mark.parametrize("shape", [(32, 36, 40), (3, 4, 2), (2, 9, 5)])
def test_a_correlation_prepared_for_a_fixed_image_is_the_plain_formula(backend, window, shape):
    warped, fixed, mask = (torch.rand(shape, generator=torch.Generator().manual_seed(n)) for n in range(3))
    values, force = torch_ops.correlation_force(
        warped, fixed, *torch_ops.window_statistics(fixed, window, 1e-3), window, 1e-3
    )
    correlation = operations(fixed).Correlation(fixed, window, 1e-3)
    similarity, found = correlation.force(warped)
    assert similarity == pytest.approx(float(values.mean()), rel=1e-4)
    assert torch.allclose(found, force, rtol=1e-3, atol=1e-4 * float(force.abs().max()))
    for factor in (None, mask):
        gradient, similarity = correlation.gradient(warped, factor)
        expected = torch_ops.gradient(warped) * (force if factor is None else force * factor)
        assert similarity == pytest.approx(float(values.mean()), rel=1e-4)
        assert torch.allclose(gradient, expected, rtol=1e-3, atol=1e-4 * float(force.abs().max()))


@pytest.mark.parametrize("window", [3, 5])
def test_windows_that_do_not_count_have_no_part_in_sum_and_gradient(backend, window):
    generator = torch.Generator().manual_seed(4)
    warped, fixed = (torch.rand(9, 8, 10, generator=generator) for _ in range(2))
    windows = torch.rand(warped.shape, generator=generator) > 0.4
    precise = warped.double().requires_grad_()
    values = similarity_of(precise, fixed.double(), window, 1e-3)
    values[windows].sum().backward()
    correlation = operations(fixed).Correlation(fixed, window, 1e-3)
    gradient, similarity = correlation.gradient(warped, windows=windows)
    assert similarity == pytest.approx(float(values[windows].mean().detach()), rel=1e-4)
    expected = torch_ops.gradient(warped) * precise.grad.float()
    assert torch.allclose(gradient, expected, rtol=1e-3, atol=1e-4 * float(precise.grad.abs().max()))
    nowhere = torch.zeros_like(windows)
    gradient, similarity = correlation.gradient(warped, windows=nowhere)
    assert similarity == 0
    assert not gradient.any()


@pytest.mark.parametrize("radius", [1, 2, 3])
def test_erosion_is_that_of_a_box_and_takes_nothing_off_at_the_border(radius):
    inside = torch.rand(2, 9, 14, generator=torch.Generator().manual_seed(5)) > 0.02
    box = np.ones((2 * radius + 1,) * 3)
    expected = scipy.ndimage.binary_erosion(inside.numpy(), box, border_value=1)
    assert 0 < expected.sum() < inside.sum()
    assert np.array_equal(torch_ops.eroded(inside, radius).numpy(), expected)


def test_what_a_correlation_refuses(backend):
    image = torch.zeros(4, 5, 6)
    for window in (1, 4):
        with pytest.raises(ValueError, match=f"window must be an odd number from 3, got {window}"):
            operations(image).Correlation(image, window, 1e-4)
    with pytest.raises(ValueError, match="both images must have one shape"):
        operations(image).Correlation(image, 3, 1e-4).gradient(torch.zeros(4, 5, 7))


def test_slabs_change_nothing(monkeypatch):
    warped, fixed, mask = texture(*SHAPE), texture(*SHAPE, seed=1), (texture(*SHAPE, seed=2) > 0.5).float()
    field = torch.stack((warped, fixed, mask))

    def results() -> list[torch.Tensor | float]:
        correlation = torch_ops.Correlation(fixed, 5, 1e-4)
        return [*correlation.gradient(warped, mask), *correlation.force(warped), *torch_ops.smooth(field, 0.9)]

    whole = results()
    monkeypatch.setattr(torch_ops, "_SLAB_VOXELS", 1)
    for one, other in zip(whole, results(), strict=True):
        assert torch.allclose(torch.as_tensor(one), torch.as_tensor(other), rtol=1e-5, atol=1e-7)


def test_smoothing_is_a_normalised_gaussian(backend):
    impulse = torch.zeros(3, 15, 17, 19)
    impulse[1, 7, 8, 9] = 2.0
    smoothed, longest = operations(impulse).smooth(impulse, 0.9)
    one_step = float(torch.exp(torch.tensor(-1 / (2 * 0.9**2))))
    assert float(smoothed[1, 7, 8, 10] / smoothed[1, 7, 8, 9]) == pytest.approx(one_step, rel=1e-5)
    assert float(smoothed[1, 6, 7, 8] / smoothed[1, 7, 8, 9]) == pytest.approx(one_step**3, rel=1e-5)
    assert float(smoothed.sum()) == pytest.approx(2.0, rel=1e-5)
    assert longest == pytest.approx(float(smoothed[1, 7, 8, 9]))
    constant, _ = operations(impulse).smooth(torch.ones(3, 9, 11, 13), 0.9)
    assert torch.allclose(constant, torch.ones(()))


def test_the_gradient_points_uphill(backend):
    """A small step along the gradient raises the similarity by its squared length times the step."""
    fixed = texture(*SHAPE)
    moving = texture(*SHAPE, seed=3) * 0.3 + fixed
    still = torch.zeros(3, *SHAPE)
    similarity = LocalCorrelation(warper(moving), fixed, window=5, epsilon=1e-3)
    gradient, before = similarity.gradient(still)
    inner = gradient * 0
    inner[:, 4:-4, 4:-4, 4:-4] = gradient[:, 4:-4, 4:-4, 4:-4]
    step = 1e-2 / float(inner.norm(dim=0).max())
    _, after = similarity.gradient(step * inner)
    expected = step * float((inner * gradient).sum()) / fixed.numel()
    assert after - before == pytest.approx(expected, rel=0.2)


@pytest.mark.parametrize("cut", [False, True])
def test_both_backends_are_alike(cut):
    if sampling.backend_name() != "numba":
        pytest.skip("needs the package numba (pip install 'LDRCore[fast]')")
    moving = texture(*SHAPE)
    fixed = warper(moving)(bend(SHAPE, 2.0))
    mask = torch.ones(SHAPE)
    mask[:, :6] = 0
    warp = cut_warper(moving, 9) if cut else warper(moving)
    optimised = []
    for name in ("torch", "numba"):
        with sampling.forced(name):
            similarity = LocalCorrelation(warp, fixed, window=5, mask=mask, inside=upper(28) if cut else None)
            optimised.append(optimise(torch.zeros(3, *SHAPE), similarity, Settings(8)))
    assert len(optimised[0].similarity) == len(optimised[1].similarity)
    assert float(optimised[0].displacement.abs().max()) > 0.5
    assert float((optimised[0].displacement - optimised[1].displacement).abs().max()) < SAME_VOX


def test_it_finds_a_displacement_and_does_not_fold(backend):
    moving, true = texture(*SHAPE), bend(SHAPE, 2.5)
    fixed = warper(moving)(true)
    similarity = LocalCorrelation(warper(moving), fixed)
    optimised = optimise(torch.zeros(3, *SHAPE), similarity, Settings(60, stall=0)).displacement
    inner = (slice(None), *[slice(6, -6)] * 3)
    before, after = (float((u - true)[inner].norm(dim=0).mean()) for u in (torch.zeros_like(true), optimised))
    assert after < 0.35 * before
    assert spatial.folding_count(optimised[None]) == 0


def test_constant_images_leave_everything_as_it_was(backend):
    for level in (0.0, 0.5):
        flat = torch.full(SHAPE, level)
        for moving, fixed in ((flat, flat), (flat, texture(*SHAPE)), (texture(*SHAPE), flat)):
            gradient, value = LocalCorrelation(warper(moving), fixed).gradient(torch.zeros(3, *SHAPE))
            assert bool(gradient.isfinite().all())
            assert float(gradient[:, 3:-3, 3:-3, 3:-3].abs().max()) < 1e-4
            assert level > 0 or value == 0  # outside of the grid lie zeros
    start = bend(SHAPE, 1.0)
    outcome = optimise(start, LocalCorrelation(warper(flat), flat), Settings(5))
    assert bool(outcome.displacement.isfinite().all())


def test_nothing_outside_of_the_mask_drives(backend):
    moving = texture(*SHAPE)
    fixed = warper(moving)(bend(SHAPE, 2.0))
    mask = torch.ones(SHAPE)
    mask[16:] = 0
    gradient, _ = LocalCorrelation(warper(moving), fixed, mask=mask).gradient(torch.zeros(3, *SHAPE))
    assert bool(gradient[:, :16].any())
    assert not gradient[:, 16:].any()


SIMILARITIES = {
    # what reaches into what is unknown: the window; and the window of the moving image with its neighbours' neighbours
    "local-ncc": (lambda *images, **more: LocalCorrelation(*images, window=5, **more), 2, 3),
    "mind": (Mind, 2, 3),
}


@pytest.mark.parametrize("name", SIMILARITIES)
def test_what_lies_outside_of_the_fixed_image_does_not_matter(backend, name):
    similarity, reach, _ = SIMILARITIES[name]
    moving, start = texture(*SHAPE), bend(SHAPE, 1.0)
    found = []
    for beyond in (0.0, 0.7):
        fixed = warper(moving)(bend(SHAPE, 2.0))
        fixed[20:] = beyond
        found.append(similarity(warper(moving), fixed, inside=upper(20)).gradient(start))
    (gradient, value), (other, other_value) = found
    assert value == pytest.approx(other_value, abs=0 if name == "local-ncc" else 2e-3)  # MIND scales by the whole image
    assert torch.allclose(gradient, other, atol=(1e-6 if name == "local-ncc" else 2e-2) * float(gradient.abs().max()))
    assert not gradient[:, 20 if name == "local-ncc" else 20 - reach :].any()
    assert bool(gradient[:, 20 - reach - 1].any())


@pytest.mark.parametrize("name", SIMILARITIES)
def test_what_lies_outside_of_the_moving_image_does_not_drive(backend, name):
    similarity, _, reach = SIMILARITIES[name]
    moving, still = texture(*SHAPE), torch.zeros(3, *SHAPE)
    fixed = warper(moving)(bend(SHAPE, 2.0))
    (gradient, value), (other, _) = (
        similarity(cut_warper(moving, 12, unknown), fixed).gradient(still) for unknown in (-1e9, -3e8)
    )
    assert torch.equal(gradient, other)
    assert 0 < abs(value) < 1
    first = 12 + 1 if name == "local-ncc" else 12 + reach  # a voxel that counts and whose neighbours are known
    assert not gradient[:, :first].any()
    assert bool(gradient[:, first].any())


@pytest.mark.parametrize("name", SIMILARITIES)
def test_a_cut_through_equal_images_moves_nothing(backend, name):
    similarity, _, _ = SIMILARITIES[name]
    image = texture(*SHAPE)
    fixed = torch.where(upper(24), image, 0.0)
    similarity = similarity(cut_warper(image, 10), fixed, inside=upper(24))
    optimised = optimise(torch.zeros(3, *SHAPE), similarity, Settings(10, stall=0))
    assert float(optimised.displacement.abs().max()) < 0.02


def test_an_image_goes_on_as_air_beyond_air_and_is_unknown_beyond_tissue():
    data = torch.full((1, 1, 4, 5, 6), 0.5)
    data[..., 0] = 0.1
    to_lps = np.diag([2.0, 2.0, 2.0, 1.0])
    to_lps[:3, 3] = 10, 20, 30
    known = preprocess.continued(Volume(data, to_lps))
    index = known.from_lps @ np.array([10.0, 20.0, 30.0, 1.0])
    assert index.tolist() == [1, 1, 1, 1]
    along = np.array([[0, 0, 0, 2], [0, 0, 0, 3], [0, 0, 1, 0], [0, 0, 0, 1]], dtype=float)  # row x from x = 0 on
    line = sampling.on_lattice(known.data[0, 0], (1, 1, 12), along, padding="border")[0, 0]
    assert line[:7].tolist() == pytest.approx([0, 0.1, 0.5, 0.5, 0.5, 0.5, 0.5])
    assert bool((line[7:] < 0).all())
    along[2, 3] = -3.0
    assert sampling.on_lattice(known.data[0, 0], (1, 1, 4), along, padding="border")[0, 0].tolist()[:4] == [0, 0, 0, 0]
    along[2, 3] = 6.001  # past the last voxel by a thousandth
    assert float(sampling.on_lattice(known.data[0, 0], (1, 1, 1), along, padding="border")) < 0


def test_what_options_allow_is_what_the_stage_offers():
    assert tuple(refine.PLANS) == options.REFINEMENTS


def test_no_iterations_change_nothing():
    start = bend(SHAPE, 1.0)
    outcome = optimise(start, LocalCorrelation(warper(texture(*SHAPE)), texture(*SHAPE)), Settings(0))
    assert outcome.displacement is start
    assert outcome.similarity == []


def test_it_stops_when_the_similarity_stalls():
    image = texture(*SHAPE)
    outcome = optimise(torch.zeros(3, *SHAPE), LocalCorrelation(warper(image), image), Settings(50, patience=3))
    assert len(outcome.similarity) <= 5


def test_it_never_returns_what_was_measured_to_be_worse():
    image = texture(*SHAPE)
    start = torch.zeros(3, *SHAPE)
    harmful = Settings(6, step=20.0, sigma_update=0.0, sigma_total=0.0, stall=-1e9)
    outcome = optimise(start, LocalCorrelation(warper(image), image), harmful)
    assert outcome.similarity[0] == max(outcome.similarity)
    assert torch.equal(outcome.displacement, start)


def test_progress_is_told_and_can_cancel():
    moving = texture(*SHAPE)
    similarity = LocalCorrelation(warper(moving), warper(moving)(bend(SHAPE, 2.0)))
    fractions: list[float] = []
    optimise(torch.zeros(3, *SHAPE), similarity, Settings(4), progress=fractions.append)
    assert fractions == [0.25, 0.5, 0.75, 1.0]

    class CancelledError(Exception):
        pass

    def cancel(fraction: float) -> None:
        raise CancelledError

    with pytest.raises(CancelledError):
        optimise(torch.zeros(3, *SHAPE), similarity, Settings(4), progress=cancel)


def test_a_gaussian_keeps_a_constant_displacement_and_tells_the_longest_vector(backend):
    from LDRCore.refinement.backend import operations

    constant = torch.ones(3, 9, 8, 7) * torch.tensor([1.0, 2.0, 2.0]).view(3, 1, 1, 1)
    smoothed, longest = operations(constant).smooth(constant, 1.2)
    assert torch.allclose(smoothed, constant, atol=1e-5)
    assert longest == pytest.approx(3.0, abs=1e-5)
    spike = torch.zeros(3, 15, 15, 15)
    spike[0, 7, 7, 7] = 1.0
    smoothed, _ = operations(spike).smooth(spike, 1.0)
    weights = torch.exp(-(torch.arange(-3.0, 4.0) ** 2) / 2)
    weights /= weights.sum()
    assert torch.allclose(smoothed[0, 7, 7, 4:11], weights * weights[3] ** 2, atol=1e-6)


def test_descriptors_do_not_mind_an_inverted_contrast():
    image = texture(*SHAPE)
    assert mind(image).shape == (12, *SHAPE)
    assert torch.allclose(mind(image), mind(1 - image), atol=1e-4)
    assert 0 <= float(mind(image).min()) <= float(mind(image).max()) <= 1


def test_descriptors_bring_images_of_unlike_contrast_together(backend):
    moving, true = texture(*SHAPE), bend(SHAPE, 2.0)
    fixed = 1 - (2 * warper(moving)(true) - 1).abs()  # not a function of the moving contrast that can be inverted
    optimised = optimise(torch.zeros(3, *SHAPE), Mind(warper(moving), fixed), Settings(40, stall=0)).displacement
    inner = (slice(None), *[slice(6, -6)] * 3)
    before, after = (float((u - true)[inner].norm(dim=0).mean()) for u in (torch.zeros_like(true), optimised))
    assert after < 0.8 * before


@pytest.mark.parametrize("name", ["local-ncc", "mind"])
def test_what_the_fixed_image_does_not_show_drives_neither_similarity(name):
    generator = torch.Generator().manual_seed(0)
    moving, fixed = torch.rand(2, 16, 14, 12, generator=generator)
    inside = torch.ones(16, 14, 12, dtype=torch.bool)
    inside[:8] = False
    level = refine.PLANS["fast"][-1]
    similarity = refine._make_similarity(name, level, lambda u: moving.clone(), fixed, None, inside)
    gradient, _ = similarity.gradient(torch.zeros(3, 16, 14, 12))
    assert not gradient[:, :8].any()
    assert gradient[:, 11:-2, 3:-3, 3:-3].any()
