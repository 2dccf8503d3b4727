"""Many pairs in worker processes: the same results as one at a time, resumed by their checksums, whatever dies."""

from __future__ import annotations

import csv
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import SimpleITK as sitk

import LDRCore
from LDRCore import RegistrationError, cli, sampling
from LDRCore.cohort import plan, pool, store
from LDRCore.evaluation import scoring

QUICK = {"model": "none", "kind": "rigid", "affine": False}  # next to nothing is computed


def brains(folder: Path, count: int, **extra: str) -> list[dict[str, str]]:
    """Rows of pairs onto the first of the tiny brains."""
    return [
        {
            "fixed": str(folder / "s0-image.nii.gz"),
            "moving": str(folder / f"s{1 + number % 5}-image.nii.gz"),
            "name": f"p{number}",
        }
        | extra
        for number in range(count)
    ]


def values(path: Path) -> np.ndarray:
    return sitk.GetArrayFromImage(sitk.ReadImage(str(path)))


def times(out: Path) -> dict[str, int]:
    return {path.parent.name: path.stat().st_mtime_ns for path in sorted(out.glob("pairs/*/checksums.json"))}


def worker_that(tmp_path: Path, name: str, code: str) -> list[str]:
    """The command of a worker that runs some code before it begins its work."""
    script = tmp_path / f"{name}.py"
    script.write_text(f"from LDRCore.cohort import perform, worker_process\n{code}\nworker_process.main()\n")
    return [sys.executable, str(script)]


