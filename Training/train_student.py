r"""Train a light student, alone or under a teacher whose deformations were stored by `Training.extract_teacher`.

    python -m Training.train_student --config Training/configs/student-brain-t1.toml --data DIR --out runs/student.pt
    python -m Training.train_student --config ... --data DIR --teacher teacher.h5 --preset mri --objective critic
    python -m Training.train_student --init brain-t1-small --pairs my.csv --steps 300 --out runs/mine.pt     # fine-tune
    torchrun --nproc-per-node 4 -m Training.train_student ... --batch 4

With a teacher this is Algorithm 1 of the paper: `n_gen` iterations on the reconstruction alone, then one with the
adversarial term, in which the discriminator is updated too. `distil` adds the plain difference of field values and
gradients in those iterations. With objective "none" and distil 0 the teacher says only which pairs are trained on: the
same student without a teacher, on the same samples. A run that is started again with the same keys continues.

With `average` near 1 (.998) the weights that are validated and exported are a moving average of the trained ones, which
is steadier than any of them.
"""

from __future__ import annotations

import copy
import dataclasses
import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch

from LDRCore import losses
from LDRCore.distillation.aldk import CT, MRI, ALDKSettings, ALDKStep
from LDRCore.distillation.discriminator import Discriminator
from LDRCore.distillation.teacher_store import TeacherStore
from LDRCore.models import registry, weights
from Training import checkpoints, config, engine, fine_tuning, objectives, processes
from Training.config import option
from Training.pair_settings import PairSettings, defaults
from Training.pairs import PairSource, validation_pairs

PRESETS = {"ct": CT, "mri": MRI}
OBJECTIVES = ("critic", "paper", "none")


@dataclasses.dataclass(frozen=True, kw_only=True)
class StudentSettings(engine.RunSettings, PairSettings, objectives.ModelSettings):
    """Everything a student's run is determined by."""

    out: Path = option(Path("runs/student.pt"), "checkpoint to write and to continue from")
    teacher: Path | None = option(None, "stored teacher deformations; none trains without a teacher")
    teacher_gain: float | None = option(
        None, "use only pairs whose local correlation the teacher raised by more than this; none: all"
    )
    objective: str = option("critic", 'of the discriminator: "critic", "paper" (Eq. 6 and 7 literally) or "none"')
    preset: str = option("mri", 'hyper-parameters of the paper: "mri" or "ct"; the four keys below win over it')
    n_gen: int | None = option(None, "iterations on the reconstruction alone before each adversarial one")
    beta: float | None = option(None, "share of the teacher in phi_hat (Eq. 8)")
    lambda_: float | None = option(None, "weight of the gradient penalty (Eq. 7)")
    gamma: float | None = option(None, "weight of the reconstruction against the distillation (Eq. 6)")
    penalty_norm: str | None = option(None, 'of the penalty: "rms" (default with critic) or "l2" (Eq. 7; with paper)')
    discriminator_lr: float = option(1e-4, "learning rate of the discriminator")
    distil: float = option(0.0, "weight of the difference of field values and gradients from the teacher's")
    average: float = option(0.0, "share that a moving average of the weights keeps in a step; it is what is exported")
    val_every: int = option(1000, "steps between validations")

    def __post_init__(self) -> None:
        for base in StudentSettings.__bases__:
            base.__post_init__(self)
        if not 0 <= self.average < 1:
            raise config.ConfigError(f"average must be at least 0 and below 1, got {self.average}")
        if self.objective not in OBJECTIVES:
            raise config.ConfigError(f"objective must be one of {OBJECTIVES}, got {self.objective!r}")
        if self.preset not in PRESETS:
            raise config.ConfigError(f"preset must be one of {sorted(PRESETS)}, got {self.preset!r}")
        for name, unused in (("distil", 0), ("teacher_gain", None)):
            if getattr(self, name) != unused and self.teacher is None:
                raise config.ConfigError(f"{name} needs a teacher, got {getattr(self, name)} without one")
        self.aldk()

    def aldk(self) -> ALDKSettings:
        """The preset with what was given on top."""
        given = {k: getattr(self, k) for k in ("n_gen", "beta", "lambda_", "gamma") if getattr(self, k) is not None}
        objective = "critic" if self.objective == "none" else self.objective
        return dataclasses.replace(PRESETS[self.preset], objective=objective, penalty_norm=self.penalty_norm, **given)


