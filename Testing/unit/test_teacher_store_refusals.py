"""Teacher deformations on disk: damage is found and named; what cannot be stored or read gets one sentence."""

from __future__ import annotations

import errno
import os
import subprocess
import sys
from collections import namedtuple
from pathlib import Path

import h5py
import numpy as np
import pytest
from stores import KEYS, META, SHAPE, check, damage_entry, field, left, write

from LDRCore import RegistrationError
from LDRCore.distillation import disk, hdf5
from LDRCore.distillation.teacher_store import TeacherStore, TeacherStoreWriter, needed_bytes, pair_key

ROOT = Path(__file__).parents[2]


@pytest.fixture
def path(tmp_path) -> Path:
    return tmp_path / "teacher.h5"


# --- damage


def test_a_flipped_bit_is_found_and_named(path):
    write(path)
    damage_entry(path, 5)
    store = TeacherStore(path)
    assert store.verify() == [KEYS[5]]
    with pytest.raises(RegistrationError, match=r"damaged 's1\|s3' in .*teacher\.h5 \(.*"):
        store.read(KEYS[5])
    assert np.array_equal(store.read(KEYS[4]), field(KEYS[4]))


def test_no_flipped_byte_anywhere_gives_wrong_values(path):
    write(path, KEYS[:3])
    whole = path.read_bytes()
    messages, named = [], 0
    for place in range(3, len(whole), 29):
        path.write_bytes(whole[:place] + bytes([whole[place] ^ 0xFF]) + whole[place + 1 :])
        try:
            store = TeacherStore(path)
            damaged = store.verify()
            assert (store.keys, store.meta) == (KEYS[:3], META), place
            good = [key for key in KEYS[:3] if key not in damaged]
            assert all(np.array_equal(store.read(key), field(key)) for key in good), place
            named += len(damaged)
        except RegistrationError as error:
            messages.append(str(error))
    assert named > 10
    assert len(messages) > 10
    assert all("teacher.h5" in message and "\n" not in message for message in messages)


