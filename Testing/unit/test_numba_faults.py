"""Whatever is wrong with the optional package numba, a registration works, and one line says that numba is not used."""

from __future__ import annotations

import json
import logging
import os
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest

from LDRCore import sampling
from LDRCore.sampling import numba_check

ROOT = Path(__file__).parents[2]
VARIABLES = (
    *numba_check.TARGET_VARIABLES,
    numba_check.VARIABLE,
    "NUMBA_DISABLE_JIT",
    "NUMBA_CACHE_DIR",
)

REGISTER = """
import json, logging, sys
lines = []
class Keep(logging.Handler):
    def emit(self, record):
        lines.append(record.getMessage())
logging.getLogger("LDRCore").addHandler(Keep())
{preamble}
import numpy as np
import SimpleITK as sitk
import LDRCore
from LDRCore import sampling

def ellipsoid(centre, radii):
    k, j, i = np.meshgrid(*[np.arange(40)] * 3, indexing="ij")
    inside = sum(((x - c) / r) ** 2 for x, c, r in zip((k, j, i), centre, radii)) < 1
    image = sitk.GetImageFromArray(np.where(inside, 400 + 60 * np.sin(k / 3) + 5 * i, 0).astype(np.int16))
    image.SetSpacing((3.0, 3.0, 3.0))
    return image

result = LDRCore.register(ellipsoid((19, 20, 21), (12, 15, 13)), ellipsoid((20, 18, 19), (13, 13, 12)), cascades=2)
points = [[30.0, 60, 60], [60, 60, 60], [70, 50, 80], [80, 80, 40]]
print(json.dumps({{
    "backend": sampling.backend_name(),
    "compiled_sampling": result.report["compiled_sampling"],
    "lines": lines,
    "mean": float(sitk.GetArrayFromImage(result.warped).mean()),
    "points": LDRCore.transform_points(points, result.transform).tolist(),
    "numba": sys.modules.get("numba") is not None,
}}))
"""


def register(preamble: str = "", **environment: str) -> dict:
    """Register two small images in a fresh process, and return its results and its lines about numba."""
    clean = {k: v for k, v in os.environ.items() if k not in VARIABLES}
    done = subprocess.run(
        [sys.executable, "-c", REGISTER.format(preamble=preamble)],
        cwd=ROOT,
        env={**clean, **environment},
        capture_output=True,
        encoding="utf-8",
        check=False,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    return json.loads(done.stdout.splitlines()[-1])


@pytest.fixture(scope="module")
def by_torch() -> dict:
    return register(LDR_NUMBA="0")


def assert_registered(result: dict, by_torch: dict) -> None:
    """Compare to a registration without numba, in millimetres and grey values of about 400."""
    assert np.abs(np.array(result["points"]) - np.array(by_torch["points"])).max() < 0.1
    assert result["mean"] == pytest.approx(by_torch["mean"], abs=0.5)
    assert result["compiled_sampling"] == (result["backend"] == "numba")


def needs_numba() -> None:
    pytest.importorskip("numba", reason="needs the package numba (pip install 'LDRCore[fast]')")


def test_where_the_environment_forbids_it_numba_is_not_imported(by_torch):
    assert (by_torch["backend"], by_torch["lines"], by_torch["numba"]) == ("torch", [], False)


@pytest.mark.parametrize("environment", [{}, {"NUMBA_CPU_NAME": "generic"}])
def test_a_missing_package_needs_no_word(environment, by_torch):
    result = register("sys.modules['numba'] = None", **environment)
    assert (result["backend"], result["lines"]) == ("torch", [])
    assert_registered(result, by_torch)


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        ("raise ImportError('Numba needs NumPy 2.2 or less. Got NumPy 2.5.')", "Numba needs NumPy 2.2 or less"),
        ("import llvmlite_that_is_missing", "No module named 'llvmlite_that_is_missing'"),
        ("raise SystemError('initialization of _internal failed\\nwith a long text')", "of _internal failed"),
        ("", "has no attribute"),  # what a broken removal leaves behind
    ],
)
def test_a_package_that_cannot_be_imported(content, reason, tmp_path, by_torch):
    (tmp_path / "numba").mkdir()
    (tmp_path / "numba" / "__init__.py").write_text(content)
    result = register(f"sys.path.insert(0, {str(tmp_path)!r})")
    (line,) = result["lines"]
    assert line.startswith("numba is not used (")
    assert reason in line
    assert "\n" not in line
    assert result["backend"] == "torch"
    assert_registered(result, by_torch)


