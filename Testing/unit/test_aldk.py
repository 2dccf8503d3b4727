"""Algorithm 1: its equations by hand, its schedule, and that a critic really pulls a student to its teacher."""

from __future__ import annotations

import pytest
import torch

from LDRCore.distillation import aldk
from LDRCore.distillation.discriminator import Discriminator

SHAPE = (8, 8, 8)


def test_discriminator_is_figure_four():
    network = Discriminator()
    assert [layer.out_channels for layer in network.layers] == [16, 32, 64, 128, 256]
    assert all(layer.kernel_size == (4, 4, 4) and layer.stride == (2, 2, 2) for layer in network.layers)
    literal = Discriminator(SHAPE, sigmoid=True)
    score = literal(torch.randn(3, 3, *SHAPE))
    assert score.shape == (3,)
    assert ((score > 0) & (score < 1)).all()


@pytest.mark.parametrize(("shape", "layers"), [((4, 9, 9), 1), (SHAPE, 2), ((80, 96, 80), 5), ((40, 48, 40), 4)])
def test_discriminator_fits_any_grid(shape, layers):
    network = Discriminator(shape)
    assert len(network.layers) == layers
    assert network(torch.randn(1, 3, *shape)).shape == (1,)


def test_presets_are_the_papers():
    assert (aldk.CT.n_gen, aldk.CT.beta, aldk.CT.lambda_, aldk.CT.gamma) == (3, 0.1, 1.0, 0.5)
    assert (aldk.MRI.n_gen, aldk.MRI.beta, aldk.MRI.lambda_, aldk.MRI.gamma) == (3, 0.05, 0.9, 0.3)


def test_blend_is_equation_eight():
    teacher, student = torch.ones(1, 3, *SHAPE), torch.full((1, 3, *SHAPE), 3.0)
    assert torch.allclose(aldk.blend(teacher, student, 0.25), torch.tensor(2.5))


def test_gradient_penalty_of_a_linear_score_by_hand():
    """D(phi) = 2 * sum(phi) has gradient 2 everywhere: norm 2 sqrt(n)."""
    phi_hat = torch.zeros(2, 3, 2, 2, 2, requires_grad=True)
    penalty = aldk.gradient_penalty(lambda x: 2 * x.flatten(1).sum(1), phi_hat)
    assert float(penalty.detach()) == pytest.approx((2 * 24**0.5 - 1) ** 2, rel=1e-5)


def test_the_rms_norm_measures_a_score_by_voxel_whatever_the_grid():
    """A score that is three times the mean changes by 3 when every displacement grows by 1 voxel."""
    for n in (2, 4):
        phi_hat = torch.randn(1, 3, n, n, n).requires_grad_()
        penalty = aldk.gradient_penalty(lambda x: 3 * x.flatten(1).mean(1), phi_hat, "rms")
        assert float(penalty.detach()) == pytest.approx((3 - 1) ** 2, rel=1e-5)


def test_the_default_norm_follows_the_objective():
    assert aldk.ALDKSettings(objective="critic").norm == "rms"
    assert aldk.ALDKSettings(objective="paper").norm == "l2"
    assert aldk.ALDKSettings(objective="critic", penalty_norm="l2").norm == "l2"


def test_gradient_penalty_can_be_differentiated_twice():
    torch.manual_seed(0)
    network = Discriminator((4, 4, 4)).double()
    phi_hat = torch.randn(1, 3, 4, 4, 4, dtype=torch.float64, requires_grad=True)
    weight = network.layers[0].weight.detach().clone().requires_grad_()

    def penalty(w: torch.Tensor) -> torch.Tensor:
        def score(x: torch.Tensor) -> torch.Tensor:
            out = torch.nn.functional.conv3d(x, w, network.layers[0].bias, stride=2, padding=1)
            return torch.nn.functional.softplus(out).flatten(1).mean(1)

        return aldk.gradient_penalty(score, phi_hat)

    assert torch.autograd.gradcheck(penalty, (weight,), eps=1e-6, atol=1e-5)


