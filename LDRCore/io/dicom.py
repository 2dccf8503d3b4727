"""Reads the one DICOM series of a folder, and refuses slices that do not make one volume."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import SimpleITK as sitk

from LDRCore.errors import RegistrationError

_POSITION, _ORIENTATION, _SLOPE, _INTERCEPT = "0020|0032", "0020|0037", "0028|1053", "0028|1052"
_SAME_DIRECTION = 1e-3  # of unit vectors
_SAME_DISTANCE = 0.05  # of the distance between slices: more means that one is missing
_TILT = 1e-2  # sine of the angle between the stack and the slices' normal


def read_folder(folder: Path, name: str) -> sitk.Image:
    """Read the one DICOM series of a folder.

    Args:
        folder: with one series, and any other files.
        name: what the image is to the user, for messages.

    Raises:
        RegistrationError: none or several series, unreadable files, or slices that do not make one volume.
    """
    series = sitk.ImageSeriesReader.GetGDCMSeriesIDs(str(folder))
    if not series:
        raise RegistrationError(f"{name} must be an image file or a folder with one DICOM series, got {folder} (none)")
    if len(series) > 1:
        raise RegistrationError(
            f"{name} must be a folder with one DICOM series, got {folder} with {len(series)}: "
            "put the wanted series in a folder of its own or convert it to NIfTI"
        )
    files = sitk.ImageSeriesReader.GetGDCMSeriesFileNames(str(folder), series[0])
    try:
        scaled = _check_slices(files, folder, name)
        reader = sitk.ImageSeriesReader()
        reader.SetFileNames(files)
        if scaled:
            reader.SetOutputPixelType(sitk.sitkFloat32)
        return reader.Execute()
    except RuntimeError as error:
        reason = str(error).strip().splitlines()[-1].strip()[:160]
        raise RegistrationError(f"{name} must be a readable DICOM series, got {folder} ({reason})") from None


def _check_slices(files: tuple[str, ...], folder: Path, name: str) -> bool:
    """Compare positions and orientations of slices.

    Returns:
        Whether slopes or intercepts differ, so that values must be read as floating-point numbers.

    Raises:
        RegistrationError: a gantry tilt, a missing slice, changing distances, or several volumes.
    """
    reader = sitk.ImageFileReader()
    positions, orientations, scales = [], [], set()
    for file in files:
        reader.SetFileName(file)
        reader.ReadImageInformation()
        if reader.GetDimension() == 3 and reader.GetSize()[2] > 1:  # all slices in one file
            return False
        if not (reader.HasMetaDataKey(_POSITION) and reader.HasMetaDataKey(_ORIENTATION)):
            return False
        positions.append(_numbers(reader.GetMetaData(_POSITION)))
        orientations.append(_numbers(reader.GetMetaData(_ORIENTATION)))
        scales.add(
            tuple(reader.GetMetaData(key).strip() if reader.HasMetaDataKey(key) else "" for key in (_SLOPE, _INTERCEPT))
        )
    if len(files) > 1:
        _check_stack(np.array(positions), np.array(orientations), folder, name)
    return len(scales) > 1


def _numbers(text: str) -> list[float]:
    return [float(part) for part in text.split("\\")]


def _check_stack(positions: np.ndarray, orientations: np.ndarray, folder: Path, name: str) -> None:
    """Refuse slices that are not parallel, not one above the other, or not equally far apart.

    Args:
        positions: (N, 3) mm.
        orientations: (N, 6), two unit vectors each.
        folder: of the series.
        name: what the image is to the user.

    Raises:
        RegistrationError: see above.
    """
    rule = f"{name} must be parallel slices at equal distances"
    if np.abs(orientations - orientations[0]).max() > _SAME_DIRECTION:
        raise RegistrationError(f"{rule}, got several orientations in {folder}")
    normal = np.cross(orientations[0, :3], orientations[0, 3:])
    order = np.argsort(positions @ normal)
    steps = np.diff(positions[order], axis=0)
    distances = steps @ normal
    step = float(np.median(distances))
    if step <= 0 or distances.min() < _SAME_DISTANCE * step:
        raise RegistrationError(f"{rule}, got several slices at one position in {folder} (two volumes in one series?)")
    if np.abs(distances - step).max() > _SAME_DISTANCE * step:
        raise RegistrationError(
            f"{rule}, got distances of {distances.min():.3f} to {distances.max():.3f} mm in {folder} (a slice missing?)"
        )
    sideways = np.linalg.norm(steps - np.outer(distances, normal), axis=1)
    if (sideways > _TILT * step).any():
        raise RegistrationError(f"{rule}, got a tilted stack in {folder} (gantry tilt): rectify it first")