def test_a_compiler_that_is_switched_off(by_torch):
    needs_numba()
    result = register(NUMBA_DISABLE_JIT="1")
    expected = "numba is not used (its compiler is switched off by NUMBA_DISABLE_JIT): torch samples instead"
    assert (result["backend"], result["lines"]) == ("torch", [expected])
    assert_registered(result, by_torch)


NO_FOLDER = """
from numba.core import caching
def refuse(self):
    raise PermissionError(13, "Permission denied")
caching._CacheLocator.ensure_cache_path = refuse
"""
FULL_DISK = """
from numba.core import caching
def save(self, key, data):
    raise OSError(28, "No space left on device")
caching.IndexDataCacheFile.save = save
"""
FULL_DISK_AT_ONCE = """
import tempfile
def refuse(*arguments, **options):
    raise OSError(28, "No space left on device")
tempfile.TemporaryFile = refuse
"""


@pytest.mark.parametrize(
    "preamble", [NO_FOLDER, FULL_DISK, FULL_DISK_AT_ONCE], ids=["no folder", "full later", "full at once"]
)
def test_compiled_code_that_cannot_be_kept_is_used_all_the_same(preamble, tmp_path, by_torch):
    needs_numba()
    result = register(preamble, NUMBA_CACHE_DIR=str(tmp_path))
    assert (result["backend"], result["lines"]) == ("numba", [])
    assert_registered(result, by_torch)
    assert not [p for p in tmp_path.rglob("*") if p.is_file()]


def test_a_cache_folder_below_a_file_is_not_used(tmp_path, by_torch):
    needs_numba()
    file = tmp_path / "file"
    file.write_text("")
    result = register(NUMBA_CACHE_DIR=str(file / "folder"))
    assert (result["backend"], result["lines"]) == ("numba", [])
    assert_registered(result, by_torch)


@pytest.mark.parametrize(("pattern", "size"), [("*.nbi", 60), ("*.nbc", 0)])
def test_kept_code_that_was_cut_off_is_compiled_again(pattern, size, tmp_path):
    needs_numba()
    code = """
import torch
from LDRCore import sampling
image, field = torch.zeros(3, 4, 4, 4), torch.zeros(3, 4, 4, 4)
print(sampling.backend_name(), float(sampling.composed(image + 3, field).mean()))
"""

    def run() -> str:
        clean = {k: v for k, v in os.environ.items() if k not in VARIABLES}
        environment = {**clean, "NUMBA_CACHE_DIR": str(tmp_path)}
        done = subprocess.run(
            [sys.executable, "-c", code], cwd=ROOT, env=environment, capture_output=True, encoding="utf-8", check=True
        )
        return done.stdout + done.stderr

    assert run() == "numba 3.0\n"
    files = list(tmp_path.rglob(pattern))
    assert len(files) > 3
    for file in files:
        os.truncate(file, size)
    assert run() == "numba 3.0\n"
    assert run() == "numba 3.0\n"
    assert all(file.stat().st_size > size for file in tmp_path.rglob(pattern))


