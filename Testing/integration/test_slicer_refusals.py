"""What the module refuses, and how it ends when cancelled, closed, broken or out of memory: the scene is as before."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from Testing.slicer_scene import add_volume, array, blobs, local, snapshot, spin

slicer = pytest.importorskip("slicer", reason="needs slicer-core (make test installs it)")

from Testing.standin import application


def _vector(name):
    node = slicer.mrmlScene.AddNewNodeByClass("vtkMRMLVectorVolumeNode", name)
    slicer.util.updateVolumeFromArray(node, np.ones((5, 6, 7, 3), np.uint8))
    return node


BAD = {
    "none": (lambda f, m: (None, m, {}), "a fixed volume must be chosen, got none"),
    "twice": (lambda f, m: (f, f, {}), "fixed and moving must be two different volumes, got 'blob 0' twice"),
    "vector": (
        lambda f, m: (f, _vector("colour"), {}),
        "the moving volume must hold one value a voxel, got 'colour' with 3 (colour, vectors or a 4D series): pick one "
        "component, or load a series as a sequence and use the section Sequence",
    ),
    "empty": (
        lambda f, m: (slicer.mrmlScene.AddNewNodeByClass("vtkMRMLScalarVolumeNode", "nothing"), m, {}),
        "the fixed volume must hold voxels, got 'nothing', which is empty",
    ),
    "constant": (
        lambda f, m: (f, add_volume("flat", np.full((8, 8, 8), 3, np.int16)), {}),
        "the moving volume must show something, got 'flat', where every voxel is 3",
    ),
    "thin": (
        lambda f, m: (f, add_volume("slice", np.arange(200.0).reshape(2, 10, 10)), {}),
        "the moving volume must have at least 4 voxels along every axis, got 'slice' with 10 x 10 x 2",
    ),
    "nan": (
        lambda f, m: (
            f,
            add_volume("holes", np.where(np.eye(8)[None] * np.ones((8, 1, 1)), np.nan, np.arange(8.0))),
            {},
        ),
        "moving image must hold only finite values, got 64 voxels that are NaN or infinite",
    ),
    "mask of another grid": (
        lambda f, m: (f, m, {"fixedMask": add_volume("small", np.ones((4, 4, 4), np.uint8), None, "LabelMap")}),
        "the fixed mask must lie on the grid of 'blob 0' (28 x 26 x 24 voxels), got 'small' (4 x 4 x 4 voxels): use a "
        "segmentation, which is resampled, or resample the labelmap",
    ),
    "empty mask": (
        lambda f, m: (
            f,
            m,
            {"movingMask": add_volume("void", np.zeros((26, 26, 28), np.uint8), local(m), "LabelMap")},
        ),
        "the moving mask must cover some of 'blob 1', got 'void', which is empty there",
    ),
    "mask without segments": (
        lambda f, m: (f, m, {"fixedMask": slicer.mrmlScene.AddNewNodeByClass("vtkMRMLSegmentationNode", "bare")}),
        "the fixed mask must hold a segment, got 'bare' without any",
    ),
    "no output": (
        lambda f, m: (f, m, {"warped": False, "transform": False, "jacobian": False}),
        "at least one output must be asked for, got none",
    ),
    "output is input": (
        lambda f, m: (f, m, {"warped": m}),
        "the output 'warped' must not be one of the inputs, got 'blob 1'",
    ),
    "cascades": (lambda f, m: (f, m, {"cascades": 9}), "cascades must be 1 to 3 for model brain-t1-small, got 9"),
    "device": (
        lambda f, m: (f, m, {"device": "abacus"}),
        "device must be \"auto\" or one that torch can use here, got 'abacus'",
    ),
    "prealignment": (
        lambda f, m: (f, m, {"prealignment": "magic"}),
        "prealignment must be one of ('centre', 'affine', 'none'), got 'magic'",
    ),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input_is_refused_in_one_sentence_and_the_scene_is_unchanged(logic, scene, case):
    from LightweightRegistrationLib.core import InputError

    fixed, moving = blobs()
    build, message = BAD[case]
    fixed, moving, options = build(fixed, moving)
    before = snapshot()
    with pytest.raises(InputError) as caught:
        logic.register(fixed, moving, **{"cascades": 1, **options})
    assert str(caught.value) == message
    assert snapshot() == before


def test_volumes_apart_are_refused_only_where_nothing_centres_them(logic, scene):
    from LightweightRegistrationLib import volumes
    from LightweightRegistrationLib.core import InputError

    fixed, moving = blobs()
    far = local(moving).copy()
    far[0, 3] += 400
    moving.SetIJKToRASMatrix(volumes.matrix_of(far))
    before = snapshot()
    with pytest.raises(InputError, match=r"must overlap when they are not centred first, got a gap of 3\d\d mm"):
        logic.register(fixed, moving, 1, prealignment="affine")
    assert snapshot() == before
    assert array(logic.register(fixed, moving, 1, jacobian=False).warped).max() > 200


def test_a_volume_under_a_non_linear_transform_is_refused(logic, scene):
    from LightweightRegistrationLib import transforms
    from LightweightRegistrationLib.core import InputError

    fixed, moving = blobs()
    bent = scene.AddNewNodeByClass("vtkMRMLTransformNode", "bent")
    transforms.write_field(bent, transforms.Field(np.ones((4, 4, 4, 3)), np.eye(4)))
    fixed.SetAndObserveTransformNodeID(bent.GetID())
    before = snapshot()
    with pytest.raises(InputError, match="must not be under a non-linear transform, got 'blob 0' under 'bent'"):
        logic.register(fixed, moving, 1)
    assert snapshot() == before


def test_a_second_run_into_the_transform_that_the_moving_volume_is_under_starts_from_the_volume_itself(logic, scene):
    fixed, moving = blobs()
    first = logic.register(fixed, moving, 1, jacobian=False)
    once = array(first.warped)
    moving.SetAndObserveTransformNodeID(first.transform.GetID())
    second = logic.register(fixed, moving, 1, transform=first.transform, jacobian=False)
    assert np.array_equal(array(second.warped), once)


# cancel, close, remove, break


def test_cancel_takes_less_than_a_second_and_leaves_nothing(logic, pair):
    early = []
    before = snapshot()
    job = logic.startRegistration(
        pair["fixed"], pair["moving"], onField=early.append, onEnd=lambda: early.append("end")
    )
    spin(job, until=lambda: job.fraction > 0.2)
    folder = job._run.folder
    began = time.monotonic()
    job.cancel()
    assert time.monotonic() - began < 1
    assert job.finished
    assert job.outputs is None
    assert early == ["end"]
    assert not folder.exists()
    assert snapshot() == before
    assert logic.register(*blobs(), 1, jacobian=False).warped is not None  # and the next run works


def test_a_scene_closed_during_the_run_is_survived(logic, scene):
    from LightweightRegistrationLib.core import InputError

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
    from LightweightRegistrationLib import background, core

    fixed, moving = blobs()
    broken = tmp_path / "broken.py"
    broken.write_text("import sys\nsys.stdin.readline()\nraise RuntimeError('boom')\n")
    worker = background.Worker(core.core_folder())
    logic = slicer_module.LightweightRegistrationLogic(worker)
    before = snapshot()
    try:
        with monkeypatch.context() as patched:
            patched.setattr(background, "WORKER", broken)
            with pytest.raises(core.InputError, match="must run to its end, got: RuntimeError: boom"):
                logic.register(fixed, moving, 1)
        assert snapshot() == before
        assert logic.register(fixed, moving, 1, jacobian=False).warped is not None
    finally:
        worker.close()


@pytest.mark.skipif(sys.platform != "linux", reason="reads processes as Linux lists them")
def test_cancel_reaches_the_interpreter_behind_a_launcher(slicer_module, scene, tmp_path):
    """Slicer puts a launcher before its Python; here one in a group of its own, so that only the watch can reach it."""
    from LightweightRegistrationLib import background, core

    note = tmp_path / "pid"
    launcher = [sys.executable, "-c", LAUNCHER, str(note), sys.executable]
    worker = background.Worker(core.core_folder(), command=launcher)
    job = slicer_module.LightweightRegistrationLogic(worker).startRegistration(*blobs(), 3, refinementSteps=200)
    spin(job, until=lambda: job.message == "refining")
    interpreter = int(note.read_text(encoding="utf-8"))
    os.kill(interpreter, 0)  # it is there
    job.cancel()
    end = time.monotonic() + 5
    while time.monotonic() < end and _runs(interpreter):
        time.sleep(0.05)
    assert not _runs(interpreter)


LAUNCHER = """
import subprocess, sys
process = subprocess.Popen(sys.argv[2:], start_new_session=True)
open(sys.argv[1], "w").write(str(process.pid))
sys.exit(process.wait())
"""


def _runs(pid: int) -> bool:
    stat = Path(f"/proc/{pid}/stat")
    return stat.exists() and stat.read_text(encoding="utf-8").rpartition(")")[2].split()[0] != "Z"


def test_a_killed_process_is_taken_for_lack_of_memory(logic, scene):
    from LightweightRegistrationLib.core import MemoryNeededError

    job = logic.startRegistration(*blobs(), 2)
    logic.worker._process.kill()  # as Linux does when memory runs out
    with pytest.raises(
        MemoryNeededError, match=r"needs about 0\.\d GB of memory, .* use fewer cascades than 2"
    ) as caught:
        spin(job)
    assert caught.value.fewer_cascades == 1


@pytest.mark.skipif(sys.platform != "linux", reason="limits memory with ulimit")
def test_running_out_of_memory_says_how_much_is_needed(slicer_module, scene):
    from LightweightRegistrationLib import background, core

    fixed, moving = blobs()
    free = background.Worker(core.core_folder())
    try:
        slicer_module.LightweightRegistrationLogic(free).register(fixed, moving, 1)
        with open(f"/proc/{free._process.pid}/status") as status:
            peak_kb = int(next(line for line in status if line.startswith("VmPeak")).split()[1])
    finally:
        free.close()
    k, j, i = np.meshgrid(*[np.arange(200)] * 3, indexing="ij", sparse=True)
    ball = (((k - 100) ** 2 + (j - 100) ** 2 + (i - 100) ** 2 < 70**2) * (50 + i // 4)).astype(np.uint8)
    fixed, moving = add_volume("large", ball), add_volume("also large", ball[::-1])
    command = ["bash", "-c", f'ulimit -v {peak_kb + 40_000}; exec "$0" "$@"', sys.executable]
    tight = background.Worker(core.core_folder(), command=command)
    before = snapshot()
    try:
        with pytest.raises(
            core.MemoryNeededError, match=r"needs about \d\.\d GB of memory, more than could be had here"
        ):
            slicer_module.LightweightRegistrationLogic(tight).register(fixed, moving, 1)
    finally:
        tight.close()
    assert snapshot() == before


def test_no_room_in_the_temporary_folder_is_said(slicer_module, scene, tmp_path):
    from LightweightRegistrationLib import background, core

    worker = background.Worker(core.core_folder(), temporary=str(tmp_path / "missing"))
    with pytest.raises(core.InputError, match=r"keep its images in the temporary folder, got: .*missing"):
        slicer_module.LightweightRegistrationLogic(worker).register(*blobs(), 1)


def test_the_process_ends_when_slicer_does(slicer_module, scene):
    from LightweightRegistrationLib import background, core

    worker = background.Worker(core.core_folder())
    slicer_module.LightweightRegistrationLogic(worker).register(*blobs(), 1, jacobian=False)
    session, process = worker._session, worker._process
    assert session.exists()
    process.stdin.close()  # what happens when Slicer is gone, however it went
    assert process.wait(timeout=10) == 0
    assert not session.exists()


@pytest.mark.parametrize("threads", [1, 2])
def test_threads_are_as_many_as_asked_for(logic, scene, threads):
    assert logic.register(*blobs(), 1, threads=threads, jacobian=False).report["threads"] == threads


def test_importing_the_module_brings_neither_torch_nor_simpleitk_nor_qt():
    code = (
        "import sys; from Testing.standin import application; application.module();"
        "from LightweightRegistrationLib import views, torch_setup;"
        "print([m for m in ('torch', 'SimpleITK', 'LDRCore', 'qt', 'PySide6') if m in sys.modules])"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=application.ROOT
    )
    assert done.stdout.strip().splitlines()[-1] == "[]"
