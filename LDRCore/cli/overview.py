"""overview.png: one picture by which a reader judges a registration. matplotlib, imported only when called.

Only the slices that are shown are sampled, so a large scan costs no more than a small one.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import SimpleITK as sitk

from LDRCore import geometry

_PLANES = ("axial", "coronal", "sagittal")
_NORMALS = (2, 1, 0)  # the LPS axis that each plane is cut across
_COLUMNS = ("fixed", "moving", "warped", "fixed + moving", "fixed + warped", "checkerboard", "grid", "Jacobian")
_MAX_EDGE = 256
_GRID_MM = 8.0
_CHECKER_MM = 24.0


def write_overview(
    path: Path, fixed: sitk.Image, moving: sitk.Image, transform: sitk.Transform, title: str = ""
) -> None:
    """Draw fixed, moving, warped, both overlays, a checkerboard, the grid and the Jacobian in three planes.

    In the overlays the fixed image is magenta and the other one green: where they agree, the picture is grey. Moving
    is shown where the scanner put it. The grid is drawn without the affine part. Slices are patient-aligned (also for
    oblique images) and go through the middle of the content, patient right on the left of the picture.

    Args:
        path: .png to write.
        fixed, moving: scalar images.
        transform: fixed -> moving.
        title: one line above the picture.
    """
    overall = _patient_aligned(fixed)
    coarse = _with_spacing(overall, 4.0)
    low_f, low_m = (float(sitk.GetArrayViewFromImage(i).min()) for i in (fixed, moving))
    identity = sitk.Transform(3, sitk.sitkIdentity)
    window_f = _window(_on(fixed, coarse, identity, low_f))
    window_m = _window(_on(moving, coarse, transform, low_m))
    centre = _content_centre(_on(fixed, coarse, identity, low_f), window_f, coarse)
    affine = _best_affine(transform, coarse)

    cuts = [_cut(overall, normal, centre[normal]) for normal in _NORMALS]
    rows = []
    for normal, cut in zip(_NORMALS, cuts, strict=True):
        f = _flat(_on(fixed, cut, identity, low_f), normal)
        m = _flat(_on(moving, cut, identity, low_m), normal)
        w = _flat(_on(moving, cut, transform, low_m), normal)
        field = geometry.displacement_field_image(transform, cut)
        jacobian = _flat(sitk.GetArrayFromImage(geometry.jacobian_determinant_image(field)), normal)
        points = geometry.points_lps(cut)
        bent = points + (points + sitk.GetArrayFromImage(field) - (points @ affine[:3, :3].T + affine[:3, 3]))
        content = f > window_f[0] + 0.05 * (window_f[1] - window_f[0])
        scaled = [_scaled(f, window_f), _scaled(m, window_m), _scaled(w, window_m)]
        rows.append((scaled, np.where(content, jacobian, np.nan), _flat(bent, normal)))

    _draw(path, rows, overall.GetSpacing()[0], cuts, title)


def _draw(path: Path, rows: list[Any], spacing: float, cuts: list[sitk.Image], title: str) -> None:
    """All panels on one pair of axes, in voxels: 24 axes of their own take longer to make than everything else."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    heights, widths = zip(*(row[1].shape for row in rows), strict=True)
    inch = max(widths) / 2.4  # voxels an inch
    gap = 0.05 * inch
    across, down = max(widths) + gap, np.cumsum([0, *(h + gap for h in heights)])
    wide, high = len(_COLUMNS) * across - gap, float(down[-1]) - gap
    left, right, bottom, top = 0.35, 0.95, 0.08, 0.7  # inches around the panels
    size = left + wide / inch + right, bottom + high / inch + top
    figure = Figure(figsize=size, facecolor="black")
    FigureCanvasAgg(figure)
    axes = figure.add_axes((left / size[0], bottom / size[1], wide / inch / size[0], high / inch / size[1]))
    axes.set_axis_off()
    for plane, ((f, m, w), jacobian, bent) in enumerate(rows):
        checker = _checkerboard(f, w, max(1, round(_CHECKER_MM / spacing)))
        pictures = [f, m, w, np.stack([f, m, f], -1), np.stack([f, w, f], -1), checker, 0.7 * f]
        y, x = down[plane], np.arange(len(_COLUMNS)) * across + (max(widths) - widths[plane]) / 2
        places = [(a, a + widths[plane], y + heights[plane], y) for a in x]
        for place, picture in zip(places, pictures, strict=False):
            axes.imshow(picture, "gray", vmin=0, vmax=1, interpolation="bilinear", extent=place, aspect="auto")
        _draw_grid(axes, places[6], bent, _NORMALS[plane], cuts[plane])
        colours = axes.imshow(
            jacobian, "RdBu_r", vmin=0, vmax=2, interpolation="nearest", extent=places[7], aspect="auto"
        )
        centre = y + heights[plane] / 2
        axes.text(-gap, centre, _PLANES[plane], color="white", fontsize=12, rotation=90, ha="right", va="center")
    for column, name in enumerate(_COLUMNS):
        axes.text(column * across + max(widths) / 2, -gap, name, color="white", fontsize=12, ha="center", va="bottom")
    axes.set(xlim=(0, wide), ylim=(high, 0))
    beside = figure.add_axes((1 - (right - 0.1) / size[0], 0.2, 0.15 / size[0], 0.55))
    bar = figure.colorbar(colours, cax=beside)
    bar.set_label("Jacobian determinant (1 = volume kept)", color="white")
    bar.ax.tick_params(colors="white")
    if title:
        figure.suptitle(title, color="white", fontsize=12, y=1 - 0.1 / size[1], va="top")
    figure.savefig(path, dpi=80, facecolor="black", format="png", pil_kwargs={"compress_level": 3})


