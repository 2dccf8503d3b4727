"""Fields of networks' programs: displacements in voxels, in the order of the array; convexAdam and voxelmorph."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import SimpleITK as sitk

from LDRCore.errors import RegistrationError
from LDRCore.io.transforms import fields
from LDRCore.io.transforms.base import Context, TransformFormat, lps_from_ijk

_NUMPY = (".npy", ".npz")
_HALVED = 2  # convexAdam optimises on every second voxel


class ConvexAdamFormat(TransformFormat):
    """convexAdam's `disp.nii.gz` or array: (x, y, z, 3), voxels along the array's axes, short by 1 - 1/(N // 2).

    The last stage divides by one voxel less than grid_sample does on its grid of N // 2 voxels along an axis, so that
    the shifts that it finds are longer than those that it returns. Both images need one size.
    """

    name = "convexadam"
    title = "convexAdam"
    dense_suffixes = (".nii.gz", ".nii", ".npy")

    def read(self, path: Path, context: Context, name: str) -> sitk.Transform:
        """Read a field and lengthen it to what was optimised."""
        what = f"{name} of {self.title}"
        fixed = context.fixed_for(what)
        return _from_voxels(_read_vectors(path, fixed, name, last=True), context, what, _shortening(fixed))

    def write(self, transform: sitk.Transform, path: Path, context: Context) -> None:
        """Write a field on the fixed image's voxels, as short as convexAdam's own."""
        fixed = context.fixed_for(f"a field of {self.title}")
        values = _in_voxels(transform, context, f"a field of {self.title}", _shortening(fixed))
        if path.name.lower().endswith(_NUMPY):
            np.save(path, values.transpose(3, 2, 1, 0))
            return
        fields.write_nifti(path, values, fixed, (3,))


class VoxelMorphFormat(TransformFormat):
    """voxelmorph's fields: (3, x, y, z), or (x, y, z, 3), voxels along the array's axes; pulls the moving image."""

    name = "voxelmorph"
    title = "voxelmorph"
    dense_suffixes = (".npy", ".nii.gz", ".nii")

    def read(self, path: Path, context: Context, name: str) -> sitk.Transform:
        """Read a field; of an array that fits both orders the first axis counts as that of the vectors."""
        what = f"{name} of {self.title}"
        return _from_voxels(_read_vectors(path, context.fixed_for(what), name, last=False), context, what)

    def write(self, transform: sitk.Transform, path: Path, context: Context) -> None:
        """Write a field, vectors along the first axis in an array, and along the last in NIfTI."""
        what = f"a field of {self.title}"
        values = _in_voxels(transform, context, what)
        if path.name.lower().endswith(_NUMPY):
            np.save(path, values.transpose(0, 3, 2, 1))
            return
        fields.write_nifti(path, values, context.fixed_for(what), (3,))


def _shortening(fixed: sitk.Image) -> np.ndarray:
    halved = np.maximum(np.array(fixed.GetSize()) // _HALVED, 2)
    return 1 - 1 / halved


def _read_vectors(path: Path, fixed: sitk.Image, name: str, *, last: bool) -> np.ndarray:
    """Read (3, D, H, W) from an array or a NIfTI file whose vectors lie along the first or the last axis."""
    if path.name.lower().endswith(_NUMPY):
        array = np.squeeze(_load(path, name))
    else:
        array = np.squeeze(fields.read_array(path, name)[0])
    size = tuple(fixed.GetSize())
    orders = {(*size, 3): (3, 2, 1, 0)}
    if not last:
        orders = {**orders, (3, *size): (0, 3, 2, 1)}
    if array.shape not in orders:
        wanted = " or ".join(str(shape) for shape in orders)
        raise RegistrationError(f"{name} must have the fixed image's shape {wanted}, got {array.shape} in {path}")
    return np.ascontiguousarray(array.transpose(orders[array.shape]), dtype=np.float32)


def _load(path: Path, name: str) -> np.ndarray:
    try:
        loaded = np.load(path, allow_pickle=False)
        if isinstance(loaded, np.ndarray):
            return loaded
        keys = list(loaded)
        array: np.ndarray = loaded["vol" if "vol" in keys else keys[0]]
        return array
    except Exception:  # numpy raises many kinds for damaged files
        raise RegistrationError(f"{name} must be an array of numbers that numpy can read, got {path}") from None


def _from_voxels(
    values: np.ndarray, context: Context, what: str, shortening: np.ndarray | float = 1.0
) -> sitk.Transform:
    fixed = context.fixed_for(what)
    convert, _ = fields.between_voxels(lps_from_ijk(context.moving_for(what)), fixed)
    return fields.field_transform(values, fixed, lambda points, vectors: convert(points, vectors / shortening))


def _in_voxels(
    transform: sitk.Transform, context: Context, what: str, shortening: np.ndarray | float = 1.0
) -> np.ndarray:
    fixed = context.fixed_for(what)
    _, convert = fields.between_voxels(lps_from_ijk(context.moving_for(what)), fixed)
    return fields.vectors_on(transform, fixed, lambda points, moved: convert(points, moved) * shortening)
