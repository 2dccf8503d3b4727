"""overview.png: one picture by which a reader judges a registration. matplotlib, imported only when called."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import SimpleITK as sitk

from LDRCore import geometry

_PLANES = ("axial", "coronal", "sagittal")
_COLUMNS = ("fixed", "moving", "warped", "fixed + moving", "fixed + warped", "checkerboard", "grid", "Jacobian")


def _display_grid(fixed: sitk.Image, max_edge: int = 256) -> sitk.Image:
    """An isotropic, axis-aligned (LPS) reference around the fixed image, at most `max_edge` voxels a side."""
    corners = []
    size = fixed.GetSize()
    for k in range(8):
        index = [(size[a] - 1) * ((k >> a) & 1) for a in range(3)]
        corners.append(fixed.TransformIndexToPhysicalPoint(index))
    low, high = np.min(corners, axis=0), np.max(corners, axis=0)
    spacing = max(min(fixed.GetSpacing()), float((high - low).max()) / max_edge)
    reference = sitk.Image([int(n) + 1 for n in np.ceil((high - low) / spacing)], sitk.sitkUInt8)
    reference.SetOrigin(low.tolist())
    reference.SetSpacing([spacing] * 3)
    return reference


def _on(image: sitk.Image, reference: sitk.Image, transform: sitk.Transform, outside: float) -> np.ndarray:
    resampled = sitk.Resample(image, reference, transform, sitk.sitkLinear, outside, sitk.sitkFloat32)
    return sitk.GetArrayFromImage(resampled)


def _window(values: np.ndarray) -> tuple[float, float]:
    sample = values.reshape(-1)[:: max(1, values.size // 200_000)]
    low, high = np.percentile(sample, (1, 99.7))
    return float(low), float(max(high, low + 1e-6))


def _content_centre(values: np.ndarray) -> tuple[int, ...]:
    low, high = _window(values)
    where = np.argwhere(values > low + 0.15 * (high - low))
    centre = where.mean(0) if len(where) else (np.array(values.shape) - 1) / 2
    return tuple(round(c) for c in centre)


def _slice(values: np.ndarray, plane: int, at: tuple[int, ...]) -> np.ndarray:
    """A slice as a radiologist looks at it: patient right on the left of the picture, anterior or head up."""
    if plane == 0:
        return values[at[0]]
    cut = values[:, at[1]] if plane == 1 else values[:, :, at[2]]
    return cut[::-1]


def write_overview(
    path: Path, fixed: sitk.Image, moving: sitk.Image, transform: sitk.Transform, title: str = ""
) -> None:
    """Draw fixed, moving, warped, both overlays, a checkerboard, the grid and the Jacobian in three planes.

    In the overlays the fixed image is magenta and the other one green: where they agree, the picture is grey. Moving
    is shown where the scanner put it. The grid is drawn without the affine part. Slices are patient-aligned (also for
    oblique images), patient right on the left of the picture.

    Args:
        path: .png to write.
        fixed, moving: scalar images.
        transform: fixed -> moving.
        title: one line above the picture.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    reference = _display_grid(fixed)
    low_f, low_m = (float(sitk.GetArrayViewFromImage(i).min()) for i in (fixed, moving))
    identity = sitk.Transform(3, sitk.sitkIdentity)
    f, m = _on(fixed, reference, identity, low_f), _on(moving, reference, identity, low_m)
    w = _on(moving, reference, transform, low_m)
    field = geometry.displacement_field_image(transform, reference)
    jacobian = sitk.GetArrayFromImage(geometry.jacobian_determinant_image(field))
    bent = _without_affine(field, reference)
    at = _content_centre(f)
    content = f > _window(f)[0] + 0.05 * (_window(f)[1] - _window(f)[0])
    f, m, w = _scaled(f, f), _scaled(m, w), _scaled(w, w)

    heights = [_slice(f, plane, at).shape[0] for plane in range(3)]
    width = max(_slice(f, plane, at).shape[1] for plane in range(3))
    inch = 2.4 / width
    size = (len(_COLUMNS) * 2.45 + 1.0, sum(heights) * inch + 0.7)
    figure = Figure(figsize=size, facecolor="black", layout="constrained")
    FigureCanvasAgg(figure)
    figure.get_layout_engine().set(w_pad=0.02, h_pad=0.02, wspace=0, hspace=0)  # type: ignore[union-attr, call-arg]
    axes = figure.subplots(3, len(_COLUMNS), gridspec_kw={"height_ratios": heights})
    for plane in range(3):
        fs, ms, ws = (_slice(v, plane, at) for v in (f, m, w))
        checker = _checkerboard(fs, ws, max(1, round(24 / reference.GetSpacing()[0])))
        pictures = [fs, ms, ws, np.stack([fs, ms, fs], -1), np.stack([fs, ws, fs], -1), checker, 0.7 * fs]
        for column, picture in enumerate(pictures):
            axes[plane, column].imshow(picture, cmap="gray", vmin=0, vmax=1, interpolation="bilinear")
        _draw_grid(axes[plane, 6], bent, plane, at, reference)
        shown = np.where(_slice(content, plane, at), _slice(jacobian, plane, at), np.nan)
        colours = axes[plane, 7].imshow(shown, cmap="RdBu_r", vmin=0, vmax=2, interpolation="nearest")
        axes[plane, 0].set_ylabel(_PLANES[plane], color="white", fontsize=12)
    for column, name in enumerate(_COLUMNS):
        axes[0, column].set_title(name, color="white", fontsize=12)
    for axis in axes.flat:
        axis.set(xticks=[], yticks=[], facecolor="black")
        axis.spines[:].set_visible(False)
    bar = figure.colorbar(colours, ax=axes[:, 7], fraction=0.08, pad=0.03, shrink=0.7)
    bar.set_label("Jacobian determinant (1 = volume kept)", color="white")
    bar.ax.tick_params(colors="white")
    if title:
        figure.suptitle(title, color="white", fontsize=12)
    figure.savefig(path, dpi=80, facecolor="black", format="png")