def _patient_aligned(image: sitk.Image) -> sitk.Image:
    """An empty isotropic image with identity direction around an image, at most `_MAX_EDGE` voxels a side."""
    corners = geometry.corners_lps(image)
    low, high = corners.min(axis=0), corners.max(axis=0)
    spacing = max(min(image.GetSpacing()), float((high - low).max()) / _MAX_EDGE)
    return _empty([int(n) + 1 for n in np.ceil((high - low) / spacing)], low, spacing)


def _empty(size: list[int], origin: np.ndarray, spacing: float) -> sitk.Image:
    image = sitk.Image(size, sitk.sitkUInt8)
    image.SetOrigin(np.asarray(origin, dtype=float).tolist())
    image.SetSpacing([spacing] * 3)
    return image


def _with_spacing(reference: sitk.Image, spacing: float) -> sitk.Image:
    old = reference.GetSpacing()[0]
    size = [max(2, int(n * old / spacing)) for n in reference.GetSize()]
    return _empty(size, np.array(reference.GetOrigin()), spacing)


def _cut(reference: sitk.Image, normal: int, position: float) -> sitk.Image:
    """Three slices of a reference (the Jacobian needs the neighbours), the middle one at a position in mm."""
    size, origin = list(reference.GetSize()), np.array(reference.GetOrigin())
    size[normal] = 3
    origin[normal] = position - reference.GetSpacing()[0]
    return _empty(size, origin, reference.GetSpacing()[0])


def _flat(values: np.ndarray, normal: int) -> np.ndarray:
    """The middle slice as a radiologist looks at it: patient right on the left, anterior or head up."""
    middle = np.take(values, 1, axis=2 - normal)
    return middle if normal == 2 else middle[::-1]


def _on(image: sitk.Image, reference: sitk.Image, transform: sitk.Transform, outside: float) -> np.ndarray:
    resampled = sitk.Resample(image, reference, transform, sitk.sitkLinear, outside, sitk.sitkFloat32)
    return sitk.GetArrayFromImage(resampled)


def _window(values: np.ndarray) -> tuple[float, float]:
    low, high = np.percentile(values, (1, 99.7))
    return float(low), float(max(high, low + 1e-6))


def _scaled(values: np.ndarray, window: tuple[float, float]) -> np.ndarray:
    return np.clip((values - window[0]) / (window[1] - window[0]), 0, 1)


def _content_centre(values: np.ndarray, window: tuple[float, float], reference: sitk.Image) -> np.ndarray:
    """LPS mm of the middle of what is not air."""
    bright = np.argwhere(values > window[0] + 0.15 * (window[1] - window[0]))
    middle = bright.mean(0) if len(bright) else (np.array(values.shape) - 1) / 2
    return middle[::-1] * reference.GetSpacing() + np.array(reference.GetOrigin())


def _best_affine(transform: sitk.Transform, reference: sitk.Image) -> np.ndarray:
    """The affine map (4x4, LPS mm) that fits a transform best over a reference."""
    points = geometry.points_lps(reference).reshape(-1, 3)
    moved = points + sitk.GetArrayFromImage(geometry.displacement_field_image(transform, reference)).reshape(-1, 3)
    return geometry.fit_affine(points, moved)


def _checkerboard(a: np.ndarray, b: np.ndarray, edge: int) -> np.ndarray:
    rows, columns = np.indices(a.shape) // edge
    return np.where((rows + columns) % 2 == 0, a, b)


def _draw_grid(axes: Any, place: tuple[float, ...], bent: np.ndarray, normal: int, cut: sitk.Image) -> None:
    """Lines of the fixed image's space, drawn where they go within the slice's plane, in a panel (see `_draw`)."""
    from matplotlib.collections import LineCollection
    from matplotlib.patches import Rectangle

    along, up = [a for a in range(3) if a != normal]
    spacing, origin = cut.GetSpacing()[0], cut.GetOrigin()
    x, y = ((bent[..., a] - origin[a]) / spacing for a in (along, up))
    if normal != 2:
        y = bent.shape[0] - 1 - y
    left, right, bottom, top = place
    points = np.stack((left + 0.5 + x, top + 0.5 + y), -1)
    every = max(1, round(_GRID_MM / spacing))
    lines = LineCollection([*points[::every], *points[:, ::every].swapaxes(0, 1)], colors="#ffd54a", linewidths=0.5)
    axes.add_collection(lines, autolim=False)
    lines.set_clip_path(Rectangle((left, top), right - left, bottom - top, transform=axes.transData))
