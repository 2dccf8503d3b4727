"""Reads NIfTI files so that nothing is lost in silence: cut-off files are refused, NaN and infinity are kept.

ITK 5 fills what a cut-off file lacks with zeros, and replaces every NaN and infinite value of a floating-point file by
zero (ITK 6 keeps them: ITK pull request 6683). So floating-point files are decompressed here, once, and SimpleITK reads
their header only. Files of integers, which have no NaN, are left to SimpleITK. All this
holds for pairs of .hdr and .img as well.
"""

from __future__ import annotations

import gzip
import math
import os
import re
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import SimpleITK as sitk

from LDRCore.errors import RegistrationError
from LDRCore.io import containers
from LDRCore.io.nifti_header import HEADER_BYTES, INTENT_DISPLACEMENT, INTENT_VECTOR, Header

_SAME_PLACE_MM = 0.1  # two placements that differ less are the same
_READ_ERRORS = (EOFError, OSError, zlib.error)


@dataclass(frozen=True)
class NiftiFile:
    """A NIfTI-1 file, or a pair of files, whose header was read.

    Attributes:
        path: of the file of values; of a pair the .img file.
        header: what it says.
        grid: SimpleITK's reader of the file, which knows size, spacing, origin and direction.
        alone: whether header and values are in one file.
    """

    path: Path
    header: Header
    grid: sitk.ImageFileReader
    alone: bool

    @property
    def data_offset(self) -> int:
        """Bytes before the first value, uncompressed."""
        return max(self.header.data_offset, HEADER_BYTES if self.alone else 0)

    @property
    def needs_read_values(self) -> bool:
        """Whether `read_values` must read the values: ITK 5 would change them.

        It loses NaN and infinity of floating-point files, scales only a part of a scaled vector image, and crashes if
        it is of integers.
        """
        components, stored_type = self.grid.GetNumberOfComponents(), self.header.stored_type
        if stored_type is None or (components > 1 and not self._has_vectors):
            return False
        return stored_type.kind == "f" or (components > 1 and self.header.scaling != (1, 0))

    @property
    def _has_vectors(self) -> bool:
        """Whether a voxel is a vector along x, y, z (not a colour or a tensor)."""
        known = self.header.intent in (INTENT_DISPLACEMENT, INTENT_VECTOR)
        return known and self.grid.GetNumberOfComponents() == 3


def find(path: Path, name: str) -> NiftiFile | None:
    """Read the header of a NIfTI-1 file or pair; None for any other file and where SimpleITK cannot read it.

    Args:
        path: an existing file (.nii, .nii.gz, .hdr, .img, .img.gz).
        name: what the image is to the user ("fixed image"), for messages.

    Raises:
        RegistrationError: SimpleITK reads it, but it is cut off or damaged.
    """
    if not path.name.lower().endswith((".nii", ".nii.gz", ".hdr", ".img", ".img.gz")):
        return None
    header_path, data_path = _pair(path)
    check_placement(header_path, name)
    grid = sitk.ImageFileReader()
    grid.SetImageIO("NiftiImageIO")  # not every other one in turn: that of HDF5 must not run in two threads at once
    grid.SetFileName(str(path))
    try:
        grid.ReadImageInformation()
    except RuntimeError:
        if containers.is_gzip(path):
            containers.check_gzip(path, name)
        return None
    return _found(header_path, data_path, grid, name)


def check_placement(path: Path, name: str) -> None:
    """Refuse a NIfTI-1 header whose sform is not finite: ITK 5.4 does not come back from reading it.

    Raises:
        RegistrationError: see above.
    """
    try:
        header = _read_header(path)
    except _READ_ERRORS:
        return  # said later
    if header is not None and header.is_nifti and not np.isfinite(header.sform).all():
        raise RegistrationError(f"{name} must have a finite placement, got an sform that is not in {path}")


def find_anywhere(path: Path, name: str) -> NiftiFile | None:
    """Read the header of a single NIfTI-1 file without SimpleITK, which refuses some placements; None for other files.

    Raises:
        RegistrationError: it is damaged.
    """
    return _found(path, path, sitk.ImageFileReader(), name)


