"""Dense fields: NIfTI arrays of vectors <-> displacement field transforms in mm LPS, some slices at a time."""

from __future__ import annotations

import gzip
import math
import struct
import tempfile
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import SimpleITK as sitk

from LDRCore import geometry
from LDRCore.errors import RegistrationError
from LDRCore.io import containers, images, nifti
from LDRCore.io.nifti_header import HEADER_BYTES, Header
from LDRCore.io.quiet import silent_libraries
from LDRCore.io.transforms.base import lps_from_ijk
from LDRCore.io.transforms.grids import first_axes

SLAB_VOXELS = 65_536  # that are computed at once
SAME_GRID_VOX = 1e-3  # two grids are one where their corners are closer
_GZIP_LEVEL = 1  # the last digits of floating-point numbers do not compress, at any level
_FLOAT32 = (16, 32)  # NIfTI's code and bits

Convert = Callable[[np.ndarray, np.ndarray], np.ndarray]
"""(points, vectors), both (slices, H, W, 3) in float64: points in mm LPS; returns other vectors for the same voxels."""


def read_vectors(path: Path, name: str, convert: Convert | None = None) -> sitk.Transform:
    """Read a NIfTI file of 3-vectors, (x, y, z, 3) or (x, y, z, 1, 3), as a displacement field on its own grid.

    Args:
        path: of the file.
        name: what it is to the user, for messages.
        convert: turns stored vectors into displacements in mm LPS; None where they are.

    Raises:
        RegistrationError: another shape, cut off or damaged.
    """
    with _opened(path, name) as file:
        field = _empty_field(first_axes(file.grid, name))
        w, h, d = field.GetSize()
        limits = list(_slab_limits((d, h, w)))
        pieces = nifti.read_pieces(file, 3 * d * h * w, name)
        portions = _in_portions(pieces, [(stop - start) * h * w for start, stop in 3 * limits])
        for component, (start, stop) in product(range(3), limits):  # a file holds all x, then all y, then all z
            vectors = sitk.GetArrayFromImage(field[:, :, start:stop])
            vectors[..., component] = next(portions).reshape(vectors.shape[:3])
            _put(field, start, stop, vectors, convert if component == 2 else None)
        for _ in pieces:  # to the end of the file, where gzip has its checksum
            pass
    return sitk.DisplacementFieldTransform(field)


def read_components(path: Path, name: str) -> tuple[np.ndarray, sitk.Image]:
    """Read a NIfTI file whose axes behind x, y and z hold three values.

    Returns:
        (values, grid): (3, D, H, W) as stored, and an empty image.

    Raises:
        RegistrationError: another shape, cut off or damaged.
    """
    with _opened(path, name) as file:
        x, y, z = file.header.shape[:3]
        return nifti.read_array(file, 3 * x * y * z, name).reshape(3, z, y, x), first_axes(file.grid, name)


@contextmanager
def _opened(path: Path, name: str) -> Iterator[nifti.NiftiFile]:
    """Give a NIfTI file whose axes behind x, y and z hold three values.

    Raises:
        RegistrationError: it is another.
    """
    with containers.named_by_content(path) as named, silent_libraries():
        file = _nifti_1(nifti.find(named, name), path, name)
        shape = file.header.shape
        if len(shape) < 4 or math.prod(shape[3:]) != 3:
            raise RegistrationError(f"{name} must be 3D with 3 values a voxel, got the shape {shape} in {path}")
        yield file


def _in_portions(pieces: Iterator[np.ndarray], counts: Iterable[int]) -> Iterator[np.ndarray]:
    """Yield what comes in pieces of any length in portions of so many values each."""
    waiting: list[np.ndarray] = []
    for count in counts:
        while sum(map(len, waiting)) < count:
            waiting.append(next(pieces))
        values = np.concatenate(waiting)
        waiting = [values[count:]]
        yield values[:count]


def read_array(path: Path, name: str) -> tuple[np.ndarray, Header]:
    """Read a NIfTI-1 file of any shape whatever its placement says: (array indexed x, y, z ..., header).

    Raises:
        RegistrationError: another file, cut off or damaged.
    """
    file = _nifti_1(nifti.find_anywhere(path, name), path, name)
    shape = file.header.shape
    return nifti.read_array(file, math.prod(shape), name).reshape(shape[::-1]).T, file.header


def _nifti_1(file: nifti.NiftiFile | None, path: Path, name: str) -> nifti.NiftiFile:
    """Return a file that was found.

    Raises:
        RegistrationError: it is none of NIfTI-1.
    """
    if file is None or not file.header.is_nifti:
        raise RegistrationError(f"{name} must be a NIfTI-1 file, got {path}")
    return file


