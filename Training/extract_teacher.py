r"""Run a teacher once over a list of pairs and store its deformations, for `Training.train_student --teacher`.

    python -m Training.extract_teacher --config Training/configs/teacher-brain-t1.toml --data DIR \
        --teacher runs/teacher.pt --n_pairs 1000 --out teacher.h5

The teacher may be a checkpoint of `Training.train_teacher`, a model (name, .pt or .json card), a folder of fields or
transforms made by ANTs, elastix, Slicer ... (FIXED|MOVING or FIXED_MOVING with any suffix that ITK reads, physical
space of the scans' files), or "package.module:function" with (moving, fixed) -> displacement, both (1, 1, D, H, W), in
voxels. The shape and spacing of the window must be those of the student. Stored is what leads from the fixed to the
moving canonical window (see `Training.pairs`), the initial map included, as float16, and beside it how good it is
(`Training.refined_teacher.measure`). An extraction that was interrupted goes on when started again.

`--refine best --refine_overlap 1.5` makes the teacher's displacement better for every single pair, on its images and
the training labels; with a model that is a teacher which needs no training:

    python -m Training.extract_teacher --data DIR --teacher brain-t1-small --refine best --refine_overlap 1.5 \
        --n_pairs 2000 --workers 2 --out teacher.h5
"""

from __future__ import annotations

import dataclasses
import hashlib
import importlib
import multiprocessing
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

from LDRCore.distillation.teacher_store import TeacherStore, TeacherStoreWriter
from LDRCore.io.transforms import transform_lattice
from LDRCore.models import registry, weights
from LDRCore.pipeline.model import deploy
from LDRCore.transforms import spatial
from Training import checkpoints, config, engine, processes
from Training.config import ConfigError, option
from Training.pair_settings import PairSettings
from Training.pairs import PairSource
from Training.refined_teacher import PLANS, measure, refine_displacement
from Training.samples import Sample
from Training.window_geometry import include_initial, remove_initial

Teacher = Callable[[int, int, Sample], torch.Tensor]
"""Fixed scan, moving scan, the pair -> displacement on the window after the initial map, (1, 3, d, h, w)."""
Extracted = tuple[str, np.ndarray, dict[str, float]]
"""Key, stored displacement, quality."""
GROUP = 8  # pairs that a killed extraction loses at most
SUFFIXES = (".h5", ".tfm", ".mat", ".xfm", ".nii.gz", ".nii", ".mha", ".nrrd")


@dataclasses.dataclass(frozen=True, kw_only=True)
class ExtractSettings(PairSettings):
    """Everything an extraction is determined by. Keys of a teacher's configuration that do not matter are ignored."""

    teacher: str = option(help='checkpoint, model, folder of transforms, or "module:function"')
    out: Path = option(Path("teacher.h5"), "store to write, or to continue")
    refine: str = option("none", f"optimise every displacement for its pair: one of {', '.join(PLANS)}")
    refine_overlap: float = option(0.0, "weight of the training labels' soft Dice in that")
    workers: int = option(1, "processes that extract; each takes its share of `threads`")
    threads: int | None = option(None, "of all workers together; none: torch's")
    minutes: float | None = option(
        None, "stop after so many minutes, with a store of what is done; start again to go on"
    )
    half: bool = option(True, "store at half the window's resolution: an eighth of the size")
    seed: int = option(1, "of the list of pairs")
    device: str = option("auto", '"auto", "cpu", "cuda" ...')

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.refine not in PLANS:
            raise ConfigError(f"refine must be one of {tuple(PLANS)}, got {self.refine!r}")
        if self.refine_overlap < 0 or (self.refine_overlap and self.refine == "none"):
            raise ConfigError(f"refine_overlap must be 0 or more, and 0 without refine, got {self.refine_overlap}")
        if self.workers < 1:
            raise ConfigError(f"workers must be at least 1, got {self.workers}")


