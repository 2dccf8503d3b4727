"""Jobs: inputs are read on the main thread, the worker process computes, and outputs are created on the main thread.

A job is started, then polled until it is finished. Unless it succeeds, the scene is as before: also after an error, a
lack of memory, a cancellation or a closed scene.
"""

from __future__ import annotations

from collections.abc import Callable, Generator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import slicer
import vtk

from . import volume_nodes
from .background import Run, Worker, suggests_lack_of_memory, take_turn
from .library import library_module
from .module_errors import CancelledError, InputError, MemoryNeededError
from .transform_nodes import LPS, SIGNS, Field, new_grid, read_transform
from .volume_nodes import WorldImage, matrix_of, new_image

PREALIGNMENTS = ("centre", "affine", "none")  # centre, then affine; affine alone; neither


@dataclass(frozen=True)
class Settings:
    """Options of a registration.

    Attributes:
        kind: "deformable", "affine" or "rigid"; the last two run no dense networks, so `cascades`, `refine`,
            `refine_steps` and `similarity` do not count.
        model: a name of `LDRCore.list_models()`, or a path to a .pt file.
        cascades: number of dense networks, 0 to the model's maximum; None for all.
        prealignment: "centre" (align the centroids of the contents, then affine), "affine" (from the scanner
            coordinates or the initial transform), "none" (use these as they are).
        refine: instance optimisation after the networks: "none", "fast" or "best", as in `LDRCore.register`; None for
            what the model needs.
        refine_steps: iterations of it at each of two resolutions, 0 for those of `refine`.
        similarity: what it makes larger: "auto", "local-ncc" or "mind", as in `LDRCore.register`.
        device: "auto", "cpu" or "cuda".
        threads: CPU threads, 0 for all.

    Raises:
        InputError: the pre-alignment is unknown; LDRCore checks the others.
    """

    model: str = "brain-t1-gradient"
    cascades: int | None = None
    prealignment: str = "centre"
    refine: str | None = "fast"
    refine_steps: int = 0
    similarity: str = "auto"
    device: str = "auto"
    threads: int = 0
    kind: str = "deformable"

    def __post_init__(self) -> None:
        if self.prealignment not in PREALIGNMENTS:
            raise InputError(f"prealignment must be one of {PREALIGNMENTS}, got {self.prealignment!r}")

    @property
    def initial(self) -> str:
        """Where the alignment begins without an initial transform, in the words of `LDRCore.register`."""
        return "center" if self.prealignment == "centre" else "none"

    @property
    def deforms(self) -> bool:
        """Whether the transform may deform."""
        return self.kind not in ("rigid", "affine")

    def check_that_it_aligns(self) -> None:
        """Check that there is something to do without an initial transform.

        Raises:
            InputError: neither a pre-alignment nor a deformation is chosen.
        """
        if not self.deforms and self.prealignment == "none":
            raise InputError(
                f"the {self.kind} registration must align something, got the pre-alignment 'none': choose another one"
            )

    def options(self) -> dict[str, Any]:
        """Return the keywords of `LDRCore.register`, without the initial transform."""
        return {
            "kind": self.kind,
            "model": str(self.model),
            "cascades": self.cascades if self.deforms else 0,
            "affine": self.prealignment != "none",
            "refine": self.refine if self.deforms else "none",
            "refine_steps": self.refine_steps if self.deforms else 0,
            "similarity": self.similarity,
            "device": self.device,
        }

    def networks(self, card: dict[str, Any]) -> int:
        """Return how many networks run at most, by the model's card."""
        most = card["architecture"]["cascades"] if self.cascades is None else self.cascades
        return most if self.deforms else 0

    def refines(self, card: dict[str, Any]) -> bool:
        """Return whether there is instance optimisation."""
        refine = card.get("refine", "none") if self.refine is None else self.refine
        return self.deforms and (refine != "none" or self.refine_steps > 0)