def test_a_truncated_file_is_refused(path):
    whole = write(path).read_bytes()
    for size in (0, 100, len(whole) // 2, len(whole) - 1):
        path.write_bytes(whole[:size])
        with pytest.raises(RegistrationError, match=r"must be a whole HDF5 file, got .*teacher\.h5 \("):
            TeacherStore(path)


def test_a_damaged_group_is_named(path):
    with TeacherStoreWriter(path, SHAPE, META, group=2) as writer:
        for key in KEYS[:4]:
            writer.write(key, field(key))
    part = path.with_name("teacher.h5.parts") / "00001.h5"
    part.write_bytes(part.read_bytes()[:-20])
    with pytest.raises(RegistrationError, match=r"00001\.h5 \(.*\): delete that part to extract its pairs again"):
        TeacherStoreWriter(path, SHAPE, META)
    part.unlink()
    assert TeacherStoreWriter(path, SHAPE, META).missing(KEYS[:4]) == KEYS[2:4]


# --- refusals


def test_what_is_no_store(path, tmp_path, monkeypatch):
    with pytest.raises(RegistrationError, match=r"must be an existing file, got .*teacher\.h5 \(not found\)"):
        TeacherStore(path)
    with pytest.raises(RegistrationError, match=r"must be an existing file, got .* \(a folder\)"):
        TeacherStore(tmp_path)
    path.write_bytes(b"not HDF5")
    with pytest.raises(
        RegistrationError, match=r"must be a whole HDF5 file, got .*teacher\.h5 \(.*signature not found"
    ):
        TeacherStore(path)
    with h5py.File(path, "w") as file:
        file["volume"] = 1
    with pytest.raises(RegistrationError, match=r"this package wrote, got another kind: .*teacher\.h5"):
        TeacherStore(path)
    path.unlink()
    with monkeypatch.context() as patch:
        patch.setattr(hdf5, "VERSION", 2)
        write(path)
    with pytest.raises(RegistrationError, match=r"must have version 1, got version 2: .*teacher\.h5"):
        TeacherStore(path)
    with pytest.raises(RegistrationError, match="must have version 1, got version 2"):
        TeacherStoreWriter(path, SHAPE, META)


def test_an_unknown_key_is_named(path):
    write(path)
    with pytest.raises(RegistrationError, match=r"one of the 12 in the teacher store, got 's9\|s1' \(.*teacher\.h5\)"):
        TeacherStore(path).read("s9|s1")


GOOD = np.zeros((3, *SHAPE), np.float32)
NAN, LARGE = GOOD.copy(), GOOD.copy()
NAN[0, 0, 0, :2] = np.nan, -np.inf
LARGE[1, 2, 3, 4] = -65520.0


@pytest.mark.parametrize(
    ("key", "values", "message"),
    [
        ("a|b", NAN, r"displacement of 'a\|b' must be finite, got 2 values that are not"),
        ("a|b", LARGE, r"displacement of 'a\|b' must fit float16 \(up to 65504 voxels\), got 65520"),
        ("a|b", GOOD[:2], r"'a\|b' must be numbers of shape \(3, 5, 6, 7\), got float32 of shape \(2, 5, 6, 7\)"),
        ("a|b", GOOD[:, :4], r"got float32 of shape \(3, 4, 6, 7\)"),
        ("a|b", GOOD > 0, r"must be numbers .*got bool"),
        ("c|d", GOOD, r"key must be a text that is new to the store, got 'c\|d'"),
        ("", GOOD, "key must be a text that is new to the store, got ''"),
    ],
)
def test_what_cannot_be_written(path, key, values, message):
    with TeacherStoreWriter(path, SHAPE, META) as writer:
        writer.write("c|d", GOOD)
        with pytest.raises(RegistrationError, match=message) as caught:
            writer.write(key, values)
        assert "\n" not in str(caught.value)
        writer.write("e|f", GOOD)
        writer.finish()
    assert TeacherStore(path).keys == ["c|d", "e|f"]


def test_the_largest_number_of_float16_is_kept(path):
    values = GOOD.copy()
    values[0, 0, 0, 0] = 65504
    with TeacherStoreWriter(path, SHAPE, META) as writer:
        writer.write("a|b", values)
        writer.finish()
    assert TeacherStore(path).read("a|b").max() == 65504


@pytest.mark.parametrize("finished", [True, False])
@pytest.mark.parametrize(
    ("shape", "meta", "message"),
    [
        ((5, 6, 8), META, r"shape that is asked for, got \(5, 6, 7\) there, \(5, 6, 8\) now"),
        (SHAPE, {**META, "teacher": "RCN"}, r"meta data that are asked for, got teacher = 'ANTs SyN' there, 'RCN' now"),
        (SHAPE, {**META, "scale": 2}, "got scale = None there, 2 now"),
    ],
)
def test_another_shape_or_meta_is_refused(path, finished, shape, meta, message):
    with TeacherStoreWriter(path, SHAPE, META) as writer:
        writer.write(KEYS[0], field(KEYS[0]))
        if finished:
            writer.finish()
    before = left(path)
    with pytest.raises(RegistrationError, match=message):
        TeacherStoreWriter(path, shape, meta)
    assert left(path) == before


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (((5, 6), {}), r"shape must be three sizes \(d, h, w\), below 4 GB a field, got \(5, 6\)"),
        (((5, 6, 0), {}), r"shape must be three sizes .*got \(5, 6, 0\)"),
        (((900, 900, 900), {}), r"below 4 GB a field, got \(900, 900, 900\)"),
        ((SHAPE, {"a": np.zeros(2)}), "meta must be a dict that JSON can hold, got Object of type ndarray"),
        ((SHAPE, {"a": float("nan")}), "meta must be a dict that JSON can hold, got Out of range float"),
    ],
)
def test_what_no_store_can_have(path, arguments, message):
    with pytest.raises(RegistrationError, match=message):
        TeacherStoreWriter(path, *arguments)
    with pytest.raises(RegistrationError, match="group must be 1 or more, got 0"):
        TeacherStoreWriter(path, SHAPE, META, group=0)
    assert left(path) == []


def test_an_empty_store_is_refused(path):
    with (
        pytest.raises(RegistrationError, match=r"must hold at least one pair, got none for .*teacher\.h5"),
        TeacherStoreWriter(path, SHAPE, META) as writer,
    ):
        writer.finish()
    assert left(path) == []


def test_without_h5py(path, monkeypatch):
    write(path)
    monkeypatch.setitem(sys.modules, "h5py", None)
    for use in (lambda: TeacherStore(path), lambda: TeacherStoreWriter(path, SHAPE, META)):
        with pytest.raises(RegistrationError, match=r"need the package h5py, got none \(pip install h5py\)"):
            use()


def test_importing_it_needs_no_h5py():
    code = "import sys; sys.modules['h5py'] = None; import LDRCore.distillation.teacher_store as t; "
    code += "assert t.TeacherStore; print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, encoding="utf-8", check=True, cwd=ROOT)
    assert done.stdout.strip() == "False"


