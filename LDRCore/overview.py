"""overview.png: one picture by which a reader judges a registration. matplotlib is imported only when called.

Only the slices that are shown are sampled, so a large scan costs no more than a small one.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import SimpleITK as sitk

from LDRCore import geometry

_PLANES = ("axial", "coronal", "sagittal")
_NORMALS = (2, 1, 0)  # the LPS axis that each plane is cut across
_SIDES = (("R", "L"), ("R", "L"), ("A", "P"))  # of the patient, at the left and right edge of each plane
_COLUMNS = ("fixed", "moving", "warped", "fixed + moving", "fixed + warped", "checkerboard", "grid", "Jacobian")
_MAX_EDGE = 256  # voxels along a side of the picture's grid
_COARSE_MM, _COARSE_EDGE = 4.0, 96  # spacing of the grid for windows and centres; voxels along a side, at most
_GRID_MM = 8.0
_CHECKER_MM = 24.0
_COLOURS = {"trust": "#7bd88f", "look": "#ffb454", "failed": "#ff6b6b"}  # of the verdict


class _Row(NamedTuple):
    """Panels of one plane, (rows, columns) as they are drawn.

    Attributes:
        fixed, moving, warped: intensities, 0 to 1.
        jacobian: determinant, NaN outside the content.
        mapped_lps: (rows, columns, 3), the points to which the nonlinear part takes the slice's points.
        cut: the slice's grid, see `_cut`.
        normal: the LPS axis that the plane is cut across.
    """

    fixed: np.ndarray
    moving: np.ndarray
    warped: np.ndarray
    jacobian: np.ndarray
    mapped_lps: np.ndarray
    cut: sitk.Image
    normal: int


def write_overview(
    path: Path,
    fixed: sitk.Image,
    moving: sitk.Image,
    transform: sitk.Transform,
    title: str = "",
    verdict: dict[str, Any] | None = None,
) -> None:
    """Draw fixed, moving, warped, both overlays, a checkerboard, the grid and the Jacobian in three planes.

    In the overlays the fixed image is magenta and the other one green: where they agree, the picture is grey. Moving
    is shown where the scanner put it. The grid is drawn without the affine part. Slices are patient-aligned (also for
    oblique images) and go through the middle of the content, patient right on the left of the picture, as the letters
    in the first column say.

    Args:
        path: of the .png to write.
        fixed, moving: scalar images.
        transform: fixed -> moving.
        title: one line above the picture.
        verdict: of the report; the line below the title.
    """
    overall = _patient_aligned(fixed)
    extent_mm = max(overall.GetSize()) * overall.GetSpacing()[0]
    coarse = _with_spacing(overall, max(_COARSE_MM, extent_mm / _COARSE_EDGE))
    fixed_fill, moving_fill = (float(sitk.GetArrayViewFromImage(image).min()) for image in (fixed, moving))
    identity = sitk.Transform(3, sitk.sitkIdentity)
    coarse_fixed = _resample(fixed, coarse, identity, fixed_fill)
    fixed_window = _intensity_window(coarse_fixed)
    moving_window = _intensity_window(_resample(moving, coarse, transform, moving_fill))
    centre_lps = _content_centre(coarse_fixed, fixed_window, coarse)
    affine_lps = _best_affine(transform, coarse)

    rows = []
    for normal in _NORMALS:
        cut = _cut(overall, normal, centre_lps[normal])
        fixed_slice = _middle_slice(_resample(fixed, cut, identity, fixed_fill), normal)
        moving_slice = _middle_slice(_resample(moving, cut, identity, moving_fill), normal)
        warped_slice = _middle_slice(_resample(moving, cut, transform, moving_fill), normal)
        field = geometry.displacement_field_image(transform, cut)
        jacobian = _middle_slice(sitk.GetArrayFromImage(geometry.jacobian_determinant_image(field)), normal)
        points_lps = geometry.points_lps(cut)
        affine_points = points_lps @ affine_lps[:3, :3].T + affine_lps[:3, 3]
        mapped_lps = points_lps + (points_lps + sitk.GetArrayFromImage(field) - affine_points)
        content = fixed_slice > fixed_window[0] + 0.05 * (fixed_window[1] - fixed_window[0])
        rows.append(
            _Row(
                fixed=_scale(fixed_slice, fixed_window),
                moving=_scale(moving_slice, moving_window),
                warped=_scale(warped_slice, moving_window),
                jacobian=np.where(content, jacobian, np.nan),
                mapped_lps=_middle_slice(mapped_lps, normal),
                cut=cut,
                normal=normal,
            )
        )
    _draw(path, rows, overall.GetSpacing()[0], title, verdict)


def describe_verdict(verdict: dict[str, Any]) -> str:
    """Say a verdict and its first reason in one line."""
    reasons = verdict["reasons"]
    more = f" (and {len(reasons) - 1} more)" if len(reasons) > 1 else ""
    return verdict["verdict"] + (f": {reasons[0]}{more}" if reasons else "")


def _draw(path: Path, rows: list[_Row], spacing_mm: float, title: str, verdict: dict[str, Any] | None) -> None:
    """Draw all panels on one pair of axes, in voxels: 24 axes of their own take longer to make than all the rest."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    heights, widths = zip(*(row.jacobian.shape for row in rows), strict=True)
    inch = max(widths) / 2.4  # voxels an inch
    gap = 0.05 * inch
    column_width, tops = max(widths) + gap, np.cumsum([0, *(height + gap for height in heights)])
    total_width, total_height = len(_COLUMNS) * column_width - gap, float(tops[-1]) - gap
    left, right, bottom, top = 0.35, 0.95, 0.08, 0.7  # margins, inches
    size = left + total_width / inch + right, bottom + total_height / inch + top
    figure = Figure(figsize=size, facecolor="black")
    FigureCanvasAgg(figure)
    axes = figure.add_axes(
        (left / size[0], bottom / size[1], total_width / inch / size[0], total_height / inch / size[1])
    )
    axes.set_axis_off()
    for plane, (row, y, height, width) in enumerate(zip(rows, tops, heights, widths, strict=False)):
        lefts = np.arange(len(_COLUMNS)) * column_width + (max(widths) - width) / 2
        extents = [(x, x + width, y + height, y) for x in lefts]
        pictures = [
            *(row.fixed, row.moving, row.warped),
            np.stack([row.fixed, row.moving, row.fixed], -1),
            np.stack([row.fixed, row.warped, row.fixed], -1),
            _checkerboard(row.fixed, row.warped, max(1, round(_CHECKER_MM / spacing_mm))),
            0.7 * row.fixed,
        ]
        for extent, picture in zip(extents, pictures, strict=False):
            axes.imshow(picture, "gray", vmin=0, vmax=1, interpolation="bilinear", extent=extent, aspect="auto")
        _draw_sides(axes, extents[0], _SIDES[plane])
        _draw_grid(axes, extents[6], row)
        colours = axes.imshow(
            row.jacobian, "RdBu_r", vmin=0, vmax=2, interpolation="nearest", extent=extents[7], aspect="auto"
        )
        middle = y + height / 2
        axes.text(-gap, middle, _PLANES[plane], color="white", fontsize=12, rotation=90, ha="right", va="center")
    for column, name in enumerate(_COLUMNS):
        x = column * column_width + max(widths) / 2
        axes.text(x, -gap, name, color="white", fontsize=12, ha="center", va="bottom")
    axes.set(xlim=(0, total_width), ylim=(total_height, 0))
    colour_axes = figure.add_axes((1 - (right - 0.1) / size[0], 0.2, 0.15 / size[0], 0.55))
    colour_bar = figure.colorbar(colours, cax=colour_axes)
    colour_bar.set_label("Jacobian determinant (1 = volume kept)", color="white")
    colour_bar.ax.tick_params(colors="white")
    if title:
        figure.suptitle(title, color="white", fontsize=12, y=1 - 0.06 / size[1], va="top")
    if verdict:
        colour, line = _COLOURS[verdict["verdict"]], describe_verdict(verdict)
        figure.text(0.5, 1 - 0.27 / size[1], line, color=colour, fontsize=12, ha="center", va="top")
    figure.savefig(path, dpi=80, facecolor="black", format="png", pil_kwargs={"compress_level": 3})


