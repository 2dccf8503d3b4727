r"""Run a teacher once over a list of pairs and store its deformations, for `Training.train_student --teacher`.

    python -m Training.extract_teacher --config Training/configs/teacher-brain-t1.toml --data DIR \
        --teacher runs/teacher.pt --n_pairs 1000 --out teacher.h5

The teacher may be a checkpoint of `Training.train_teacher`, a model (name, .pt or .json card), a folder of fields or
transforms made by ANTs, elastix, Slicer ... (FIXED|MOVING or FIXED_MOVING with any suffix that ITK reads, physical
space of the scans' files), or "package.module:function" with (moving, fixed) -> displacement, both (1, 1, D, H, W), in
voxels. The shape and spacing of the window must be those of the student. Stored is what leads from the fixed to the
moving canonical window (see `Training.pairs`), the initial map included, as float16. An extraction that was interrupted
goes on when started again.
"""

from __future__ import annotations

import dataclasses
import hashlib
import importlib
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

from LDRCore.distillation.teacher_store import TeacherStoreWriter
from LDRCore.io.transforms import transform_lattice
from LDRCore.models import registry, weights
from LDRCore.pipeline.model import deploy
from LDRCore.transforms import spatial
from Training import checkpoints, config, engine, processes
from Training.config import ConfigError, option
from Training.pair_settings import PairSettings
from Training.pairs import PairSource
from Training.window_geometry import include_initial

Teacher = Callable[[int, int], torch.Tensor]  # (fixed, moving) scan -> stored displacement (1, 3, d, h, w)
SUFFIXES = (".h5", ".tfm", ".mat", ".xfm", ".nii.gz", ".nii", ".mha", ".nrrd")


@dataclasses.dataclass(frozen=True, kw_only=True)
class ExtractSettings(PairSettings):
    """Everything an extraction is determined by. Keys of a teacher's configuration that do not matter are ignored."""

    teacher: str = option(help='checkpoint, model, folder of transforms, or "module:function"')
    out: Path = option(Path("teacher.h5"), "store to write, or to continue")
    half: bool = option(True, "store at half the window's resolution: an eighth of the size")
    seed: int = option(1, "of the list of pairs")
    device: str = option("auto", '"auto", "cpu", "cuda" ...')


def teacher_of(settings: ExtractSettings, source: PairSource, points: tuple[int, int, int]) -> tuple[str, Teacher]:
    """The teacher and a text that identifies it.

    Raises:
        ConfigError: there is no such teacher, or it does not fit the window.
    """
    path = Path(settings.teacher)
    if path.is_dir():
        return f"transforms of {path.name}", lambda fixed, moving: from_disk(path, source, fixed, moving, points)
    if ":" in settings.teacher and not path.exists():
        module, _, name = settings.teacher.partition(":")
        try:
            function = getattr(importlib.import_module(module), name)
        except (ImportError, AttributeError) as error:
            raise ConfigError(
                f"teacher must be importable as module:function, got {settings.teacher!r} ({error})"
            ) from None
        return settings.teacher, lambda fixed, moving: from_network(function, source, fixed, moving, points)
    if checkpoints.is_checkpoint(settings.teacher):
        state = checkpoints.read_checkpoint(path)
        model = registry.build_cascade(state["facts"]["architecture"])
        model.load_state_dict(state["model"])
        digest = hashlib.sha256(path.read_bytes()).hexdigest()[:16]
        name = f"{state['config']['network']}, {len(model)} cascades, {state['step']} steps, {digest}"
    else:
        card = weights.model_info(settings.teacher)
        model, name = weights.load_cascade(settings.teacher), f"{card['name']} {card['sha256'][:16]}"
        model.stem = None if settings.initial == "stem" else model.stem
    if any(n % model.multiple for n in settings.shape):
        raise ConfigError(
            f"every axis of shape must be a multiple of {model.multiple} for the teacher, got {settings.shape}"
        )
    model = deploy(model, str(source.device), torch.float32)

    def displacement(moving: torch.Tensor, fixed: torch.Tensor) -> torch.Tensor:
        return model(moving, fixed).displacement

    return name, lambda fixed, moving: from_network(displacement, source, fixed, moving, points)


@torch.no_grad()
def from_network(function, source: PairSource, fixed: int, moving: int, points: tuple[int, int, int]) -> torch.Tensor:
    """What (moving, fixed) -> displacement gives on the canonical window, as it is stored."""
    sample = source.make(fixed, moving, np.random.default_rng(0), augment=False)
    displacement = function(sample.moving, sample.fixed)
    if displacement.ndim != 5 or displacement.shape[:2] != (1, 3):
        raise ConfigError(f"a teacher must return (1, 3, d, h, w), got {tuple(displacement.shape)}")
    canonical_from_window = np.linalg.inv(source.window_from_canonical(fixed, moving))
    return include_initial(spatial.upsample(displacement, points), source.settings.shape, canonical_from_window)


def from_disk(folder: Path, source: PairSource, fixed: int, moving: int, points: tuple[int, int, int]) -> torch.Tensor:
    """A transform in physical space (LPS mm, fixed -> moving), as it is stored.

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
    return torch.from_numpy((ended - np.indices(points)).astype(np.float32))[None]


def extract(settings: ExtractSettings) -> Path:
    """Run, or continue; the finished store."""
    device = processes.pick_device(settings.device, processes.Rank())
    source = PairSource(settings, settings.split, settings.seed, device)
    if source.pairs is None:
        raise ConfigError("n_pairs must be given where the data set prescribes no pairs, got none")
    stride = 2 if settings.half else 1
    points = (settings.shape[0] // stride, settings.shape[1] // stride, settings.shape[2] // stride)
    name, teacher = teacher_of(settings, source, points)
    pairs = {source.key(*pair): pair for pair in source.pairs}
    meta = {
        "teacher": name,
        "shape": list(settings.shape),
        "spacing_mm": settings.spacing_mm,
        "initial": settings.initial,
        "stem": settings.stem if settings.initial == "stem" else None,
        "stripped": settings.stripped,
        "data_identity": source.scans.identity,
        "split": settings.split,
    }
    with TeacherStoreWriter(settings.out, points, meta) as writer:
        missing = writer.missing(list(pairs))
        writer.check_space(len(missing))
        for key in tqdm(missing, desc="teacher deformations", mininterval=5):
            writer.write(key, teacher(*pairs[key])[0].cpu().numpy())
        return writer.finish()


def main() -> None:
    """Read the configuration and extract."""
    fields = {f.name for f in dataclasses.fields(ExtractSettings)}
    argv = sys.argv[1:]
    print(extract(config.load(ExtractSettings, argv, __doc__, ignore=lambda key: key not in fields)))


if __name__ == "__main__":
    engine.run_script(main)
