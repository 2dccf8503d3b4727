"""Runs the systems that are compared: baselines, exported models, other programs. Each gives a transform of a pair."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import hashlib
import json
import os
import shlex
import shutil
import signal
import subprocess
import tempfile
import threading
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import SimpleITK as sitk

import LDRCore
from LDRCore import geometry
from LDRCore.errors import RegistrationError
from LDRCore.io.transforms import read_transform
from LDRCore.models import weights
from LDRCore.pipeline import preprocess
from LDRCore.pipeline.affine import centring_candidates
from Training.evaluation import memory, peers
from Training.evaluation.config import System
from Training.evaluation.datasets import Loaded

PEERS = Path(peers.__file__)
_CHECK_S = 120.0
_WATCH_S = 0.05


@dataclass(frozen=True)
class Place:
    """The setting in which systems run.

    Attributes:
        models: folders with exported models, searched before those that ship.
        peer_python: interpreter whose packages the peers use.
        threads: of every system.
        device: of models: "cpu" or "cuda".
    """

    models: tuple[str, ...]
    peer_python: str
    threads: int
    device: str = "cpu"


@dataclass(frozen=True)
class Outcome:
    """The result of a system on a pair.

    Attributes:
        transform: fixed -> moving.
        seconds: from images in memory to the transform (models: to the warped image).
        seconds_io: the same with reading two files and writing the transform (models: and the warped image); of other
            programs the whole process, its start included.
        peak_mb: of other programs, the process's largest memory; None for what runs in this process.
        initial: the affine start, by name.
        versions: of what ran.
    """

    transform: sitk.Transform
    seconds: float
    seconds_io: float
    peak_mb: float | None = None
    initial: str = ""
    versions: str = ""


def for_domain(system: System, domain: str) -> System:
    """Fill in `{domain}` of a system's model."""
    return dataclasses.replace(system, model=system.model.replace("{domain}", domain))


def find_model(name: str, models: tuple[str, ...]) -> str:
    """Find a model in the folders or among those that ship, as a path or name that `load_model` takes.

    Raises:
        RegistrationError: there are no such weights.
    """
    for folder in models:
        if (Path(folder) / f"{name}.json").is_file():
            return str(Path(folder) / f"{name}.pt")
    if name in weights.list_models() or Path(name).with_suffix(".json").is_file():
        return name
    places = ", ".join([*models, "those that ship"])
    raise RegistrationError(f"no weights yet: no model {name!r} in {places}")


def unavailable(system: System, place: Place) -> str:
    """Say in one sentence why a system cannot run here; empty if it can."""
    try:
        if system.kind in ("affine", "model"):
            card = weights.model_info(find_model(system.model, place.models))
            weights.verify(find_model(system.model, place.models))
            most = card["architecture"]["cascades"]
            if system.cascades > most:
                return f"no weights yet: {system.model} has {most} cascades, not {system.cascades}"
        if system.kind == "peer":
            return _missing_peer(system.method, place.peer_python)
        if system.kind == "command":
            program = shlex.split(system.command)[0]
            return "" if shutil.which(program) else f"the program {program} is not installed"
    except RegistrationError as error:
        return str(error)
    return ""


