"""The process that registers: cancelled, left alone, broken or out of memory, the scene is as before."""

from __future__ import annotations

import os
import re
import subprocess
import sys

import numpy as np
import pytest

from Testing.slicer_scene import GUARD_S, add_volume, blobs, pause, process_runs, snapshot, spin, wait_until

slicer = pytest.importorskip("slicer", reason="needs slicer-core (make test installs it)")

from Testing.standin import application

ENDLESS = 1_000_000  # refinement steps: the run cannot finish before it is cancelled


# cancel, close, remove, break


def test_cancel_ends_the_process_in_the_middle_of_its_work_and_leaves_nothing(logic, pair):
    early = []
    before = snapshot()
    job = logic.startRegistration(
        pair["fixed"],
        pair["moving"],
        refinementSteps=ENDLESS,
        onField=early.append,
        onEnd=lambda: early.append("end"),
    )
    spin(job, until=lambda: job.fraction > 0.2)
    folder, process = job._run.folder, logic.worker.process
    job.cancel()
    assert process.returncode not in (None, 0)  # killed, it did not come to an end by itself
    assert job.finished
    assert job.outputs is None
    assert early == ["end"]
    assert not folder.exists()
    assert snapshot() == before
    assert logic.register(*blobs(), 1, jacobian=False).warped is not None  # and the next run works


def test_a_scene_closed_during_the_run_is_survived(logic, scene):
    from LightweightRegistrationLib.module_errors import InputError

    job = logic.startRegistration(*blobs(), 1)
    application.clear()
    before = snapshot()
    with pytest.raises(InputError, match="must stay in the scene during the run, got one that was removed"):
        spin(job)
    assert snapshot() == before


def test_an_output_removed_during_the_run_is_created_anew(logic, scene):
    fixed, moving = blobs()
    warped = scene.AddNewNodeByClass("vtkMRMLScalarVolumeNode", "mine")
    job = logic.startRegistration(fixed, moving, 1, warped=warped, jacobian=False)
    scene.RemoveNode(warped)
    spin(job)
    assert job.outputs.warped.GetName() == "blob 1 warped to blob 0"


def test_a_process_that_breaks_is_reported_and_the_next_run_has_a_new_one(slicer_module, scene, monkeypatch, tmp_path):
    from LightweightRegistrationLib import background, library, module_errors

    fixed, moving = blobs()
    broken = tmp_path / "broken.py"
    broken.write_text("import sys\nsys.stdin.readline()\nraise RuntimeError('boom')\n")
    worker = background.Worker(library.library_folder())
    logic = slicer_module.LightweightRegistrationLogic(worker)
    before = snapshot()
    try:
        with monkeypatch.context() as patched:
            patched.setattr(background, "WORKER", broken)
            with pytest.raises(
                module_errors.InputError, match="must run to its end, got exit code 1: RuntimeError: boom"
            ) as caught:
                logic.register(fixed, moving, 1)
        assert "Traceback" in caught.value.details
        assert snapshot() == before
        assert logic.register(fixed, moving, 1, jacobian=False).warped is not None
    finally:
        worker.close()


@pytest.mark.parametrize(
    ("code", "message"),
    [
        ("os._exit(3)", "must run to its end, got exit code 3: last words"),
        ("os.abort()", "must run to its end, got exit code (-6|3|134): "),
        ("os.kill(os.getpid(), 9)", "more than could be had here"),
    ],
)
def test_only_a_killed_process_is_taken_for_lack_of_memory(slicer_module, scene, monkeypatch, tmp_path, code, message):
    from LightweightRegistrationLib import background, library, module_errors

    silent = tmp_path / "silent.py"
    silent.write_text(f"import os, sys\nprint('last words', flush=True)\nsys.stdin.readline()\n{code}\n")
    monkeypatch.setattr(background, "WORKER", silent)
    worker = background.Worker(library.library_folder())
    try:
        with pytest.raises(module_errors.InputError, match=message) as caught:
            slicer_module.LightweightRegistrationLogic(worker).register(*blobs(), 1)
    finally:
        worker.close()
    assert isinstance(caught.value, module_errors.MemoryNeededError) == ("9" in code)


@pytest.mark.parametrize("restarted", [False, True])
def test_a_run_that_ends_because_another_was_cancelled_says_so(logic, scene, restarted):
    from LightweightRegistrationLib.module_errors import CancelledError

    fixed, moving = blobs()
    before = snapshot()
    first, second = (logic.startRegistration(fixed, moving, 1, refinementSteps=ENDLESS) for _ in range(2))
    for job in (first, second):
        spin(job, until=lambda job=job: job._run is not None)
    first.cancel()
    if restarted:  # a new process serves the next run, and will never say anything about the second
        logic.warmUp()
    with pytest.raises(CancelledError):
        spin(second)
    assert second.finished
    assert snapshot() == before