def check_same_size(grid: sitk.Image, reference: sitk.Image, name: str, path: Path) -> None:
    """Refuse a field that does not have the voxels of its image.

    Raises:
        RegistrationError: see above.
    """
    if grid.GetSize() != reference.GetSize():
        raise RegistrationError(
            f"{name} must have the size of the fixed image, {reference.GetSize()}, got {grid.GetSize()} in {path}"
        )


def field_transform(values: np.ndarray, grid: sitk.Image, convert: Convert | None = None) -> sitk.Transform:
    """Make a displacement field transform.

    Args:
        values: (3, D, H, W).
        grid: image of the field's placement.
        convert: turns `values` into displacements in mm LPS; None where they are.
    """
    field = _empty_field(grid)
    for start, stop in _slab_limits(values.shape[1:]):  # an image of the whole array would be one more copy
        _put(field, start, stop, np.moveaxis(values[:, start:stop], 0, -1), convert)
    return sitk.DisplacementFieldTransform(field)


def _empty_field(grid: sitk.Image) -> sitk.Image:
    field = sitk.Image(grid.GetSize(), sitk.sitkVectorFloat64, 3)
    field.CopyInformation(grid)
    return field


def _put(field: sitk.Image, start: int, stop: int, vectors: np.ndarray, convert: Convert | None) -> None:
    """Replace some slices of a field by vectors (slices, H, W, 3), converted; it is changed in place."""
    with np.errstate(invalid="ignore", over="ignore"):  # what is not finite is refused later
        vectors = vectors.astype(np.float64)
        if convert is not None:
            vectors = convert(slab_points(field, start, stop), vectors)
    field[:, :, start:stop] = sitk.GetImageFromArray(vectors, isVector=True)


