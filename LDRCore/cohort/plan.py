"""What a cohort takes: bytes on disk, memory, and how many workers with how many threads."""

from __future__ import annotations

import dataclasses
import math
import os
import re
import shutil
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

from LDRCore.cohort.pairs import CohortPair
from LDRCore.cohort.settings import CohortSettings
from LDRCore.cpu.memory import BASE, MAX_WORKING_VOXELS, needed_bytes
from LDRCore.errors import RegistrationError
from LDRCore.pipeline.options import resolve_device

_SAMPLED = 50  # pairs whose headers are read
_SMALL_FILES = 40_000  # bytes of report, thumbnail and checksums of a pair
_PICTURE = 700_000  # bytes of overview.png
# bytes a voxel after compression, measured on brain images and rounded up
_WARPED = {1: 0.6, 2: 1.2, 4: 3.7, 8: 7.0}  # by the bytes of a voxel
_JACOBIAN, _DISPLACEMENT, _LABELS = 3.8, 12.0, 0.2
_FIELD = 29.0  # of a transform, a voxel: three numbers of 8 bytes, not compressed; a fifth for grids rounded up
_TAPER = 2 * 6  # voxels that a field is larger than its working grid, along each axis; see `pipeline.dense`
_CONTENTS_READ = 3  # fixed images whose content is measured: .2 to 1 of a field of view
_SAMPLED_VOXELS = 100_000  # of each
_COMPILED_FROM = 30  # pairs: loading numba takes seconds, and saves a third of every pair's


@dataclasses.dataclass(frozen=True)
class Plan:
    """How a cohort runs.

    Attributes:
        workers, threads: processes and the threads of each.
        compiled: whether sampling is compiled.
        pair_bytes: on disk, of a pair, estimated.
        worker_bytes: memory of a worker, estimated; 0 where nothing is known.
    """

    workers: int
    threads: int
    compiled: bool
    pair_bytes: int
    worker_bytes: int


