"""Registers every frame of a sequence of moving volumes to one fixed volume."""

from __future__ import annotations

from collections.abc import Generator
from typing import Any

import numpy as np
import slicer

from . import outputs, volume_nodes
from .background import Worker
from .jobs import Job, Settings, memory_error, register_request
from .module_errors import InputError, MemoryNeededError
from .transform_nodes import Field, write_field
from .volume_nodes import WorldImage


class SequenceJob(Job):
    """Registers frame after frame in one process; the output sequences are created after the last one."""

    def __init__(self, worker: Worker, settings: Settings, *, initial: slicer.vtkMRMLTransformNode | None = None):
        """Store the arguments, which are those of `jobs.RegistrationJob`."""
        super().__init__(worker)
        self.settings, self._initial = settings, initial
        self._results: list[tuple[np.ndarray, Field, dict[str, Any]]] = []
        self._images: dict[str, WorldImage] = {}

    def start(self, fixed: slicer.vtkMRMLVolumeNode, sequence: slicer.vtkMRMLSequenceNode) -> None:
        """Check every frame, and start to register the first.

        Raises:
            InputError: the fixed volume, the sequence or one of its frames cannot be registered.
        """
        if sequence is None:
            raise InputError("a sequence must be chosen, got none")
        self._inputs = [fixed, sequence]
        self._count = sequence.GetNumberOfDataNodes()
        if self._count == 0:
            raise InputError(f"the sequence must hold frames, got '{sequence.GetName()}', which is empty")
        self._fixed = volume_nodes.read_volume(fixed, "fixed volume")
        for n in range(self._count):
            self._frame(n)
        self._next()

    def _frame(self, n: int) -> WorldImage:
        node = self._inputs[1].GetNthDataNode(n)
        if node is None or not node.IsA("vtkMRMLVolumeNode"):
            raise InputError(f"the sequence must hold volumes, got '{self._inputs[1].GetName()}' with something else")
        return volume_nodes.read_volume(node, f"frame {n + 1} of the sequence")

    def _next(self) -> None:
        n = len(self._results)
        self.set_progress(0.0, "reading images")
        self._images = {"fixed": self._fixed, "moving": self._frame(n)}
        arrays, request = register_request(self._images, self.settings, self._initial)
        request.update(warped=True, transform=True, jacobian=False, inverse=False, early=False)
        self.send(request, arrays)

    def set_progress(self, fraction: float, message: str) -> None:
        """Store the progress over all frames."""
        n = len(self._results)
        super().set_progress((n + fraction) / self._count, f"frame {n + 1} of {self._count}: {message}")

    def on_done(self, event: dict[str, Any]) -> Generator[None, None, None]:
        """Store this frame's result; start the next frame or create the sequences."""
        result = self._array(event["warped"]), self._field(event["transform"]), event["report"]
        assert self._run is not None
        self._run.finish()
        self._results.append(result)
        if len(self._results) < self._count:
            self._next()
            return
        self.outputs = self._create()
        yield

    def _create(self) -> dict[str, Any]:
        fixed, source = self._inputs
        made = {"warped": f"{source.GetName()} on {fixed.GetName()}", "transforms": f"{source.GetName()} transforms"}
        for key, name in made.items():
            node = outputs.new_node("vtkMRMLSequenceNode", name)
            node.SetIndexName(source.GetIndexName())
            node.SetIndexUnit(source.GetIndexUnit())
            node.SetIndexType(source.GetIndexType())
            made[key] = node
        for n, (values, field, report) in enumerate(self._results):
            at = source.GetNthIndexValue(n)
            volume = slicer.vtkMRMLScalarVolumeNode()
            volume.SetName(f"{made['warped'].GetName()} {at}")
            volume.SetIJKToRASMatrix(volume_nodes.matrix_of(volume_nodes.voxel_to_local(fixed)))
            slicer.util.updateVolumeFromArray(volume, values)
            made["warped"].SetDataNodeAtValue(volume, at)
            transform = slicer.vtkMRMLTransformNode()
            transform.SetName(f"{made['transforms'].GetName()} {at}")
            write_field(transform, field)
            outputs.write_report(transform, report)
            made["transforms"].SetDataNodeAtValue(transform, at)
        browser = outputs.new_node("vtkMRMLSequenceBrowserNode", f"{made['warped'].GetName()} browser")
        browser.SetAndObserveMasterSequenceNodeID(made["warped"].GetID())
        browser.AddSynchronizedSequenceNode(made["transforms"])
        return {**made, "browser": browser, "reports": [report for _, _, report in self._results]}

    def memory_error(self) -> MemoryNeededError:
        """Return the exception that names the memory that one frame needs."""
        return memory_error(self._images, self.settings, {})