def test_results_are_those_of_single_registrations(tiny_brains, tmp_path, capsys, monkeypatch):
    """Through the command line: outputs by name, Dice, labels, a page, statistics; then nothing is left to do."""
    monkeypatch.setattr(plan, "_COMPILED_FROM", 0 if sampling.backend_name() == "numba" else 99)  # as this process does
    rows = brains(tiny_brains, 3)
    for row in rows:
        row |= {"fixed_labels": str(tiny_brains / "s0-labels.nii.gz")}
        row["moving_labels"] = row["moving"].replace("image", "labels")
    with (tmp_path / "p.csv").open("w", newline="") as stream:
        writer = csv.DictWriter(stream, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
    out = tmp_path / "out"
    arguments = ["register", "--pairs", tmp_path / "p.csv", "--out", out, "--json", "--workers", 2, "--statistics"]
    arguments = [str(a) for a in [*arguments, "--outputs", "warped,transform,inverse,jacobian,labels,displacement"]]
    assert cli.main(arguments) == 0
    summary = json.loads(capsys.readouterr().out)
    assert (summary["done"], summary["failed"], summary["reused"]) == (3, 0, 0)
    for row, told in zip(rows, summary["pairs"], strict=True):
        folder = out / "pairs" / row["name"]
        single = LDRCore.register(row["fixed"], row["moving"], inverse=True)
        assert np.array_equal(values(folder / "warped.nii.gz"), sitk.GetArrayFromImage(single.warped))
        assert np.array_equal(
            values(folder / "jacobian_determinant.nii.gz"), sitk.GetArrayFromImage(single.jacobian_determinant)
        )
        assert told["similarity_after"] == single.report["similarity"]["after"]
        dice, _ = scoring.overlaps(
            scoring.load_labels(row["moving_labels"], "m"),
            single.transform,
            scoring.load_labels(row["fixed_labels"], "f"),
        )
        assert told["dice_after"] == pytest.approx(np.mean(list(dice.values())), abs=1e-5)
        assert set(np.unique(values(folder / "warped_labels.nii.gz"))) <= set(range(6))
        point = sitk.ReadTransform(str(folder / "transform.h5")).TransformPoint((1.0, 2.0, 3.0))
        back = sitk.ReadTransform(str(folder / "inverse_transform.h5")).TransformPoint(point)
        assert back == pytest.approx((1.0, 2.0, 3.0), abs=1.5)
        assert (folder / "thumbnail.jpg").stat().st_mode & 0o777 == (tmp_path / "p.csv").stat().st_mode & 0o777
    mean = values(out / "statistics" / "warped_mean.nii.gz")
    every = [values(out / "pairs" / f"p{n}" / "warped.nii.gz") for n in range(3)]
    np.testing.assert_allclose(mean, np.mean(every, axis=0), atol=1e-3)
    assert (out / "index.html").stat().st_size > 3000
    before = times(out)
    assert cli.main(arguments) == 0
    assert json.loads(capsys.readouterr().out)["reused"] == 3
    assert times(out) == before
    assert cli.main([a for a in arguments if a != "--statistics"] + ["--refine", "fast"]) == 2
    assert "results of the same options (or overwrite must be set)" in capsys.readouterr().err


def test_a_pair_that_fails_is_a_row_and_what_is_harmed_is_done_again(tiny_brains, tmp_path):
    rows = brains(tiny_brains, 4)
    rows[1]["moving"] = str(tmp_path / "gone.nii.gz")
    summary = LDRCore.register_many(rows, tmp_path / "out", workers=1, **QUICK)
    assert [row["status"] for row in summary["pairs"]] == ["done", "failed", "done", "done"]
    assert "moving image must be an existing file" in summary["pairs"][1]["error"]
    assert summary["problems"] == [f"p1: {summary['pairs'][1]['error']}"]
    assert not (tmp_path / "out" / "pairs" / "p1").exists()
    before = times(tmp_path / "out")
    (tmp_path / "out" / "pairs" / "p2" / "transform.h5").write_bytes(b"")
    sitk.WriteImage(sitk.ReadImage(rows[0]["moving"]), rows[1]["moving"])  # the missing file has come
    summary = LDRCore.register_many(rows, tmp_path / "out", workers=1, **QUICK)
    assert (summary["done"], summary["reused"]) == (4, 2)
    after = times(tmp_path / "out")
    assert [name for name in before if after[name] != before[name]] == ["p2"]


def test_killed_workers_lose_nothing(tiny_brains, tmp_path, monkeypatch):
    started = []
    first = pool._Worker.__init__

    def record(self, *arguments):
        first(self, *arguments)
        started.append(self)

    monkeypatch.setattr(pool._Worker, "__init__", record)

    def kill(fraction: float, message: str) -> None:
        if message.startswith("2 of 8"):
            for worker in started[:2]:
                worker.process.kill()

    summary = LDRCore.register_many(brains(tiny_brains, 8), tmp_path / "out", workers=2, progress=kill, **QUICK)
    assert (summary["done"], summary["failed"]) == (8, 0)
    assert len(started) == 4
    assert len(times(tmp_path / "out")) == 8
    assert not (tmp_path / "out" / store.STAGING).exists()


@pytest.mark.skipif(sys.platform == "win32", reason="no such signals")
def test_a_pair_that_takes_its_worker_down_is_a_row(tiny_brains, tmp_path, monkeypatch):
    code = """
import os, signal
register_pair = perform.register_pair
def crash(loaded, settings):
    if loaded.pair.name == "p1":
        os.kill(os.getpid(), signal.SIGSEGV)
    return register_pair(loaded, settings)
perform.register_pair = crash
"""
    monkeypatch.setattr(pool, "COMMAND", worker_that(tmp_path, "crash", code))
    summary = LDRCore.register_many(brains(tiny_brains, 5), tmp_path / "out", workers=1, **QUICK)
    assert [row["status"] for row in summary["pairs"]] == ["done", "failed", "done", "done", "done"]
    assert summary["pairs"][1]["error"].startswith("the pair must leave its process alive, got signal 11")


def test_a_worker_ends_after_its_threads(tiny_brains, tmp_path, monkeypatch):
    """The reader, slow here after its last pair, must have ended: else Python aborts now and then."""
    code = f"""
import pathlib, queue, threading, time
class Slow(queue.Queue):
    def put(self, item, *rest):
        super().put(item, *rest)
        if item is None and threading.current_thread() is not threading.main_thread():
            time.sleep(1)
            pathlib.Path({str(tmp_path / "ended")!r}).touch()
queue.Queue = Slow
"""
    monkeypatch.setattr(pool, "COMMAND", worker_that(tmp_path, "slow", code))
    LDRCore.register_many(brains(tiny_brains, 1), tmp_path / "out", workers=1, **QUICK)
    assert (tmp_path / "ended").exists()


def test_a_worker_that_cannot_start_is_one_sentence(tiny_brains, tmp_path, monkeypatch):
    monkeypatch.setattr(pool, "COMMAND", [sys.executable, "-c", "raise SystemExit(3)"])
    with pytest.raises(RegistrationError, match="a worker process must start, got exit code 3 each time"):
        LDRCore.register_many(brains(tiny_brains, 2), tmp_path / "out", workers=2, **QUICK)


def test_an_interruption_keeps_what_is_finished(tiny_brains, tmp_path):
    def interrupt(fraction: float, message: str) -> None:
        if message.startswith("2 of 4"):
            raise KeyboardInterrupt

    summary = LDRCore.register_many(brains(tiny_brains, 4), tmp_path / "out", workers=1, progress=interrupt, **QUICK)
    assert summary["interrupted"]
    assert 2 <= summary["done"] < 4
    assert "the same command goes on from there" in summary["problems"][-1]
    kept = times(tmp_path / "out")
    summary = LDRCore.register_many(brains(tiny_brains, 4), tmp_path / "out", workers=1, **QUICK)
    assert (summary["done"], summary["reused"]) == (4, len(kept))
    assert times(tmp_path / "out").items() >= kept.items()


@pytest.mark.skipif(sys.platform == "win32", reason="no such signals")
@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGTERM])
def test_a_killed_run_goes_on_where_it_ended(tiny_brains, tmp_path, how):
    out = tmp_path / "out"
    (tmp_path / "moving").mkdir()
    for number in range(12):
        os.symlink(tiny_brains / f"s{1 + number % 5}-image.nii.gz", tmp_path / "moving" / f"m{number:02}.nii.gz")
    command = [sys.executable, "-m", "LDRCore.cli", "register", "--fixed", str(tiny_brains / "s0-image.nii.gz")]
    command += ["--moving", f"{tmp_path}/moving/*.nii.gz", "--out", str(out), "--workers", "1", "--model", "none"]
    command += ["--kind", "rigid", "--no-affine"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, encoding="utf-8") as running:
        while not times(out):
            assert running.poll() is None
            time.sleep(0.01)
        running.send_signal(how)
        _, told = running.communicate()
    assert running.returncode == (-9 if how == signal.SIGKILL else 130), told
    kept = times(out)
    assert 0 < len(kept) < 12
    done = subprocess.run([*command, "--json"], capture_output=True, encoding="utf-8", check=True)
    summary = json.loads(done.stdout)
    assert summary["done"] == 12
    assert summary["reused"] >= len(kept)
    assert times(out).items() >= kept.items()
    assert not (out / store.STAGING).exists()


