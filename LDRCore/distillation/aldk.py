"""Adversarial learning with distilling knowledge: one step of Algorithm 1, for any student and any teacher.

The teacher appears here only as a displacement, from a network, a file or another program. The paper does not define
the discriminator's own objective; there are two:

- "critic" (default): WGAN-GP. The discriminator minimises ``D(phi_s) - D(phi_t) + lambda * penalty``, the student
  minimises ``gamma * l_rec + (1 - gamma) * (D(phi_s) - D(phi_t))^2``.
- "paper": Eq. 6 and 7 as printed. Student and discriminator both minimise
  ``gamma * l_rec + (1 - gamma) * ((D(phi_s) - D(phi_t))^2 + lambda * penalty)``, with the sigmoid of Fig. 4.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch

from LDRCore.distillation.discriminator import Discriminator

OBJECTIVES = ("critic", "paper")
NORMS = ("l2", "rms")


@dataclass(frozen=True)
class ALDKSettings:
    """Hyper-parameters of Algorithm 1 (paper, section III-D and IV).

    Attributes:
        n_gen: generator iterations with l_rec alone before each adversarial one.
        beta: weight of the teacher in phi_hat (Eq. 8); fixed, not drawn at random.
        lambda_: weight of the gradient penalty (Eq. 7).
        gamma: weight of the reconstruction against the distillation term (Eq. 6).
        objective: "critic" or "paper".
        penalty_norm: by default "rms" with "critic" and "l2" with "paper" (docs/distillation.md says why). "l2": the
            penalty pulls the gradient's Euclidean norm to 1, as in Eq. 7; the score's scale, and with it the weight of
            the distillation term, then grows with the root of the number of voxels. "rms": a change of the deformation
            changes the score by at most its root mean square, on any grid.
    """

    n_gen: int = 3
    beta: float = 0.1
    lambda_: float = 1.0
    gamma: float = 0.5
    objective: str = "critic"
    penalty_norm: str | None = None

    def __post_init__(self) -> None:
        if self.objective not in OBJECTIVES:
            raise ValueError(f"objective must be one of {OBJECTIVES}, got {self.objective!r}")
        if self.penalty_norm not in (None, *NORMS):
            raise ValueError(f"penalty_norm must be one of {NORMS}, got {self.penalty_norm!r}")
        if self.n_gen < 0:
            raise ValueError(f"n_gen must be 0 or more, got {self.n_gen}")
        for name in ("beta", "gamma"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"{name} must lie between 0 and 1, got {getattr(self, name)}")
        if self.lambda_ < 0:
            raise ValueError(f"lambda_ must be 0 or more, got {self.lambda_}")

    @property
    def norm(self) -> str:
        """The penalty's norm, also where it is the objective's default."""
        return self.penalty_norm or ("rms" if self.objective == "critic" else "l2")


CT = ALDKSettings(n_gen=3, beta=0.1, lambda_=1.0, gamma=0.5)
MRI = ALDKSettings(n_gen=3, beta=0.05, lambda_=0.9, gamma=0.3)


def blend(teacher: torch.Tensor, student: torch.Tensor, beta: float) -> torch.Tensor:
    """Blend two deformations: phi_hat = beta * phi_t + (1 - beta) * phi_s (Eq. 8).

    >>> blend(torch.tensor([1.0]), torch.tensor([0.0]), beta=0.25).detach()
    tensor([0.2500])

    Returns:
        A leaf that requires a gradient, of the shape of both.
    """
    return (beta * teacher + (1 - beta) * student).detach().requires_grad_()


def gradient_penalty(
    discriminator: Callable[[torch.Tensor], torch.Tensor], phi_hat: torch.Tensor, norm: str = "l2"
) -> torch.Tensor:
    """Compute the mean of (||grad_phi_hat D(phi_hat)||_2 - 1)^2 over the batch (Eq. 7).

    The result is differentiable by D's parameters.

    Args:
        discriminator: maps (B, 3, D, H, W) to (B,).
        phi_hat: (B, 3, D, H, W) that requires a gradient.
        norm: see `ALDKSettings.penalty_norm`.
    """
    score = discriminator(phi_hat).sum()
    (gradient,) = torch.autograd.grad(score, phi_hat, create_graph=True)
    length = gradient.flatten(1).norm(dim=1)
    if norm == "rms":  # the dual of the root mean square
        length = length * math.sqrt(phi_hat[0].numel())
    return ((length - 1) ** 2).mean()


@dataclass(frozen=True)
class StepReport:
    """Terms of one iteration, as numbers; None where the iteration had no such term."""

    reconstruction: float
    distillation: float | None = None
    penalty: float | None = None
    student: float | None = None
    discriminator: float | None = None


class ALDKStep:
    """Algorithm 1: n_gen iterations with l_rec, then one with L_adv that also updates the discriminator."""

    def __init__(
        self,
        discriminator: Discriminator,
        student_optimizer: torch.optim.Optimizer,
        discriminator_optimizer: torch.optim.Optimizer,
        settings: ALDKSettings,
        before_step: Callable[[torch.optim.Optimizer], None] | None = None,
    ) -> None:
        """Keep the discriminator and the optimizers.

        Args:
            discriminator: without sigmoid for "critic", with it for "paper".
            student_optimizer, discriminator_optimizer: over the parameters of the two.
            settings: hyper-parameters.
            before_step: called with an optimizer when its gradients are computed and before its step, to clip them or
                to average them over processes.
        """
        if discriminator.sigmoid != (settings.objective == "paper"):
            raise ValueError(
                f'the discriminator must have a sigmoid for "paper" and none for "critic", got sigmoid='
                f"{discriminator.sigmoid} for {settings.objective!r}"
            )
        self.discriminator = discriminator
        self.student_optimizer = student_optimizer
        self.discriminator_optimizer = discriminator_optimizer
        self.settings = settings
        self.before_step = before_step

    def is_adversarial(self, iteration: int) -> bool:
        """Whether an iteration (counted from 0) needs the teacher's deformation."""
        return iteration % (self.settings.n_gen + 1) == self.settings.n_gen

    def __call__(
        self,
        iteration: int,
        reconstruction: torch.Tensor,
        student: torch.Tensor,
        teacher: torch.Tensor | None,
    ) -> StepReport:
        """Update the student, and in an adversarial iteration the discriminator.

        Args:
            iteration: counted from 0; see `is_adversarial`.
            reconstruction: l_rec of the final warped image with its regularisation, scalar.
            student: phi_s, the student's final displacement (B, 3, D, H, W), with its graph.
            teacher: phi_t on the same grid; not needed (None) unless `is_adversarial(iteration)`.

        Raises:
            ValueError: an adversarial iteration without teacher, or grids that differ.
        """
        if not self.is_adversarial(iteration):
            self._update(reconstruction, self.student_optimizer)
            return StepReport(reconstruction.item())
        if teacher is None:
            raise ValueError(f"iteration {iteration} is adversarial and needs a teacher's deformation, got none")
        if teacher.shape != student.shape:
            raise ValueError(
                "the teacher's deformation must lie on the student's grid, "
                f"got {tuple(teacher.shape)} and {tuple(student.shape)}"
            )
        settings, discriminator = self.settings, self.discriminator
        phi_hat = blend(teacher, student, settings.beta)
        gap = (discriminator(student) - discriminator(teacher)).square().mean()
        if settings.objective == "paper":
            penalty = gradient_penalty(discriminator, phi_hat, settings.norm)
            distillation = gap + settings.lambda_ * penalty
            loss = settings.gamma * reconstruction + (1 - settings.gamma) * distillation
            self._update(loss, self.student_optimizer, self.discriminator_optimizer)
            return StepReport(reconstruction.item(), distillation.item(), penalty.item(), loss.item(), loss.item())
        loss = settings.gamma * reconstruction + (1 - settings.gamma) * gap
        self._update(loss, self.student_optimizer)
        penalty = gradient_penalty(discriminator, phi_hat, settings.norm)
        critic = (discriminator(student.detach()) - discriminator(teacher)).mean() + settings.lambda_ * penalty
        self._update(critic, self.discriminator_optimizer)
        return StepReport(reconstruction.item(), gap.item(), penalty.item(), loss.item(), critic.item())

    def _update(self, loss: torch.Tensor, *optimizers: torch.optim.Optimizer) -> None:
        """Take one step of the optimizers on a loss.

        All gradients are cleared first, because the loss also leaves gradients in parameters that are not updated.
        """
        for optimizer in (self.student_optimizer, self.discriminator_optimizer):
            optimizer.zero_grad(set_to_none=True)
        loss.backward()
        for optimizer in optimizers:
            if self.before_step is not None:
                self.before_step(optimizer)
            optimizer.step()
