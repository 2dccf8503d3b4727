"""Work under way: inputs captured on the main thread, computed in the other process, outputs created here again.

A job is started, then polled until it is finished. Whatever happens (a refusal, no memory, cancel, a closed scene), the
scene is as before unless it succeeded.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import slicer

from . import outputs, volumes
from .background import Run, Worker
from .core import CancelledError, InputError, MemoryNeededError, core
from .transforms import LPS, Field, for_worker
from .volumes import Picture

PREALIGNMENTS = ("centre", "affine", "none")  # centre then affine; affine from where they are; neither


@dataclass(frozen=True)
class Settings:
    """How to register.

    Attributes:
        model: a name of `LDRCore.list_models()`, or a path to a .pt file.
        cascades: 1 to the model's maximum.
        prealignment: "centre" (bring the contents together, then affine), "affine" (from where they are, or from the
            initial transform), "none" (trust the scanner coordinates or the initial transform).
        refine_steps: steps of instance optimisation after the networks.
        device: "auto", "cpu" or "cuda".
        threads: CPU threads, 0 for all.
    """

    model: str = "brain-t1-small"
    cascades: int = 3
    prealignment: str = "centre"
    refine_steps: int = 0
    device: str = "auto"
    threads: int = 0


class Job:
    """Something that the other process does.

    Attributes:
        fraction: how much is done, 0 to 1.
        message: what it is doing.
        finished: nothing more will come.
        outputs: what it left in the scene, once it succeeded.
    """

    def __init__(self, worker: Worker):
        self._worker = worker
        self._run: Run | None = None
        self._inputs: list[slicer.vtkMRMLNode] = []
        self.fraction, self.message = 0.0, ""
        self.finished = False
        self.outputs: Any = None

    def send(self, request: dict[str, Any], arrays: dict[str, np.ndarray]) -> None:
        """Start the other process on a request.

        Raises:
            InputError: there is no room for the arrays, or no Python to run.
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
        """Take what has come; create the outputs when all is there.

        Returns:
            Whether the job is finished.

        Raises:
            InputError, MemoryNeededError: it failed; the scene is as before.
        """
        try:
            for event in [] if self.finished or self._run is None else self._run.poll():
                self._take(event)
        except BaseException:
            self._end()
            raise
        return self.finished

    def cancel(self) -> None:
        """Stop at once and leave the scene as before."""
        if self.finished:
            return
        if self._run is not None:
            self._run.cancel()
        self._end()

    def wait(self, while_waiting: Callable[[], None]) -> Any:
        """Poll until finished, calling a function in between, and return the outputs.

        Raises:
            CancelledError: `cancel` was called meanwhile; and what `poll` raises.
        """
        while not self.poll():
            while_waiting()
        if self.outputs is None:
            raise CancelledError
        return self.outputs

    def _end(self) -> None:
        self.finished = True
        self.clean_up()
        if self._run is not None:
            self._run.finish()
            self._run = None

    def _take(self, event: dict[str, Any]) -> None:
        kind = event["event"]
        if kind == "progress":
            self.tell(event["fraction"], event["message"])
        elif kind == "field":
            self.early(self._field(event["field"]))
        elif kind == "error":
            raise self.failure(event)
        elif kind == "done":
            for node in self._inputs:
                if not slicer.mrmlScene.IsNodePresent(node):
                    raise InputError("the volumes must stay in the scene during the run, got one that was removed")
            self.done(event)

    def _array(self, name: str) -> np.ndarray:
        assert self._run is not None
        return self._run.load(name)

    def _field(self, facts: dict[str, Any]) -> Field:
        return Field(self._array(facts["vectors"]), np.array(facts["to_lps"]))

    def failure(self, event: dict[str, Any]) -> Exception:
        """What to raise for an error event."""
        kind = event["kind"]
        if kind == "input":
            return InputError(event["message"])
        if kind == "memory" or (kind == "died" and "Traceback" not in event["log"]):
            return self.no_memory()  # ended from outside without a word: the system took it for its memory
        if kind == "setup":
            return InputError(f"torch must be usable by Slicer's Python, got: {event['message']}")
        reason = event.get("message") or event["log"].splitlines()[-1]
        return InputError(f"the registration process must run to its end, got: {reason}")

    # what kinds of job fill in

    def tell(self, fraction: float, message: str) -> None:
        """Keep the progress."""
        self.fraction, self.message = fraction, message

    def early(self, field: Field) -> None:
        """The transform is known, the rest is still being computed."""

    def done(self, event: dict[str, Any]) -> None:
        """Everything has arrived: create outputs and finish."""
        raise NotImplementedError

    def clean_up(self) -> None:
        """Remove what was only there meanwhile."""

    def no_memory(self) -> MemoryNeededError:
        """What to raise when memory could not be had."""
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
        """Nothing is started yet.

        Args:
            worker: the process.
            settings: how to register.
            initial: transform node that brings moving near fixed when moving is put under it.
            fixed_mask, moving_mask: segmentation or labelmap.
            wanted: see `outputs.create`.
            on_early: called with a coarse field as soon as the transform is known.
            on_end: called when the job ends in any way, before outputs are created.
        """
        super().__init__(worker)
        self.settings, self._wanted = settings, wanted
        self._initial, self._masks = initial, {"fixed": fixed_mask, "moving": moving_mask}
        self._on_early, self._on_end = on_early, on_end
        self._pictures: dict[str, Picture] = {}

    def start(self, fixed: slicer.vtkMRMLVolumeNode, moving: slicer.vtkMRMLVolumeNode) -> None:
        """Check and capture the inputs, and start.

        Raises:
            InputError: input that cannot be registered; nothing was started.
        """
        self._inputs = [fixed, moving]
        pictures = volumes.check_pair(fixed, moving, ignored=self._node("transform"))
        self._check_wanted()
        arrays, request = register_request(pictures, self.settings, self._initial)
        for name, node in (("fixed", fixed), ("moving", moving)):
            if self._masks[name] is not None:
                arrays[f"{name}_mask.npy"] = volumes.mask(self._masks[name], node, pictures[name], f"{name} mask")
                request[f"{name}_mask"] = f"{name}_mask.npy"
        request.update({name: bool(want) for name, want in self._wanted.items()}, early=self._on_early is not None)
        self._pictures = pictures
        self.send(request, arrays)

    def _node(self, output: str) -> slicer.vtkMRMLNode | None:
        """The node that was given for an output."""
        want = self._wanted.get(output)
        return None if isinstance(want, bool) else want

    def _check_wanted(self) -> None:
        if not any(self._wanted.values()):
            raise InputError("at least one output must be asked for, got none")
        used = [*self._inputs, self._initial, *(node.GetParentTransformNode() for node in self._inputs[:1])]
        for name, node in self._wanted.items():
            if node is not None and any(node is other for other in used):
                raise InputError(f"the output '{name}' must not be one of the inputs, got '{node.GetName()}'")

    def early(self, field: Field) -> None:
        """Pass the field on, while the inputs are still there."""
        if self._on_early is not None and all(slicer.mrmlScene.IsNodePresent(node) for node in self._inputs):
            self._on_early(field)

    def done(self, event: dict[str, Any]) -> None:
        """Load every array first, so that nothing is created unless all of it can be."""
        arrays: dict[str, np.ndarray | Field] = {}
        for name, want in self._wanted.items():
            if want:
                arrays[name] = self._field(event[name]) if isinstance(event[name], dict) else self._array(event[name])
        wanted = {
            name: True if want and want is not True and not slicer.mrmlScene.IsNodePresent(want) else want
            for name, want in self._wanted.items()
        }
        self._end()
        self.outputs = outputs.create(wanted, arrays, self._inputs[0], self._inputs[1], event["report"])

    def clean_up(self) -> None:
        """Tell that it ends, once."""
        on_end, self._on_end = self._on_end, None
        if on_end is not None:
            on_end()

    def no_memory(self) -> MemoryNeededError:
        """How much is needed, and what to do."""
        return no_memory(self._pictures, self.settings, self._wanted)


