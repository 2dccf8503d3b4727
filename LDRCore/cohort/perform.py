"""One pair of a cohort, in a worker: read, register, measure, write. A fixed image is read and prepared once."""

from __future__ import annotations

import dataclasses
import json
import math
import time
from collections.abc import Callable
from pathlib import Path
from threading import Lock
from typing import Any

import numpy as np
import SimpleITK as sitk

from LDRCore.cohort.pairs import CohortPair
from LDRCore.cohort.settings import FILES, REPORT, THUMBNAIL, CohortSettings
from LDRCore.cohort.store import folder_of, input_marks, mark_of, publish, seal, staging
from LDRCore.cohort.thumbnail import write_thumbnail
from LDRCore.errors import RegistrationError
from LDRCore.evaluation import scoring
from LDRCore.io import files, images, writing
from LDRCore.io.quiet import silent_libraries
from LDRCore.pipeline.inputs import FixedImage
from LDRCore.registration import register, warp_image
from LDRCore.result import RegistrationResult

_FIXED_KEPT = 2  # fixed images in memory: that of the pair at work and that of the next one
_SCORES = {"dice_mean": "dice", "tre_mm": "tre_mm"}


@dataclasses.dataclass
class LoadedPair:
    """A pair whose files were read."""

    pair: CohortPair
    marks: dict[str, Any]
    fixed: FixedImage
    moving: sitk.Image
    moving_mask: sitk.Image | None
    moving_labels: sitk.Image | None
    truth: scoring.Truth


@dataclasses.dataclass
class RegisteredPair:
    """A pair that was registered and measured."""

    loaded: LoadedPair
    result: RegistrationResult
    row: dict[str, Any]


class FixedImages:
    """The fixed images and their labels used last, read and prepared once; for several threads."""

    def __init__(self) -> None:
        self._lock = Lock()
        self._images: dict[tuple[Any, ...], Any] = {}

    def load(self, pair: CohortPair) -> FixedImage:
        """Return the fixed image of a pair with its mask."""

        def read() -> FixedImage:
            image = images.load(pair.fixed, "fixed image")
            return FixedImage(image, images.load_mask(pair.fixed_mask or None, image, "fixed mask"))

        return self._kept(("image", pair.fixed, pair.fixed_mask), read)

    def load_labels(self, path: str) -> sitk.Image:
        """Return the fixed labels of a pair."""
        return self._kept(("labels", path), lambda: scoring.load_labels(path, "fixed labels"))

    def _kept(self, names: tuple[str, ...], read: Callable[[], Any]) -> Any:
        key = (*names, *(str(mark_of(path)) for path in names[1:]))
        with self._lock:
            if key not in self._images:
                kind = [old for old in self._images if old[0] == names[0]]
                for old in kind[: len(kind) + 1 - _FIXED_KEPT]:
                    del self._images[old]
                self._images[key] = read()
            self._images[key] = self._images.pop(key)  # the last used at the end
            return self._images[key]


def load_pair(pair: CohortPair, settings: CohortSettings, fixed_images: FixedImages) -> LoadedPair:
    """Read the files of a pair.

    Raises:
        RegistrationError: one of them cannot be used.
    """
    marks = input_marks(pair)
    fixed = fixed_images.load(pair)
    moving = images.load(pair.moving, "moving image")
    known: dict[str, Any] = {}
    labels = None
    if pair.moving_labels:
        labels = scoring.load_labels(pair.moving_labels, "moving labels")
    if labels is not None and pair.fixed_labels:
        known |= {"fixed_labels": fixed_images.load_labels(pair.fixed_labels), "moving_labels": labels}
    for side, image in (("fixed", fixed.image), ("moving", moving)):
        path = getattr(pair, f"{side}_landmarks")
        if path:
            known[f"{side}_landmarks_lps"] = scoring.load_landmarks(path, settings.frame, image, f"{side} landmarks")
    mask = images.read(pair.moving_mask, "moving mask") if pair.moving_mask else None
    return LoadedPair(pair, marks, fixed, moving, mask, labels, scoring.Truth(fixed.image, **known))


def register_pair(loaded: LoadedPair, settings: CohortSettings) -> RegisteredPair:
    """Register a pair and measure it.

    Raises:
        RegistrationError: it cannot be registered, or its labels or landmarks do not fit.
    """
    began_s = time.perf_counter()
    options = settings.options | ({"initial": loaded.pair.initial} if loaded.pair.initial else {})
    result = register(loaded.fixed, loaded.moving, moving_mask=loaded.moving_mask, **options)
    seconds = time.perf_counter() - began_s
    result.facts["inputs"] = {"fixed": loaded.pair.fixed, "moving": loaded.pair.moving}
    before = _score(sitk.Transform(3, sitk.sitkIdentity), loaded.truth)
    after = _score(result.transform, loaded.truth)
    row = describe_report(result.report) | {
        **{f"{name}_before": value for name, value in before.items()},
        **{f"{name}_after": value for name, value in after.items()},
        "seconds": round(seconds, 3),
    }
    return RegisteredPair(loaded, result, row)


