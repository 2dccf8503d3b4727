"""Grids of images as empty images: read from headers alone, or made of a matrix."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import SimpleITK as sitk

from LDRCore import geometry
from LDRCore.errors import RegistrationError
from LDRCore.io import images
from LDRCore.io.images import ImageLike


def read_grid(source: ImageLike, name: str) -> sitk.Image:
    """Return an image on the grid of another (its first three axes); of a file only the header is read.

    Raises:
        RegistrationError: it cannot be read, or is not 3D.
    """
    if isinstance(source, (str, os.PathLike)) and Path(source).is_file():
        return first_axes(images.read_header(Path(source), name), name)
    image = images.read(source, name)
    return image if image.GetDimension() == 3 else first_axes(image, name)


def first_axes(source: sitk.ImageFileReader | sitk.Image, name: str) -> sitk.Image:
    """Return an empty image on the first three axes of a grid.

    Raises:
        RegistrationError: it has fewer, or lies nowhere.
    """
    dimension = source.GetDimension()
    if dimension < 3 or min(source.GetSize()[:3]) < 1:
        raise RegistrationError(f"{name} must be 3D, got size {tuple(source.GetSize())}")
    placement = [*source.GetSpacing()[:3], *source.GetOrigin()[:3], *source.GetDirection()]
    if not (np.isfinite(placement).all() and min(placement[:3]) > 0):
        raise RegistrationError(f"{name} must have a finite origin, direction and spacing, got {placement}")
    direction = np.array(source.GetDirection()).reshape(dimension, dimension)[:3, :3]
    return geometry.empty_image(source.GetSize()[:3], source.GetSpacing()[:3], source.GetOrigin()[:3], direction)


def grid_from_ras(ras_from_ijk: np.ndarray, size: tuple[int, ...], name: str) -> sitk.Image:
    """Return an empty image of a size at the place that a 4x4 from voxel to RAS mm says.

    Raises:
        RegistrationError: the matrix is singular, or its axes are not at right angles.
    """
    lps_from_index = geometry.RAS_TO_LPS @ ras_from_ijk
    spacing = np.linalg.norm(lps_from_index[:3, :3], axis=0)
    axes = lps_from_index[:3, :3] / np.where(spacing > 0, spacing, 1)
    if not (np.isfinite(lps_from_index).all() and np.abs(axes.T @ axes - np.eye(3)).max() < images.SHEAR):
        raise RegistrationError(f"{name} must lie on a grid with axes at right angles, got {ras_from_ijk.tolist()}")
    return geometry.empty_image(size, spacing.tolist(), lps_from_index[:3, 3].tolist(), axes)