def _patient_aligned(image: sitk.Image) -> sitk.Image:
    """Make an empty isotropic image with identity direction around an image, at most `_MAX_EDGE` voxels a side."""
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
    """Cut three slices out of a reference, the middle one at a position in mm: the Jacobian needs the neighbours."""
    size, origin = list(reference.GetSize()), np.array(reference.GetOrigin())
    size[normal] = 3
    origin[normal] = position - reference.GetSpacing()[0]
    return _empty(size, origin, reference.GetSpacing()[0])


def _middle_slice(values: np.ndarray, normal: int) -> np.ndarray:
    """Return the middle slice as a radiologist looks at it: patient right on the left, anterior or head up."""
    middle = np.take(values, 1, axis=2 - normal)
    return middle if normal == 2 else middle[::-1]


def _resample(image: sitk.Image, reference: sitk.Image, transform: sitk.Transform, fill: float) -> np.ndarray:
    resampled = sitk.Resample(image, reference, transform, sitk.sitkLinear, fill, sitk.sitkFloat32)
    return sitk.GetArrayFromImage(resampled)


def _intensity_window(values: np.ndarray) -> tuple[float, float]:
    low, high = np.percentile(values, (1, 99.7))
    return float(low), float(max(high, low + 1e-6))


def _scale(values: np.ndarray, window: tuple[float, float]) -> np.ndarray:
    return np.clip((values - window[0]) / (window[1] - window[0]), 0, 1)