def _score(transform: sitk.Transform, truth: scoring.Truth) -> dict[str, float]:
    scores = scoring.score(transform, truth, measures=("overlap", "landmarks"))
    return {name: round(scores[key], 5) for key, name in _SCORES.items() if key in scores}


def describe_report(report: dict[str, Any]) -> dict[str, Any]:
    """Return what the cohort's table says of a report: verdict and reasons, similarity, folding, Jacobian range."""
    verdict = report["verdict"]
    similarity, jacobian = report["similarity"], report["jacobian_determinant"]
    return {
        "verdict": verdict["verdict"],
        "reasons": "; ".join(dict.fromkeys([*verdict["reasons"], *report["warnings"]])),
        "similarity_before": similarity["before"],
        "similarity_after": similarity["after"],
        "folding_fraction": report["folding_fraction"],
        "jacobian_min": jacobian["min"],
        "jacobian_max": jacobian["max"],
    }


def write_pair(registered: RegisteredPair, settings: CohortSettings, out: Path) -> dict[str, Any]:
    """Write the outputs of a pair; its folder appears in one step.

    Returns:
        Its row of the cohort's table.

    Raises:
        RegistrationError: the folder cannot be written.
    """
    loaded, result, row = registered.loaded, registered.result, registered.row
    target = folder_of(out, loaded.pair)
    try:
        with staging(out) as folder, silent_libraries():
            for name in settings.outputs:
                _write_output(name, registered, folder / FILES[name])
            write_thumbnail(folder / THUMBNAIL, loaded.fixed.image, result.warped)
            report = json.dumps(result.report, indent=1, default=np.generic.item)
            (folder / REPORT).write_text(report + "\n", encoding="utf-8")
            written = sum(path.stat().st_size for path in folder.iterdir())
            row = finite(row | {"bytes": written})
            seal(folder, loaded.pair, settings, row, loaded.marks)
            publish(folder, target)
    except (OSError, RuntimeError) as error:
        raise files.describe_failure(target, error) from None
    return row


def _write_output(name: str, registered: RegisteredPair, path: Path) -> None:
    loaded, result = registered.loaded, registered.result
    if name == "transform":
        writing.write_transform(result.transform, path)
    elif name == "inverse" and result.inverse_transform is not None:
        writing.write_transform(result.inverse_transform, path)
    elif name == "warped":
        writing.write_image(result.warped, path)
    elif name == "jacobian":
        writing.write_image(result.jacobian_determinant, path)
    elif name == "displacement":
        writing.write_image(result.displacement_field, path)
    elif name == "labels" and loaded.moving_labels is not None:
        labels = sitk.Cast(loaded.moving_labels, sitk.sitkUInt16)
        writing.write_image(warp_image(labels, result.transform, loaded.fixed.image, "nearest"), path)
    elif name == "picture":
        from LDRCore.overview import write_overview

        verdict = result.report["verdict"]
        write_overview(path, loaded.fixed.image, loaded.moving, result.transform, loaded.pair.name, verdict)


def finite(row: dict[str, Any]) -> dict[str, Any]:
    """Return a row with None in place of NaN and infinity, which JSON does not have."""
    return {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in row.items()}


def sentence_of(error: BaseException) -> str:
    """Return what the table says of a pair that failed."""
    if isinstance(error, RegistrationError):
        return str(error)
    if isinstance(error, MemoryError):
        return "the images must fit into memory, got too little of it"
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return str(
        RegistrationError(
            f"the pair must be registered without a fault, got {type(error).__name__}: "
            f"{lines[-1][:300] if lines else 'no more is known'}"
        )
    )


class Performer:
    """Performs pairs one at a time, whatever thread asks: what a worker of a cluster does."""

    def __init__(self) -> None:
        self._fixed_images, self._lock = FixedImages(), Lock()

    def __call__(self, pair: CohortPair, settings: CohortSettings, out: Path, *, marked: bool = True) -> dict[str, Any]:
        """Return the pair's row; a failure is in its `error`.

        Args:
            pair, settings, out: see `write_pair`.
            marked: note size and time of the inputs, so that a later run sees that one has changed.
        """
        with self._lock:
            try:
                loaded = load_pair(pair, settings, self._fixed_images)
                if not marked:
                    loaded.marks = {}
                registered = register_pair(loaded, settings)
            except Exception as error:
                return {"error": sentence_of(error)}
            try:
                return write_pair(registered, settings, out)
            except Exception as error:
                return {"error": sentence_of(error), "unwritten": True}
