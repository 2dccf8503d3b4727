"""Measure size and speed of the teacher store under each filter; `LDRCore.distillation.hdf5.FILTERS` rests on it.

    python -m Training.measure_store --fields 24 --shape 64 64 64
    python -m Training.measure_store --fields 24 --store runs/teacher.h5

Without a store, smooth random fields are made. Every setting is measured in every round, so that what else the machine
does falls on all of them. Files are read warm (from the system's cache), each process in its own random order. Times
on a busy machine are good for comparing rows of one table, not for more.
"""

from __future__ import annotations

import argparse
import multiprocessing
import statistics
import tempfile
import time
from pathlib import Path

import numpy as np
import torch

from LDRCore.distillation import hdf5
from LDRCore.distillation.teacher_store import TeacherStore

GZIP = {"compression": "gzip"}
SETTINGS: dict[str, dict] = {
    "none": {},
    "lzf": {"compression": "lzf"},
    "shuffle, lzf": {"compression": "lzf", "shuffle": True},
    "gzip 1": {**GZIP, "compression_opts": 1},
    "shuffle, gzip 1": {**GZIP, "compression_opts": 1, "shuffle": True},
    "gzip 4": {**GZIP, "compression_opts": 4},
    "shuffle, gzip 4": {**GZIP, "compression_opts": 4, "shuffle": True},
}


def smooth_field(shape: tuple[int, int, int], seed: int) -> np.ndarray:
    """(3, d, h, w) float16: waves about 8, 4 and 2 voxels wide, of 2, 0.7 and 0.15 voxels (standard deviation)."""
    generator = torch.Generator().manual_seed(seed)
    total = torch.zeros(3, *shape)
    for sigma, size in ((8.0, 2.0), (4.0, 0.7), (2.0, 0.15)):
        reach = torch.arange(-int(3 * sigma), int(3 * sigma) + 1)
        kernel = torch.exp(-0.5 * (reach / sigma) ** 2)
        wave = torch.randn(3, 1, *shape, generator=generator)
        for axis in range(3):
            form = [1, 1, 1, 1, 1]
            form[2 + axis] = len(reach)
            padding = [0, 0, 0]
            padding[axis] = len(reach) // 2
            wave = torch.nn.functional.conv3d(wave, kernel.view(form), padding=padding)
        total += wave[:, 0] * (size / wave.std())
    return total.numpy().astype(np.float16)


def write(path: Path, fields: list[np.ndarray], filters: dict) -> list[float]:
    """Write a store with other filters than its own; milliseconds of each field."""
    _, d, h, w = fields[0].shape
    file, data = hdf5.create(path, (d, h, w), {}, [str(n) for n in range(len(fields))], filters)
    times = []
    with file:
        for row, field in enumerate(fields):
            began = time.perf_counter()
            data[row] = field
            file.flush()  # or HDF5 leaves the compressing to a later field
            times.append(1e3 * (time.perf_counter() - began))
    return times


def read(path: Path, seed: int) -> list[float]:
    """Read every field once in random order; milliseconds of each, opening the file left out."""
    store = TeacherStore(path)
    times = []
    for n in np.random.default_rng(seed).permutation(len(store)):
        began = time.perf_counter()
        store.read(store.keys[n])
        times.append(1e3 * (time.perf_counter() - began))
    return times


def spread(times: list[float]) -> str:
    """Median, smallest and largest."""
    return f"{statistics.median(times):.1f} ({min(times):.1f} to {max(times):.1f})"


def main() -> None:
    """Measure all settings and print a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--store", type=Path, help="take fields from this store instead of making some")
    parser.add_argument("--fields", type=int, default=24)
    parser.add_argument("--shape", type=int, nargs=3, default=(64, 64, 64), metavar=("D", "H", "W"))
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--processes", type=int, default=4, help="readers at once, compared with one")
    parser.add_argument("--folder", type=Path, help="where the files are tried out (default: the system's)")
    a = parser.parse_args()
    if min(a.fields, a.rounds, a.processes, *a.shape) < 1:
        parser.error("numbers must be 1 or more")
    if a.store:
        store = TeacherStore(a.store)
        fields = [store.read(key).astype(np.float16) for key in store.keys[: a.fields]]
    else:
        fields = [smooth_field(tuple(a.shape), seed) for seed in range(a.fields)]
    size: dict[str, float] = {}
    found: dict[str, dict[str, list[float]]] = {name: {"write": [], "one": [], "many": []} for name in SETTINGS}
    context = multiprocessing.get_context("spawn")
    with tempfile.TemporaryDirectory(dir=a.folder) as folder, context.Pool(a.processes) as pool:
        path = Path(folder) / "store.h5"
        for round_ in range(a.rounds):
            for name, filters in SETTINGS.items():
                times = found[name]
                times["write"] += write(path, fields, filters)
                size[name] = path.stat().st_size / len(fields)
                times["one"] += pool.apply(read, (path, round_))
                for some in pool.starmap(read, [(path, 100 * round_ + k) for k in range(a.processes)], chunksize=1):
                    times["many"] += some
    raw = fields[0].nbytes
    print(
        f"{len(fields)} fields of {fields[0].shape[1:]}, float16 {raw / 1e6:.2f} MB each, {a.rounds} rounds; ms a field"
    )
    print(f"| setting | MB | of raw | write | read, 1 process | read, {a.processes} processes |")
    print("|---|---|---|---|---|---|")
    for name, times in found.items():
        columns = " | ".join(spread(times[kind]) for kind in ("write", "one", "many"))
        print(f"| {name} | {size[name] / 1e6:.2f} | {size[name] / raw:.3f} | {columns} |")


if __name__ == "__main__":
    main()
