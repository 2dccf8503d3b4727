"""Every frame of a moving sequence onto one fixed volume."""

from __future__ import annotations

from typing import Any

import numpy as np
import slicer

from . import outputs, volumes
from .background import Worker
from .core import InputError, MemoryNeededError
from .jobs import Job, Settings, no_memory, register_request
from .transforms import Field, write_field
from .volumes import Picture


class SequenceJob(Job):
    """Frame after frame in the same process; the sequences appear in the scene when the last one is done."""

    def __init__(self, worker: Worker, settings: Settings, *, initial: slicer.vtkMRMLTransformNode | None = None):
        """Nothing is started yet; see `jobs.RegistrationJob`."""
        super().__init__(worker)
        self.settings, self._initial = settings, initial
        self._results: list[tuple[np.ndarray, Field, dict[str, Any]]] = []
        self._pictures: dict[str, Picture] = {}

    def start(self, fixed: slicer.vtkMRMLVolumeNode, sequence: slicer.vtkMRMLSequenceNode) -> None:
        """Check every frame, and start with the first.

        Raises:
            InputError: the fixed volume, the sequence or one of its frames cannot be registered.
        """
        if sequence is None:
            raise InputError("a sequence must be chosen, got none")
        self._inputs = [fixed, sequence]
        self._count = sequence.GetNumberOfDataNodes()
        if self._count == 0:
            raise InputError(f"the sequence must hold frames, got '{sequence.GetName()}', which is empty")
        self._fixed = volumes.picture(fixed, "fixed volume")
        for n in range(self._count):
            self._frame(n)
        self._next()

    def _frame(self, n: int) -> Picture:
        node = self._inputs[1].GetNthDataNode(n)
        if node is None or not node.IsA("vtkMRMLVolumeNode"):
            raise InputError(f"the sequence must hold volumes, got '{self._inputs[1].GetName()}' with something else")
        return volumes.picture(node, f"frame {n + 1} of the sequence")

    def _next(self) -> None:
        n = len(self._results)
        self.tell(0.0, "reading images")
        self._pictures = {"fixed": self._fixed, "moving": self._frame(n)}
        arrays, request = register_request(self._pictures, self.settings, self._initial)
        request.update(warped=True, transform=True, jacobian=False, inverse=False, early=False)
        self.send(request, arrays)

    def tell(self, fraction: float, message: str) -> None:
        """Progress over all frames."""
        n = len(self._results)
        super().tell((n + fraction) / self._count, f"frame {n + 1} of {self._count}: {message}")

    def done(self, event: dict[str, Any]) -> None:
        """Keep this frame's result; start the next or create the sequences."""
        result = self._array(event["warped"]), self._field(event["transform"]), event["report"]
        assert self._run is not None
        self._run.finish()
        self._results.append(result)
        if len(self._results) < self._count:
            self._next()
            return
        self._end()
        self.outputs = self._create()

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
            volume.SetIJKToRASMatrix(volumes.matrix_of(volumes.voxel_to_local(fixed)))
            slicer.util.updateVolumeFromArray(volume, values)
            made["warped"].SetDataNodeAtValue(volume, at)
            transform = slicer.vtkMRMLTransformNode()
            transform.SetName(f"{made['transforms'].GetName()} {at}")
            write_field(transform, field)
            outputs.keep_report(transform, report)
            made["transforms"].SetDataNodeAtValue(transform, at)
        browser = outputs.new_node("vtkMRMLSequenceBrowserNode", f"{made['warped'].GetName()} browser")
        browser.SetAndObserveMasterSequenceNodeID(made["warped"].GetID())
        browser.AddSynchronizedSequenceNode(made["transforms"])
        return {**made, "browser": browser, "reports": [report for _, _, report in self._results]}

    def no_memory(self) -> MemoryNeededError:
        """How much one frame needs."""
        return no_memory(self._pictures, self.settings, {})
