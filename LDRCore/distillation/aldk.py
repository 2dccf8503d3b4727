"""Adversarial learning with distilling knowledge: one step of Algorithm 1, for any student and any teacher.

The teacher appears here only as a displacement: from a network, from a file, from anywhere. No argparse, no layout of
data sets. The paper leaves the discriminator's own objective open; two readings are built:

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
        beta: share of the teacher in phi_hat (Eq. 8); fixed, not drawn.
        lambda_: weight of the gradient penalty (Eq. 7).
        gamma: weight of the reconstruction against the distillation term (Eq. 6).
        objective: "critic" or "paper".
        penalty_norm: by default "rms" with "critic" and "l2" with "paper" (docs/distillation.md says why). "l2": the
            gradient's Euclidean norm is drawn to 1, as in Eq. 7; the score's scale then grows with the root of the
            number of voxels, and so does the student's distillation term against its reconstruction. "rms": scores
            change by at most the root mean square of a change of the deformation, on any grid.
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
        """The penalty's norm, the default resolved."""
        return self.penalty_norm or ("rms" if self.objective == "critic" else "l2")


CT = ALDKSettings(n_gen=3, beta=0.1, lambda_=1.0, gamma=0.5)
MRI = ALDKSettings(n_gen=3, beta=0.05, lambda_=0.9, gamma=0.3)


def blend(teacher: torch.Tensor, student: torch.Tensor, beta: float) -> torch.Tensor:
    """phi_hat = beta * phi_t + (1 - beta) * phi_s (Eq. 8), detached and ready to be differentiated by."""
    return (beta * teacher + (1 - beta) * student).detach().requires_grad_()


def gradient_penalty(
    discriminator: Callable[[torch.Tensor], torch.Tensor], phi_hat: torch.Tensor, norm: str = "l2"
) -> torch.Tensor:
    """Mean of (||grad_phi_hat D(phi_hat)||_2 - 1)^2 over the batch (Eq. 7); differentiable by D's parameters.

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
    """Every term of one iteration, as numbers; None where the iteration had no such term."""

    reconstruction: float
    distillation: float | None = None
    penalty: float | None = None
    student: float | None = None
    discriminator: float | None = None


class ALDKStep:
    """Algorithm 1: n_gen iterations with l_rec, then one with L_adv in which the discriminator is updated too."""

    def __init__(
        self,
        discriminator: Discriminator,
        student_optimizer: torch.optim.Optimizer,
        discriminator_optimizer: torch.optim.Optimizer,
        settings: ALDKSettings,
        before_step: Callable[[torch.optim.Optimizer], None] | None = None,
    ) -> None:
        """Keep what is updated.

        Args:
            discriminator: without sigmoid for "critic", with it for "paper".
            student_optimizer, discriminator_optimizer: over the parameters of the two.
            settings: hyper-parameters.
            before_step: called with an optimizer when its gradients are ready and before they are used: the place to
                clip them, or to average them over processes.
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
            iteration: counted from 0; decides what kind of iteration this is.
            reconstruction: l_rec of the final warped image and whatever regularisation goes with it, scalar.
            student: phi_s, the student's final displacement (B, 3, D, H, W), with its graph.
            teacher: phi_t on the same grid; not needed (None) unless `is_adversarial(iteration)`.

        Raises:
            ValueError: an adversarial iteration without teacher, or grids that differ.
        """
        if not self.is_adversarial(iteration):
            self._update(self.student_optimizer, reconstruction)
            return StepReport(reconstruction.item())
        if teacher is None:
            raise ValueError(f"iteration {iteration} is adversarial and needs a teacher's deformation, got none")
        if teacher.shape != student.shape:
            raise ValueError(
                "the teacher's deformation must lie on the student's grid, "
                f"got {tuple(teacher.shape)} and {tuple(student.shape)}"
            )
        s, d = self.settings, self.discriminator
        phi_hat = blend(teacher, student, s.beta)
        if s.objective == "paper":
            gap = (d(student) - d(teacher)).square().mean()
            penalty = gradient_penalty(d, phi_hat, s.norm)
            distillation = gap + s.lambda_ * penalty
            loss = s.gamma * reconstruction + (1 - s.gamma) * distillation
            self._update(self.student_optimizer, loss, self.discriminator_optimizer)
            value = loss.item()
            return StepReport(reconstruction.item(), distillation.item(), penalty.item(), value, value)
        gap = (d(student) - d(teacher)).square().mean()
        loss = s.gamma * reconstruction + (1 - s.gamma) * gap
        self._update(self.student_optimizer, loss)
        penalty = gradient_penalty(d, phi_hat, s.norm)
        critic = (d(student.detach()) - d(teacher)).mean() + s.lambda_ * penalty
        self._update(self.discriminator_optimizer, critic)
        return StepReport(reconstruction.item(), gap.item(), penalty.item(), loss.item(), critic.item())

    def _update(self, optimizer: torch.optim.Optimizer, loss: torch.Tensor, *also: torch.optim.Optimizer) -> None:
        """One step of the optimizers on a loss. Gradients that reach other parameters are dropped before their use."""
        for each in (self.student_optimizer, self.discriminator_optimizer):
            each.zero_grad(set_to_none=True)
        loss.backward()
        for each in (optimizer, *also):
            if self.before_step is not None:
                self.before_step(each)
            each.step()