@pytest.mark.skipif(sys.platform != "linux", reason="reads processes as Linux lists them")
def test_cancel_reaches_the_interpreter_behind_a_launcher(slicer_module, scene, tmp_path):
    """Slicer puts a launcher before its Python; here one in a group of its own, so that only the watch can reach it."""
    from LightweightRegistrationLib import background, library

    note = tmp_path / "pid"
    launcher = [sys.executable, "-c", LAUNCHER, str(note), sys.executable]
    worker = background.Worker(library.library_folder(), command=launcher)
    job = slicer_module.LightweightRegistrationLogic(worker).startRegistration(*blobs(), 3, refinementSteps=ENDLESS)
    spin(job, until=lambda: job.message == "refining")
    interpreter = int(note.read_text(encoding="utf-8"))
    assert process_runs(interpreter)
    job.cancel()
    wait_until(lambda: not process_runs(interpreter), lambda: f"process {interpreter} is still there")


LAUNCHER = """
import subprocess, sys
process = subprocess.Popen(sys.argv[2:], start_new_session=True)
open(sys.argv[1], "w").write(str(process.pid))
sys.exit(process.wait())
"""


def test_a_process_that_is_no_longer_wanted_ends_whatever_it_is_doing(slicer_module):
    """Its stdin stays open, and no event fails to be written: only the file in its session folder is gone."""
    from LightweightRegistrationLib import background, library

    worker = background.Worker(library.library_folder())
    try:
        worker.warm_up({"model": "brain-t1-small", "device": "cpu", "threads": 1})
        session, process = worker._session, worker.process
        (session / "wanted").unlink()
        assert process.wait(timeout=GUARD_S) == 0
        assert not session.exists()
    finally:
        worker.close()


def test_an_idle_process_ends_but_not_while_a_run_is_being_sent_or_read(slicer_module, tmp_path, monkeypatch):
    """Its folder is there before the request arrives, which takes seconds for large volumes."""
    from LightweightRegistrationLib import background, library

    text = background.WORKER.read_text(encoding="utf-8")
    impatient = tmp_path / "worker.py"
    impatient.write_text(text.replace("IDLE_S = 60.0", "IDLE_S = 0.0"), encoding="utf-8")
    assert impatient.read_text(encoding="utf-8") != text
    monkeypatch.setattr(background, "WORKER", impatient)
    worker = background.Worker(library.library_folder())
    try:
        run = worker.start({"do": "warp"}, {"values.npy": np.zeros(3)})
        process = worker.process
        log = worker._session / "log.txt"
        worker._send({"do": "warm up"})  # fails, and is printed: the process has been idle before and after
        wait_until(lambda: "Traceback" in log.read_text(encoding="utf-8") or process.poll() is not None, lambda: "")
        events = []
        wait_until(lambda: events.extend(run.poll()) or events, lambda: "no event")
        assert events[0]["kind"] == "unexpected"  # the request was read, and is no good
        run.finish()
        assert process.wait(timeout=GUARD_S) == 0  # now there is nothing to do
    finally:
        worker.close()


def test_the_idle_time_begins_anew_while_the_folder_of_a_run_is_there(slicer_module, tmp_path, monkeypatch):
    from LightweightRegistrationLib import worker

    now_s = 100.0
    monkeypatch.setattr(worker.time, "monotonic", lambda: now_s)
    idle = worker.IdleTime(tmp_path)
    now_s += worker.IDLE_S - 1
    assert not idle.is_over()
    now_s += 1
    (tmp_path / "run1").mkdir()
    assert not idle.is_over()
    (tmp_path / "run1").rmdir()
    assert not idle.is_over()
    now_s += worker.IDLE_S
    assert idle.is_over()
    idle.since_s = None  # a request is handled
    assert not idle.is_over()


def test_folders_of_sessions_that_are_gone_are_removed_at_the_next_start(slicer_module, tmp_path):
    from LightweightRegistrationLib import background, library

    for name in ("gone", "gone-too", "alive", "unrelated"):
        folder = tmp_path / (name if name == "unrelated" else f"{background.PREFIX}{name}")
        folder.mkdir()
        (folder / "run.npy").touch()
        if name != "gone-too":
            (folder / "wanted").touch()
        old = 1e9
        if name in ("gone", "unrelated"):
            os.utime(folder / "wanted", (old, old))
        os.utime(folder, (old, old))
    worker = background.Worker(library.library_folder(), temporary=str(tmp_path))
    try:
        worker.warm_up({"model": "brain-t1-small", "device": "cpu", "threads": 1})
        names = {folder.name for folder in tmp_path.iterdir()} - {worker._session.name}
        assert names == {"unrelated", f"{background.PREFIX}alive"}
    finally:
        worker.close()


