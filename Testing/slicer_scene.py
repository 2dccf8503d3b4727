"""What tests of the Slicer module share: a clean scene on slicer-core, and comparisons of its nodes with SimpleITK."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable, Generator
from pathlib import Path
from typing import Any

import numpy as np
import SimpleITK as sitk

GUARD_S = 900.0  # against hanging only: tests wait for events, however long they take on a busy machine
LPS = np.diag([-1.0, -1.0, 1.0, 1.0])


def image_of(node: Any, to_world: np.ndarray | None = None) -> sitk.Image:
    """A volume node as a SimpleITK image in world coordinates."""
    import slicer
    from LightweightRegistrationLib import volume_nodes

    if to_world is None:
        to_world = volume_nodes.parent_to_world(node, "volume") @ volume_nodes.voxel_to_local(node)
    lps = LPS @ to_world
    spacing = np.linalg.norm(lps[:3, :3], axis=0)
    image = sitk.GetImageFromArray(slicer.util.arrayFromVolume(node))
    image.SetSpacing(spacing.tolist())
    image.SetDirection((lps[:3, :3] / spacing).ravel().tolist())
    image.SetOrigin(lps[:3, 3].tolist())
    return image


def add_volume(name: str, values: np.ndarray, to_local: np.ndarray | None = None, kind: str = "Scalar") -> Any:
    """A new volume node (kind "Scalar" or "LabelMap")."""
    import slicer
    from LightweightRegistrationLib import volume_nodes

    node = slicer.mrmlScene.AddNewNodeByClass(f"vtkMRML{kind}VolumeNode", name)
    slicer.util.updateVolumeFromArray(node, values)
    if to_local is not None:
        node.SetIJKToRASMatrix(volume_nodes.matrix_of(to_local))
    node.CreateDefaultDisplayNodes()
    return node


def linear(name: str, matrix: np.ndarray) -> Any:
    """A new linear transform node, to parent."""
    import slicer
    from LightweightRegistrationLib import volume_nodes

    node = slicer.mrmlScene.AddNewNodeByClass("vtkMRMLLinearTransformNode", name)
    node.SetMatrixTransformToParent(volume_nodes.matrix_of(matrix))
    return node


def turned(degrees: float, shift: tuple[float, float, float], axis: int = 2) -> np.ndarray:
    """A rotation about an axis and a shift, 4x4."""
    c, s = np.cos(np.deg2rad(degrees)), np.sin(np.deg2rad(degrees))
    i, j = (a for a in range(3) if a != axis)
    out = np.eye(4)
    out[i, i], out[j, j], out[i, j], out[j, i] = c, c, -s, s
    out[:3, 3] = shift
    return out


def snapshot() -> dict[str, tuple[str, int]]:
    """Every node's id with its name and modification time, and that of its data: equal means unchanged."""
    import slicer

    scene = slicer.mrmlScene
    nodes = [scene.GetNthNode(n) for n in range(scene.GetNumberOfNodes())]
    state = {}
    for node in nodes:
        data = node.GetImageData() if hasattr(node, "GetImageData") else None
        state[node.GetID()] = (node.GetName(), node.GetMTime(), data.GetMTime() if data is not None else 0)
    return state


def wait_until(holds: Callable[[], bool], what: Callable[[], str], pause_s: float = 0.01) -> None:
    """Wait for an event.

    Args:
        holds: whether it has happened.
        what: describes the state, for the message where it never happens.
        pause_s: between two looks.
    """
    end = time.monotonic() + GUARD_S
    while not holds():
        assert time.monotonic() < end, what()
        time.sleep(pause_s)


def spin(job: Any, until: Callable[[], bool] = lambda: False) -> None:
    """Poll a job until it is finished, or until something holds."""
    wait_until(lambda: job.poll() or until(), lambda: f"still at {job.fraction} {job.message}")


def count_steps(steps: Generator[None, None, Any]) -> tuple[int, Any]:
    """Take every step; return how many there are, and what the last one returns."""
    count = 0
    while True:
        try:
            next(steps)
        except StopIteration as end:
            return count, end.value
        count += 1


