"""Registers every frame of a sequence of moving volumes to one fixed volume."""

from __future__ import annotations

from collections.abc import Generator
from typing import Any

import slicer
import vtk

from . import outputs, volume_nodes
from .background import Worker
from .jobs import Job, Settings, memory_error, register_request
from .module_errors import InputError, MemoryNeededError
from .volume_nodes import WorldImage


class SequenceJob(Job):
    """Registers frame after frame in one process; the output sequences are created after the last one."""

    def __init__(
        self,
        worker: Worker,
        settings: Settings,
        *,
        initial: slicer.vtkMRMLTransformNode | None = None,
        keep_files: bool = False,
    ):
        """Store the arguments, which are those of `registration_job.RegistrationJob`."""
        super().__init__(worker, keep_files=keep_files)
        self.settings, self._initial = settings, initial
        self._results: list[tuple[vtk.vtkImageData, vtk.vtkAbstractTransform, dict[str, Any]]] = []
        self._images: dict[str, WorldImage] = {}

    def start(self, fixed: slicer.vtkMRMLVolumeNode, sequence: slicer.vtkMRMLSequenceNode) -> None:
        """Check the fixed volume; `poll` goes on with checking every frame, and with registering the first.

        Raises:
            InputError: the fixed volume or the sequence cannot be registered. `poll` raises it for a frame.
        """
        if sequence is None:
            raise InputError("a sequence must be chosen, got none")
        self._inputs = [fixed, sequence]
        self._count = sequence.GetNumberOfDataNodes()
        if self._count == 0:
            raise InputError(f"the sequence must hold frames, got '{sequence.GetName()}', which is empty")
        self._fixed = volume_nodes.read_volume(fixed, "fixed volume")
        self.set_progress(0.0, "reading images")
        self._steps = self._checking()

    def _checking(self) -> Generator[None, None, None]:
        """Check a frame in each step, then send the first."""
        for n in range(self._count):
            self._frame(n)
            yield
        yield from self._sending()

    def _frame(self, n: int) -> WorldImage:
        node = self._inputs[1].GetNthDataNode(n)
        if node is None or not node.IsA("vtkMRMLVolumeNode"):
            raise InputError(f"the sequence must hold volumes, got '{self._inputs[1].GetName()}' with something else")
        return volume_nodes.read_volume(node, f"frame {n + 1} of the sequence")

    def _sending(self) -> Generator[None, None, None]:
        """Read and send the next frame."""
        self.set_progress(0.0, "reading images")
        self._images = {"fixed": self._fixed, "moving": self._frame(len(self._results))}
        arrays, request = yield from register_request(self._images, self.settings, self._initial)
        request.update(warped=True, transform=True, jacobian=False, inverse=False, early=False)
        self._check_inputs()
        self.send(request, arrays)

    def set_progress(self, fraction: float, message: str) -> None:
        """Store the progress over all frames."""
        n = len(self._results)
        super().set_progress((n + fraction) / self._count, f"frame {n + 1} of {self._count}: {message}")

    def on_done(self, event: dict[str, Any]) -> Generator[None, None, None]:
        """Store this frame's result; start the next frame or create the sequences."""
        volume = yield from self._read_image(event["warped"])
        transform = yield from self._read_transform(event["transform"])
        self._check_inputs()
        self._end_run()
        self._results.append((volume, transform, event["report"]))
        if len(self._results) < self._count:
            yield from self._sending()
        else:
            self.outputs = yield from self._creating()

    def _creating(self) -> Generator[None, None, dict[str, Any]]:
        """Create the sequences, a frame in each step: all of it, or nothing."""
        fixed, source = self._inputs
        names = {"warped": f"{source.GetName()} on {fixed.GetName()}", "transforms": f"{source.GetName()} transforms"}
        made: dict[str, Any] = {}
        try:
            for key, name in names.items():
                node = made[key] = outputs.new_node("vtkMRMLSequenceNode", name)
                node.SetIndexName(source.GetIndexName())
                node.SetIndexUnit(source.GetIndexUnit())
                node.SetIndexType(source.GetIndexType())
            for n, (image, from_parent, report) in enumerate(self._results):
                at = source.GetNthIndexValue(n)
                volume = slicer.vtkMRMLScalarVolumeNode()
                volume.SetName(f"{made['warped'].GetName()} {at}")
                volume.SetIJKToRASMatrix(volume_nodes.matrix_of(volume_nodes.voxel_to_local(fixed)))
                made["warped"].SetDataNodeAtValue(volume, at)  # a deep copy, so voxels and vectors are set after it
                made["warped"].GetDataNodeAtValue(at).SetAndObserveImageData(image)
                yield
                transform = slicer.vtkMRMLTransformNode()
                transform.SetName(f"{made['transforms'].GetName()} {at}")
                outputs.write_report(transform, report)
                made["transforms"].SetDataNodeAtValue(transform, at)
                made["transforms"].GetDataNodeAtValue(at).SetAndObserveTransformFromParent(from_parent)
                yield
            shown = made["shown"] = outputs.new_node("vtkMRMLScalarVolumeNode", made["warped"].GetName())
            outputs.prepare_display(shown, *outputs.displayed_range(fixed))  # the browser's own takes long
            outputs.copy_window_level(fixed, shown)
            browser = made["browser"] = outputs.new_node("vtkMRMLSequenceBrowserNode", f"{shown.GetName()} browser")
            yield
            browser.AddProxyNode(shown, made["warped"], False)
            yield
            browser.SetAndObserveMasterSequenceNodeID(made["warped"].GetID())
            yield
            browser.AddSynchronizedSequenceNode(made["transforms"])
        except BaseException:
            for node in made.values():
                outputs.remove_node(node)
            raise
        del made["shown"]
        return {**made, "reports": [report for _, _, report in self._results]}

    def memory_error(self) -> MemoryNeededError:
        """Return the exception that names the memory that one frame needs."""
        return memory_error(self._images, self.settings, {})