def _slab_limits(shape: tuple[int, ...]) -> Iterator[tuple[int, int]]:
    slices = max(1, SLAB_VOXELS // max(1, shape[1] * shape[2]))
    for start in range(0, shape[0], slices):
        yield start, min(start + slices, shape[0])


def slab_points(grid: sitk.Image, start: int, stop: int) -> np.ndarray:
    """Return the voxels of some slices of a grid, (slices, H, W, 3) in mm LPS."""
    w, h, _ = grid.GetSize()
    lps_from_index = geometry.index_to_lps(grid)
    along = [
        np.arange(*limits)[:, None] * lps_from_index[:3, axis]
        for axis, limits in enumerate(((start, stop), (h,), (w,)))
    ]
    return along[0][:, None, None] + (along[1][:, None] + (along[2] + lps_from_index[:3, 3]))


def apply_matrix(matrix: np.ndarray, points: np.ndarray) -> np.ndarray:
    """Map points (..., 3) by a 4x4."""
    mapped: np.ndarray = points @ matrix[:3, :3].T + matrix[:3, 3]
    return mapped


def same_grid(first: sitk.Image, second: sitk.Image) -> bool:
    """Return whether two images have the same voxels."""
    if first.GetSize() != second.GetSize():
        return False
    apart_mm = np.abs(geometry.corners_lps(first) - geometry.corners_lps(second)).max()
    return bool(apart_mm < SAME_GRID_VOX * min(first.GetSpacing()))


def sampled(transform: sitk.Transform, reference: sitk.Image) -> sitk.Image:
    """Return ``T(x) - x`` on a grid, mm LPS: the transform's own field where it is one on this grid."""
    if transform.GetName() == "DisplacementFieldTransform":
        field = sitk.DisplacementFieldTransform(transform).GetDisplacementField()
        if same_grid(field, reference):
            return field
    return geometry.displacement_field_image(transform, reference)


def vectors_on(transform: sitk.Transform, reference: sitk.Image, convert: Convert | None = None) -> np.ndarray:
    """Sample a transform on a grid and convert it for a file.

    Args:
        transform: fixed -> moving, LPS mm.
        reference: image of the grid.
        convert: turns (points, displacements) in mm LPS into what is stored; None where displacements are.

    Returns:
        (3, D, H, W) float32.

    Raises:
        RegistrationError: values that are not finite.
    """
    field = sampled(transform, reference)
    view = sitk.GetArrayViewFromImage(field)
    stored = np.empty((3, *view.shape[:3]), np.float32)
    for start, stop in _slab_limits(view.shape[:3]):
        vectors = view[start:stop]
        if convert is not None:
            vectors = convert(slab_points(reference, start, stop), vectors.astype(np.float64))
        stored[:, start:stop] = np.moveaxis(vectors, -1, 0)
        if images.count_non_finite(stored[:, start:stop]):
            raise RegistrationError(
                "the transform must be finite on the grid of the fixed image, got values that are not"
            )
    return stored


def write_nifti(
    path: Path,
    values: np.ndarray,
    grid: sitk.Image,
    tail: tuple[int, ...],
    *,
    intent: int = 0,
    intent_name: str = "",
    affine: np.ndarray | None = None,
) -> None:
    """Write an array of float32 as a NIfTI-1 file, with the placement that SimpleITK gives an image.

    Args:
        path: compressed where it ends in .gz.
        values: (components, D, H, W).
        grid: image of its placement.
        tail: sizes of the axes behind x, y and z.
        intent, intent_name: see `Header`.
        affine: 4x4 to write as sform instead, where a program stores another.

    Raises:
        RegistrationError: the grid's axes are not at right angles.
    """
    images.check_right_angles(grid, "an image that is written")
    shape = (*grid.GetSize(), *tail)
    if math.prod(tail) != len(values):
        raise ValueError(f"tail must hold {len(values)} values a voxel, got {tail}")
    header = bytearray(_placed_header(grid))
    struct.pack_into("<8h", header, 40, len(shape), *shape, *[1] * (7 - len(shape)))
    struct.pack_into("<3h", header, 68, intent, *_FLOAT32)
    struct.pack_into("<4f", header, 92, 1, 1, 1, 1)
    struct.pack_into("<3f", header, 108, 352, 1, 0)
    header[123] = 2  # mm
    header[328:344] = intent_name.encode("ascii")[:15].ljust(16, b"\0")
    header[344:348] = b"n+1\0"
    if affine is not None:
        struct.pack_into("<2h", header, 252, 0, 2)
        struct.pack_into("<12f", header, 280, *affine[:3].ravel())
    with open_for_writing(path) as stream:
        stream.write(bytes(header) + bytes(4))
        for component in values:
            for plane in component:  # a compressor holds what it is given twice
                stream.write(np.ascontiguousarray(plane, dtype="<f4").data)


def open_for_writing(path: Path) -> Any:
    """Open a file of bytes, compressed where its name says so."""
    if path.name.lower().endswith((".gz", ".mgz")):
        return gzip.open(path, "wb", compresslevel=_GZIP_LEVEL)
    return path.open("wb")


def _placed_header(grid: sitk.Image) -> bytes:
    """Return the header that SimpleITK writes for an image at this place."""
    tiny = sitk.Image([2, 2, 2], sitk.sitkFloat32)
    tiny.SetOrigin(grid.GetOrigin())
    tiny.SetSpacing(grid.GetSpacing())
    tiny.SetDirection(grid.GetDirection())
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "tiny.nii"
        with silent_libraries():
            sitk.WriteImage(tiny, str(path))
        return path.read_bytes()[:HEADER_BYTES]


def to_ras(points: np.ndarray, displacement: np.ndarray) -> np.ndarray:
    """Turn displacements from LPS into RAS, or back."""
    return displacement * (-1, -1, 1)


def to_absolute_ras(points: np.ndarray, displacement: np.ndarray) -> np.ndarray:
    """Turn displacements in mm LPS into coordinates of the mapped points in mm RAS."""
    coordinates: np.ndarray = (points + displacement) * (-1, -1, 1)
    return coordinates


def from_absolute_ras(points: np.ndarray, coordinates: np.ndarray) -> np.ndarray:
    """Turn coordinates of the mapped points in mm RAS into displacements in mm LPS."""
    return coordinates * (-1, -1, 1) - points


def between_voxels(moving_lps_from_ijk: np.ndarray, fixed: sitk.Image) -> tuple[Convert, Convert]:
    """Return (read, write) for fields of displacements in voxels: index in the moving image minus that in the fixed.

    Args:
        moving_lps_from_ijk: 4x4.
        fixed: image.
    """
    ijk_from_lps = np.linalg.inv(lps_from_ijk(fixed))
    moving_ijk_from_lps = np.linalg.inv(moving_lps_from_ijk)

    def read(points: np.ndarray, vectors: np.ndarray) -> np.ndarray:
        return apply_matrix(moving_lps_from_ijk, apply_matrix(ijk_from_lps, points) + vectors) - points

    def write(points: np.ndarray, displacement: np.ndarray) -> np.ndarray:
        return apply_matrix(moving_ijk_from_lps, points + displacement) - apply_matrix(ijk_from_lps, points)

    return read, write
