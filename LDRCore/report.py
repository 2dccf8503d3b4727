"""What a registration reports: seconds per stage, similarity, regularity, and warnings a careful reader would want."""

from __future__ import annotations

import dataclasses
import platform
import time
from collections.abc import Callable
from typing import Any

import numpy as np
import SimpleITK as sitk
import torch

from LDRCore import __version__, sampling
from LDRCore.geometry import Grid
from LDRCore.io import images
from LDRCore.losses import correlation_coefficient
from LDRCore.pipeline import verdict
from LDRCore.pipeline.inputs import Inputs, Pair
from LDRCore.pipeline.model import Model
from LDRCore.pipeline.options import Options
from LDRCore.pipeline.output import Output
from LDRCore.pipeline.preprocess import PreparedImage, foreground_index
from LDRCore.transforms import inversion
from LDRCore.transforms.field import DenseField

Progress = Callable[[float, str], None]
"""Called with (fraction done, what comes now); an exception raised in it cancels the registration."""


class Clock:
    """Seconds per stage, and progress for the user.

    Attributes:
        times_s: seconds of every finished stage; the first is "import", from `began_s` until now.
    """

    def __init__(self, progress: Progress | None, began_s: float) -> None:
        self._progress = progress
        self._began, self._last = began_s, time.perf_counter()
        self.times_s = {"import": round(self._last - began_s, 4)}
        self._stage = ""

    def start(self, stage: str, fraction: float, message: str) -> None:
        """End the stage before and begin a new one; tells `progress` the fraction done and what comes."""
        self.stop()
        self._stage = stage
        if self._progress is not None:
            self._progress(fraction, message)
        self._last = time.perf_counter()

    def within(self, begin: float, end: float, message: str) -> Callable[[float], None] | None:
        """Return what maps the fraction 0..1 of a stage to `progress` between two fractions; None without progress."""
        progress = self._progress
        if progress is None:
            return None
        return lambda fraction: progress(begin + (end - begin) * fraction, message)

    def stop(self) -> None:
        """End the current stage."""
        if self._stage:
            self.times_s[self._stage] = round(time.perf_counter() - self._last, 4)
        self._stage = ""

    def finish(self) -> dict[str, float]:
        """End everything and return `times_s` with the total."""
        self.stop()
        self.times_s["total"] = round(time.perf_counter() - self._began, 4)
        if self._progress is not None:
            self._progress(1.0, "done")
        return self.times_s


def measure(pair: Pair, field: DenseField, start: np.ndarray, grid: Grid) -> dict[str, Any]:
    """Measure similarity at each stage, and the length of the dense displacement.

    Args:
        pair: the prepared images.
        field: the result.
        start: 4x4, the initial map that is preferred.
        grid: on which the similarity is measured.
    """
    return {
        "similarity": similarity(pair, field, start, grid),
        "dense_displacement_mm": lengths(field),
    }


def similarity(pair: Pair, field: DenseField, start: np.ndarray, grid: Grid) -> dict[str, float]:
    """Correlation (paper, Eq. 10) over the fixed content at each stage, of images averaged to the stem's spacing.

    A grid finer than these images is thinned out to about their spacing.
    "before": where the scanner put the images; "initial": after the initial transform; "affine"; "after".
    """
    grid = grid.coarser(max(1, round(min(pair.fixed.coarse.spacing_mm) / max(grid.spacing_mm))))
    fixed, moving = pair.fixed.coarse.on(grid), pair.moving.coarse
    stages = {
        "before": pair.moving_as_scanned.on(grid),
        "initial": moving.on(grid, start),
        "affine": moving.on(grid, field.affine_lps),
        "after": moving.on(grid, field.affine_lps, displacement=field.on(grid)),
    }
    return {name: round(float(correlation_coefficient(moved, fixed)), 5) for name, moved in stages.items()}


def lengths(field: DenseField) -> dict[str, float]:
    """Return mean and largest length of the dense displacement at the voxels of its grid, mm."""
    u = field.displacement_vox[0]
    length = (u * u.new_tensor(field.grid.spacing_mm).view(3, 1, 1, 1)).square_().sum(0).sqrt_()
    return {"mean": round(float(length.mean()), 4), "max": round(float(length.max()), 4)}