def _scaled(values: np.ndarray, like: np.ndarray) -> np.ndarray:
    low, high = _window(like)
    return np.clip((values - low) / (high - low), 0, 1)


def _checkerboard(a: np.ndarray, b: np.ndarray, edge: int) -> np.ndarray:
    rows, columns = np.indices(a.shape) // edge
    return np.where((rows + columns) % 2 == 0, a, b)


def _without_affine(field: sitk.Image, reference: sitk.Image) -> np.ndarray:
    """Where the points of the reference go, (D, H, W, 3) mm, less the affine map that fits best."""
    k, j, i = np.meshgrid(*[np.arange(n) for n in reference.GetSize()[::-1]], indexing="ij")
    rest = np.stack([i, j, k], -1) * reference.GetSpacing() + np.array(reference.GetOrigin())
    design = np.concatenate([rest.reshape(-1, 3), np.ones((rest.size // 3, 1))], 1)
    moved = sitk.GetArrayFromImage(field).reshape(-1, 3) + rest.reshape(-1, 3)
    fit, *_ = np.linalg.lstsq(design[::37], moved[::37], rcond=None)
    return rest + (moved - design @ fit).reshape(rest.shape)


def _draw_grid(axis: Any, bent: np.ndarray, plane: int, at: tuple[int, ...], reference: sitk.Image) -> None:
    """Lines 8 mm apart in the fixed image, drawn where they go within the slice's plane."""
    across, up = {0: (0, 1), 1: (0, 2), 2: (1, 2)}[plane]
    cut = bent[at[0]] if plane == 0 else bent[:, at[1]] if plane == 1 else bent[:, :, at[2]]
    spacing, origin = reference.GetSpacing(), reference.GetOrigin()
    x = (cut[..., across] - origin[across]) / spacing[across]
    y = (cut[..., up] - origin[up]) / spacing[up]
    if plane != 0:
        y = cut.shape[0] - 1 - y
    every = max(1, round(8 / spacing[0]))
    axis.plot(x[::every].T, y[::every].T, color="#ffd54a", linewidth=0.5)
    axis.plot(x[:, ::every], y[:, ::every], color="#ffd54a", linewidth=0.5)
    axis.set_xlim(-0.5, cut.shape[1] - 0.5)
    axis.set_ylim(cut.shape[0] - 0.5, -0.5)
