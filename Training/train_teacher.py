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

from Training import config, engine, objectives
from Training.config import option
from Training.pairs import PairSettings, PairSource, defaults, validation_pairs


@dataclasses.dataclass(frozen=True, kw_only=True)
class TeacherSettings(engine.RunSettings, PairSettings, objectives.ModelSettings):
    """Everything a teacher's run is determined by."""

    out: Path = option(Path("runs/teacher.pt"), "checkpoint to write and to continue from")
    val_every: int = option(1000, "steps between validations")

    def __post_init__(self) -> None:
        for base in TeacherSettings.__bases__:
            base.__post_init__(self)


def train(s: TeacherSettings) -> None:
    """Run, or continue."""
    rank = engine.join_processes(s.device)
    device = engine.pick_device(s.device, rank)
    torch.manual_seed(s.seed)
    model = objectives.build(s, s, s.shape).to(device, memory_format=torch.channels_last_3d)
    optimizer = engine.adam(model.parameters(), s.lr)
    share = rank.share(s.batch)
    source = PairSource(s, s.split, s.seed, device, labels=s.dice > 0)
    val = validation_pairs(s, device) if s.val_split and rank.leads else None
    with engine.Run(s, {"model": model, "optimizer": optimizer}, rank) as run:
        run.facts = {"architecture": s.architecture(), "data_identity": source.scans.identity}
        learner = engine.parallel(model, rank, device)
        for step, batch in source.batches(iter(run), share, lambda step: False):
            run.waited(source.waited_s)
            run.set_learning_rate(step, optimizer)
            output = learner(batch.moving, batch.fixed)
            rng = np.random.default_rng((s.seed, step, 2**31))
            loss, terms = objectives.reconstruction(s, output, batch, rng, source.scans.n_labels)
            run.log(step, {"loss": loss.item(), **terms})
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), s.clip)
            optimizer.step()
            run.picture(step, lambda b=batch, o=output: objectives.picture(b, o.displacement))
            if val is not None and ((step + 1) % s.val_every == 0 or step + 1 == s.steps):
                figures = objectives.validate(model, val)
                run.log_validation(step + 1, figures, objectives.criterion(figures))


def main() -> None:
    """Read the configuration and train."""
    train(config.load(TeacherSettings, sys.argv[1:], __doc__, defaults))


if __name__ == "__main__":
    engine.run_script(main)
