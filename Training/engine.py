"""What every long run needs, once: resuming, checkpoints, stopping, progress, curves, several processes, precision.

    with engine.Run(settings, {"model": model, "optimizer": optimizer}, rank) as run:
        for step in run:                    # continues where the checkpoint ended
            ...                             # all randomness from (seed, step, index), so a resumed run is the same run
            run.log(step, {"loss": loss})   # a number that is not finite ends the run and leaves the last checkpoint
            run.log_validation(step + 1, figures, "Dice, 3 cascades")  # keeps the checkpoint where this one is highest

Files of a run, NAME being `out` without its suffix: NAME.pt, the last checkpoint; NAME.best.pt, that of the best
validation so far; NAME.curves.jsonl, one JSON object a line. SIGTERM, SIGINT and the time limit save and stop after the
current step. A checkpoint is written under a temporary name and renamed. Several processes: start with torchrun; only
rank 0 writes.
"""

from __future__ import annotations

import dataclasses
import json
import math
import signal
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import distributed, nn
from torch.optim.swa_utils import get_ema_multi_avg_fn
from tqdm import tqdm

from LDRCore.cpu import memory
from LDRCore.distillation import disk
from Training.checkpoints import best_path, read_checkpoint, save_atomically
from Training.config import ConfigError, as_dict, option
from Training.processes import Rank

RECENT = 8  # steps: two rounds of Algorithm 1