def train(settings: StudentSettings) -> engine.Run:
    """Run, or continue; the run says how far it came."""
    rank = processes.join_processes(settings.device)
    device = processes.pick_device(settings.device, rank)
    torch.manual_seed(settings.seed)

    model = objectives.build(settings, settings, settings.shape)
    model.to(device, memory_format=torch.channels_last_3d)
    field_shape = model.field_shape(settings.shape)
    optimizer = engine.adam(model.parameters(), settings.lr)
    parts: dict[str, Any] = {"model": model, "optimizer": optimizer}
    exported = model
    if settings.average:
        exported = copy.deepcopy(model)
        parts |= {"model": exported, "trained": model}

    share = rank.share(settings.batch)
    teacher = TeacherStore(settings.teacher) if settings.teacher else None
    keys = None
    if teacher is not None:
        check_teacher(teacher, settings)
        keys = keys_to_use(teacher, settings)
    source = PairSource(
        settings, settings.split, settings.seed, device, labels=settings.dice > 0, teacher=teacher,
        field_shape=field_shape, keys=keys,
    )  # fmt: skip
    validation = validation_pairs(settings, device) if settings.val_split and rank.leads else None

    algorithm: ALDKStep | None = None  # the paper's Algorithm 1
    if teacher is not None and settings.objective != "none":
        discriminator = Discriminator(field_shape, sigmoid=settings.objective == "paper").to(device)
        discriminator_optimizer = engine.adam(discriminator.parameters(), settings.discriminator_lr)
        parts |= {"discriminator": discriminator, "discriminator_optimizer": discriminator_optimizer}

        def before_step(which: torch.optim.Optimizer) -> None:
            if which is optimizer:
                torch.nn.utils.clip_grad_norm_(model.parameters(), settings.clip)
            else:
                processes.average_gradients(discriminator.parameters(), rank)

        algorithm = ALDKStep(discriminator, optimizer, discriminator_optimizer, settings.aldk(), before_step)

    every = settings.aldk().n_gen + 1

    def needs_teacher(step: int) -> bool:
        return teacher is not None and step % every == every - 1

    with engine.Run(settings, parts, rank) as run:
        run.facts = {"architecture": settings.architecture(), "data_identity": source.scans.identity}
        learns_from_it = algorithm is not None or settings.distil > 0  # otherwise only the pairs are the teacher's
        run.facts |= {"teacher": teacher.meta} if teacher is not None and learns_from_it else {}
        run.facts |= fine_tuning.started_from(settings.init)
        if settings.init and validation is not None and run.step == 0:  # what it starts from may stay the best
            figures = objectives.validate(exported, validation)
            run.log_validation(0, figures, objectives.criterion(figures, settings.similarity))
            run.save()
        learner = processes.parallel(model, rank, device)
        for step, batch in source.batches(iter(run), share, needs_teacher):
            run.waited(source.waited_s)
            run.set_learning_rate(step, optimizer)

            output = learner(batch.moving, batch.fixed)
            rng = np.random.default_rng((settings.seed, step, 2**31))
            loss, terms = objectives.reconstruction(settings, output, batch, rng, source.scans.n_labels)
            run.log(step, {"reconstruction": loss.item(), **terms})
            if settings.distil and batch.teacher is not None:
                difference = losses.distillation(output.displacement, batch.teacher)
                run.log(step, {"field_difference": difference.item()})
                loss = loss + settings.distil * difference

            if algorithm is not None:
                # backward, clip and step of the student, and in an adversarial iteration of the discriminator
                report = dataclasses.asdict(algorithm(step, loss, output.displacement, batch.teacher))
                run.log(step, {name: value for name, value in report.items() if name != "reconstruction"})
            else:
                optimizer.zero_grad(set_to_none=True)
                loss.backward()
                torch.nn.utils.clip_grad_norm_(model.parameters(), settings.clip)
                optimizer.step()
            if settings.average:
                engine.follow(exported, model, settings.average, step)

            run.picture(step, lambda batch=batch, output=output: objectives.picture(batch, output.displacement))
            if validation is not None and run.is_due(step, settings.val_every):
                figures = objectives.validate(exported, validation)
                run.log_validation(step + 1, figures, objectives.criterion(figures, settings.similarity))
    if settings.init and rank.leads and not run.stopped:
        print(*fine_tuning.compare(settings, exported, source, validation), sep="\n")
    return run