@pytest.mark.skipif(sys.platform != "linux", reason="tmpfs is Linux's")
def test_a_disk_that_fills_ends_the_run_and_spares_what_is_finished(tiny_brains, tmp_path, monkeypatch):
    out = tmp_path / "disk"
    out.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=640k", "tmpfs", out], capture_output=True, check=False
    )
    if mounted.returncode:
        pytest.skip(f"no small disk can be made here: {mounted.stderr.decode().strip()}")
    try:
        monkeypatch.setattr(plan, "check_disk", lambda *_: 0)  # as if another program took the room
        with pytest.raises(RegistrationError, match=r"must have room for every pair, got a full one after \d+ of 40"):
            LDRCore.register_many(brains(tiny_brains, 40), out, workers=1, **QUICK)
        kept = times(out)
        assert 0 < len(kept) < 40
        subprocess.run(["mount", "-o", "remount,size=64m", out], check=True)
        summary = LDRCore.register_many(brains(tiny_brains, 40), out, workers=1, **QUICK)
        assert (summary["done"], summary["reused"]) == (40, len(kept))
    finally:
        subprocess.run(["umount", out], check=True)


def test_too_small_a_disk_is_refused_before_the_first_pair(tiny_brains, tmp_path, monkeypatch):
    monkeypatch.setattr(plan, "free_bytes", lambda folder: 1000)
    with pytest.raises(RegistrationError, match=r"must hold about .* for 3 pairs, got 1 kB free"):
        LDRCore.register_many(brains(tiny_brains, 3), tmp_path / "out", **QUICK)
    assert not (tmp_path / "out" / "pairs").exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--fixed", "a.nii"], "--fixed and --moving belong together"),
        (["--pairs", "none.csv"], "the list of pairs must be an existing CSV file"),
        (["--pairs", "p.csv", "--fixed", "a"], "from --pairs or from --fixed and --moving, got both"),
        (["f.nii", "--pairs", "p.csv"], "takes no further image"),
        (["f.nii"], "register takes a fixed and a moving image, --pairs CSV"),
        (["f.nii", "m.nii", "--workers", "2"], "--workers is for a list of pairs"),
        (["--fixed", "a", "--moving", "none*"], "must match files, got none"),
        (["--pairs", "p.csv", "--workers", "0"], "workers must be 1 or more"),
        (["--pairs", "p.csv", "--outputs", "warped,x"], "an output must be one of"),
        (["--pairs", "p.csv", "--outputs", ""], "an output must be one of"),
        (["f.nii", "m.nii", "--outputs", ""], "--outputs is for a list of pairs"),
        (["--pairs", "p.csv", "--fixed-mask", "m.nii"], "belong into its columns"),
        (["--pairs", "p.csv", "--scheduler", "tcp://127.0.0.1:1"], "scheduler"),
    ],
)
def test_wrong_arguments_are_one_sentence_and_nothing_is_written(
    tmp_path, monkeypatch, capsys, blob, arguments, message
):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "p.csv").write_text("fixed,moving\nf.nii,f.nii\n")
    sitk.WriteImage(blob, str(tmp_path / "f.nii"))
    assert cli.main(["register", *arguments, "--out", "out"]) == 2
    printed = capsys.readouterr()
    assert message in printed.err
    assert printed.err.strip().splitlines()[-1].startswith("ldr register: ")
    assert not (tmp_path / "out" / "pairs").exists()


def test_statistics_need_one_atlas(tiny_brains, tmp_path):
    rows = brains(tiny_brains, 2)
    rows[1]["fixed"] = rows[1]["moving"]
    with pytest.raises(RegistrationError, match="statistics need one atlas, got several fixed images"):
        LDRCore.register_many(rows, tmp_path / "out", statistics=True)