def test_a_killed_process_is_taken_for_lack_of_memory(logic, scene):
    from LightweightRegistrationLib.module_errors import MemoryNeededError

    fixed, moving = blobs()
    logic.warmUp()
    pause(logic.worker.process)
    job = logic.startRegistration(fixed, moving, 2)
    spin(job, until=lambda: job._run is not None)  # otherwise a process that ended is replaced before it is needed
    logic.worker.process.kill()  # as Linux does when memory runs out
    with pytest.raises(
        MemoryNeededError, match=r"needs about 0\.\d GB of memory, .* use fewer cascades than 2"
    ) as caught:
        spin(job)
    assert caught.value.fewer_cascades == 1


@pytest.mark.skipif(sys.platform != "linux", reason="limits memory with ulimit")
def test_running_out_of_memory_says_how_much_is_needed(slicer_module, scene, monkeypatch):
    monkeypatch.setenv("LDR_NUMBA", "0")  # as in Slicer; its compiler aborts where memory is short
    monkeypatch.setenv("MALLOC_ARENA_MAX", "1")  # others reserve 64 MB of address space each, now and then
    from LightweightRegistrationLib import background, library, module_errors

    fixed, moving = blobs()
    free = background.Worker(library.library_folder())
    try:
        slicer_module.LightweightRegistrationLogic(free).register(fixed, moving, 1, refine="none")
        with open(f"/proc/{free.process.pid}/status") as status:
            peak_kb = int(next(line for line in status if line.startswith("VmPeak")).split()[1])
    finally:
        free.close()
    k, j, i = np.meshgrid(*[np.arange(200)] * 3, indexing="ij", sparse=True)
    ball = (((k - 100) ** 2 + (j - 100) ** 2 + (i - 100) ** 2 < 70**2) * (50 + i // 4)).astype(np.uint8)
    fixed, moving = add_volume("large", ball), add_volume("also large", ball[::-1])
    command = ["bash", "-c", f'ulimit -v {peak_kb + 40_000}; exec "$0" "$@"', sys.executable]
    tight = background.Worker(library.library_folder(), command=command)
    before = snapshot()
    try:
        with pytest.raises(
            module_errors.MemoryNeededError, match=r"needs about \d\.\d GB of memory, more than could be had here"
        ):
            slicer_module.LightweightRegistrationLogic(tight).register(fixed, moving, 1, refine="none")
    finally:
        tight.close()
    assert snapshot() == before


def test_no_room_in_the_temporary_folder_is_said(slicer_module, scene, tmp_path):
    from LightweightRegistrationLib import background, library, module_errors

    worker = background.Worker(library.library_folder(), temporary=str(tmp_path / "missing"))
    with pytest.raises(module_errors.InputError, match=r"keep its images in the temporary folder, got: .*missing"):
        slicer_module.LightweightRegistrationLogic(worker).register(*blobs(), 1)


def test_the_process_ends_when_slicer_does(slicer_module, scene):
    from LightweightRegistrationLib import background, library

    worker = background.Worker(library.library_folder())
    slicer_module.LightweightRegistrationLogic(worker).register(*blobs(), 1, jacobian=False)
    session, process = worker._session, worker.process
    assert session.exists()
    process.stdin.close()  # what happens when Slicer is gone, however it went
    assert process.wait(timeout=GUARD_S) == 0
    assert not session.exists()


@pytest.mark.parametrize("threads", [1, 2])
def test_threads_are_as_many_as_asked_for(logic, scene, threads):
    assert logic.register(*blobs(), 1, threads=threads, jacobian=False).report["threads"] == threads


def test_importing_the_module_brings_neither_torch_nor_simpleitk_nor_qt():
    code = (
        "import sys; from Testing.standin import application; application.module();"
        "from LightweightRegistrationLib import slice_display, torch_setup;"
        "print([m for m in ('torch', 'SimpleITK', 'LDRCore', 'qt', 'PySide6') if m in sys.modules])"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, encoding="utf-8", check=True, cwd=application.ROOT
    )
    assert done.stdout.strip().splitlines()[-1] == "[]"


@pytest.mark.skipif(sys.platform != "linux", reason="torch uses GNU OpenMP on Linux")
@pytest.mark.parametrize("policy", [None, "active"])
def test_idle_threads_of_the_process_sleep_early_unless_the_user_chose_a_policy(
    slicer_module, scene, monkeypatch, policy
):
    from LightweightRegistrationLib import background, library

    monkeypatch.delenv("GOMP_SPINCOUNT", raising=False)
    monkeypatch.delenv("OMP_WAIT_POLICY", raising=False)
    monkeypatch.setenv("OMP_DISPLAY_ENV", "verbose")  # GNU OpenMP prints what it read when it is loaded
    if policy:
        monkeypatch.setenv("OMP_WAIT_POLICY", policy)
    worker = background.Worker(library.library_folder())
    try:
        slicer_module.LightweightRegistrationLogic(worker).register(*blobs(), 1, jacobian=False)
        printed = (worker._session / "log.txt").read_text(encoding="utf-8")
    finally:
        worker.close()
    (count,) = re.findall(r"GOMP_SPINCOUNT = '(\d+)'", printed)
    assert (count == "3000") == (policy is None)