def make_plan(pairs: Sequence[CohortPair], settings: CohortSettings, workers: int | None, threads: int | None) -> Plan:
    """Choose workers and threads, and estimate what a pair takes.

    Measured on 2 cores: two workers with a thread each do most pairs a minute. A thread more a worker than there are
    cores makes all of them several times slower, because the threads wait for one another.

    Raises:
        RegistrationError: numbers below 1, or no pair of the list can be read.
    """
    for name, number in (("workers", workers), ("threads", threads)):
        if number is not None and number < 1:
            raise RegistrationError(f"{name} must be 1 or more, got {number}")
    pair_bytes, worker_bytes = estimate(pairs, settings)
    cores = available_cores()
    if workers is None:
        workers = max(1, cores // (threads or 1))
        if resolve_device(settings.options["device"]) != "cpu":
            workers = 1  # one process keeps a GPU busy
        elif worker_bytes:
            workers = max(1, min(workers, available_memory() // worker_bytes))
        workers = min(workers, len(pairs))
        threads = threads or 1
    threads = threads or max(1, cores // workers)
    return Plan(workers, threads, len(pairs) >= _COMPILED_FROM, pair_bytes, worker_bytes)


def available_cores() -> int:
    """Return how many processors this process may use."""
    try:
        return len(os.sched_getaffinity(0))
    except AttributeError:  # macOS, Windows
        return os.cpu_count() or 1


def available_memory() -> int:
    """Return how many bytes of memory are free, or as many as there can be where the system does not say."""
    free = 1 << 62
    with suppress(OSError, AttributeError):
        found = re.search(r"MemAvailable:\s+(\d+) kB", Path("/proc/meminfo").read_text())
        if found:
            free = 1024 * int(found[1])
    with suppress(OSError, ValueError):  # of a container
        group = Path("/sys/fs/cgroup")
        free = min(free, int((group / "memory.max").read_text()) - int((group / "memory.current").read_text()))
    return max(0, free)


def estimate(pairs: Sequence[CohortPair], settings: CohortSettings) -> tuple[int, int]:
    """Estimate a pair's bytes on disk (mean) and in a worker's memory (most), from the headers of some pairs.

    Raises:
        RegistrationError: none of these can be read; the sentence is that of the first.
    """
    chosen = [pairs[i] for i in sorted({round(k * (len(pairs) - 1) / _SAMPLED) for k in range(_SAMPLED + 1)})]
    sizes, memories, first = [], [], None
    headers: dict[str, _Header] = {}
    shares: dict[str, list[float]] = {}
    for pair in chosen:
        try:
            for path, name in ((pair.fixed, "fixed image"), (pair.moving, "moving image")):
                if path not in headers:
                    headers[path] = _read_header(path, name)
        except RegistrationError as error:
            first = first or error
            continue
        fixed, moving = headers[pair.fixed], headers[pair.moving]
        if pair.fixed not in shares and len(shares) < _CONTENTS_READ:
            shares[pair.fixed] = _content_share(pair.fixed)
        share = shares.get(pair.fixed, [sum(of_axis) / len(shares) for of_axis in zip(*shares.values(), strict=True)])
        sizes.append(_pair_bytes(pair, fixed, moving, settings, share))
        memories.append(_memory(fixed, moving, settings))
    if first is not None and not sizes:
        raise first
    return round(sum(sizes) / len(sizes)), max(memories)


@dataclasses.dataclass(frozen=True)
class _Header:
    size: tuple[int, ...]
    spacing_mm: tuple[float, ...]
    value_bytes: int


def _read_header(path: str, name: str) -> _Header:
    import SimpleITK as sitk

    from LDRCore.io.images import read_header

    header = read_header(Path(path), name)
    bits = re.search(r"(\d+)-bit", sitk.GetPixelIDValueAsString(header.GetPixelID()))
    return _Header(header.GetSize(), header.GetSpacing(), int(bits[1]) // 8 if bits else 1)


def _content_share(path: str) -> list[float]:
    """Return the share of each axis, x first, that the content of an image takes; all of it where it cannot be read."""
    import numpy as np
    import SimpleITK as sitk

    from LDRCore.io.images import load

    try:
        image = load(path, "fixed image")
    except RegistrationError:
        return [1.0, 1.0, 1.0]
    values = sitk.GetArrayViewFromImage(image)
    step = max(1, round((values.size / _SAMPLED_VOXELS) ** (1 / 3)))
    some = values[::step, ::step, ::step].astype(np.float32)
    low, high = np.percentile(some, (1, 99.5))
    bright = np.argwhere(some > low + 0.05 * (high - low))
    if not len(bright):
        return [1.0, 1.0, 1.0]
    first, last = np.percentile(bright, (0.1, 99.9), axis=0)
    return np.minimum((last - first + 1) / some.shape, 1.0)[::-1].tolist()


def _field_voxels(fixed: _Header, settings: CohortSettings, share: Sequence[float]) -> float:
    """Return the voxels of a stored displacement; see `pipeline.dense`."""
    from LDRCore.models.weights import model_info

    if settings.options["kind"] != "deformable":
        return 0.0
    card, options = model_info(settings.options["model"]), settings.options
    grid, networks = card["working_grid"], card["architecture"].get("network", [])
    networks = [networks] if isinstance(networks, dict) else networks
    refined = options.get("refine", "none") != "none" or options.get("refine_steps", 0) > 0
    coarse = networks and all(one.get("head") == "half" or one.get("image_stride", 1) > 1 for one in networks)
    spacing_mm = grid["spacing_mm"] * (2 if coarse and not refined else 1)
    voxels = math.prod(
        (n * s * part + 2 * grid["margin_mm"]) / spacing_mm + _TAPER
        for n, s, part in zip(fixed.size[:3], fixed.spacing_mm[:3], share, strict=False)  # a flat image has two axes
    )
    return min(voxels, MAX_WORKING_VOXELS)


def _pair_bytes(
    pair: CohortPair, fixed: _Header, moving: _Header, settings: CohortSettings, share: Sequence[float]
) -> float:
    voxels, field = math.prod(fixed.size), _field_voxels(fixed, settings, share)
    of_output = {
        "warped": _WARPED.get(moving.value_bytes, 7.0) * voxels,
        "transform": _FIELD * field + 20_000,
        "inverse": 2 * _FIELD * field + 20_000,
        "jacobian": _JACOBIAN * voxels,
        "displacement": _DISPLACEMENT * voxels,
        "labels": _LABELS * voxels if pair.moving_labels else 0,
        "picture": _PICTURE,
    }
    return _SMALL_FILES + sum(of_output[name] for name in settings.outputs)


def _memory(fixed: _Header, moving: _Header, settings: CohortSettings) -> int:
    """Return the bytes of a worker: a registration, and the pairs before and after it in memory."""
    from LDRCore.models.weights import model_info

    options = settings.options
    registration = needed_bytes(
        model_info(options["model"]),
        fixed.size[:3],
        fixed.spacing_mm[:3],
        moving.size[:3],
        cascades=options["cascades"],
        refine=options.get("refine", "none") != "none" or options.get("refine_steps", 0) > 0,
        inverse=options["inverse"],
        jacobian="jacobian" in settings.outputs,
    )
    others = (4 * math.prod(fixed.size) + 2 * math.prod(moving.size)) * 4.0
    return int(registration + others + BASE / 4)


def check_disk(out: Path, pairs: int, plan: Plan) -> int:
    """Refuse a disk that cannot hold the outputs of so many pairs.

    Returns:
        The bytes that they take, estimated.

    Raises:
        RegistrationError: fewer bytes are free.
    """
    needed, free = pairs * plan.pair_bytes, free_bytes(out)
    if needed > free:
        raise RegistrationError(
            f"the disk of {out} must hold about {amount(needed)} for {pairs} pairs, got {amount(free)} free"
        )
    return needed


def free_bytes(folder: Path) -> int:
    """Return the free bytes of the disk that a folder is, or will be, on."""
    existing = folder.resolve()
    while not existing.exists():
        existing = existing.parent
    return shutil.disk_usage(existing).free


def amount(count: float) -> str:
    """Return a number of bytes for a person.

    >>> amount(1_230_000)
    '1.2 MB'
    """
    for unit in ("bytes", "kB", "MB", "GB"):
        if count < 1000:
            return f"{count:.3g} {unit}"
        count /= 1000
    return f"{count:.3g} TB"