def _found(header_path: Path, data_path: Path, grid: sitk.ImageFileReader, name: str) -> NiftiFile | None:
    """Read a header; None where it is not one of NIfTI-1.

    Raises:
        RegistrationError: it cannot be decompressed.
    """
    try:
        header = _read_header(header_path)
    except _READ_ERRORS:
        raise containers.damaged(header_path, name) from None
    return None if header is None else NiftiFile(data_path, header, grid, data_path == header_path)


def read_values(file: NiftiFile, name: str) -> sitk.Image:
    """Read a file as SimpleITK does, but with NaN and infinity kept; only what `needs_read_values`.

    Args:
        file: see `find`.
        name: what the image is to the user, for messages.

    Returns:
        A scalar image, or one of 3-component vectors. Displacements, which NIfTI has in RAS, come in LPS.

    Raises:
        RegistrationError: the file is cut off or damaged.
    """
    grid = file.grid
    size, components = grid.GetSize(), grid.GetNumberOfComponents()
    values = read_array(file, math.prod(size) * components, name)
    values = values.reshape(components, *size[::-1])  # components are the slowest axis of a NIfTI file
    if components == 1:
        image = sitk.GetImageFromArray(values[0], isVector=False)
    else:
        if file.header.intent == INTENT_DISPLACEMENT:
            values[:2] *= -1
        image = sitk.GetImageFromArray(np.moveaxis(values, 0, -1), isVector=True)
    image.SetSpacing(grid.GetSpacing())
    image.SetOrigin(grid.GetOrigin())
    image.SetDirection(grid.GetDirection())
    return image


def read_array(file: NiftiFile, count: int, name: str) -> np.ndarray:
    """Read all values of a file of numbers, scaled as its header says, x fastest.

    Args:
        file: see `find`.
        count: how many there should be.
        name: what the image is to the user, for messages.

    Returns:
        (count,), see `read_pieces`.

    Raises:
        RegistrationError: see `read_pieces`.
    """
    pieces = read_pieces(file, count, name)
    first = next(pieces)
    values = np.empty(count, first.dtype)
    values[: len(first)] = first
    at = len(first)
    for piece in pieces:
        values[at : at + len(piece)] = piece
        at += len(piece)
    return values


def read_pieces(file: NiftiFile, count: int, name: str) -> Iterator[np.ndarray]:
    """Yield all values of a file in pieces; arguments as of `read_array`.

    Yields:
        (n,), floating-point numbers as they are stored; integers as float32 where they are scaled.

    Raises:
        RegistrationError: the file is cut off or damaged, or holds colours or complex numbers.
    """
    header, stored_type = file.header, file.header.stored_type
    if stored_type is None:
        raise RegistrationError(f"{name} must hold real numbers, got NIfTI's type {header.datatype} in {file.path}")
    length = file.path.stat().st_size * (containers.MOST_INFLATED if containers.is_gzip(file.path) else 1)
    if count * stored_type.itemsize != header.data_bytes or file.data_offset + header.data_bytes > length:
        raise containers.damaged(file.path, name)
    slope, intercept = header.scaling
    scaled_type = stored_type if stored_type.kind == "f" else np.dtype(np.float32)
    missing, rest = header.data_bytes, b""
    try:
        for content in _read_data(file):
            content = rest + content
            size = min(missing, len(content)) // stored_type.itemsize * stored_type.itemsize
            missing, rest = missing - size, content[size:] if size < missing else b""
            if not size:
                continue
            values = np.frombuffer(content[:size], stored_type.newbyteorder(header.byte_order))
            if (slope, intercept) != (1, 0):
                yield (values.astype(np.float64) * slope + intercept).astype(scaled_type)
            else:
                yield values.astype(stored_type, copy=False)
    except _READ_ERRORS:
        raise containers.damaged(file.path, name) from None
    if missing:
        raise containers.damaged(file.path, name)


