"""overview.png: one picture by which a reader judges a registration. matplotlib, imported only when called."""

from __future__ import annotations

from pathlib import Path

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
    return tuple(int(round(c)) for c in centre)


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
    is shown where the scanner put it. Slices are patient-aligned (also for oblique images), right on the left.

    Args:
        path: .png to write.
        fixed, moving: scalar images.
        transform: fixed -> moving.
        title: one line above the picture.
    """
    import matplotlib

    matplotlib.use("Agg", force=False)
    from matplotlib.figure import Figure

    reference = _display_grid(fixed)
    identity = sitk.Transform(3, sitk.sitkIdentity)
    low_f = float(sitk.GetArrayViewFromImage(fixed).min())
    low_m = float(sitk.GetArrayViewFromImage(moving).min())
    f = _on(fixed, reference, identity, low_f)
    m = _on(moving, reference, identity, low_m)
    w = _on(moving, reference, transform, low_m)
    field = geometry.displacement_field_image(transform, reference)
    jacobian = sitk.GetArrayFromImage(geometry.jacobian_determinant_image(field))
    points = sitk.GetArrayFromImage(field) + _positions(reference)
    at = _content_centre(f)

    def scaled(values: np.ndarray, like: np.ndarray) -> np.ndarray:
        low, high = _window(like)
        return np.clip((values - low) / (high - low), 0, 1)

    f, w, m = scaled(f, f), scaled(w, w), scaled(m, w)
    figure = Figure(figsize=(20, 8.2), facecolor="black")
    axes = figure.subplots(3, len(_COLUMNS), gridspec_kw={"wspace": 0.03, "hspace": 0.03})
    spacing = reference.GetSpacing()[0]
    drawn = None
    for plane in range(3):
        fs, ms, ws = (_slice(v, plane, at) for v in (f, m, w))
        rows, columns = np.indices(fs.shape) // max(1, round(24 / spacing))
        checker = np.where((rows + columns) % 2 == 0, fs, ws)
        pictures = [fs, ms, ws, np.stack([fs, ms, fs], -1), np.stack([fs, ws, fs], -1), checker, ws]
        for column, picture in enumerate(pictures):
            axes[plane, column].imshow(picture, cmap="gray", vmin=0, vmax=1, interpolation="bilinear")
        _draw_grid(axes[plane, 6], points, plane, at, reference)
        drawn = axes[plane, 7].imshow(
            _slice(jacobian, plane, at), cmap="RdBu_r", vmin=0, vmax=2, interpolation="nearest"
        )
        axes[plane, 7].contour(fs, levels=[0.2], colors="black", linewidths=0.4)
        axes[plane, 0].set_ylabel(_PLANES[plane], color="white", fontsize=12)
    for column, name in enumerate(_COLUMNS):
        axes[0, column].set_title(name, color="white", fontsize=12)
    for axis in axes.flat:
        axis.set_xticks([])
        axis.set_yticks([])
        for spine in axis.spines.values():
            spine.set_visible(False)
    bar = figure.colorbar(drawn, ax=axes[:, 7], fraction=0.06, pad=0.02)
    bar.set_label("local volume change (1 = none)", color="white")
    bar.ax.tick_params(colors="white")
    figure.suptitle(title, color="white", fontsize=13, y=0.99)
    figure.savefig(path, dpi=90, facecolor="black", bbox_inches="tight", pad_inches=0.1, format="png")


def _positions(reference: sitk.Image) -> np.ndarray:
    size = reference.GetSize()[::-1]
    axes = [np.arange(n) for n in size]
    k, j, i = np.meshgrid(*axes, indexing="ij")
    return np.stack([i, j, k], -1) * reference.GetSpacing() + np.array(reference.GetOrigin())


def _draw_grid(axis, points: np.ndarray, plane: int, at: tuple[int, ...], reference: sitk.Image) -> None:  # type: ignore[no-untyped-def]
    """Lines of the fixed image's space, drawn where the dense part takes them within the slice plane."""
    across, up = {0: (0, 1), 1: (0, 2), 2: (1, 2)}[plane]
    cut = points[at[0]] if plane == 0 else points[:, at[1]] if plane == 1 else points[:, :, at[2]]
    still = _positions(reference)
    rest = still[at[0]] if plane == 0 else still[:, at[1]] if plane == 1 else still[:, :, at[2]]
    design = np.concatenate([rest.reshape(-1, 3), np.ones((rest.size // 3, 1))], 1)
    fit, *_ = np.linalg.lstsq(design[::37], cut.reshape(-1, 3)[::37], rcond=None)
    moved = rest + (cut - (design @ fit).reshape(cut.shape))  # without the affine part, which would hide the rest
    spacing, origin = reference.GetSpacing(), reference.GetOrigin()
    x = (moved[..., across] - origin[across]) / spacing[across]
    y = (moved[..., up] - origin[up]) / spacing[up]
    if plane != 0:
        y = cut.shape[0] - 1 - y
    every = max(1, round(8 / spacing[0]))
    axis.plot(x[::every].T, y[::every].T, color="#ffd54a", linewidth=0.5, alpha=0.9)
    axis.plot(x[:, ::every], y[:, ::every], color="#ffd54a", linewidth=0.5, alpha=0.9)
    axis.set_xlim(-0.5, cut.shape[1] - 0.5)
    axis.set_ylim(cut.shape[0] - 0.5, -0.5)
