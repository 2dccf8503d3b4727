r"""Train a teacher: RCN (affine stem and n base networks, end to end), VTN, VoxelMorph, or any network by name.

    python -m Training.train_teacher --config Training/configs/teacher-brain-t1.toml --data DIR --out runs/teacher.pt
    torchrun --nproc-per-node 4 -m Training.train_teacher --config ... --batch 4

Similarity on the last warped image, smoothness of every dense displacement (paper, section III; RCN). The affine stage
is either trained along (`affine`, losses on determinant and orthogonality) or a stem that exists (`initial = "stem"`).
A run that is started again with the same keys continues. `Training.extract_teacher` stores the fields.
"""

from __future__ import annotations

import dataclasses
import sys
from pathlib import Path

import numpy as np
import torch

from Training import config, engine, objectives, processes
from Training.config import option
from Training.pair_settings import PairSettings, defaults
from Training.pairs import PairSource, validation_pairs


@dataclasses.dataclass(frozen=True, kw_only=True)
class TeacherSettings(engine.RunSettings, PairSettings, objectives.ModelSettings):
    """Everything a teacher's run is determined by."""

    out: Path = option(Path("runs/teacher.pt"), "checkpoint to write and to continue from")
    val_every: int = option(1000, "steps between validations")

    def __post_init__(self) -> None:
        for base in TeacherSettings.__bases__:
            base.__post_init__(self)


def train(settings: TeacherSettings) -> engine.Run:
    """Run, or continue; the run says how far it came."""
    rank = processes.join_processes(settings.device)
    device = processes.pick_device(settings.device, rank)
    torch.manual_seed(settings.seed)

    model = objectives.build(settings, settings, settings.shape)
    model.to(device, memory_format=torch.channels_last_3d)
    optimizer = engine.adam(model.parameters(), settings.lr)

    share = rank.share(settings.batch)
    source = PairSource(settings, settings.split, settings.seed, device, labels=settings.dice > 0)
    validation = validation_pairs(settings, device) if settings.val_split and rank.leads else None

    with engine.Run(settings, {"model": model, "optimizer": optimizer}, rank) as run:
        run.facts = {"architecture": settings.architecture(), "data_identity": source.scans.identity}
        learner = processes.parallel(model, rank, device)
        for step, batch in source.batches(iter(run), share, lambda step: False):
            run.waited(source.waited_s)
            run.set_learning_rate(step, optimizer)

            output = learner(batch.moving, batch.fixed)
            rng = np.random.default_rng((settings.seed, step, 2**31))
            loss, terms = objectives.reconstruction(settings, output, batch, rng, source.scans.n_labels)
            run.log(step, {"loss": loss.item(), **terms})

            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), settings.clip)
            optimizer.step()

            run.picture(step, lambda batch=batch, output=output: objectives.picture(batch, output.displacement))
            if validation is not None and run.is_due(step, settings.val_every):
                figures = objectives.validate(model, validation)
                run.log_validation(step + 1, figures, objectives.criterion(figures, settings.similarity))
    return run


def main() -> None:
    """Read the configuration and train."""
    train(config.load(TeacherSettings, sys.argv[1:], __doc__, defaults))


if __name__ == "__main__":
    engine.run_script(main)
