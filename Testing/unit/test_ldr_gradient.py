"""The network that is fed the gradient of local correlation: what it is fed, what it adds, and cards with repeats."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F

from LDRCore import losses
from LDRCore.cpu import layout
from LDRCore.models import registry, weights
from LDRCore.models.base import smooth
from LDRCore.models.cascade import Cascade
from LDRCore.models.ldr_gradient import LIMIT, LDRGradient, forces
from LDRCore.refinement import torch_ops
from LDRCore.transforms import spatial

SHAPE = (16, 32, 16)
SMALL = {"channels": (8, 8, 8, 8)}


def images(batch: int = 1, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """Smooth images, of which the second is the first one moved by a voxel, with noise."""
    generator = torch.Generator().manual_seed(seed)
    noise = torch.rand(batch, 1, *SHAPE, generator=generator)
    smooth = F.avg_pool3d(F.pad(noise, (2,) * 6, mode="replicate"), 5, stride=1)
    return smooth, smooth.roll(1, 3) + 0.01 * noise


def trained(seed: int = 0, **options) -> LDRGradient:
    """A network whose every weight counts."""
    torch.manual_seed(seed)
    network = LDRGradient(**{**SMALL, **options})
    torch.nn.init.normal_(network.flow.weight, 0, 0.05)
    return network


def by_hand(moving: torch.Tensor, fixed: torch.Tensor, window: int, epsilon: float) -> torch.Tensor:
    """The gradient of one pair, averaged over 2x2x2 voxels, smoothed by (1, 2, 1) / 4, in units of a typical length."""
    w, f = moving[0, 0], fixed[0, 0]
    box = torch.full((1, 1, window, window, window), 1 / window**3)

    def mean(image):
        return F.conv3d(image[None, None], box, padding=window // 2)[0, 0]

    variance = mean(f * f) - mean(f) ** 2 + epsilon
    raw = torch_ops.correlation_force(w, f, mean(f), variance, window, epsilon)[1] * torch_ops.gradient(w)
    coarse = raw.unflatten(3, (-1, 2)).unflatten(2, (-1, 2)).unflatten(1, (-1, 2)).mean((2, 4, 6))
    line = torch.tensor([0.25, 0.5, 0.25])
    kernel = (line.view(3, 1, 1) * line.view(1, 3, 1) * line).expand(3, 1, 3, 3, 3)
    coarse = F.conv3d(F.pad(coarse[None], (1,) * 6, mode="replicate"), kernel, groups=3)
    lengths = coarse.norm(dim=1)
    return coarse * lengths.sum() / lengths.square().sum()


def test_without_weights_the_displacement_is_the_scaled_gradient():
    network = LDRGradient(**SMALL)
    for parameter in network.parameters():
        torch.nn.init.zeros_(parameter)
    with torch.no_grad():
        network.gain.fill_(0.5)
        moving, fixed = images()
        field = network.predict(moving, fixed)
        assert torch.allclose(field, 0.5 * by_hand(moving, fixed, 3, 1e-4), atol=1e-3)
        assert float(field.norm(dim=1).max()) > 0.5  # a typical length is 1, so the longest is longer
        network.flow.bias[3] = 1.0  # of every voxel's own gain
        network.flow.bias[1] = 7.0  # of the second component
        expected = 1.5 * by_hand(moving, fixed, 3, 1e-4) + torch.tensor([0.0, 7.0, 0.0]).view(1, 3, 1, 1, 1)
        assert torch.allclose(network.predict(moving, fixed), expected, atol=1e-3)


def test_a_step_along_the_gradient_raises_the_correlation():
    moving, fixed = images()
    field = by_hand(moving, fixed, 3, 1e-4)
    similarity = []
    for step in (0.0, 0.2):
        warped = spatial.warp(moving, spatial.upsample(step * field, SHAPE), padding="border")
        mean, variance = torch_ops.window_statistics(fixed[0, 0], 3, 1e-4)
        similarity.append(torch_ops.correlation_force(warped[0, 0], fixed[0, 0], mean, variance, 3, 1e-4)[0].mean())
    assert similarity[1] > similarity[0] + 0.01


@pytest.mark.parametrize("level", [0.0, 0.7, 1.0])
def test_constant_patches_have_no_gradient_and_train(level):
    """Patches that are constant in one image, and in both, beside texture: zero inside, finite everywhere."""
    moving, fixed = images(seed=3)
    moving[:, :, :, :16] = level
    fixed[:, :, :8] = 1 - level
    given = forces(moving, fixed, 3, 1e-4)
    fine, coarse = given.limited, given.coarse
    assert torch.equal(fine[:, :, :, :15], torch.zeros_like(fine[:, :, :, :15]))  # the image itself has no slope there
    assert torch.equal(coarse[:, :, :, :6], torch.zeros_like(coarse[:, :, :, :6]))
    assert torch.isfinite(fine).all()
    assert torch.isfinite(coarse).all()
    assert fine[:, :, 10:, 20:].abs().max() > 0.1
    network = trained()
    displacement = spatial.upsample(network(moving, fixed), SHAPE)
    warped = spatial.warp(moving, displacement)
    losses.local_ncc(warped, fixed, 5).backward()
    gradients = [p.grad for p in network.parameters()]
    assert all(torch.isfinite(g).all() for g in gradients)
    assert any(g.abs().max() > 0 for g in gradients)


@pytest.mark.parametrize("value", [0.0, 0.7])
def test_constant_images_have_no_gradient(value):
    """Far from the border, where zeros outside are an edge; black images have none anywhere."""
    constant = torch.full((1, 1, *SHAPE), value)
    given = forces(constant, constant, 3, 1e-4)
    fine, coarse = given.limited, given.coarse
    assert torch.equal(fine[..., 3:-3, 3:-3, 3:-3], torch.zeros_like(fine[..., 3:-3, 3:-3, 3:-3]))
    assert torch.isfinite(coarse).all()
    if value == 0:
        assert not coarse.any()
    assert torch.isfinite(trained().predict(constant, constant)).all()


def test_no_vector_is_longer_than_the_limit_and_contrast_does_not_matter():
    moving, fixed = images()
    given = forces(moving, fixed, 3, 1e-8)
    fine, coarse = given.limited, given.coarse
    assert float(fine.norm(dim=1).max()) == pytest.approx(LIMIT, rel=1e-5)
    for scaled in forces(0.5 * moving, 2 * fixed, 3, 1e-8), forces(moving, 1 - fixed, 3, 1e-8):
        inside = (..., slice(3, -3), slice(3, -3), slice(3, -3))  # zeros outside are not turned round
        assert torch.allclose(scaled.limited[inside], fine[inside], atol=0.05)
    assert torch.allclose(forces(0.5 * moving, 2 * fixed, 3, 1e-8).coarse, coarse, atol=0.01)


def test_a_batch_is_its_pairs_one_by_one():
    network = trained()
    moving, fixed = images(2)
    moving[1] *= 0.3
    with torch.no_grad():
        both = network.predict(moving, fixed)
        each = [network.predict(m[None], f[None]) for m, f in zip(moving, fixed, strict=True)]
    assert torch.allclose(both, torch.cat(each), atol=1e-5)


def test_gradients_reach_every_parameter_and_not_through_the_force():
    network = trained(hidden=4)
    moving, fixed = images()
    moving.requires_grad_()
    network.predict(moving, fixed).square().mean().backward()
    assert all(p.grad is not None and torch.isfinite(p.grad).all() for p in network.parameters())
    assert float(network.gain.grad.abs()) > 0
    given = forces(moving, fixed, 3, 1e-4, 0.9)
    assert not any(t.requires_grad for t in (given.limited, given.coarse, given.smoothed))


@pytest.mark.parametrize(
    "options", [{}, {"up": (8, 8, 4)}, {"channels": (8, 16, 8)}, {"hidden": 8}, {"sigma": 0.9}], ids=str
)
@pytest.mark.parametrize("batch", [1, 2])
def test_the_layout_for_a_cpu_is_the_same_network(options, batch):
    network = trained(**options)
    moving, fixed = images(batch)
    with torch.no_grad():
        plain = network.predict(moving, fixed)
        arranged = layout.arrange_network(network, torch.float32)
        assert type(arranged) is not LDRGradient
        assert torch.allclose(arranged.predict(moving, fixed), plain, atol=1e-5)
        with torch.autocast("cpu", torch.bfloat16):
            half = layout.arrange_network(network, torch.bfloat16).predict(moving, fixed)
    assert half.dtype == torch.float32
    assert 1e-6 < float((half - plain).abs().max()) < 0.02 * float(plain.abs().max())


def test_repeats_apply_one_set_of_weights_again():
    first, again = trained(0), trained(1)
    cascade = Cascade([first, again], repeats=[1, 2], multiplier=1.0)
    moving, fixed = images()
    with torch.no_grad():
        output = cascade.dense(moving, fixed)
        assert [len(cascade), len(output.composed), len(cascade.dense(moving, fixed, 2).composed)] == [3, 3, 2]
        written_out = Cascade([first, again, again], multiplier=1.0).dense(moving, fixed)
    assert torch.equal(output.displacement, written_out.displacement)
    assert len(list(cascade.parameters())) == 2 * len(list(first.parameters()))
    with pytest.raises(ValueError, match="n_cascades must be 1 to 3, got 4"):
        cascade.dense(moving, fixed, 4)


ARCHITECTURE = {
    "network": [
        {"name": "ldr-gradient", "image_stride": 2, **SMALL},
        {"name": "ldr-gradient", "repeat": 8, **SMALL},
    ],
    "cascades": 5,
    "multiplier": 1.0,
}


def test_a_card_with_repeats_round_trips(tmp_path):
    cascade = registry.build_cascade(ARCHITECTURE)
    assert (len(cascade), len(cascade.networks), cascade.repeats, cascade.image_strides) == (5, 2, (1, 4), (2, 1))
    assert (cascade.field_stride, cascade.multiple) == (2, 16)
    grid = {"spacing_mm": 2.0, "margin_mm": 8.0, "stem_spacing_mm": 4.0}
    card = {"name": "mine", "version": "0", "architecture": ARCHITECTURE, "working_grid": grid}
    path = weights.save_model(tmp_path, card, cascade.state_dict())
    loaded = weights.load_cascade(path)
    assert loaded.repeats == (1, 4)
    moving, fixed = images()
    half = registry.build_cascade(ARCHITECTURE)
    half.load_state_dict({k: v.half().float() for k, v in cascade.state_dict().items()})
    with torch.no_grad():
        assert torch.equal(loaded.dense(moving, fixed).displacement, half.dense(moving, fixed).displacement)
        arranged = layout.arrange(loaded, torch.float32)
        assert len(arranged) == 5
        close = arranged.dense(moving, fixed, 4).displacement
    assert torch.allclose(close, half.dense(moving, fixed, 4).displacement, atol=5e-4)


@pytest.mark.parametrize(
    ("network", "cascades", "repeats"),
    [
        ({"name": "ldr-gradient", "repeat": 8}, 3, [3]),
        ([{"name": "ldr-gradient"}, {"name": "ldr-gradient", "repeat": 3}], 4, [1, 3]),
        ([{"name": "ldr-gradient"}, {"name": "ldr-gradient", "repeat": 3}], 1, [1]),
        ({"name": "ldr", "head": "half"}, 2, [1, 1]),
    ],
)
def test_cascades_are_counted_with_repeats(network, cascades, repeats):
    entries = registry.networks_of({"network": network, "cascades": cascades})
    assert [entry.repeat for entry in entries] == repeats


@pytest.mark.parametrize(
    ("network", "message"),
    [
        ({"name": "ldr-gradient", "repeat": 2}, r"one for each of 3 cascades \(repeat counted\), got 2"),
        ({"name": "ldr-gradient", "repeat": 0}, "repeat must be a whole number from 1, got 0"),
        ({"name": "ldr-gradient", "repeat": "often"}, "repeat must be a whole number from 1, got 'often'"),
        ({"name": "ldr-gradient", "repeat": 3, "up": (8, 8)}, "up must be 3 numbers"),
    ],
)
def test_what_is_refused(network, message):
    with pytest.raises(ValueError, match=message):
        registry.build_cascade({"network": network, "cascades": 3})


def test_a_coarse_network_of_the_same_kind_predicts_on_a_coarser_grid():
    """Its displacement is resampled to the finest field, in voxels of that."""

    class Constant(LDRGradient):
        def predict(self, moving, fixed):
            return torch.ones(1, 3, *(n // 2 for n in fixed.shape[2:]))

    coarse, fine = Constant(**SMALL), Constant(**SMALL)
    cascade = Cascade([coarse, fine], image_strides=[2, 1], multiplier=1.0)
    moving, fixed = images()
    output = cascade.dense(moving, fixed)
    ratio = [(n // 2 - 1) / (n // 4 - 1) for n in SHAPE]
    assert output.increments[0].shape == output.composed[0].shape == (1, 3, 4, 8, 4)  # resampled when it is needed
    assert output.increments[1].shape == output.composed[1].shape == (1, 3, 8, 16, 8)
    assert (output.displacement - output.increments[1])[0, :, 2, 3, 2].tolist() == pytest.approx(ratio)
    assert cascade.dense(moving, fixed, 1).displacement[0, :, 2, 3, 2].tolist() == pytest.approx(ratio)


def test_the_cost_is_counted_without_computing():
    cost = registry.cost(registry.build_network("ldr-gradient"), (32, 32, 32))
    # 4x4x4 kernels of 5 images at half size; 3x3x3 ones of 32 channels to three components and a gain
    assert cost.multiply_adds > 16**3 * (64 * 5 * 16 + 27 * 32 * 4)
    assert cost.parameters == sum(p.numel() for p in LDRGradient().parameters())


def test_one_predictor_takes_many_moving_images():
    """What was prepared for the fixed image is not changed by a prediction."""
    network = layout.arrange_network(trained(hidden=8), torch.float32)
    moving, fixed = images()
    with torch.no_grad():
        predict = network.predictor(fixed)
        first = predict(moving)
        assert not torch.allclose(predict(fixed), first, atol=1e-3)
        assert torch.equal(predict(moving), first)
        assert torch.equal(network.predict(moving, fixed), first)
    with pytest.raises(ValueError, match="must both have shape"):
        predict(moving[..., :-1])


def test_a_cascade_prepares_once_for_a_network_that_is_applied_again(monkeypatch):
    prepared = []
    plain = LDRGradient.predictor
    monkeypatch.setattr(LDRGradient, "predictor", lambda self, fixed: prepared.append(self) or plain(self, fixed))
    first, again = trained(0), trained(1)
    Cascade([first, again], repeats=[1, 3]).dense(*images())
    assert prepared == [first, again]


def test_smoothing_spreads_an_impulse_as_a_gaussian_and_keeps_constants():
    impulse = torch.zeros(2, 3, 7, 9, 8)
    impulse[1, 2, 3, 4, 4] = 1
    side = math.exp(-2)  # exp(-d^2 / (2 sigma^2)) at d = 1 for sigma = .5; at d = 2 it is negligible
    line = torch.tensor([0, side, 1, side, 0]) / (1 + 2 * side)
    expected = line[:, None, None] * line[:, None] * line
    for values in (impulse, impulse.clone().requires_grad_()):
        smoothed = smooth(values, 0.5).detach()
        assert torch.allclose(smoothed[1, 2, 1:6, 2:7, 2:7], expected, atol=1e-6)
        assert smoothed.sum() == pytest.approx(1, abs=1e-5)
    assert torch.allclose(smooth(torch.ones(1, 3, 7, 9, 8), 0.9), torch.ones(1), atol=1e-6)


def test_a_cascade_smooths_what_was_composed():
    moving, fixed = images()
    network = trained(sigma=0.9, sigma_total=0.7)
    with torch.no_grad():
        whole = Cascade([network], repeats=[2], multiplier=1).dense(moving, fixed)
        first = smooth(network.predict(moving, fixed), 0.7)
        second = smooth(spatial.compose(first, network.predict(spatial.warp(moving, first), fixed)), 0.7)
    assert torch.allclose(whole.composed[0], first, atol=1e-5)
    assert torch.allclose(whole.displacement, second, atol=1e-4)
    assert not torch.allclose(first, network.predict(moving, fixed), atol=1e-2)
