"""Teacher deformations on disk: what was written comes back, also after a kill, to any number of readers."""

from __future__ import annotations

import json
import multiprocessing
import pickle
import signal
import subprocess
import sys
import time
from pathlib import Path

import h5py
import numpy as np
import pytest
from stores import KEYS, META, SHAPE, check, damage_entry, field, left, write

from LDRCore import RegistrationError
from LDRCore.distillation import teacher_store
from LDRCore.distillation.teacher_store import TeacherStore, TeacherStoreWriter, pair_key

ROOT = Path(__file__).parents[2]
METHODS = [m for m in ("fork", "spawn") if m in multiprocessing.get_all_start_methods()]


@pytest.fixture
def path(tmp_path) -> Path:
    return tmp_path / "teacher.h5"


# --- what is written comes back


@pytest.mark.parametrize("group", [1, 5, 100])
def test_round_trip(path, group):
    assert write(path, group=group) == path
    assert left(path) == ["teacher.h5"]
    store = TeacherStore(path)
    check(store, KEYS)
    assert (len(store), store.shape, store.meta) == (12, SHAPE, META)
    assert KEYS[3] in store
    assert "s0|s0" not in store
    values = store.read(KEYS[3])
    assert (values.dtype, values.shape) == (np.float32, (3, *SHAPE))
    values[:] = 0  # the caller's own
    check(store, KEYS)


def test_one_pair_and_values_that_do_not_compress(path):
    noise = np.random.default_rng(0).integers(0, 2**15 - 2**11, (3, *SHAPE)).astype(np.uint16).view(np.float16)
    with TeacherStoreWriter(path, SHAPE, {}) as writer:
        writer.write("a|b", noise)
        writer.finish()
    assert np.array_equal(TeacherStore(path).read("a|b"), noise.astype(np.float32))


def test_the_file_can_be_read_without_this_package(path):
    write(path)
    with h5py.File(path) as file:
        index = json.loads(file["index"][()].tobytes())
        assert index == {"keys": KEYS, "meta": META}
        data = file["displacement"]
        assert np.array_equal(data[4], field(KEYS[4]).astype(np.float16))
        assert data.chunks == (1, 3, *SHAPE)
        assert data.shuffle
        assert data.fletcher32
        assert data.compression == "gzip"


@pytest.mark.parametrize(("limit", "worst"), [(16, 1 / 256), (32, 1 / 128), (64, 1 / 64)])
def test_worst_rounding_of_float16(path, limit, worst):
    exact = np.arange(0, limit * 1024 + 1) / 1024  # holds the worst case, half way between two float16 numbers
    values = np.concatenate([exact, -exact, [0.0] * (-2 * len(exact) % 3)]).reshape(3, 1, 1, -1)
    with TeacherStoreWriter(path, values.shape[1:], {}) as writer:
        writer.write("a|b", values)
        writer.finish()
    assert np.abs(TeacherStore(path).read("a|b") - values).max() == worst


def test_two_pairs_never_share_a_key():
    assert pair_key("a", "b") != pair_key("b", "a")
    for names in (("a|b", "c"), ("a", "b|c"), ("", "a")):
        with pytest.raises(RegistrationError, match=r'name in a pair must be a text without "\|", got '):
            pair_key(*names)


# --- killed and taken up again


def compressed(path: Path) -> dict[str, tuple[int, bytes]]:
    store = TeacherStore(path)
    return {key: store.compressed(row) for row, key in enumerate(store.keys)}


def test_resume_after_a_kill(path):
    uninterrupted = compressed(write(path.with_name("other.h5"), group=2))
    first = TeacherStoreWriter(path, SHAPE, META, group=2)
    for key in KEYS[:7]:
        first.write(key, field(key))
    del first  # never left, never finished: the seventh was in memory only
    parts = path.with_name("teacher.h5.parts")
    (parts / "00003.h5.part").write_bytes(b"half of a group")
    path.with_name("teacher.h5.part").write_bytes(b"half of a merge")
    with pytest.raises(RegistrationError, match=r"existing file, got .*teacher\.h5 \(not finished: .*parts holds"):
        TeacherStore(path)

    with TeacherStoreWriter(path, SHAPE, META, group=2) as writer:
        assert sorted(p.name for p in parts.iterdir()) == ["00000.h5", "00001.h5", "00002.h5"]
        assert writer.missing(KEYS) == KEYS[6:]
        assert writer.missing([*KEYS[::-1], KEYS[7]]) == KEYS[:5:-1]
        for key in writer.missing(KEYS):
            writer.write(key, field(key))
        assert writer.missing(KEYS) == []
        writer.finish()
    path.with_name("other.h5").unlink()
    assert left(path) == ["teacher.h5"]
    check(TeacherStore(path), KEYS)
    assert compressed(path) == uninterrupted


