"""What a registration is asked to do, checked in one place before anything is read."""

from __future__ import annotations

import importlib.util
import os
import re
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import SimpleITK as sitk

from LDRCore import geometry
from LDRCore.errors import RegistrationError
from LDRCore.io.transforms import TransformLike, read_transform
from LDRCore.models.weights import model_info

KINDS = ("rigid", "affine", "deformable")
INITIALS = ("center", "none")
REFINEMENTS = ("none", "fast", "best")
SIMILARITIES = ("auto", "local-ncc", "mind")
SPACINGS = ("working", "native")


@dataclass(frozen=True)
class Options:
    """Options of `register`, checked.

    Attributes:
        model, affine, refine, refine_steps, refine_spacing, similarity, inverse, kind: see `register`.
        cascades: how many networks run; see `every_cascade`.
        initial: "center", "none", or a transform fixed -> moving.
        device: one that torch can use here ("auto" is resolved).

    Raises:
        RegistrationError: an option that cannot be; the message names the rule and what came.
    """

    model: str | os.PathLike[str]
    cascades: int
    affine: bool
    initial: str | sitk.Transform
    inverse: bool
    device: str
    refine: str = "none"
    refine_steps: int = 0
    refine_spacing: str = "working"
    similarity: str = "auto"
    kind: str = "deformable"

    def __post_init__(self) -> None:
        card = model_info(self.model)
        most = card["architecture"]["cascades"]
        if not _is_whole(self.cascades) or not 0 <= self.cascades <= most:
            raise RegistrationError(f"cascades must be 0 to {most} for model {card['name']}, got {self.cascades!r}")
        for name in ("refine", "refine_spacing", "similarity", "device"):
            if not isinstance(getattr(self, name), str):
                raise RegistrationError(f"{name} must be a text, got {getattr(self, name)!r}")
        if self.refine not in REFINEMENTS:
            raise RegistrationError(f"refine must be one of {REFINEMENTS}, got {self.refine!r}")
        if not _is_whole(self.refine_steps) or self.refine_steps < 0:
            raise RegistrationError(f"refine_steps must be a whole number, 0 or more, got {self.refine_steps!r}")
        if self.refine_spacing not in SPACINGS:
            raise RegistrationError(f"refine_spacing must be one of {SPACINGS}, got {self.refine_spacing!r}")
        if self.similarity not in SIMILARITIES:
            raise RegistrationError(f"similarity must be one of {SIMILARITIES}, got {self.similarity!r}")
        _check_initial(self.initial)
        self._check_kind()
        object.__setattr__(self, "device", resolve_device(self.device))

    def _check_kind(self) -> None:
        """Refuse a kind that is none, and for a linear kind what only deforms."""
        if self.kind not in KINDS:
            raise RegistrationError(f"kind must be one of {KINDS}, got {self.kind!r}")
        if self.kind == "deformable":
            return
        if self.refines:
            raise RegistrationError(f'refine must be "none" for kind {self.kind!r}, which does not deform')
        if self.cascades:
            raise RegistrationError(f"cascades must be 0 (or not given) for kind {self.kind!r}, got {self.cascades}")
        if self.nonlinear_initial is not None:
            raise RegistrationError(f"initial must be linear for kind {self.kind!r}, got a transform that deforms")

    @property
    def linear_kind(self) -> str:
        """The kind of the affine stage: "rigid" or "affine"."""
        return "rigid" if self.kind == "rigid" else "affine"

    @property
    def refines(self) -> bool:
        """Whether instance optimisation was asked for."""
        return self.refine != "none" or self.refine_steps > 0

    @property
    def initial_matrix(self) -> np.ndarray | None:
        """4x4, LPS mm, to start from; None where the contents' centres are brought together first."""
        if isinstance(self.initial, str):
            return None if self.initial == "center" else np.eye(4)
        matrix = geometry.linear_matrix(self.initial)
        return np.eye(4) if matrix is None else matrix

    @property
    def nonlinear_initial(self) -> sitk.Transform | None:
        """The initial transform where it is not linear: the moving image is then seen through it."""
        if isinstance(self.initial, str) or self.initial.IsLinear():
            return None
        return self.initial


def every_cascade(model: str | os.PathLike[str], kind: str = "deformable") -> int:
    """Return the number of cascades of a model; 0 for a kind that does not deform."""
    if kind in ("rigid", "affine"):
        return 0
    return int(model_info(model)["architecture"]["cascades"])


def resolve_refine(refine: str | None, model: str | os.PathLike[str], kind: str, steps: int) -> str:
    """Return the refinement that was asked for; for None the one that the model's card names, "none" without one."""
    if refine is not None:
        return refine
    return "none" if kind != "deformable" or steps else str(model_info(model).get("refine", "none"))


def _is_whole(value: object) -> bool:
    return isinstance(value, (int, np.integer)) and not isinstance(value, bool)


def resolve_initial(initial: str | TransformLike | None) -> str | sitk.Transform:
    """Return what a registration starts from: "center" (also for None), "none", or a transform, read where needed.

    Raises:
        RegistrationError: neither of these; or a transform that cannot be read or used, see `io.transforms`.
    """
    if initial is None:
        return "center"
    if isinstance(initial, str) and (initial in INITIALS or not os.path.exists(initial)):
        return initial  # refused by `Options` if it is none of the words
    if isinstance(initial, (str, os.PathLike, list, tuple)):
        return read_transform(initial, "initial")
    return initial  # type: ignore[return-value]  # anything else is refused by `Options`


def _check_initial(initial: object) -> None:
    """Refuse what is neither a known word nor a transform that can be started from."""
    if isinstance(initial, str) and initial in INITIALS:
        return
    if not isinstance(initial, sitk.Transform) or initial.GetDimension() != 3:
        what = f"a {initial.GetDimension()}D transform" if isinstance(initial, sitk.Transform) else repr(initial)
        raise RegistrationError(f'initial must be "center", "none" or a 3D SimpleITK transform or its path, got {what}')
    matrix = geometry.linear_matrix(initial)
    if matrix is not None and (not np.isfinite(matrix).all() or geometry.is_singular(matrix)):
        raise RegistrationError(
            f"initial must be finite and invertible, got a linear transform with the matrix {matrix.round(6).tolist()}"
        )


def resolve_device(device: str) -> str:
    """Return a device that torch can use here.

    Args:
        device: "auto" (a GPU if there is one), "cpu", "cuda", "cuda:1" ...

    Raises:
        RegistrationError: torch cannot use it.
    """
    if device == "cpu" or (device == "auto" and _torch_is_for_cpu()):
        return "cpu"
    import torch

    if device == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    try:
        torch.zeros(1, dtype=torch.float32, device=device).cpu()
    except (RuntimeError, AssertionError, TypeError, AttributeError):
        raise RegistrationError(f'device must be "auto" or one that torch can use here, got {device!r}') from None
    return device


def _torch_is_for_cpu() -> bool:
    """Return whether the installed torch knows no GPU, without importing it, which takes more than a second."""
    spec = importlib.util.find_spec("torch")
    try:
        text = Path(str(spec and spec.origin)).with_name("version.py").read_text(encoding="utf-8")
    except OSError:
        return False
    return re.findall(r"^(?:cuda|hip)\b.*= *(.*)$", text, re.MULTILINE) == ["None", "None"]
