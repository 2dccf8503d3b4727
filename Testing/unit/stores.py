"""Small teacher stores that several test files write and look at."""

from __future__ import annotations

import itertools
from pathlib import Path

import h5py
import numpy as np

from LDRCore.distillation.teacher_store import TeacherStore, TeacherStoreWriter, pair_key

SHAPE = (5, 6, 7)
META = {"teacher": "ANTs SyN", "spacing_mm": [2.0, 2.0, 2.5], "pairs_sha256": "0f"}
KEYS = [pair_key(f"s{a}", f"s{b}") for a, b in itertools.permutations(range(4), 2)]


def field(key: str) -> np.ndarray:
    """Values that float16 holds exactly, different for each key."""
    k, j, i = np.meshgrid(*[np.arange(n) for n in SHAPE], indexing="ij")
    return np.stack([k + 0.5 * j, -j - 0.25 * i, i * 2.0 + KEYS.index(key)]).astype(np.float32)


def write(path: Path, keys: list[str] = KEYS, **options) -> Path:
    with TeacherStoreWriter(path, SHAPE, META, **options) as writer:
        for key in keys:
            writer.write(key, field(key))
        return writer.finish()


def left(path: Path) -> list[str]:
    """Everything that lies around a store."""
    return sorted(str(p.relative_to(path.parent)) for p in path.parent.rglob("*"))


def check(store: TeacherStore, keys: list[str]) -> None:
    assert store.keys == keys
    assert all(np.array_equal(store.read(key), field(key)) for key in keys)
    assert store.verify() == []


def damage_entry(path: Path, row: int) -> None:
    """Flip one bit in the middle of a compressed chunk."""
    with h5py.File(path) as file:
        data = file["displacement"].id
        info = next(i for i in map(data.get_chunk_info, range(len(KEYS))) if i.chunk_offset[0] == row)
    content = bytearray(path.read_bytes())
    content[info.byte_offset + info.size // 2] ^= 1
    path.write_bytes(content)