@pytest.mark.parametrize(
    "environment",
    [
        {"NUMBA_CPU_FEATURES": "-avx,-avx2,-avx512f,-fma"},
        {"NUMBA_CPU_FEATURES": "+egpr,+ndd,+ccmp,+nf,+push2pop2,+ppx"},  # of Intel's next: an illegal instruction
        {"NUMBA_CPU_FEATURES": "-sse,-sse2"},  # the compiler ends the process at some loops, not at the first
        {"NUMBA_CPU_FEATURES": "neither plus nor minus"},  # or at once
        {"NUMBA_CPU_NAME": "nonsense"},
    ],
    ids=str,
)
def test_code_for_another_processor_runs_or_is_not_used(environment, by_torch):
    needs_numba()
    result = register(**environment)
    assert result["backend"] in ("torch", "numba")
    if result["backend"] == "torch":
        (line,) = result["lines"]
        assert "NUMBA_CPU_NAME or NUMBA_CPU_FEATURES" in line
    else:
        assert result["lines"] == []
    assert_registered(result, by_torch)


def test_another_processor_without_a_python_to_try_it_in(by_torch):
    needs_numba()
    result = register("sys.executable = None", NUMBA_CPU_NAME="generic")
    assert result["backend"] == "torch"
    assert len(result["lines"]) == 1
    assert_registered(result, by_torch)


@pytest.fixture
def fresh_check(monkeypatch):
    """Have numba tested again within the test, and after it."""
    for name in VARIABLES:
        monkeypatch.delenv(name, raising=False)
    numba_check.load.cache_clear()
    yield
    numba_check.load.cache_clear()


def test_another_process_is_started_only_where_the_environment_names_a_processor(fresh_check, monkeypatch):
    needs_numba()
    started: list[list[str]] = []

    def run(command, **options):
        started.append(command)
        return subprocess.CompletedProcess(command, 0)

    monkeypatch.setattr(numba_check.subprocess, "run", run)
    monkeypatch.setenv("NUMBA_CPU_NAME", "")
    assert numba_check.load() is not None
    assert started == []
    for name in numba_check.TARGET_VARIABLES:
        numba_check.load.cache_clear()
        monkeypatch.setenv(name, "generic")
        assert numba_check.load() is not None
        monkeypatch.delenv(name)
    assert [command[0] for command in started] == [sys.executable] * 2
    monkeypatch.setenv(numba_check.VARIABLE, "0")
    monkeypatch.setenv("NUMBA_CPU_NAME", "generic")
    numba_check.load.cache_clear()
    assert numba_check.load() is None
    assert len(started) == 2


def test_the_other_process_runs_every_loop():
    needs_numba()
    code = """
import inspect
from LDRCore.sampling import numba_check, numba_loops
numba_check.test_every_loop()
loops = {name: loop for name, loop in vars(numba_loops).items() if hasattr(loop, "signatures")}
called = {n: loop for n, loop in loops.items() if "begin" in inspect.signature(loop.py_func).parameters}
print(len(called), [name for name, loop in called.items() if not loop.signatures])
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, encoding="utf-8", check=True)
    count, missed = done.stdout.strip().split(" ", 1)
    assert int(count) >= 6
    assert missed == "[]"


def test_a_loop_with_wrong_values_is_found(monkeypatch):
    needs_numba()
    from LDRCore.sampling import numba_loops

    original = numba_loops.displaced
    monkeypatch.setattr(numba_loops, "displaced", lambda *arguments: original(*arguments) + 0.1)
    with pytest.raises(RuntimeError, match="displaced gives other values than torch"):
        numba_check.test_every_loop()


def test_threads_that_ask_at_once_are_told_once(fresh_check, monkeypatch, caplog):
    needs_numba()
    from LDRCore.sampling import numba_support

    together = threading.Barrier(4)

    def fail() -> None:
        raise RuntimeError("for a reason")

    def ask() -> str:
        together.wait()
        return sampling.backend_name()

    monkeypatch.setattr(numba_support, "self_test", fail)
    with caplog.at_level(logging.WARNING, "LDRCore"), ThreadPoolExecutor(4) as pool:
        assert [task.result() for task in [pool.submit(ask) for _ in range(4)]] == ["torch"] * 4
    assert [record.getMessage() for record in caplog.records] == [
        "numba is not used (for a reason): torch samples instead"
    ]