class Job:
    """One task of the worker process.

    Attributes:
        fraction: progress, 0 to 1.
        message: the current step.
        finished: whether it has succeeded, failed or been cancelled.
        outputs: the nodes that it created, None before it has succeeded.
        kept: folders with the files of its runs, where it keeps them.
        resumable: what is finished stays when it is cancelled, and the same job goes on from there.
    """

    resumable = False

    def __init__(self, worker: Worker, *, keep_files: bool = False):
        self._worker, self._keep_files = worker, keep_files
        self.kept: list[Path] = []
        self._run: Run | None = None
        self._inputs: list[slicer.vtkMRMLNode] = []
        self._steps: Generator[None, None, None] | None = None
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
            raise _no_folder(error) from None

    def poll(self) -> bool:
        """Handle the events that have arrived; create the outputs after the last one.

        Returns:
            Whether the job is finished.

        Raises:
            InputError, MemoryNeededError: the job failed; the scene is as before.
            CancelledError: another job of the same process was cancelled, and this one with it.
        """
        try:
            if self._steps is not None and take_turn(self._steps):
                self._steps = None
                if self.outputs is not None:  # otherwise a run was started
                    self._finish()
            for event in [] if self.finished or self._run is None else self._run.poll():
                self._handle_event(event)
        except BaseException as error:
            if self._run is not None:
                self._run.cancel()
            self._finish()
            if isinstance(error, OSError):
                raise _no_folder(error) from None
            raise
        return self.finished

    def cancel(self) -> None:
        """End the worker process and leave the scene as before."""
        if self.finished:
            return
        if self._run is not None:
            self._run.cancel()
        if self._steps is not None:
            self._steps.close()
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
        self.finished, self._steps = True, None
        self._end_run()

    def _end_run(self) -> None:
        """Remove what the run needed: its files, and what is shown during it."""
        self.clean_up()
        if self._run is not None:
            kept = self._run.finish(self._keep_files)
            if kept is not None:
                self.kept.append(kept)
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
            self._check_inputs()
            self._steps = self.on_done(event)

    def _check_inputs(self) -> None:
        for node in self._inputs:
            if not slicer.mrmlScene.IsNodePresent(node):
                raise InputError("the volumes must stay in the scene during the run, got one that was removed")

    def _array(self, name: str) -> np.ndarray:
        assert self._run is not None
        return self._run.load(name)

    def _read_image(self, name: str) -> Generator[None, None, vtk.vtkImageData]:
        """Read image data that the process wrote, in steps."""
        made: list[vtk.vtkImageData] = []

        def allocate(shape: tuple[int, ...], dtype: np.dtype) -> np.ndarray:
            image, view = new_image(shape, dtype)
            made.append(image)
            return view

        assert self._run is not None
        for _ in self._run.read(name, allocate):
            yield
        return made[0]

    def _read_transform(self, facts: dict[str, Any]) -> Generator[None, None, vtk.vtkAbstractTransform]:
        """Read a matrix or a field that the process wrote, in steps, as a transform from parent."""
        if "matrix_lps" in facts:
            linear = vtk.vtkTransform()
            linear.SetMatrix(matrix_of(LPS @ np.array(facts["matrix_lps"]) @ LPS))
            return linear
        made: list[slicer.vtkOrientedGridTransform] = []

        def allocate(shape: tuple[int, ...], dtype: np.dtype) -> np.ndarray:
            transform, view = new_grid(np.array(facts["to_lps"]), shape, dtype)
            made.append(transform)
            return view

        assert self._run is not None
        for vectors in self._run.read(facts["vectors"], allocate):
            vectors *= np.array(SIGNS, vectors.dtype)
            yield
        return made[0]

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

    def on_done(self, event: dict[str, Any]) -> Generator[None, None, None]:
        """Create the outputs, in steps that each take little of the main thread's time."""
        raise NotImplementedError

    def clean_up(self) -> None:
        """Remove what the job created for the time of its run."""

    def memory_error(self) -> MemoryNeededError:
        """Return the exception for a lack of memory."""
        return MemoryNeededError("this needs more memory than could be had here: close other programs and try again")


def _no_folder(error: OSError) -> InputError:
    return InputError(
        f"the registration process must be able to start and to keep its images in the temporary folder, got: {error}"
    )


def register_request(
    images: dict[str, WorldImage], settings: Settings, initial: slicer.vtkMRMLTransformNode | None
) -> Generator[None, None, tuple[dict[str, np.ndarray], dict[str, Any]]]:
    """Build the arrays and the request for the worker process, in steps, without masks and wanted outputs.

    Raises:
        InputError: the pre-alignment leaves nothing to do; or the volumes do not overlap and are not centred first.
    """
    if initial is None:
        settings.check_that_it_aligns()
    arrays = {f"{name}.npy": image.values for name, image in images.items()}
    request: dict[str, Any] = {
        "do": "register",
        "options": settings.options(),
        "initial": settings.initial,
        "threads": settings.threads,
        **{name: volume_request(image, f"{name}.npy") for name, image in images.items()},
    }
    matrix_lps = np.eye(4)
    if initial is not None:
        transform = yield from read_transform(initial, images["fixed"])
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
    card = library_module("models.weights").model_info(settings.model)
    cascades, refines = settings.networks(card), settings.refines(card)
    needed = library_module("cpu.memory").needed_bytes(
        card,
        fixed.values.shape,
        fixed.spacing_mm[::-1].tolist(),
        moving.values.shape,
        cascades=cascades,
        refine=refines,
        inverse=bool(wanted.get("inverse")),
        jacobian=bool(wanted.get("jacobian")),
    )
    fewer = cascades - 1 if cascades > 1 else None
    tips = ["close other programs", "crop the volumes (module Crop Volume)"]
    tips += ["set Device to CPU"] if settings.device != "cpu" else []
    tips += ["set Quality to Fast"] if refines and settings.refine is not None else []
    tips += ["leave out the Jacobian map"] if wanted.get("jacobian") else []
    tips += [f"use fewer cascades than {cascades}"] if fewer else []
    return MemoryNeededError(
        f"registering these volumes needs about {needed / 1e9:.1f} GB of memory, more than could be had here: "
        + ", ".join(tips[:-1])
        + (" or " if len(tips) > 1 else "")
        + tips[-1],
        fewer,
    )
