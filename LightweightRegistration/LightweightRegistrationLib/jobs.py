"""Jobs: inputs are read on the main thread, the worker process computes, and outputs are created on the main thread.

A job is started, then polled until it is finished. Unless it succeeds, the scene is as before: also after an error, a
lack of memory, a cancellation or a closed scene.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import slicer

from . import outputs, volume_nodes
from .background import Run, Worker, suggests_lack_of_memory
from .library import library_module
from .module_errors import CancelledError, InputError, MemoryNeededError
from .transform_nodes import LPS, Field, read_transform
from .volume_nodes import WorldImage

PREALIGNMENTS = ("centre", "affine", "none")  # centre, then affine; affine alone; neither


@dataclass(frozen=True)
class Settings:
    """Options of a registration.

    Attributes:
        model: a name of `LDRCore.list_models()`, or a path to a .pt file.
        cascades: number of dense networks, 1 to the model's maximum.
        prealignment: "centre" (align the centroids of the contents, then affine), "affine" (from the scanner
            coordinates or the initial transform), "none" (use these as they are).
        refine: instance optimisation after the networks: "none", "fast" or "best", as in `LDRCore.register`.
        refine_steps: iterations of it at each of two resolutions, 0 for those of `refine`.
        similarity: what it makes larger: "auto", "local-ncc" or "mind", as in `LDRCore.register`.
        device: "auto", "cpu" or "cuda".
        threads: CPU threads, 0 for all.
    """

    model: str = "brain-t1-small"
    cascades: int = 3
    prealignment: str = "centre"
    refine: str = "fast"
    refine_steps: int = 0
    similarity: str = "local-ncc"
    device: str = "auto"
    threads: int = 0

    @property
    def refines(self) -> bool:
        """Whether there is instance optimisation."""
        return self.refine != "none" or self.refine_steps > 0


class Job:
    """One task of the worker process.

    Attributes:
        fraction: progress, 0 to 1.
        message: the current step.
        finished: whether it has succeeded, failed or been cancelled.
        outputs: the nodes that it created, None before it has succeeded.
    """

    def __init__(self, worker: Worker):
        self._worker = worker
        self._run: Run | None = None
        self._inputs: list[slicer.vtkMRMLNode] = []
        self.fraction, self.message = 0.0, ""
        self.finished = False
        self.outputs: Any = None

    def send(self, request: dict[str, Any], arrays: dict[str, np.ndarray]) -> None:
        """Send a request to the worker process.

        Raises:
            InputError: the arrays cannot be written, or the process cannot be started.
        """
        try:
            self._run = self._worker.start(request, arrays)
        except OSError as error:
            self.finished = True
            raise InputError(
                "the registration process must be able to start and to keep its images in the temporary folder, "
                f"got: {error}"
            ) from None

    def poll(self) -> bool:
        """Handle the events that have arrived; create the outputs after the last one.

        Returns:
            Whether the job is finished.

        Raises:
            InputError, MemoryNeededError: the job failed; the scene is as before.
            CancelledError: another job of the same process was cancelled, and this one with it.
        """
        try:
            for event in [] if self.finished or self._run is None else self._run.poll():
                self._handle_event(event)
        except BaseException:
            if self._run is not None:
                self._run.cancel()
            self._finish()
            raise
        return self.finished

    def cancel(self) -> None:
        """End the worker process and leave the scene as before."""
        if self.finished:
            return
        if self._run is not None:
            self._run.cancel()
        self._finish()

    def wait(self, while_waiting: Callable[[], None]) -> Any:
        """Poll until the job is finished and return its outputs.

        Args:
            while_waiting: called between two polls.

        Raises:
            CancelledError: `cancel` was called meanwhile.
            InputError, MemoryNeededError: as `poll`.
        """
        while not self.poll():
            while_waiting()
        if self.outputs is None:
            raise CancelledError
        return self.outputs

    def _finish(self) -> None:
        self.finished = True
        self.clean_up()
        if self._run is not None:
            self._run.finish()
            self._run = None

    def _handle_event(self, event: dict[str, Any]) -> None:
        kind = event["event"]
        if kind == "progress":
            self.set_progress(event["fraction"], event["message"])
        elif kind == "field":
            self.on_early_field(self._field(event["field"]))
        elif kind == "error":
            raise self.failure(event)
        elif kind == "done":
            for node in self._inputs:
                if not slicer.mrmlScene.IsNodePresent(node):
                    raise InputError("the volumes must stay in the scene during the run, got one that was removed")
            self.on_done(event)

    def _array(self, name: str) -> np.ndarray:
        assert self._run is not None
        return self._run.load(name)

    def _field(self, facts: dict[str, Any]) -> Field:
        return Field(self._array(facts["vectors"]), np.array(facts["to_lps"]))

    def failure(self, event: dict[str, Any]) -> Exception:
        """Return the exception for an error event."""
        kind = event["kind"]
        if kind == "input":
            return InputError(event["message"])
        if kind == "cancelled":
            return CancelledError()
        if kind == "memory" or (kind == "died" and suggests_lack_of_memory(event["code"])):
            return self.memory_error()
        if kind == "setup":
            return InputError(f"torch must be usable by Slicer's Python, got: {event['message']}", event["log"])
        last = (event["log"].splitlines() or ["nothing in its log"])[-1]
        reason = event["message"] if kind == "unexpected" else f"exit code {event['code']}: {last}"
        return InputError(f"the registration process must run to its end, got {reason}", event["log"])

    # overridden by the kinds of job

    def set_progress(self, fraction: float, message: str) -> None:
        """Store the progress of the run."""
        self.fraction, self.message = fraction, message

    def on_early_field(self, field: Field) -> None:
        """Take a coarse field; the outputs are still being computed."""

    def on_done(self, event: dict[str, Any]) -> None:
        """Create the outputs and finish."""
        raise NotImplementedError

    def clean_up(self) -> None:
        """Remove what the job created for the time of its run."""

    def memory_error(self) -> MemoryNeededError:
        """Return the exception for a lack of memory."""
        return MemoryNeededError("this needs more memory than could be had here: close other programs and try again")


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
        """
        super().__init__(worker)
        self.settings, self._wanted = settings, wanted
        self._initial, self._masks = initial, {"fixed": fixed_mask, "moving": moving_mask}
        self._on_early, self._on_end = on_early, on_end
        self._images: dict[str, WorldImage] = {}

    def start(self, fixed: slicer.vtkMRMLVolumeNode, moving: slicer.vtkMRMLVolumeNode) -> None:
        """Check and read the inputs, and send the request.

        Raises:
            InputError: the input cannot be registered; nothing was started.
        """
        self._inputs = [fixed, moving]
        images = volume_nodes.check_pair(fixed, moving, ignored=self._node("transform"))
        self._check_wanted()
        arrays, request = register_request(images, self.settings, self._initial)
        for name, node in (("fixed", fixed), ("moving", moving)):
            if self._masks[name] is not None:
                arrays[f"{name}_mask.npy"] = volume_nodes.mask(self._masks[name], node, images[name], f"{name} mask")
                request[f"{name}_mask"] = f"{name}_mask.npy"
        request.update({name: bool(want) for name, want in self._wanted.items()}, early=self._on_early is not None)
        self._images = images
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
                raise InputError(f"the output '{name}' must not be one of the inputs, got '{node.GetName()}'")
        if len({node.GetID() for _, node in given}) < len(given):
            names = ", ".join(f"'{node.GetName()}'" for _, node in given)
            raise InputError(f"every output must be a node of its own, got {names}")

    def on_early_field(self, field: Field) -> None:
        """Pass the field on if the inputs are still in the scene."""
        if self._on_early is not None and all(slicer.mrmlScene.IsNodePresent(node) for node in self._inputs):
            self._on_early(field)

    def on_done(self, event: dict[str, Any]) -> None:
        """Load every array, then create the outputs: all of them, or none."""
        arrays: dict[str, np.ndarray | Field] = {}
        for name, want in self._wanted.items():
            if want:
                arrays[name] = self._field(event[name]) if isinstance(event[name], dict) else self._array(event[name])
        wanted = {
            name: True if want and want is not True and not slicer.mrmlScene.IsNodePresent(want) else want
            for name, want in self._wanted.items()
        }
        self._finish()
        self.outputs = outputs.create(wanted, arrays, self._inputs[0], self._inputs[1], event["report"])

    def clean_up(self) -> None:
        """Call `on_end`, once."""
        on_end, self._on_end = self._on_end, None
        if on_end is not None:
            on_end()

    def memory_error(self) -> MemoryNeededError:
        """Return the exception that names the memory needed."""
        return memory_error(self._images, self.settings, self._wanted)