@functools.cache
def _missing_peer(method: str, python: str) -> str:
    try:
        done = subprocess.run(
            [python, str(PEERS), method, "--check"], capture_output=True, text=True, timeout=_CHECK_S, check=False
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        return f"the peers' Python cannot be used ({error})"
    if not done.returncode:
        return ""
    lines = done.stderr.strip().splitlines()
    return lines[-1] if lines else f"the check of {method} ended with code {done.returncode}"


def fingerprint(system: System, place: Place) -> str:
    """Hash everything that determines a system's result: its definition, the weights, the peer's settings."""
    parts = [repr(dataclasses.replace(system, name="", timeout_s=0.0)), place.device]
    if system.kind in ("affine", "model"):
        parts.append(weights.model_info(find_model(system.model, place.models))["sha256"])
    if system.kind == "peer":
        parts.append(peers.SETTINGS.get(system.method, ""))
    return hashlib.sha256("|".join(parts).encode()).hexdigest()[:10]


def run(system: System, pair: Loaded, place: Place) -> Outcome:
    """Register a pair.

    Raises:
        RegistrationError: the system failed; the message says how.
    """
    if system.kind == "nothing":
        return Outcome(centring(pair), 0.0, 0.0)
    if system.kind == "affine" or system.kind == "model":
        return _run_model(system, pair, place)
    with tempfile.TemporaryDirectory(prefix="evaluate-") as folder:
        files = write_pair(pair, Path(folder))
        if system.kind == "peer":
            return _run_peer(system, files, Path(folder) / "out", place)
        return _run_command(system, files, Path(folder), place)


def centring(pair: Loaded) -> sitk.Transform:
    """Return the translation that aligns the contents' centres: the baseline "nothing"."""
    fixed, moving = (preprocess.prepare(i, None, fine_mm=2.0, coarse_mm=4.0) for i in (pair.fixed, pair.moving))
    return geometry.affine_transform(centring_candidates(fixed, moving)[0])


def write_pair(pair: Loaded, folder: Path) -> tuple[Path, Path]:
    """Write the pair as two NIfTI files."""
    files = folder / "fixed.nii.gz", folder / "moving.nii.gz"
    for image, file in zip((pair.fixed, pair.moving), files, strict=True):
        sitk.WriteImage(image, str(file), useCompression=True)
    return files


_warmed: set[tuple[str, str]] = set()  # (model, device) that have run in this process: what is timed is warm


def _run_model(system: System, pair: Loaded, place: Place) -> Outcome:
    model = find_model(system.model, place.models)
    settings = {"model": model, "device": place.device, "cascades": max(system.cascades, 0)}
    if (model, place.device) not in _warmed:
        LDRCore.register(pair.fixed, pair.moving, **settings)
        _warmed.add((model, place.device))
    began = time.perf_counter()
    result = LDRCore.register(pair.fixed, pair.moving, refine=system.refine, **settings)
    seconds = time.perf_counter() - began
    transform = result.transform
    if system.kind == "affine":
        seconds -= result.report["times_s"]["dense"]
        transform = result.affine
    with tempfile.TemporaryDirectory(prefix="evaluate-") as folder:
        files = write_pair(pair, Path(folder))
        began = time.perf_counter()
        for file in files:
            sitk.ReadImage(str(file))
        sitk.WriteImage(result.warped, f"{folder}/warped.nii.gz", useCompression=True)
        sitk.WriteTransform(transform, f"{folder}/transform.h5")
        io_seconds = time.perf_counter() - began
    versions = f"LDRCore {LDRCore.__version__}, torch {result.report['versions']['torch']}"
    initial = "content centred" if system.kind == "affine" else f"affine stem of {system.model}"
    return Outcome(transform, seconds, seconds + io_seconds, None, initial, versions)


def _environment(threads: int) -> dict[str, str]:
    limits = ("OMP_NUM_THREADS", "ITK_GLOBAL_DEFAULT_NUMBER_OF_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS")
    kept = {k: v for k, v in os.environ.items() if k not in ("PYTHONPATH", "PYTHONHOME")}
    return {**kept, **dict.fromkeys(limits, str(threads))}


def call(command: list[str], *, timeout_s: float, threads: int, folder: Path) -> tuple[float, float | None]:
    """Run a program to its end; return seconds, and peak MB of its largest process (None where it is unknown).

    Raises:
        RegistrationError: it failed (with the last line that it printed), took too long, or is not there.
    """
    log = folder / "log.txt"
    began = time.perf_counter()
    try:
        with log.open("wb") as stream:
            process = subprocess.Popen(
                command, stdout=stream, stderr=stream, env=_environment(threads), cwd=folder, start_new_session=True
            )
    except OSError as error:
        raise RegistrationError(f"the command must be a program that runs, got {command[0]} ({error})") from None
    watch = _Watch(process.pid, timeout_s)
    try:
        process.wait()
    except BaseException:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        raise
    finally:
        seconds = time.perf_counter() - began
        watch.end()
    if watch.stopped:
        raise RegistrationError(f"took longer than {timeout_s:g} seconds and was stopped")
    if process.returncode:
        lines = [x for x in log.read_text(errors="replace").splitlines() if x.strip()]
        raise RegistrationError(f"ended with code {process.returncode}: {lines[-1].strip() if lines else 'no output'}")
    return seconds, watch.peak_mb


class _Watch(threading.Thread):
    """Polls a session of processes for its peak memory, and stops it at its deadline."""

    def __init__(self, session: int, timeout_s: float) -> None:
        super().__init__(daemon=True)
        self.peak_mb: float | None = None
        self.stopped = False
        self._session, self._deadline, self._over = session, time.monotonic() + timeout_s, threading.Event()
        self.start()

    def run(self) -> None:
        while not self._over.wait(_WATCH_S):
            if time.monotonic() > self._deadline:
                self.stopped = True
                os.killpg(self._session, signal.SIGKILL)
                return
            peaks_mb = [m for pid in _processes(self._session) if (m := memory.peak_mb(pid)) is not None]
            self.peak_mb = max([*peaks_mb, self.peak_mb or 0.0]) if peaks_mb else self.peak_mb

    def end(self) -> None:
        self._over.set()
        self.join()


def _processes(session: int) -> list[str]:
    """List the process numbers of a session, where the system has /proc."""
    members = []
    for stat in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError, IndexError):
            if int(stat.read_text().rsplit(")", 1)[1].split()[3]) == session:
                members.append(stat.parent.name)
    return members


def _run_peer(system: System, files: tuple[Path, Path], out: Path, place: Place) -> Outcome:
    out.mkdir()
    command = [place.peer_python, str(PEERS.resolve()), system.method, "--fixed", str(files[0]), "--moving"]
    command += [str(files[1]), "--out", str(out), "--threads", str(place.threads)]
    seconds, peak_mb = call(command, timeout_s=system.timeout_s, threads=place.threads, folder=out)
    result = json.loads((out / "result.json").read_text())
    transform = sitk.CompositeTransform(3)
    for stage in reversed(result["stages"]):  # SimpleITK applies the last one added first
        transform.AddTransform(_stage(out / stage["file"], stage["kind"]))
    versions = ", ".join(f"{k} {v}" for k, v in result["versions"].items())
    return Outcome(transform, result["seconds"], seconds, peak_mb, result["initial"], versions)


def _stage(file: Path, kind: str) -> sitk.Transform:
    if kind == "ras-matrix":
        flip = np.diag([-1.0, -1.0, 1.0, 1.0])
        return geometry.affine_transform(flip @ np.loadtxt(file) @ flip)
    return read_transform(str(file))


def _run_command(system: System, files: tuple[Path, Path], folder: Path, place: Place) -> Outcome:
    out = folder / f"out{system.writes}"
    places = {"fixed": str(files[0]), "moving": str(files[1]), "out": str(out), "threads": str(place.threads)}
    words = shlex.split(system.command)
    for name, value in places.items():
        words = [w.replace(f"{{{name}}}", value) for w in words]
    seconds, peak_mb = call(words, timeout_s=system.timeout_s, threads=place.threads, folder=folder)
    if not out.exists():
        raise RegistrationError(f"the command must write its {{out}}, got no file {out.name}")
    return Outcome(read_transform(str(out)), seconds, seconds, peak_mb)