class NotFiniteError(ArithmeticError):
    """A loss became NaN or infinite."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class RunSettings:
    """Keys that every training script has."""

    out: Path = option(help="checkpoint to write, and to continue from where it exists")
    steps: int = option(4000, "optimizer steps of the whole run")
    batch: int = option(1, "pairs a step, over all processes together")
    lr: float = option(1e-4, "largest learning rate; warmed up, then lowered along a cosine")
    warmup: int = option(100, "steps until the largest learning rate")
    clip: float = option(5.0, "largest norm of the gradient")
    seed: int = option(1, "start of all randomness")
    device: str = option("auto", '"auto", "cpu", "cuda", "cuda:1" ...')
    precision: str = option("float32", 'of the convolutions: "float32" or "bfloat16" (mixed precision)')
    save_every: int = option(200, "steps between checkpoints")
    minutes: float | None = option(None, "save and stop after so many minutes; start again to go on")
    tensorboard: Path | None = option(None, "folder for curves and pictures")
    picture_every: int = option(500, "steps between pictures in TensorBoard")

    def __post_init__(self) -> None:
        for name in ("steps", "batch", "save_every", "picture_every"):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name} must be at least 1, got {getattr(self, name)}")
        if self.precision not in ("float32", "bfloat16"):
            raise ConfigError(f'precision must be "float32" or "bfloat16", got {self.precision!r}')


def adam(parameters: Iterable[nn.Parameter], lr: float) -> torch.optim.Adam:
    """Adam in its fused form: on a CPU several times faster, which counts for networks of many parameters."""
    return torch.optim.Adam(parameters, lr=lr, fused=True)


def learning_rate(settings: RunSettings, step: int) -> float:
    """Linear warm-up, then a cosine down to a hundredth of the largest rate."""
    ramp = min(1.0, (step + 1) / max(settings.warmup, 1))
    return settings.lr * ramp * max(0.01, 0.5 * (1 + math.cos(math.pi * step / settings.steps)))


def follow(average: nn.Module, model: nn.Module, keep: float, step: int) -> None:
    """Update a moving average of a model's weights, which keeps less of what was in the first steps of a run.

    Args:
        average: a copy of the model, changed.
        model: after an optimizer's step.
        keep: share of the average that stays, below 1.
        step: of the run, from 0.
    """
    update = get_ema_multi_avg_fn(min(keep, (step + 1) / (step + 10)))
    update(list(average.parameters()), list(model.parameters()), step)
    for own, other in zip(average.buffers(), model.buffers(), strict=True):
        own.copy_(other)


class Run:
    """Iterates over the steps of a run; see the top of this file."""

    # what may differ between the two halves of one run
    _FREE = frozenset(
        {"out", "device", "minutes", "tensorboard", "save_every", "picture_every", "cache", "data", "more_data"}
    )

    def __init__(self, settings: RunSettings, parts: Mapping[str, Any], rank: Rank | None = None) -> None:
        """Prepare, and continue a checkpoint at `settings.out`.

        Args:
            settings: the resolved configuration; recorded in every checkpoint.
            parts: everything with `state_dict` that is needed to go on, by name.
            rank: this process.

        Raises:
            ConfigError: the checkpoint was made with another configuration, or cannot be read.
        """
        self.settings, self.parts, self.rank = settings, dict(parts), rank or Rank()
        self.step, self.seconds, self.stopped = 0, 0.0, False
        self._sums: dict[str, list[float]] = {}
        self._waited, self._since = 0.0, 0.0
        self.recent_s: deque[float] = deque(maxlen=RECENT)  # what each of the last steps took
        self.asked_to_stop = False  # by a signal
        self._handlers: dict[int, Any] = {}
        self._board: Any = None
        self.facts: dict[str, Any] = {}
        self.best: dict[str, Any] | None = None  # {"step", "criterion", "value"} of the best validation so far
        self._best_is_new = False
        if self.rank.leads:
            self._require_room()
        best = best_path(settings.out)
        if settings.out.exists():
            self._resume(read_checkpoint(settings.out))
            if best.exists():
                found = read_checkpoint(best)
                self._require_same(found["config"], best)
                self.best = found["best"]
        elif best.exists():
            raise ConfigError(f"a new run must not find a best checkpoint of another one, got {best}: remove it")

    def _require_room(self) -> None:
        """Refuse to begin where the last checkpoint, the best one and a successor would not fit.

        Raises:
            RegistrationError: naming what is needed and what is free.
        """
        tensors = [p for part in self.parts.values() if isinstance(part, nn.Module) for p in part.parameters()]
        size = 3 * sum(t.numel() * t.element_size() for t in tensors)  # Adam keeps two moments of each
        disk.require_free(self.settings.out.absolute(), 3 * size, f"checkpoints of {self.settings.out.name}")

    def _require_same(self, before: Mapping[str, Any], path: Path) -> None:
        """Refuse a checkpoint that was made with another configuration.

        Raises:
            ConfigError: naming the key.
        """
        now = as_dict(self.settings)
        for key in sorted((set(before) | set(now)) - self._FREE):
            if before.get(key) != now.get(key):
                raise ConfigError(
                    f"{key} must be {before.get(key)!r} to continue {path}, got {now.get(key)!r} "
                    "(give another `out` for a new run)"
                )

    def _resume(self, state: dict[str, Any]) -> None:
        self._require_same(state["config"], self.settings.out)
        for name, part in self.parts.items():
            part.load_state_dict(state[name])
        self.step, self.seconds = state["step"], state["seconds"]
        self._since = self.seconds

    def __enter__(self) -> Run:
        memory.keep_freed_blocks()
        for number in (signal.SIGTERM, signal.SIGINT):
            self._handlers[number] = signal.signal(number, self._ask_to_stop)
        if self.settings.tensorboard and self.rank.leads:
            self._board = open_board(self.settings.tensorboard)
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._handlers.items():
            signal.signal(number, handler)
        if self._board:
            self._board.close()

    def _ask_to_stop(self, *_: object) -> None:
        self.asked_to_stop = True

    def __iter__(self) -> Iterator[int]:
        began, before = time.monotonic(), self.seconds
        bar = tqdm(
            total=self.settings.steps, initial=self.step, disable=not self.rank.leads, mininterval=5, unit="step"
        )
        try:
            while self.step < self.settings.steps and not self.stopped:
                step_began = time.monotonic()
                yield self.step
                self.recent_s.append(time.monotonic() - step_began)
                self.step += 1
                self.seconds = before + time.monotonic() - began
                bar.update()
                limit = self.settings.minutes
                over = limit is not None and time.monotonic() - began > 60 * limit
                self.stopped = self._any(self.asked_to_stop or over)
                due = self.step % self.settings.save_every == 0 or self.step == self.settings.steps
                if self.stopped or due or self._best_is_new:
                    self.save()
        finally:
            bar.close()
        if self.stopped and self.rank.leads:
            print(f"stopped after step {self.step} of {self.settings.steps}; start again to go on", flush=True)

    def _any(self, flag: bool) -> bool:
        """Whether any process wants it: all must leave the loop together."""
        if self.rank.count == 1:
            return flag
        device = torch.device("cuda", self.rank.local) if distributed.get_backend() == "nccl" else "cpu"
        wanted = torch.tensor(float(flag), device=device)
        distributed.all_reduce(wanted)
        return bool(wanted > 0)

    def save(self) -> None:
        """Write the checkpoint (rank 0 only), the best one where this is it, and the mean of every term since the last.

        The best one is written second: whatever moment ends this process, the last one is never behind it.
        """
        if not self.rank.leads:
            return
        state: dict[str, Any] = {name: part.state_dict() for name, part in self.parts.items()}
        facts = {"step": self.step, "seconds": self.seconds, "config": as_dict(self.settings), "facts": self.facts}
        save_atomically(state | facts, self.settings.out)
        if self._best_is_new:
            save_atomically(state | facts | {"best": self.best}, best_path(self.settings.out))
            self._best_is_new = False
        if self._sums:
            means = {k: float(f"{sum(v) / len(v):.4g}") for k, v in self._sums.items()}
            waiting = round(self._waited / max(self.seconds - self._since, 1e-9), 4)
            self._waited, self._since = 0.0, self.seconds
            self._write_line({"step": self.step, "seconds": round(self.seconds, 1), "waiting": waiting, **means})
            self._sums.clear()

    def _write_line(self, line: dict[str, Any]) -> None:
        """Add a line to the curves, and print it."""
        text = json.dumps(line)
        path = self.settings.out.with_suffix(".curves.jsonl")
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("a", encoding="utf-8") as file:
            file.write(text + "\n")
        tqdm.write(text)

    def log(self, step: int, terms: Mapping[str, float | None]) -> None:
        """Take the terms of one step: curves, and an end when one of them is not finite.

        Raises:
            NotFiniteError: naming term and step; the last checkpoint stays as it is.
        """
        for name, value in terms.items():
            if value is None:
                continue
            if not math.isfinite(value):
                raise NotFiniteError(
                    f"every loss term must be finite, got {name} = {value} at step {step}; the last checkpoint "
                    f"({self.settings.out}) is untouched: lower lr, or look at the data of this step"
                )
            self._sums.setdefault(name, []).append(value)
            if self._board:
                self._board.add_scalar(f"loss/{name}", value, step)

    def waited(self, seconds: float) -> None:
        """Count time in which a step waited for its batch; the curves show its share as `waiting`."""
        self._waited += seconds

    def is_due(self, step: int, every: int) -> bool:
        """Whether something that is done every so many steps is due after this step; always after the last one."""
        return (step + 1) % every == 0 or step + 1 == self.settings.steps

    def log_validation(self, step: int, figures: Mapping[str, float], criterion: str) -> None:
        """Take validation figures: a line of the curves, and the best checkpoint where the criterion is highest so far.

        The checkpoint is written when the step ends.

        Args:
            step: how many steps the network has trained.
            figures: by name.
            criterion: the name of the one that decides; higher is better, and one that is not finite is never best.
        """
        if not self.rank.leads:
            return
        self._write_line({"step": step, "validation": {k: float(f"{v:.6g}") for k, v in figures.items()}})
        if self._board:
            for name, value in figures.items():
                self._board.add_scalar(f"validation/{name}", value, step)
        value = figures[criterion]
        if math.isfinite(value) and (self.best is None or value > self.best["value"]):
            self.best = {"step": step, "criterion": criterion, "value": value}
            self._best_is_new = True

    def picture(self, step: int, make: Callable[[], Any]) -> None:
        """Show a picture (H, W, 3 in 0..1) in TensorBoard every `picture_every` steps."""
        if self._board and step % self.settings.picture_every == 0:
            self._board.add_image("fixed, moving, warped, grid", make(), step, dataformats="HWC")

    def set_learning_rate(self, step: int, *optimizers: torch.optim.Optimizer) -> None:
        """Set this step's learning rate."""
        for optimizer in optimizers:
            for group in optimizer.param_groups:
                group["lr"] = learning_rate(self.settings, step)


def open_board(folder: Path) -> Any:
    """A TensorBoard writer.

    Raises:
        ConfigError: the package tensorboard is not installed.
    """
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError:
        raise ConfigError("tensorboard needs the package tensorboard (pip install '.[train]'), got none") from None
    return SummaryWriter(str(folder))


def run_script(main: Callable[[], None]) -> None:
    """Run a script's main function; a user's mistake ends in one sentence and exit code 2.

    Anything else keeps its traceback. The process group is left in every case; where nothing failed, by all processes
    together, as one that goes early may end the others.
    """
    import sys

    from LDRCore.errors import RegistrationError
    from Training.data.scan_set import DataError

    try:
        main()
    except (ConfigError, DataError, RegistrationError, NotFiniteError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        raise SystemExit(2) from None
    else:
        if distributed.is_available() and distributed.is_initialized():
            distributed.barrier()
    finally:
        if distributed.is_available() and distributed.is_initialized():
            distributed.destroy_process_group()