def register_request(
    images: dict[str, WorldImage], settings: Settings, initial: slicer.vtkMRMLTransformNode | None
) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
    """Build the arrays and the request for the worker process, without masks and wanted outputs.

    Raises:
        InputError: the pre-alignment is unknown, or the volumes do not overlap and are not centred first.
    """
    if settings.prealignment not in PREALIGNMENTS:
        raise InputError(f"prealignment must be one of {PREALIGNMENTS}, got {settings.prealignment!r}")
    arrays = {f"{name}.npy": image.values for name, image in images.items()}
    request: dict[str, Any] = {
        "do": "register",
        "model": str(settings.model),
        "cascades": settings.cascades,
        "affine": settings.prealignment != "none",
        "initial": "center" if settings.prealignment == "centre" else "none",
        "refine": settings.refine,
        "refine_steps": settings.refine_steps,
        "similarity": settings.similarity,
        "device": settings.device,
        "threads": settings.threads,
        **{name: volume_request(image, f"{name}.npy") for name, image in images.items()},
    }
    matrix_lps = np.eye(4)
    if initial is not None:
        transform = read_transform(initial, images["fixed"])
        request["initial"], field_arrays = transform_request(transform, "initial.npy")
        arrays.update(field_arrays)
        matrix_lps = transform if isinstance(transform, np.ndarray) else None
    if request["initial"] != "center" and matrix_lps is not None:
        volume_nodes.check_overlap(images["fixed"], images["moving"], LPS @ np.linalg.inv(matrix_lps) @ LPS)
    return arrays, request


