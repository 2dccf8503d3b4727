"""Times programs from a cold start: the command line, and the process behind Slicer's panel.

Every function starts a fresh interpreter, waits for what a user waits for, and returns seconds.
"""

from __future__ import annotations

import importlib.util
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path
from types import ModuleType

import numpy as np
import SimpleITK as sitk

from LDRCore import geometry
from LDRCore.errors import RegistrationError
from LDRCore.models import weights
from LDRCore.sampling.numba_check import VARIABLE

ROOT = Path(__file__).resolve().parents[2]
BACKGROUND = ROOT / "LightweightRegistration" / "LightweightRegistrationLib" / "background.py"
POLL_S = 0.04  # as the panel's timer


def ldr_help() -> float:
    """Time ``ldr --help``."""
    return _run("--help")


def ldr_register(fixed: str, moving: str, out: Path) -> float:
    """Time ``ldr register`` of two files into a folder, which is removed afterwards."""
    try:
        return _run("register", fixed, moving, "--out", str(out))
    finally:
        shutil.rmtree(out, ignore_errors=True)


def _run(*arguments: str) -> float:
    began = time.perf_counter()
    command = [sys.executable, "-c", "import sys; from LDRCore.cli import script; sys.exit(script())", *arguments]
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=ROOT)
    if done.returncode:
        raise RegistrationError(f"ldr {arguments[0]} must end well, got {done.stderr.strip() or done.returncode}")
    return time.perf_counter() - began


def first_apply(fixed: sitk.Image, moving: sitk.Image, *, chosen_s: float = 0.0, earlier: int = 0) -> float:
    """Time a registration by the process behind the panel, until all outputs of the panel are in this process.

    The process runs without numba, which Slicer's Python does not have.

    Args:
        fixed, moving: the volumes.
        chosen_s: seconds between choosing both volumes and the start; 0: both are chosen at the start.
        earlier: number of registrations before the one that is timed.
    """
    worker = _background().Worker(ROOT, command=[sys.executable])
    how = {"model": weights.DEFAULT, "device": "cpu", "threads": 0}
    before = os.environ.get(VARIABLE)
    os.environ[VARIABLE] = "0"  # the process inherits it
    try:
        if chosen_s:
            worker.warm_up(how)
            time.sleep(chosen_s)
        for _ in range(earlier):
            _apply(worker, fixed, moving, how)
        return _apply(worker, fixed, moving, how)
    finally:
        os.environ.pop(VARIABLE)
        if before is not None:
            os.environ[VARIABLE] = before
        worker.close()


def _background() -> ModuleType:
    """Import the panel's background.py, which needs no Slicer."""
    spec = importlib.util.spec_from_file_location("_ldr_background", BACKGROUND)
    if spec is None or spec.loader is None or not BACKGROUND.exists():
        raise RegistrationError(f"the panel's files must lie beside Training, got no {BACKGROUND}")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def _apply(worker: object, fixed: sitk.Image, moving: sitk.Image, how: dict) -> float:
    began = time.perf_counter()
    options = {"affine": True, "refine": "none", "model": how["model"], "device": how["device"]}
    arrays, request = {}, {"do": "register", "options": options, "initial": "center"}
    for name, image in (("fixed", fixed), ("moving", moving)):
        arrays[f"{name}.npy"] = sitk.GetArrayViewFromImage(image)
        to_world = np.diag([-1.0, -1, 1, 1]) @ geometry.index_to_lps(image)[:, [2, 1, 0, 3]]
        request[name] = {"values": f"{name}.npy", "to_world": to_world.tolist()}
    wanted = {"warped": True, "transform": True, "jacobian": True, "inverse": False, "early": True}
    run = worker.start({**request, **how, **wanted}, arrays)  # type: ignore[attr-defined]
    try:
        while True:
            for event in run.poll():
                if event["event"] == "error":
                    raise RegistrationError(f"the panel's process must do its work, got {event}")
                if event["event"] == "done":
                    for name in (event["warped"], event["transform"]["vectors"], event["jacobian"]):
                        run.load(name)
                    return time.perf_counter() - began
            time.sleep(POLL_S)
    finally:
        run.finish()
