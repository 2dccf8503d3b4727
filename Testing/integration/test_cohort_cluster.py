"""A real Dask scheduler with two worker processes: one killed in the middle, and everything that can differ."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import LDRCore
from LDRCore import RegistrationError
from LDRCore.cohort import cluster, store
from LDRCore.cohort.pairs import make_pairs
from LDRCore.cohort.settings import check_settings

pytest.importorskip("distributed", reason="needs the extra cluster (make test installs it)")
ROOT = Path(__file__).parents[2]
OPTIONS = {"model": "none", "kind": "rigid", "affine": False}


class DaskCluster:
    """A scheduler and workers, each a process of its own."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.processes: list[subprocess.Popen] = []
        file = folder / "scheduler.json"
        self.start("distributed.cli.dask_scheduler", "--host", "127.0.0.1", "--port", "0", "--scheduler-file", file)
        while not file.exists() or not file.read_text(encoding="utf-8").endswith("}"):
            assert self.processes[0].poll() is None, (folder / "0.log").read_text(encoding="utf-8")
        self.address = json.loads(file.read_text(encoding="utf-8"))["address"]

    def start(self, module: str, *arguments: object, **environment: str) -> subprocess.Popen:
        """Start a process; its log is NUMBER.log."""
        variables = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"} | environment
        with (self.folder / f"{len(self.processes)}.log").open("wb") as log:
            command = [sys.executable, "-m", module, *map(str, arguments), "--no-dashboard"]
            self.processes.append(subprocess.Popen(command, stdout=log, stderr=log, env=variables, cwd=self.folder))
        return self.processes[-1]

    def add_worker(self, **environment: str) -> subprocess.Popen:
        """Start a worker of one thread."""
        arguments = (self.address, "--nthreads", 1, "--no-nanny", "--local-directory", self.folder)
        return self.start("distributed.cli.dask_worker", *arguments, **environment)

    def stop(self) -> None:
        """End all processes."""
        for process in self.processes[::-1]:
            process.kill()
            process.wait()


@pytest.fixture
def dask_cluster(tmp_path) -> Iterator[DaskCluster]:
    made = DaskCluster(tmp_path)
    yield made
    made.stop()


def rows(brains: Path, count: int) -> list[dict[str, str]]:
    fixed = str(brains / "s0-image.nii.gz")
    return [
        {"fixed": fixed, "moving": str(brains / f"s{1 + n % 5}-image.nii.gz"), "name": f"p{n:02}"} for n in range(count)
    ]


def test_a_worker_killed_in_the_middle_loses_nothing_and_doubles_nothing(dask_cluster, tiny_brains, tmp_path):
    """Counted by the outputs: every folder was moved into place once."""
    out, workers = tmp_path / "out", [dask_cluster.add_worker(), dask_cluster.add_worker()]
    seen: dict[str, int] = {}

    def watch(fraction: float, message: str) -> None:
        for path in out.glob("pairs/*/checksums.json"):
            assert seen.setdefault(path.parent.name, path.stat().st_ino) == path.stat().st_ino
        if message.startswith("3 of 24"):
            workers[0].kill()

    summary = LDRCore.register_many(
        rows(tiny_brains, 24), out, scheduler=dask_cluster.address, progress=watch, **OPTIONS
    )
    assert (summary["done"], summary["failed"]) == (24, 0)
    folders = {path.name: path / "checksums.json" for path in (out / "pairs").iterdir()}
    assert sorted(folders) == [f"p{n:02}" for n in range(24)]
    assert {name: folders[name].stat().st_ino for name in seen} == seen
    assert not (out / store.STAGING).exists()
    again = LDRCore.register_many(rows(tiny_brains, 24), out, workers=1, **OPTIONS)  # on this machine: nothing is left
    assert again["reused"] == 24


def test_results_come_back_where_workers_do_not_see_the_folder(dask_cluster, tiny_brains, tmp_path, monkeypatch):
    dask_cluster.add_worker()
    perform = cluster.perform

    def elsewhere(pair, settings, out, probe, threads, expected):
        return perform(pair, settings, "/nowhere", "/nowhere/probe", threads, expected)

    monkeypatch.setattr(cluster, "perform", elsewhere)
    pairs = rows(tiny_brains, 3)
    pairs[1]["moving"] = str(tmp_path / "gone.nii.gz")
    summary = LDRCore.register_many(pairs, tmp_path / "out", scheduler=dask_cluster.address, **OPTIONS)
    assert [row["status"] for row in summary["pairs"]] == ["done", "failed", "done"]
    assert "moving image must be an existing file" in summary["pairs"][1]["error"]
    again = LDRCore.register_many(pairs, tmp_path / "out", workers=1, **OPTIONS)
    assert again["reused"] == 2


def test_other_versions_and_no_workers_are_one_sentence(dask_cluster, tiny_brains, tmp_path, monkeypatch):
    monkeypatch.setattr(cluster, "_WORKERS_S", 1)
    with pytest.raises(RegistrationError, match="the scheduler must have workers, got none"):
        LDRCore.register_many(rows(tiny_brains, 1), tmp_path / "out", scheduler=dask_cluster.address, **OPTIONS)
    monkeypatch.setattr(cluster, "_WORKERS_S", 300)
    dask_cluster.add_worker()
    monkeypatch.setattr(cluster, "__version__", "9.9")
    with pytest.raises(RegistrationError, match=r"workers must have LDRCore 9\.9 as the client has, got"):
        LDRCore.register_many(rows(tiny_brains, 1), tmp_path / "out", scheduler=dask_cluster.address, **OPTIONS)


def test_a_scheduler_that_is_not_there_is_one_sentence(tiny_brains, tmp_path, monkeypatch):
    monkeypatch.setattr(cluster, "_CONNECT_S", 1)
    with pytest.raises(RegistrationError, match=r"a Dask scheduler must answer at tcp://127\.0\.0\.1:1, got none"):
        LDRCore.register_many(rows(tiny_brains, 1), tmp_path / "out", scheduler="tcp://127.0.0.1:1", **OPTIONS)


def test_a_missing_dask_is_one_sentence(tiny_brains, tmp_path, monkeypatch):
    monkeypatch.setattr(cluster.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(RegistrationError, match="a scheduler needs dask: pip install"):
        LDRCore.register_many(rows(tiny_brains, 1), tmp_path / "out", scheduler="tcp://127.0.0.1:1", **OPTIONS)


def test_a_task_of_other_versions_is_refused_where_it_runs(tiny_brains, tmp_path):
    """A worker that joins late was not asked at the start."""
    (pair,) = make_pairs(rows(tiny_brains, 1))
    settings = check_settings(OPTIONS, ("warped",), "lps")
    with pytest.raises(RegistrationError, match="workers must have torch 0 as the client has"):
        cluster.perform(pair, settings, str(tmp_path), "", 1, cluster.versions() | {"torch": "0"})