# --- disks that are full


def free(monkeypatch, size: int) -> None:
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(disk.shutil, "disk_usage", lambda _: usage(10**12, 10**12 - size, size))


def test_space_is_checked_before_starting(path, monkeypatch):
    writer = TeacherStoreWriter(path, (64, 64, 64), META)
    needed = needed_bytes(1000, (64, 64, 64))
    assert needed > 2 * 1000 * 64**3 * 3 * 2  # groups and the merged file, side by side
    free(monkeypatch, needed)
    writer.check_space(1000)
    free(monkeypatch, needed - 1)
    message = r"3,178\.5 MB of disk must be free for 1000 teacher deformations of \(64, 64, 64\), got 3,178\.5 MB at .*"
    with pytest.raises(RegistrationError, match=message):
        writer.check_space(1000)


def test_needed_bytes_is_an_upper_bound(path, monkeypatch):
    """Noise does not compress, and groups of one pair with long names cost most."""
    keys = [pair_key(f"{n}" + 200 * "f", 200 * "m") for n in range(20)]
    parts = path.with_name("teacher.h5.parts")
    with TeacherStoreWriter(path, SHAPE, META, group=1) as writer:
        for key in keys:
            writer.write(key, np.random.default_rng(0).standard_normal((3, *SHAPE)))
        used = sum(4096 * -(-p.stat().st_size // 4096) for p in parts.iterdir())
        used += writer.finish().stat().st_size
    assert used < needed_bytes(20, SHAPE)


def test_a_merge_without_room_keeps_the_groups(path, monkeypatch):
    with TeacherStoreWriter(path, SHAPE, META, group=2) as writer:
        for key in KEYS[:4]:
            writer.write(key, field(key))
        with monkeypatch.context() as patch:
            free(patch, 100)
            with pytest.raises(RegistrationError, match=r"MB of disk must be free for merging 4 pairs, got 0\.0 MB at"):
                writer.finish()
        assert len(left(path)) == 3
        writer.finish()
    check(TeacherStore(path), KEYS[:4])


@pytest.mark.parametrize(
    ("number", "message"),
    [
        (errno.ENOSPC, r"disk must have room for .*00000\.h5, got a full one \(\d+"),
        (errno.EACCES, r"must lie where files can be written, got .*00000\.h5 \(Permission denied\)"),
    ],
)
def test_a_group_that_cannot_be_written_leaves_nothing_half(path, monkeypatch, number, message):
    def write_bytes(self: Path, content: bytes) -> None:
        with open(self, "wb") as file:
            file.write(content[:100])
        raise OSError(number, os.strerror(number))

    with TeacherStoreWriter(path, SHAPE, META, group=2) as writer:
        writer.write(KEYS[0], field(KEYS[0]))
        with monkeypatch.context() as patch:
            patch.setattr(Path, "write_bytes", write_bytes)
            with pytest.raises(RegistrationError, match=message):
                writer.write(KEYS[1], field(KEYS[1]))
            assert left(path) == ["teacher.h5.parts"]
        writer.finish()  # room was made: nothing is lost
    check(TeacherStore(path), KEYS[:2])


@pytest.mark.skipif(os.name != "posix", reason="limits the size of files as POSIX systems can")
def test_a_merge_that_hits_a_real_limit_leaves_nothing_half(path):
    """HDF5 writes the merged file by itself: the process must survive its failure, and end without a crash."""
    code = f"""
import resource, numpy as np
from LDRCore.distillation.teacher_store import TeacherStoreWriter
writer = TeacherStoreWriter({str(path)!r}, (16, 16, 16), {{}}, group=1)
for n in range(8):
    writer.write(str(n), np.random.default_rng(n).standard_normal((3, 16, 16, 16)))
resource.setrlimit(resource.RLIMIT_FSIZE, (60_000, resource.RLIM_INFINITY))
try:
    writer.finish()
except ValueError as error:
    print(error)
resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, encoding="utf-8", check=False, cwd=ROOT)
    assert done.returncode == 0
    assert done.stdout.strip() == (
        f"a teacher store must lie where files can be written, got {path} ({os.strerror(errno.EFBIG)})"
    )
    assert left(path) == ["teacher.h5.parts", *(f"teacher.h5.parts/{n:05d}.h5" for n in range(8))]
    writer = TeacherStoreWriter(path, (16, 16, 16), {})
    assert TeacherStore(writer.finish()).keys == [str(n) for n in range(8)]