def volume_request(image: WorldImage, name: str) -> dict[str, Any]:
    """Describe a volume for the worker process; `name` is the file of its voxels."""
    return {"values": name, "to_world": image.to_world.tolist(), "shape": list(image.values.shape)}


def transform_request(transform: np.ndarray | Field, name: str) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    """Describe a transform for the worker process; a field's vectors go to the file `name`.

    Returns:
        The description, and the arrays to send with it.
    """
    if isinstance(transform, Field):
        return {"vectors": name, "to_lps": transform.to_lps.tolist()}, {name: transform.vectors}
    return {"matrix_lps": transform.tolist()}, {}


def memory_error(images: dict[str, WorldImage], settings: Settings, wanted: dict[str, Any]) -> MemoryNeededError:
    """Return the exception that names the memory that these volumes need, and what a user can do."""
    fixed, moving = images["fixed"], images["moving"]
    needed = library_module("cpu.memory").needed_bytes(
        library_module("models.weights").model_info(settings.model),
        fixed.values.shape,
        fixed.spacing_mm[::-1].tolist(),
        moving.values.shape,
        cascades=settings.cascades,
        refine=settings.refines,
        inverse=bool(wanted.get("inverse")),
        jacobian=bool(wanted.get("jacobian")),
    )
    fewer = settings.cascades - 1 if settings.cascades > 1 else None
    tips = ["close other programs", "crop the volumes (module Crop Volume)"]
    tips += ["set Device to CPU"] if settings.device != "cpu" else []
    tips += ["set Quality to Fast"] if settings.refines else []
    tips += ["leave out the Jacobian map"] if wanted.get("jacobian") else []
    tips += [f"use fewer cascades than {settings.cascades}"] if fewer else []
    return MemoryNeededError(
        f"registering these volumes needs about {needed / 1e9:.1f} GB of memory, more than could be had here: "
        + ", ".join(tips[:-1])
        + (" or " if len(tips) > 1 else "")
        + tips[-1],
        fewer,
    )
