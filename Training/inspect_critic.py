r"""Look into a discriminator after training: does it tell student from teacher, and where does it pull the student?

    python -m Training.inspect_critic --student runs/critic.pt --teacher teacher.h5 --data DIR

The checkpoint is the one that is named: runs/critic.pt is the last one, runs/critic.best.pt that of the best
validation. Over a few training pairs, on the student's own window and grid, one line of JSON:

- `step`: how many steps the student had trained;
- `score_student`, `score_teacher`: mean scores D(phi_s), D(phi_t); `told_apart`: share of all (student, teacher) score
  pairs in the order that is usual (0.5 is chance);
- `gradient`: mean Euclidean norm of D's gradient at phi_s (near 0: the discriminator is flat there);
- `pull_cosine`: mean cosine between the step that the distillation term asks of phi_s and phi_t - phi_s (1: straight to
  the teacher's field of this pair; 0: unrelated to it);
- `difference_rms_vox`: root mean square of phi_t - phi_s, voxels of the field's grid.
"""

from __future__ import annotations

import dataclasses
import json
import sys
from pathlib import Path

import numpy as np
import torch

from LDRCore.distillation.discriminator import Discriminator
from LDRCore.distillation.teacher_store import TeacherStore
from LDRCore.models import registry
from Training import checkpoints, config, engine
from Training.config import ConfigError, option
from Training.pairs import PairSource
from Training.train_student import StudentSettings


@dataclasses.dataclass(frozen=True, kw_only=True)
class InspectSettings:
    """What is looked at."""

    student: Path = option(help="checkpoint of Training.train_student with a teacher")
    teacher: Path = option(help="the stored deformations that it was trained under")
    data: Path = option(help="the data set that it was trained on")
    pairs: int = option(40, "how many training pairs")
    cache: Path | None = option(Path(".cache"), "folder for what is read once and kept")


def inspect(settings: InspectSettings) -> dict[str, float]:
    """The figures named at the top of this file.

    Raises:
        ConfigError: a student without discriminator.
    """
    state = checkpoints.read_checkpoint(settings.student)
    if "discriminator" not in state:
        raise ConfigError(f"student must have been trained with a discriminator, got none in {settings.student}")
    paths = {"data": settings.data, "cache": settings.cache, "pairs": None}
    paths |= {"teacher": settings.teacher, "out": settings.student}
    run = config.build(StudentSettings, {**state["config"], **paths})
    model = registry.build_cascade(state["facts"]["architecture"])
    model.load_state_dict(state["model"])
    model.eval()
    field_shape = model.field_shape(run.shape)
    discriminator = Discriminator(field_shape, sigmoid=run.objective == "paper")
    discriminator.load_state_dict(state["discriminator"])
    store = TeacherStore(settings.teacher)
    source = PairSource(run, run.split, run.seed, torch.device("cpu"), teacher=store, field_shape=field_shape)
    scores, norms, cosines, differences = [], [], [], []
    for fixed, moving in (source.pairs or [])[: settings.pairs]:
        sample = source.make(fixed, moving, np.random.default_rng((run.seed, fixed, moving)), teacher=True)
        assert sample.teacher is not None
        with torch.no_grad():
            student = model(sample.moving, sample.fixed).displacement
        student.requires_grad_()
        score = discriminator(student)
        with torch.no_grad():
            goal = discriminator(sample.teacher)
        (gradient,) = torch.autograd.grad(score.sum(), student)
        pull = -gradient * torch.sign(score - goal).detach()  # where (D(phi_s) - D(phi_t))^2 falls
        missing = sample.teacher - student.detach()
        scores.append((score.item(), goal.item()))
        norms.append(gradient.norm().item())
        cosines.append(torch.nn.functional.cosine_similarity(pull.flatten(), missing.flatten(), dim=0).item())
        differences.append(missing.square().mean().sqrt().item())
    of_student, of_teacher = np.array(scores).T
    apart = np.mean(of_student[:, None] > of_teacher[None])
    return {
        "step": state["step"],
        "score_student": float(of_student.mean()),
        "score_teacher": float(of_teacher.mean()),
        "told_apart": float(max(apart, 1 - apart)),
        "gradient": float(np.mean(norms)),
        "pull_cosine": float(np.mean(cosines)),
        "difference_rms_vox": float(np.mean(differences)),
    }


def main() -> None:
    """Read the arguments and print the figures."""
    found = inspect(config.load(InspectSettings, sys.argv[1:], __doc__))
    print(json.dumps({k: float(f"{v:.4g}") for k, v in found.items()}))


if __name__ == "__main__":
    engine.run_script(main)
