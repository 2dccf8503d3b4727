"""A small picture of a result: fixed image magenta, warped image green, in three planes. Nothing is resampled."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import SimpleITK as sitk

EDGE = 112  # pixels of a plane
_QUALITY = 80  # of JPEG
_SAMPLE = 50_000  # voxels that intensities are judged by


def write_thumbnail(path: Path, fixed: sitk.Image, warped: sitk.Image) -> None:
    """Draw axial, coronal and sagittal slices through the middle of the fixed content.

    Args:
        path: of the .jpg to write.
        fixed, warped: scalar images on one grid.
    """
    fixed_values, spacing = _patient_order(fixed)
    warped_values, _ = _patient_order(warped)
    fixed_window, warped_window = _window(fixed_values), _window(warped_values)
    centre = _content_centre(fixed_values, fixed_window)
    scale = EDGE / max(n * s for n, s in zip(fixed_values.shape, spacing, strict=True))  # pixels a mm
    picture = np.zeros((EDGE, 3 * EDGE, 3), np.uint8)
    for plane in range(3):
        magenta, green = (
            _resized(np.take(values, centre[plane], axis=plane), np.delete(spacing, plane) * scale, window)
            for values, window in ((fixed_values, fixed_window), (warped_values, warped_window))
        )
        if plane > 0:
            magenta, green = magenta[::-1], green[::-1]  # the head is up
        top, left = (EDGE - magenta.shape[0]) // 2, plane * EDGE + (EDGE - magenta.shape[1]) // 2
        picture[top : top + magenta.shape[0], left : left + magenta.shape[1]] = np.stack((magenta, green, magenta), -1)
    image = sitk.GetImageFromArray(picture, isVector=True)
    sitk.WriteImage(image, str(path), useCompression=True, compressionLevel=_QUALITY)


def _patient_order(image: sitk.Image) -> tuple[np.ndarray, np.ndarray]:
    """Return a view of the voxels along inferior-superior, anterior-posterior, right-left, and its spacing in mm."""
    direction = np.array(image.GetDirection()).reshape(3, 3)  # columns: the axes x, y, z of the array
    free, order, flips = [0, 1, 2], [], []
    for lps_axis in (2, 1, 0):
        axis = max(free, key=lambda a: abs(direction[lps_axis, a]))
        free.remove(axis)
        order.append(2 - axis)
        flips.append(slice(None, None, -1 if direction[lps_axis, axis] < 0 else 1))
    values = sitk.GetArrayViewFromImage(image).transpose(order)[tuple(flips)]
    return values, np.array(image.GetSpacing())[::-1][order]


def _window(values: np.ndarray) -> tuple[float, float]:
    step = max(1, round((values.size / _SAMPLE) ** (1 / 3)))
    low, high = np.percentile(values[::step, ::step, ::step].astype(np.float32), (1, 99.5))
    return float(low), float(max(high, low + 1e-6))


def _content_centre(values: np.ndarray, window: tuple[float, float]) -> list[int]:
    step = max(1, round((values.size / _SAMPLE) ** (1 / 3)))
    bright = np.argwhere(values[::step, ::step, ::step] > window[0] + 0.15 * (window[1] - window[0]))
    return [int(c) for c in bright.mean(0) * step] if len(bright) else [n // 2 for n in values.shape]


def _resized(plane: np.ndarray, pixels: np.ndarray, window: tuple[float, float]) -> np.ndarray:
    """Return a slice as 8 bit, each axis sampled so that a voxel takes `pixels` pixels."""
    rows, columns = (
        np.minimum(np.arange(max(1, min(EDGE, int(n * p)))) / p, n - 1).astype(int)
        for n, p in zip(plane.shape, pixels, strict=True)
    )
    values = plane[np.ix_(rows, columns)].astype(np.float32)
    return (255 * np.clip((values - window[0]) / (window[1] - window[0]), 0, 1)).astype(np.uint8)