def test_a_process_that_dies_loses_one_group_at_most(path):
    code = f"""
import os, signal, numpy as np
from LDRCore.distillation.teacher_store import TeacherStoreWriter
with TeacherStoreWriter({str(path)!r}, {SHAPE}, {META!r}, group=3) as writer:
    for n, key in enumerate({KEYS!r}):
        if n == 8:
            os.kill(os.getpid(), signal.SIGKILL)
        writer.write(key, np.full((3, *{SHAPE}), n))
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=False)
    assert done.returncode < 0
    writer = TeacherStoreWriter(path, SHAPE, META, group=3)
    assert writer.missing(KEYS) == KEYS[6:]
    store = TeacherStore(writer.finish())
    assert [float(store.read(key).max()) for key in store.keys] == [0, 1, 2, 3, 4, 5]


def stop(path: Path) -> None:
    with TeacherStoreWriter(path, SHAPE, META, group=100) as writer:
        for key in KEYS[:3]:
            writer.write(key, field(key))
        raise KeyboardInterrupt


def test_an_error_in_the_callers_code_keeps_what_was_written(path):
    with pytest.raises(KeyboardInterrupt):
        stop(path)
    with TeacherStoreWriter(path, SHAPE, META) as writer:
        assert writer.missing(KEYS) == KEYS[3:]
        writer.finish()
    check(TeacherStore(path), KEYS[:3])


def killed(*_, **__) -> None:
    raise KeyboardInterrupt


def test_a_kill_between_the_merge_and_the_removal_of_groups_does_no_harm(path, monkeypatch):
    with TeacherStoreWriter(path, SHAPE, META, group=2) as writer:
        for key in KEYS[:4]:
            writer.write(key, field(key))
        with monkeypatch.context() as patch:
            patch.setattr(Path, "unlink", killed)
            with pytest.raises(KeyboardInterrupt):
                writer.finish()
    assert len(left(path)) == 4  # the store, the folder, two groups
    with TeacherStoreWriter(path, SHAPE, META, group=2) as writer:
        assert writer.missing(KEYS) == KEYS[4:]
        writer.write(KEYS[4], field(KEYS[4]))
        writer.finish()
    assert left(path) == ["teacher.h5"]
    check(TeacherStore(path), KEYS[:5])


@pytest.fixture
def interruptible():
    """As in a terminal: a shell has those that it starts in the background ignore Ctrl-C."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.usefixtures("interruptible")
def test_ctrl_c_does_not_break_into_the_merge(path, monkeypatch):
    def interrupted(store: TeacherStore, row: int) -> tuple[int, bytes]:
        if store.keys[row] == KEYS[0]:
            time.sleep(0.2)  # the main thread waits by now
            signal.raise_signal(signal.SIGINT)
        return whole(store, row)

    whole = TeacherStore.compressed
    with TeacherStoreWriter(path, SHAPE, META, group=2) as writer:
        for key in KEYS[:2]:
            writer.write(key, field(key))
        writer.write(KEYS[2], field(KEYS[2]))
        with monkeypatch.context() as patch:
            patch.setattr(TeacherStore, "compressed", interrupted)
            with pytest.raises(KeyboardInterrupt):
                writer.finish()
    check(TeacherStore(path), KEYS[:3])


def test_a_finished_store_can_be_asked_again_and_grow(path):
    write(path, KEYS[:3])
    before = path.stat().st_mtime_ns
    with TeacherStoreWriter(path, SHAPE, META) as writer:
        assert writer.missing(KEYS[:3]) == []
        assert writer.finish() == path
    assert path.stat().st_mtime_ns == before
    write(path, KEYS[3:])
    check(TeacherStore(path), KEYS)