def register_request(
    pictures: dict[str, Picture], settings: Settings, initial: slicer.vtkMRMLTransformNode | None
) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
    """Arrays and request for the worker, without masks and wanted outputs.

    Raises:
        InputError: a pre-alignment that does not exist, or volumes that do not overlap where nothing centres them.
    """
    if settings.prealignment not in PREALIGNMENTS:
        raise InputError(f"prealignment must be one of {PREALIGNMENTS}, got {settings.prealignment!r}")
    arrays = {f"{name}.npy": picture.values for name, picture in pictures.items()}
    request: dict[str, Any] = {
        "do": "register",
        "model": str(settings.model),
        "cascades": settings.cascades,
        "affine": settings.prealignment != "none",
        "initial": "center" if settings.prealignment == "centre" else "none",
        "refine_steps": settings.refine_steps,
        "device": settings.device,
        "threads": settings.threads,
        **{name: described(picture, f"{name}.npy") for name, picture in pictures.items()},
    }
    start = np.eye(4)
    if initial is not None:
        given = for_worker(initial, pictures["fixed"])
        request["initial"], more = transform_request(given, "initial.npy")
        arrays.update(more)
        start = given if isinstance(given, np.ndarray) else None
    if request["initial"] != "center" and start is not None:
        volumes.check_overlap(pictures["fixed"], pictures["moving"], LPS @ np.linalg.inv(start) @ LPS)
    return arrays, request


def described(picture: Picture, name: str) -> dict[str, Any]:
    """A picture as the worker takes it."""
    return {"values": name, "to_world": picture.to_world.tolist(), "shape": list(picture.values.shape)}


def transform_request(given: np.ndarray | Field, name: str) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    """A transform as the worker takes it, and the array that goes with it."""
    if isinstance(given, Field):
        return {"vectors": name, "to_lps": given.to_lps.tolist()}, {name: given.vectors}
    return {"matrix_lps": given.tolist()}, {}


def no_memory(pictures: dict[str, Picture], settings: Settings, wanted: dict[str, Any]) -> MemoryNeededError:
    """How much memory these pictures need, and what to do."""
    fixed, moving = pictures["fixed"], pictures["moving"]
    needed = core("cpu.memory").needed_bytes(
        core("models.weights").model_info(settings.model),
        fixed.values.shape,
        fixed.spacing_mm[::-1].tolist(),
        moving.values.shape,
        cascades=settings.cascades,
        refine_steps=settings.refine_steps,
        inverse=bool(wanted.get("inverse")),
        jacobian=bool(wanted.get("jacobian")),
    )
    fewer = settings.cascades - 1 if settings.cascades > 1 else None
    tips = ["close other programs", "crop the volumes (module Crop Volume)"]
    tips += ["set Device to CPU"] if settings.device != "cpu" else []
    tips += ["leave out the Jacobian map"] if wanted.get("jacobian") else []
    tips += [f"use fewer cascades than {settings.cascades}"] if fewer else []
    return MemoryNeededError(
        f"registering these volumes needs about {needed / 1e9:.1f} GB of memory, more than could be had here: "
        + ", ".join(tips[:-1])
        + (" or " if len(tips) > 1 else "")
        + tips[-1],
        fewer,
    )
