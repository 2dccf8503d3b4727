"""Warps images of any number of volumes and components through a SimpleITK transform, sampled once."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import SimpleITK as sitk

from LDRCore.errors import RegistrationError

INTERPOLATIONS = ("linear", "nearest", "cubic", "label-gaussian", "label-majority")
_MOST_LABELS = 2**31


def volumes_of(image: sitk.Image) -> list[sitk.Image]:
    """Take an image apart into three-dimensional scalar images: those of a series, the components of a vector image.

    Args:
        image: 3D or 4D; others come back as they are.
    """
    if image.GetDimension() == 4:
        return [volume for t in range(image.GetSize()[3]) for volume in volumes_of(image[:, :, :, t])]
    if image.GetNumberOfComponentsPerPixel() == 1:
        return [image]
    return [sitk.VectorIndexSelectionCast(image, c) for c in range(image.GetNumberOfComponentsPerPixel())]


def warp_volumes(image: sitk.Image, warp: Callable[[sitk.Image], sitk.Image]) -> sitk.Image:
    """Warp every volume of an image and join the results as they were. Vectors are not turned.

    Args:
        image: 3D or 4D, scalars or vectors.
        warp: warps a three-dimensional scalar image.
    """
    if image.GetDimension() == 4:
        series = [warp_volumes(image[:, :, :, t], warp) for t in range(image.GetSize()[3])]
        return sitk.JoinSeries(series, image.GetOrigin()[3], image.GetSpacing()[3])
    volumes = [warp(volume) for volume in volumes_of(image)]
    return volumes[0] if len(volumes) == 1 else sitk.Compose(volumes)


def warp_volume(
    image: sitk.Image, reference: sitk.Image, transform: sitk.Transform, interpolation: str = "linear"
) -> sitk.Image:
    """Warp a three-dimensional scalar image onto a grid.

    Args:
        image: in the moving image's space.
        reference: image whose grid the result shall have.
        transform: fixed -> moving.
        interpolation: "linear"; "cubic" (a B-spline through the voxels, which overshoots at edges); "nearest";
            "label-gaussian" and "label-majority": the label with the largest sum of Gaussian or linear weights.

    Returns:
        An image of the input's pixel type, integers rounded; outside the input its smallest value (0 for labels).

    Raises:
        RegistrationError: labels that are not whole numbers, or voxels that are not finite where cubic is wanted.
    """
    if interpolation == "nearest":
        return sitk.Resample(image, reference, transform, sitk.sitkNearestNeighbor, 0.0)
    if interpolation.startswith("label"):
        return _warp_labels(image, reference, transform, interpolation)
    values = sitk.GetArrayViewFromImage(image)
    kind = sitk.sitkBSpline3 if interpolation == "cubic" else sitk.sitkLinear
    if not np.issubdtype(values.dtype, np.integer):
        known = values[np.isfinite(values)]
        if kind == sitk.sitkBSpline3 and known.size != values.size:
            raise RegistrationError("an image must hold only finite values for cubic interpolation, got others")
        return sitk.Resample(image, reference, transform, kind, float(known.min()) if known.size else 0.0)
    precise = sitk.sitkFloat32 if values.dtype.itemsize <= 2 else sitk.sitkFloat64
    warped = sitk.Resample(image, reference, transform, kind, float(values.min()), precise)
    rounded = np.rint(sitk.GetArrayViewFromImage(warped))
    if kind == sitk.sitkBSpline3:
        limits = np.iinfo(values.dtype)
        np.clip(rounded, limits.min, limits.max, out=rounded)
    result = sitk.GetImageFromArray(rounded.astype(values.dtype))
    result.CopyInformation(warped)
    return result


def _warp_labels(image: sitk.Image, reference: sitk.Image, transform: sitk.Transform, interpolation: str) -> sitk.Image:
    values = sitk.GetArrayViewFromImage(image)
    labels = image
    if not np.issubdtype(values.dtype, np.integer):
        if not (
            np.isfinite(values).all() and (np.rint(values) == values).all() and np.abs(values).max() < _MOST_LABELS
        ):
            raise RegistrationError("labels must be whole numbers, got others: use linear or nearest")
        labels = sitk.Cast(image, sitk.sitkInt32)
    kind = sitk.sitkLabelGaussian if interpolation == "label-gaussian" else getattr(sitk, "sitkLabelLinear", None)
    if kind is None:
        raise RegistrationError(f"label-majority needs SimpleITK 2.4 or later, got {sitk.Version_VersionString()}")
    return sitk.Cast(sitk.Resample(labels, reference, transform, kind, 0.0), image.GetPixelID())