def check_teacher(teacher: TeacherStore, settings: StudentSettings) -> None:
    """Refuse deformations that were made on another window.

    Raises:
        ConfigError: naming what differs.
    """
    if (teacher.meta.get("initial") == "grid") != (settings.initial == "grid"):  # other canonical windows
        raise config.ConfigError(
            f"the teacher's deformations and the student must both have initial = grid, or neither, got "
            f"{teacher.meta.get('initial')} in {settings.teacher} and {settings.initial}"
        )
    for key, mine in (("shape", list(settings.shape)), ("spacing_mm", settings.spacing_mm)):
        if teacher.meta.get(key) != mine:
            raise config.ConfigError(
                f"the teacher's deformations must have been made with {key} = {mine}, got {teacher.meta.get(key)} "
                f"in {settings.teacher}"
            )


def keys_to_use(teacher: TeacherStore, settings: StudentSettings) -> list[str]:
    """The pairs that are good enough, see `StudentSettings.teacher_gain`.

    Raises:
        ConfigError: there is none, or the store does not say how good its pairs are.
    """
    if settings.teacher_gain is None:
        return teacher.keys
    unknown = [key for key in teacher.keys if not {"lncc", "lncc_start"} <= teacher.quality.get(key, {}).keys()]
    if unknown:
        raise config.ConfigError(
            f"teacher_gain needs the quality of every pair, got none for {unknown[0]!r} in {settings.teacher}"
        )
    rows = teacher.quality
    keys = [key for key in teacher.keys if rows[key]["lncc"] - rows[key]["lncc_start"] > settings.teacher_gain]
    if not keys:
        raise config.ConfigError(
            f"teacher_gain must leave a pair, got {settings.teacher_gain} with {len(teacher)} pairs in "
            f"{settings.teacher}"
        )
    return keys


def from_card(given: dict[str, Any]) -> dict[str, Any]:
    """What `init` already fixes when it names a model: its architecture, working grid and losses."""
    source, found = given.get("init"), defaults(given)
    if not source or checkpoints.is_checkpoint(source):
        return found
    card = weights.model_info(source)
    entries = registry.networks_of(card["architecture"])
    if any(entry != entries[0] for entry in entries) or entries[0].repeat > 1:
        found["stages"] = tuple(objectives.write_stage(entry) for entry in entries)
    found |= {
        "network": entries[-1].name,
        "options": objectives.write_options(entries[-1].options),
        "cascades": card["architecture"]["cascades"],
        "multiplier": card["architecture"].get("multiplier"),
        "spacing_mm": card["working_grid"]["spacing_mm"],
        "initial": "stem",
        "stem": str(source),
    } | fine_tuning.losses_of_card(card, given)
    return found


def main() -> None:
    """Read the configuration and train."""
    train(config.load(StudentSettings, sys.argv[1:], __doc__, from_card))


if __name__ == "__main__":
    engine.run_script(main)