def _content_centre(values: np.ndarray, window: tuple[float, float], reference: sitk.Image) -> np.ndarray:
    """Return the mean position of bright voxels, LPS mm; the grid's centre if there are none."""
    bright = np.argwhere(values > window[0] + 0.15 * (window[1] - window[0]))
    middle = bright.mean(0) if len(bright) else (np.array(values.shape) - 1) / 2
    return middle[::-1] * reference.GetSpacing() + np.array(reference.GetOrigin())


def _best_affine(transform: sitk.Transform, reference: sitk.Image) -> np.ndarray:
    """Fit an affine map (4x4, LPS mm) to a transform over a reference."""
    points = geometry.points_lps(reference).reshape(-1, 3)
    moved = points + sitk.GetArrayFromImage(geometry.displacement_field_image(transform, reference)).reshape(-1, 3)
    return geometry.fit_affine(points, moved)


def _checkerboard(a: np.ndarray, b: np.ndarray, edge: int) -> np.ndarray:
    rows, columns = np.indices(a.shape) // edge
    return np.where((rows + columns) % 2 == 0, a, b)


def _draw_sides(axes: Any, extent: tuple[float, ...], names: tuple[str, str]) -> None:
    """Name the patient's sides at the edges of a panel."""
    left, right, bottom, top = extent
    for x, name, align in ((left, names[0], "left"), (right, names[1], "right")):
        axes.text(x, (bottom + top) / 2, name, color="white", fontsize=10, ha=align, va="center")


def _draw_grid(axes: Any, extent: tuple[float, ...], row: _Row) -> None:
    """Draw lines of the fixed image's space where the transform takes them within the slice's plane, in one panel."""
    from matplotlib.collections import LineCollection
    from matplotlib.patches import Rectangle

    spacing_mm, origin_lps = row.cut.GetSpacing()[0], row.cut.GetOrigin()
    x, y = ((row.mapped_lps[..., a] - origin_lps[a]) / spacing_mm for a in range(3) if a != row.normal)
    if row.normal != 2:
        y = row.mapped_lps.shape[0] - 1 - y
    left, right, bottom, top = extent
    points = np.stack((left + 0.5 + x, top + 0.5 + y), -1)
    every = max(1, round(_GRID_MM / spacing_mm))
    lines = LineCollection([*points[::every], *points[:, ::every].swapaxes(0, 1)], colors="#ffd54a", linewidths=0.5)
    axes.add_collection(lines, autolim=False)
    lines.set_clip_path(Rectangle((left, top), right - left, bottom - top, transform=axes.transData))