def teacher_of(settings: ExtractSettings, source: PairSource, points: tuple[int, int, int]) -> tuple[str, Teacher]:
    """The teacher and a text that identifies it.

    Raises:
        ConfigError: there is no such teacher, or it does not fit the window.
    """
    path = Path(settings.teacher)
    if path.is_dir():
        return f"transforms of {path.name}", lambda fixed, moving, _: from_disk(path, source, fixed, moving, points)
    if ":" in settings.teacher and not path.exists():
        module, _, name = settings.teacher.partition(":")
        try:
            function = getattr(importlib.import_module(module), name)
        except (ImportError, AttributeError) as error:
            raise ConfigError(
                f"teacher must be importable as module:function, got {settings.teacher!r} ({error})"
            ) from None
        return settings.teacher, lambda _, __, sample: from_network(function, sample)
    if checkpoints.is_checkpoint(settings.teacher):
        state = checkpoints.read_checkpoint(path)
        model = registry.build_cascade(state["facts"]["architecture"])
        model.load_state_dict(state["model"])
        digest = hashlib.sha256(path.read_bytes()).hexdigest()[:16]
        name = f"{state['config']['network']}, {len(model)} cascades, {state['step']} steps, {digest}"
    else:
        card = weights.model_info(settings.teacher)
        model, name = weights.load_cascade(settings.teacher), f"{card['name']} {card['sha256'][:16]}"
        model.stem = model.stem if settings.initial in ("grid", "centred") else None  # aligned already
    if any(n % model.multiple for n in settings.shape):
        raise ConfigError(
            f"every axis of shape must be a multiple of {model.multiple} for the teacher, got {settings.shape}"
        )
    model = deploy(model, str(source.device), torch.float32)

    def displacement(moving: torch.Tensor, fixed: torch.Tensor) -> torch.Tensor:
        return model(moving, fixed).displacement

    return name, lambda _, __, sample: from_network(displacement, sample)


@torch.no_grad()
def from_network(function: Callable[..., torch.Tensor], sample: Sample) -> torch.Tensor:
    """What (moving, fixed) -> displacement gives on the canonical window."""
    displacement = function(sample.moving, sample.fixed)
    if displacement.ndim != 5 or displacement.shape[:2] != (1, 3):
        raise ConfigError(f"a teacher must return (1, 3, d, h, w), got {tuple(displacement.shape)}")
    return displacement


def from_disk(folder: Path, source: PairSource, fixed: int, moving: int, points: tuple[int, int, int]) -> torch.Tensor:
    """A transform in physical space (LPS mm, fixed -> moving) after the initial map.

    Raises:
        ConfigError: no file for this pair.
    """
    names = source.scans.names[fixed], source.scans.names[moving]
    stems = [folder / f"{names[0]}{mark}{names[1]}" for mark in ("|", "_")]
    found = [p for stem in stems for suffix in SUFFIXES if (p := stem.with_name(stem.name + suffix)).exists()]
    if not found:
        raise ConfigError(f"the folder must hold a transform for every pair, got none for {names} in {folder}")
    shape = source.settings.shape
    scale = np.diag([(n - 1) / (p - 1) for n, p in zip(shape, points, strict=True)] + [1.0])
    sides = [source.scans[k].to_lps @ source.canonical(k) @ scale for k in (fixed, moving)]  # store's grid -> LPS mm
    moved_lps = transform_lattice(found[0], sides[0], points)
    inverse = np.linalg.inv(sides[1])
    ended = np.moveaxis(moved_lps @ inverse[:3, :3].T + inverse[:3, 3], -1, 0)
    stored = torch.from_numpy((ended - np.indices(points)).astype(np.float32))[None].to(source.device)
    return remove_initial(stored, shape, points, source.window_from_canonical(fixed, moving))


class Extraction:
    """The teacher at work on pairs of a data set."""

    def __init__(self, settings: ExtractSettings) -> None:
        """Open the data set and the teacher; initial maps are found pair by pair."""
        self.settings = settings
        device = processes.pick_device(settings.device, processes.Rank())
        self.source = PairSource(settings, settings.split, settings.seed, device, keys=[])
        d, h, w = (n // 2 if settings.half else n for n in settings.shape)
        self.points = d, h, w
        self.name, self._teacher = teacher_of(settings, self.source, self.points)

    def pairs(self) -> dict[str, tuple[int, int]]:
        """Every pair to extract, by its key."""
        pairs = self.source.list_pairs(None)
        if pairs is None:
            raise ConfigError("n_pairs must be given where the data set prescribes no pairs, got none")
        return {self.source.key(*pair): pair for pair in pairs}

    def run(self, fixed: int, moving: int) -> Extracted:
        """Extract one pair."""
        settings, source = self.settings, self.source
        sample = source.make(fixed, moving, np.random.default_rng(0), augment=False)
        displacement = self._teacher(fixed, moving, sample)
        if settings.refine != "none":
            weight = settings.refine_overlap
            n_labels = source.scans.n_labels if weight else 0
            displacement = refine_displacement(displacement, sample, settings.refine, weight, n_labels)
        coarse = spatial.upsample(displacement, self.points)
        canonical_from_window = np.linalg.inv(source.window_from_canonical(fixed, moving))
        stored = include_initial(coarse, settings.shape, canonical_from_window)
        return source.key(fixed, moving), stored[0].cpu().numpy(), measure(coarse, sample)


_worker: Extraction | None = None


def _start_worker(settings: ExtractSettings, threads: int) -> None:
    global _worker
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the process that writes ends the others
    threading.Thread(target=_end_with_parent, daemon=True).start()
    torch.set_num_threads(threads)
    _worker = Extraction(settings)


def _end_with_parent() -> None:
    """End this process when the one that writes is gone: killed, it can end no other."""
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)


