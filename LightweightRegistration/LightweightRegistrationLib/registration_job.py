"""The job of one registration of two volume nodes."""

from __future__ import annotations

from collections.abc import Callable, Generator
from typing import Any

import slicer

from . import outputs, volume_nodes
from .background import Worker
from .jobs import Job, Settings, memory_error, register_request
from .module_errors import InputError, MemoryNeededError
from .transform_nodes import Field
from .volume_nodes import WorldImage


class RegistrationJob(Job):
    """One registration of two volume nodes."""

    def __init__(
        self,
        worker: Worker,
        settings: Settings,
        *,
        initial: slicer.vtkMRMLTransformNode | None = None,
        fixed_mask: slicer.vtkMRMLDisplayableNode | None = None,
        moving_mask: slicer.vtkMRMLDisplayableNode | None = None,
        wanted: dict[str, bool | slicer.vtkMRMLNode | None],
        on_early: Callable[[Field], None] | None = None,
        on_end: Callable[[], None] | None = None,
        keep_files: bool = False,
    ):
        """Store the arguments; `start` reads the volumes.

        Args:
            worker: the process.
            settings: options of the registration.
            initial: initial transform: it aligns the moving volume roughly when the volume is put under it.
            fixed_mask, moving_mask: segmentation or labelmap.
            wanted: see `outputs.create`.
            on_early: called with a coarse field as soon as the transform is known.
            on_end: called when the job ends in any way, before outputs are created.
            keep_files: keep the arrays, the request, the events and the log of the run.
        """
        super().__init__(worker, keep_files=keep_files)
        self.settings, self._wanted = settings, wanted
        self._initial, self._masks = initial, {"fixed": fixed_mask, "moving": moving_mask}
        self._on_early, self._on_end = on_early, on_end
        self._images: dict[str, WorldImage] = {}

    def start(self, fixed: slicer.vtkMRMLVolumeNode, moving: slicer.vtkMRMLVolumeNode) -> None:
        """Check the inputs; `poll` goes on with reading and sending them.

        Raises:
            InputError: the input cannot be registered; nothing was started. `poll` raises it for a mask or transform.
        """
        self._inputs = [fixed, moving]
        self._images = volume_nodes.check_pair(fixed, moving, ignored=self._node("transform"))
        self._check_wanted()
        self._steps = self._reading()

    def _reading(self) -> Generator[None, None, None]:
        """Read the initial transform and the masks, in steps, and send the request."""
        images = self._images
        arrays, request = yield from register_request(images, self.settings, self._initial)
        for (name, mask), volume in zip(self._masks.items(), self._inputs, strict=True):
            if mask is not None:
                inside = yield from volume_nodes.mask(mask, volume, images[name], f"{name} mask")
                arrays[f"{name}_mask.npy"], request[f"{name}_mask"] = inside, f"{name}_mask.npy"
        request.update({name: bool(want) for name, want in self._wanted.items()}, early=self._on_early is not None)
        self._check_inputs()
        self.send(request, arrays)

    def _node(self, output: str) -> slicer.vtkMRMLNode | None:
        """Return the node that was given for an output."""
        want = self._wanted.get(output)
        return None if isinstance(want, bool) else want

    def _check_wanted(self) -> None:
        if not any(self._wanted.values()):
            raise InputError("at least one output must be asked for, got none")
        used = [*self._inputs, self._initial, *self._masks.values()]
        for node in [*self._inputs[:1], *self._masks.values()]:  # the moving volume may be under the result before
            used += volume_nodes.parents(node)
        given = [(name, node) for name, node in self._wanted.items() if node is not None and not isinstance(node, bool)]
        for name, node in given:
            if any(node is other for other in used):
                raise InputError(
                    f"the output '{name}' must not be one of the inputs, got '{node.GetName()}': choose another one, "
                    "or New"
                )
        if len({node.GetID() for _, node in given}) < len(given):
            names = ", ".join(f"'{node.GetName()}'" for _, node in given)
            raise InputError(f"every output must be a node of its own, got {names}")

    def on_early_field(self, field: Field) -> None:
        """Pass the field on if the inputs are still in the scene."""
        if self._on_early is not None and all(slicer.mrmlScene.IsNodePresent(node) for node in self._inputs):
            self._on_early(field)

    def on_done(self, event: dict[str, Any]) -> Generator[None, None, None]:
        """Read every array, then create the outputs: all of them, or none."""
        data = {}
        for name, want in self._wanted.items():
            if want:
                given = event[name]
                data[name] = (
                    yield from self._read_transform(given) if isinstance(given, dict) else self._read_image(given)
                )
        self._check_inputs()
        wanted = {
            name: True if want and want is not True and not slicer.mrmlScene.IsNodePresent(want) else want
            for name, want in self._wanted.items()
        }
        self._end_run()
        self.outputs = yield from outputs.create(wanted, data, self._inputs[0], self._inputs[1], event["report"])

    def clean_up(self) -> None:
        """Call `on_end`, once."""
        on_end, self._on_end = self._on_end, None
        if on_end is not None:
            on_end()

    def memory_error(self) -> MemoryNeededError:
        """Return the exception that names the memory needed."""
        return memory_error(self._images, self.settings, self._wanted)