def check_complete(file: NiftiFile, name: str, *, every_byte: bool = False) -> None:
    """Refuse a file that lacks values.

    Args:
        file: see `find`.
        name: what the image is to the user, for messages.
        every_byte: decompress a compressed file to its end. Otherwise only where the length that it says of itself,
            modulo 2^32, is not what it should be.

    Raises:
        RegistrationError: the file is cut off or damaged.
    """
    expected = file.data_offset + file.header.data_bytes
    length = file.path.stat().st_size
    if containers.is_gzip(file.path):
        with file.path.open("rb") as stream:
            stream.seek(-min(4, length), os.SEEK_END)
            if int.from_bytes(stream.read(), "little") == expected % 2**32 and not every_byte:
                return
            stream.seek(0)
            try:
                length = containers.inflated_bytes(stream)
            except _READ_ERRORS:
                length = 0
    if length < expected:
        raise containers.damaged(file.path, name)


def describe_placement(file: NiftiFile) -> str:
    """Say which of a header's two placements SimpleITK took, and by how much the other differs; "" where they agree.

    A NIfTI file may place its voxels twice, by sform and by qform, and by neither. Programs choose differently.
    """
    grid, header = file.grid, file.header
    if not header.is_nifti or grid.GetDimension() < 3:
        return ""
    codes = header.placement_codes
    if not any(codes.values()):
        return "the header places its voxels nowhere (qform and sform code 0): other programs may put them elsewhere"
    if not all(codes.values()):
        return ""
    corners = np.array([[i, j, k, 1] for i in (0, 1) for j in (0, 1) for k in (0, 1)], dtype=float)
    corners[:, :3] *= np.array(grid.GetSize()[:3]) - 1
    axes = np.array(grid.GetDirection()).reshape(grid.GetDimension(), -1)[:3, :3]
    taken_ras = corners[:, :3] @ (axes * grid.GetSpacing()[:3]).T + grid.GetOrigin()[:3]
    taken_ras *= (-1, -1, 1)
    placements = {"qform": header.qform, "sform": header.sform}
    far_mm = {name: float(np.abs(corners @ ras.T[:, :3] - taken_ras).max()) for name, ras in placements.items()}
    other, taken = sorted(far_mm, key=lambda name: -far_mm[name])
    if not far_mm[other] > _SAME_PLACE_MM:
        return ""
    return f"the header places its voxels twice: its {taken} was taken, its {other} is up to {far_mm[other]:.1f} mm off"


def _pair(path: Path) -> tuple[Path, Path]:
    """Return the file of the header and that of the values: the same but for pairs of .hdr and .img."""
    match = re.fullmatch(r"(.*)\.(hdr|img|img\.gz)", path.name, re.IGNORECASE | re.DOTALL)
    if match is None:
        return path, path
    header, *values = (path.with_name(match[1] + suffix) for suffix in (".hdr", ".img", ".img.gz"))
    if match[2].lower() != "hdr":
        return header if header.exists() else path, path
    return path, next((file for file in values if file.exists()), path)


def _read_header(path: Path) -> Header | None:
    """Read the header of a file; None where it is not one of NIfTI-1 or Analyze.

    Raises:
        EOFError, OSError, zlib.error: it cannot be decompressed.
    """
    with gzip.open(path, "rb") if containers.is_gzip(path) else path.open("rb") as stream:
        return Header.parse(stream.read(HEADER_BYTES))


def _read_data(file: NiftiFile) -> Iterator[bytes]:
    """Yield what follows the header in pieces: of a compressed file to the end, where gzip has its checksum.

    Raises:
        EOFError, OSError, zlib.error: it cannot be read, or is not what was compressed.
    """
    with file.path.open("rb") as stream:
        if containers.is_gzip(file.path):
            skipped = file.data_offset
            for piece in containers.inflated(stream):
                yield piece[skipped:]
                skipped = max(0, skipped - len(piece))
        else:
            stream.seek(file.data_offset)
            yield from iter(lambda: stream.read(containers.CHUNK_BYTES), b"")