def make(settings: aldk.ALDKSettings, rate: float = 0.05) -> tuple[aldk.ALDKStep, torch.nn.Parameter, Discriminator]:
    torch.manual_seed(0)
    student = torch.nn.Parameter(torch.zeros(1, 3, *SHAPE))
    discriminator = Discriminator(SHAPE, sigmoid=settings.objective == "paper")
    step = aldk.ALDKStep(
        discriminator,
        torch.optim.Adam([student], lr=rate),
        torch.optim.Adam(discriminator.parameters(), lr=1e-3),
        settings,
    )
    return step, student, discriminator


def weights_of(network: torch.nn.Module) -> torch.Tensor:
    return torch.cat([p.detach().flatten() for p in network.parameters()])


@pytest.mark.parametrize("objective", aldk.OBJECTIVES)
def test_every_fourth_iteration_is_adversarial(objective):
    step, student, discriminator = make(aldk.ALDKSettings(objective=objective))
    teacher = torch.randn(1, 3, *SHAPE)
    for iteration in range(8):
        adversarial = iteration in (3, 7)
        assert step.is_adversarial(iteration) == adversarial
        before = weights_of(discriminator)
        report = step(iteration, (student**2).mean(), student, teacher if adversarial else None)
        assert (report.distillation is not None) == adversarial
        assert torch.equal(before, weights_of(discriminator)) != adversarial


def test_student_minimises_equation_six():
    settings = aldk.ALDKSettings(n_gen=0, gamma=0.3)
    step, student, discriminator = make(settings)
    with torch.no_grad():
        student += torch.randn_like(student)
    teacher = torch.randn(1, 3, *SHAPE)
    reconstruction = (student**2).mean()
    gap = (discriminator(student) - discriminator(teacher)).detach()
    expected = 0.3 * reconstruction.item() + 0.7 * float(gap**2)
    assert step(0, reconstruction, student, teacher).student == pytest.approx(expected, rel=1e-4)


def test_a_trained_critic_pulls_the_student_towards_the_teacher():
    """Reconstruction says nothing here, so whatever the student learns comes through the critic."""
    step, student, _ = make(aldk.ALDKSettings(n_gen=0, gamma=0.0), rate=0.02)
    generator = torch.Generator().manual_seed(1)
    teacher = torch.nn.functional.interpolate(torch.randn(1, 3, 2, 2, 2, generator=generator), size=SHAPE)
    far = float((student - teacher).detach().square().mean())
    reports = [step(i, student.sum() * 0, student, teacher) for i in range(200)]
    assert float((student - teacher).detach().square().mean()) < 0.9 * far
    assert all(torch.isfinite(torch.tensor([r.student, r.discriminator, r.penalty])).all() for r in reports)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"objective": "gan"}, "objective must be one of"),
        ({"beta": 1.5}, "beta must lie between 0 and 1, got 1.5"),
        ({"gamma": -0.1}, "gamma must lie between 0 and 1"),
        ({"n_gen": -1}, "n_gen must be 0 or more"),
        ({"lambda_": -1.0}, "lambda_ must be 0 or more"),
        ({"penalty_norm": "max"}, "penalty_norm must be one of .*, got 'max'"),
    ],
)
def test_impossible_settings_are_named(options, message):
    with pytest.raises(ValueError, match=message):
        aldk.ALDKSettings(**options)


def test_wrong_use_is_named():
    step, student, discriminator = make(aldk.ALDKSettings(n_gen=0))
    with pytest.raises(ValueError, match="needs a teacher's deformation, got none"):
        step(0, student.sum(), student, None)
    with pytest.raises(ValueError, match="must lie on the student's grid"):
        step(0, student.sum(), student, torch.zeros(1, 3, 4, 4, 4))
    with pytest.raises(ValueError, match="at least 4 voxels"):
        Discriminator((2, 8, 8))
    with pytest.raises(ValueError, match="must have a sigmoid"):
        aldk.ALDKStep(
            discriminator, step.student_optimizer, step.discriminator_optimizer, aldk.ALDKSettings(objective="paper")
        )