def inverse_consistency(output: Output, inverse: sitk.Transform, pair: Pair) -> dict[str, float]:
    """Measure how far the inverse brings mapped points of the fixed foreground back: mean, p99_9 and max, mm."""
    coarse = pair.fixed.coarse
    points = foreground_index(coarse.data[0, 0]) @ coarse.to_lps[:3, :3].T + coarse.to_lps[:3, 3]
    return dataclasses.asdict(inversion.inverse_consistency(output.transform, inverse, points))


def unlike(card: dict[str, Any], pair: Pair) -> list[str]:
    """Return a sentence for each image that is unlike those that a model was made for."""
    made_for = card.get("made_for", "other images")
    return [
        f"the {name} image looks like CT (air as in Hounsfield units), "
        f"but the model {card['name']} was made for {made_for}"
        for name, image in (("fixed", pair.fixed), ("moving", pair.moving))
        if card.get("expects_nonnegative") and image.intensities.hounsfield
    ]


def doubts(measures: dict[str, Any]) -> list[str]:
    """Return a sentence where nothing was deformed though it was asked for, and where a contrast may not be known."""
    found = [measures["contrast_doubtful"]] if "contrast_doubtful" in measures else []
    why = measures.get("networks_left_out") or measures.get("refinement_skipped")
    if why and not measures["dense_displacement_mm"]["max"]:
        found.append(f"nothing was deformed after the affine alignment: {why}")
    return found


def warnings(measures: dict[str, Any]) -> list[str]:
    """Return what a careful reader would want to be told beside the verdict, a sentence each."""
    found = []
    if "networks_left_out" in measures:
        found.append(f"no network shaped the result: {measures['networks_left_out']}")
    if "refinement_skipped" in measures:
        found.append(f"instance optimisation was skipped: {measures['refinement_skipped']}")
    if "refinement_coarser" in measures:
        found.append(measures["refinement_coarser"])
    return found


def _intensities(image: PreparedImage) -> dict[str, str]:
    """What is out of the ordinary about an image's values, where something is."""
    described = image.intensities.describe()
    return {"intensities": described} if described else {}


def build(
    options: Options,
    model: Model,
    networks: Model,
    inputs: Inputs,
    pair: Pair,
    field: DenseField,
    measures: dict[str, Any],
    clock: Clock,
) -> dict[str, Any]:
    """Put the report together: options, images, measures, verdict, warnings, versions and, last, seconds.

    `model` is the one that was named, `networks` the one whose networks were chosen.
    """
    odd = unlike(model.card, pair)
    one_contrast = options.cascades > 0 and networks.card.get("fits", {}).get("one_contrast", True)
    facts = {
        "kind": options.kind,
        "model": model.name,
        "cascades": options.cascades,
        "affine": options.affine,
        "refine": options.refine,
        "refine_steps": options.refine_steps,
        "refine_spacing": options.refine_spacing,
        "refine_similarity": options.similarity,
        "initial": options.initial if isinstance(options.initial, str) else "transform",
        "masks": {"fixed": inputs.fixed_mask is not None, "moving": inputs.moving_mask is not None},
        "fixed": images.describe(inputs.fixed) | _intensities(pair.fixed),
        "moving": images.describe(inputs.moving) | _intensities(pair.moving),
        **measures,
        "affine_matrix_lps": np.round(field.affine_lps, 6).tolist(),
        "field_grid": {
            "shape": list(field.grid.shape),
            "spacing_mm": [round(s, 4) for s in field.grid.spacing_mm],
        },
        "verdict": verdict.judge(measures["evidence"], one_contrast=one_contrast, more=[*odd, *doubts(measures)]),
        "warnings": odd + warnings(measures),
        "device": options.device,
        "threads": torch.get_num_threads(),
        "compiled_sampling": sampling.backend_name() == "numba",
        "precision": "float32" if networks.cascade is None else str(networks.cascade.precision).removeprefix("torch."),
        "versions": {
            "LDRCore": __version__,
            "torch": torch.__version__,
            "SimpleITK": sitk.Version_VersionString(),
            "numpy": np.__version__,
            "python": platform.python_version(),
        },
    }
    facts["times_s"] = clock.finish()
    return facts