def test_a_damaged_entry_can_be_written_again(path):
    write(path)
    damage_entry(path, 4)
    damaged = TeacherStore(path).verify()
    with TeacherStoreWriter(path, SHAPE, META) as writer:
        writer.forget(damaged)
        assert writer.missing(KEYS) == [KEYS[4]]
        writer.write(KEYS[4], field(KEYS[4]))
        writer.finish()
    check(TeacherStore(path), KEYS)


def test_large_fields_make_small_groups(path, monkeypatch):
    monkeypatch.setattr(teacher_store, "PENDING_BYTES", 2 * 2 * 3 * 5 * 6 * 7)
    with TeacherStoreWriter(path, SHAPE, META, group=32) as writer:
        for key in KEYS[:5]:
            writer.write(key, field(key))
        assert len(list(path.with_name("teacher.h5.parts").iterdir())) == 2


# --- many readers


def total(store: TeacherStore, key: str) -> float:
    return float(store.read(key).sum())


@pytest.mark.parametrize("method", METHODS)
def test_processes_read_at_the_same_time(path, method):
    write(path)
    store = TeacherStore(path)
    store.read(KEYS[0])  # open in the parent before the children are made
    order = [KEYS[n] for n in np.random.default_rng(1).integers(0, len(KEYS), 60)]
    with multiprocessing.get_context(method).Pool(3) as pool:
        fields = pool.map(store.read, order, chunksize=1)
    assert all(np.array_equal(values, field(key)) for key, values in zip(order, fields, strict=True))
    check(store, KEYS)


def test_data_loader_workers_read(path):
    torch_data = pytest.importorskip("torch.utils.data")
    write(path)
    store = TeacherStore(path)

    class Fields(torch_data.Dataset):
        def __len__(self) -> int:
            return len(store)

        def __getitem__(self, n: int) -> np.ndarray:
            return store.read(store.keys[n])

    for _ in range(2):  # workers are made anew for every epoch
        loader = torch_data.DataLoader(Fields(), batch_size=5, num_workers=2, multiprocessing_context=METHODS[0])
        batches = [batch.numpy() for batch in loader]
        assert np.array_equal(np.concatenate(batches), np.stack([field(key) for key in KEYS]))


def test_a_pickled_store_opens_its_file_again(path):
    write(path)
    store = TeacherStore(path)
    copy = pickle.loads(pickle.dumps(store))
    store.close()
    check(copy, KEYS)
    check(store, KEYS)


def test_a_store_that_was_replaced_is_not_mixed_up(path):
    write(path)
    copy = pickle.dumps(TeacherStore(path))
    path.unlink()
    write(path, KEYS[::-1])
    with pytest.raises(RegistrationError, match=r"must stay as it was first opened, got .*teacher\.h5 replaced"):
        pickle.loads(copy).read(KEYS[0])


def test_every_pair_may_have_a_quality(path):
    """It survives groups, the merge, a store that grows, and an entry that is written again."""
    qualities = {key: {"lncc": 0.5 + n, "dice": 0.25} for n, key in enumerate(KEYS[:3])}
    with TeacherStoreWriter(path, SHAPE, META, group=2) as writer:
        for key, quality in qualities.items():
            writer.write(key, field(key), quality)
        writer.finish()
    assert TeacherStore(path).quality == qualities
    with TeacherStoreWriter(path, SHAPE, META) as writer:
        writer.forget([KEYS[1]])
        writer.write(KEYS[1], field(KEYS[1]), {"lncc": np.float32(7)})
        writer.write(KEYS[3], field(KEYS[3]))
        writer.finish()
    store = TeacherStore(path)
    check(store, KEYS[:4])
    assert store.quality == {KEYS[0]: qualities[KEYS[0]], KEYS[1]: {"lncc": 7.0}, KEYS[2]: qualities[KEYS[2]]}
    assert TeacherStore(write(path.with_name("plain.h5"))).quality == {}
    with pytest.raises(RegistrationError, match=r"quality of 's0\|s1' must be finite numbers, got \{'lncc': nan\}"):
        TeacherStoreWriter(path.with_name("nan.h5"), SHAPE, META).write(KEYS[0], field(KEYS[0]), {"lncc": np.nan})