def result_of(steps: Generator[None, None, Any]) -> Any:
    """Take every step, and return what the last one returns."""
    return count_steps(steps)[1]


def process_runs(pid: int) -> bool:
    """Whether Linux lists a process that has not ended."""
    stat = Path(f"/proc/{pid}/stat")
    return stat.exists() and stat.read_text(encoding="utf-8").rpartition(")")[2].split()[0] != "Z"


def pause(process: Any) -> None:
    """Stop a process where it stands, so that it cannot finish before a test ends it (where the system can do that)."""
    if hasattr(signal, "SIGSTOP"):
        os.kill(process.pid, signal.SIGSTOP)


def array(node: Any) -> np.ndarray:
    """A volume's voxels as floats."""
    import slicer

    return slicer.util.arrayFromVolume(node).astype(float)


def assert_same_volume(state: np.ndarray, expected: np.ndarray) -> None:
    """Equal to 1e-3 of the intensity range; a whole number may be rounded the other way at a few voxels.

    The module computes in a process of its own, whose number of threads may differ: sums then differ in their last bit.
    """
    off = np.abs(state.astype(float) - expected)
    allowed = 1e-3 * np.ptp(expected.astype(float))
    rounding = 1.0 if np.array_equal(expected, np.rint(expected)) else 0.0
    assert off.max() <= allowed + rounding
    assert (off > allowed).mean() < 1e-3


def local(node: Any) -> np.ndarray:
    """4x4 voxel -> RAS mm without parents."""
    from LightweightRegistrationLib import volume_nodes

    return volume_nodes.voxel_to_local(node)


def moved(transform: Any, point: Any) -> tuple[float, float, float]:
    """Where a transform node takes a world point, from parent (fixed -> moving)."""
    return transform.GetTransformFromParent().TransformPoint(point)


def blobs(count: int = 2) -> list[Any]:
    """Small volumes of different grids and content: quick to register."""
    made = []
    for n in range(count):
        k, j, i = np.meshgrid(*[np.arange(size) for size in (24 + 2 * n, 26, 28)], indexing="ij")
        inside = ((k - 12) / 8) ** 2 + ((j - 13 - n) / 9) ** 2 + ((i - 14) / (9 + n)) ** 2 < 1
        values = np.where(inside, 300 + 20 * np.sin(k + n) * np.cos(j) + 5 * i, 0).astype(np.int16)
        to_local = turned(10 * n, (-40, -40, -40)) @ np.diag([3.0, 3.0, 3.0 + n, 1.0])
        made.append(add_volume(f"blob {n}", values, to_local))
    return made


def frames(scene: Any, count: int = 3) -> tuple[Any, Any]:
    """A fixed volume, and a sequence of volumes that turn and move."""
    import slicer
    from LightweightRegistrationLib import volume_nodes

    fixed, moving = blobs()
    sequence = scene.AddNewNodeByClass("vtkMRMLSequenceNode", "breathing")
    sequence.SetIndexName("time")
    sequence.SetIndexUnit("s")
    for n in range(count):
        frame = slicer.vtkMRMLScalarVolumeNode()
        frame.SetIJKToRASMatrix(volume_nodes.matrix_of(turned(3 * n, (2.0 * n, 0, 0)) @ local(moving)))
        slicer.util.updateVolumeFromArray(frame, slicer.util.arrayFromVolume(moving))
        sequence.SetDataNodeAtValue(frame, str(0.5 * n))
    return fixed, sequence


def field_image(node) -> sitk.Image:
    """The grid that a transform node holds, read through VTK, as a SimpleITK image."""
    from LightweightRegistrationLib import transform_nodes

    field = result_of(transform_nodes.read_displacement_grid(node))
    spacing = np.linalg.norm(field.to_lps[:3, :3], axis=0)
    image = sitk.GetImageFromArray(field.vectors.astype(np.float32), isVector=True)
    image.SetSpacing(spacing.tolist())
    image.SetDirection((field.to_lps[:3, :3] / spacing).ravel().tolist())
    image.SetOrigin(field.to_lps[:3, 3].tolist())
    return image