def _run_in_worker(pair: tuple[int, int]) -> Extracted:
    assert _worker is not None
    return _worker.run(*pair)


def _results(extraction: Extraction, pairs: list[tuple[int, int]]) -> Iterator[Extracted]:
    """Extract pairs, in their order."""
    settings = extraction.settings
    threads = settings.threads or torch.get_num_threads()
    if settings.workers == 1:
        torch.set_num_threads(threads)
        yield from (extraction.run(*pair) for pair in pairs)
        return
    each = max(1, threads // settings.workers)
    pool = ProcessPoolExecutor(settings.workers, multiprocessing.get_context("spawn"), _start_worker, (settings, each))
    try:
        yield from pool.map(_run_in_worker, pairs)
    except BrokenProcessPool:
        raise ConfigError("every worker must live, got one that ended (of too little memory?); start again") from None
    finally:
        pool.shutdown(cancel_futures=True)


def extract(settings: ExtractSettings) -> Path:
    """Run, or continue; the finished store."""
    extraction = Extraction(settings)
    meta = {
        "teacher": extraction.name,
        "shape": list(settings.shape),
        "spacing_mm": settings.spacing_mm,
        "initial": settings.initial,
        "stem": settings.stem if settings.initial == "stem" else None,
        "stripped": settings.stripped,
        "data_identity": extraction.source.scans.identity,
        "split": settings.split,
    }
    if settings.refine != "none":
        meta |= {"refine": settings.refine, "refine_overlap": settings.refine_overlap}
    pairs = extraction.pairs()
    with TeacherStoreWriter(settings.out, extraction.points, meta, group=GROUP) as writer:
        missing = writer.missing(list(pairs))
        writer.check_space(len(missing))
        bar = tqdm(
            _results(extraction, [pairs[key] for key in missing]),
            desc="teacher deformations",
            total=len(missing),
            mininterval=5,
        )
        began = time.monotonic()
        for key, displacement, quality in bar:
            if np.isfinite(displacement).all() and np.isfinite(list(quality.values())).all():
                writer.write(key, displacement, quality)
            else:  # one pair of thousands; the next start tries it again
                bar.write(f"left out: {key}: the teacher's displacement or its quality is not finite")
            if settings.minutes is not None and time.monotonic() - began > 60 * settings.minutes:
                break
        bar.close()
        return writer.finish()


def _stop(*_: object) -> None:
    """End as Ctrl-C does: what was extracted is written."""
    raise KeyboardInterrupt


def summary(store: TeacherStore) -> str:
    """The mean of every figure of a store's quality, and how many pairs the teacher made better."""
    rows = list(store.quality.values())
    means = {
        name: float(np.mean([row[name] for row in rows if name in row]))
        for name in dict.fromkeys(n for row in rows for n in row)
    }
    better = sum(row["lncc"] > row["lncc_start"] for row in rows)
    figures = ", ".join(f"{name} {value:.4f}" for name, value in means.items())
    return f"{len(store)} pairs, local correlation raised in {better}; means: {figures}"


def main() -> None:
    """Read the configuration and extract."""
    fields = {f.name for f in dataclasses.fields(ExtractSettings)}
    argv = sys.argv[1:]
    settings = config.load(ExtractSettings, argv, __doc__, ignore=lambda key: key not in fields)
    signal.signal(signal.SIGTERM, _stop)
    path = extract(settings)
    print(path, summary(TeacherStore(path)), sep="\n")


if __name__ == "__main__":
    engine.run_script(main)
