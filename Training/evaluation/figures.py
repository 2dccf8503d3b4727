"""Draws pictures of the report: Dice and speed against the number of cascades (Fig. 5), slices and masks (Fig. 6)."""

from __future__ import annotations

import io
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import SimpleITK as sitk

from LDRCore.registration import warp_image
from Training.evaluation.datasets import Loaded

_MARGIN_MM = 25.0
_PLANES = {"axial": 2, "coronal": 1, "sagittal": 0}  # the LPS axis that each is cut across


@dataclass(frozen=True)
class Curve:
    """One family of systems in one panel: its values at 1, 2, 3 ... cascades; None where there is none.

    Attributes:
        name: of the family.
        values: ours.
        paper: the paper's, or empty.
    """

    name: str
    values: Sequence[float | None]
    paper: Sequence[float | None] = ()


def _figure(rows: int, columns: int, size: tuple[float, float]) -> tuple[Any, Any]:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=size, layout="constrained")
    FigureCanvasAgg(figure)
    return figure, figure.subplots(rows, columns, squeeze=False)


def _png(figure: Any) -> bytes:
    stream = io.BytesIO()
    figure.savefig(stream, dpi=90, format="png")
    return stream.getvalue()


def curves(panels: dict[str, list[Curve]]) -> bytes:
    """Draw Fig. 5 as PNG: a panel for each title, lines over the number of cascades; the paper's dashed and hollow.

    A family of which nothing was measured is named in the legend as "no weights yet".
    """
    figure, axes = _figure(1, max(len(panels), 1), (4.2 * max(len(panels), 1), 3.6))
    for axis, (title, families) in zip(axes[0], panels.items(), strict=False):
        most = max((len(c.values) for c in families), default=1)
        for number, curve in enumerate(families):
            colour = f"C{number}"
            for values, style, suffix in (
                (curve.values, {"marker": "o"}, ""),
                (curve.paper, {"marker": "o", "fillstyle": "none", "linestyle": "--"}, " (paper)"),
            ):
                points = [(k + 1, v) for k, v in enumerate(values) if v is not None]
                if points:
                    axis.plot(*zip(*points, strict=True), color=colour, label=curve.name + suffix, **style)
            if not any(v is not None for v in curve.values):
                axis.plot([], [], color=colour, label=f"{curve.name}: not measured")
        axis.set(title=title, xlabel="cascades", xticks=range(1, most + 1))
        if "seconds" in title:
            axis.set_ylim(bottom=0)
        axis.legend(fontsize=7)
        axis.grid(alpha=0.3)
    return _png(figure)


def _slice(values: np.ndarray, axis: int, index: int, box: tuple[slice, slice, slice]) -> np.ndarray:
    """Return a slice of a box of a (D, H, W) volume with LPS axes in radiological convention."""
    whole = list(box)
    whole[2 - axis] = slice(index, index + 1)
    cut = np.squeeze(values[tuple(whole)], axis=2 - axis)
    return cut if axis == 2 else cut[::-1]


def agreement(labels: np.ndarray, truth: np.ndarray) -> np.ndarray:
    """Return colours (..., 3): white where both maps hold the same label, red where only one does or they differ."""
    some = (labels > 0) | (truth > 0)
    same = some & (labels == truth)
    return np.stack([some, same, same], -1).astype(float)


def slices(pair: Loaded, systems: dict[str, sitk.Transform], plane: str = "coronal") -> bytes:
    """Draw Fig. 6 as PNG: the warped image of every system, and below it its warped labels against the fixed ones.

    Args:
        pair: with labels.
        systems: {name: transform fixed -> moving}.
        plane: "axial", "coronal" or "sagittal"; through the middle of the fixed labels.
    """
    truth = pair.truth
    if truth.fixed_labels is None or truth.moving_labels is None:
        raise ValueError("slices need the labels of both images, got a pair without")
    reference = sitk.DICOMOrient(pair.fixed, "LPS")
    fixed = sitk.GetArrayFromImage(reference)
    labels = sitk.GetArrayFromImage(sitk.DICOMOrient(truth.fixed_labels, "LPS"))
    axis = _PLANES[plane]
    inside = np.argwhere(labels > 0)
    index = int(inside.mean(0)[2 - axis].round())
    margin = np.ceil(_MARGIN_MM / np.array(reference.GetSpacing()[::-1])).astype(int)
    low_high = zip((inside.min(0) - margin).clip(0), inside.max(0) + margin + 1, strict=True)
    box = tuple(slice(int(a), int(b)) for a, b in low_high)
    across, up = [a for a in range(3) if a != axis]
    aspect = reference.GetSpacing()[up] / reference.GetSpacing()[across]
    columns = {"fixed": (fixed, labels)}
    for name, transform in systems.items():
        image = sitk.GetArrayFromImage(warp_image(pair.moving, transform, reference))
        warped = sitk.GetArrayFromImage(warp_image(truth.moving_labels, transform, reference, "nearest"))
        columns[name] = (image, warped)
    figure, axes = _figure(2, len(columns), (2.5 * len(columns), 5.2))
    figure.set_facecolor("black")
    for column, (name, (image, mask)) in enumerate(columns.items()):
        low, high = np.percentile(image, (1, 99.7))
        shown = np.clip((_slice(image, axis, index, box) - low) / max(high - low, 1e-6), 0, 1)
        axes[0, column].imshow(shown, cmap="gray", aspect=aspect)
        axes[1, column].imshow(
            agreement(_slice(mask, axis, index, box), _slice(labels, axis, index, box)), aspect=aspect
        )
        axes[0, column].set_title(name, color="white", fontsize=10)
    for one in axes.flat:
        one.set(xticks=[], yticks=[])
    return _png(figure)
