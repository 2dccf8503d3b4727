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
import struct
import sys
import zlib
from dataclasses import dataclass
from io import BufferedIOBase
from pathlib import Path

import numpy as np
import SimpleITK as sitk

from LDRCore.errors import RegistrationError
from LDRCore.io import containers

_HEADER_BYTES = 348  # of NIfTI-1; NIfTI-2 has 540, and no ITK 5 reads it
_TYPES = {  # by the header's `datatype`
    code: np.dtype(name)
    for code, name in {2: "u1", 4: "i2", 8: "i4", 16: "f4", 64: "f8", 256: "i1", 512: "u2", 768: "u4"}.items()
}
_INTENT_DISPLACEMENT, _INTENT_VECTOR = 1006, 1007
_SAME_PLACE_MM = 0.1  # two placements that differ less are the same
_READ_ERRORS = (EOFError, OSError, zlib.error)


@dataclass(frozen=True)
class Header:
    """The part of a NIfTI-1 header that is needed to read the values.

    Attributes:
        path: of the file of values; of a pair the .img file.
        grid: SimpleITK's reader of the file, which knows size, spacing, origin and direction.
        byte_order: "<" or ">".
        datatype: NIfTI's code of the type of a value.
        intent: NIfTI's code of what a value means.
        intent_name: what programs write there in words.
        data_offset: bytes before the first value, uncompressed.
        data_bytes: of all values, uncompressed.
        slope, intercept: a value is ``slope * stored + intercept``.
        raw: the header's bytes.
    """

    path: Path
    grid: sitk.ImageFileReader
    byte_order: str
    datatype: int
    intent: int
    intent_name: str
    data_offset: int
    data_bytes: int
    slope: float
    intercept: float
    raw: bytes

    @property
    def scaled(self) -> bool:
        """Whether stored values are not yet the values."""
        return (self.slope, self.intercept) != (1, 0)

    @property
    def stored_type(self) -> np.dtype | None:
        """The type of the stored values where `read_values` must read them, None where SimpleITK can.

        ITK 5 loses NaN and infinity of floating-point files, scales only a part of a scaled vector image, and crashes
        if it is of integers.
        """
        components, stored_type = self.grid.GetNumberOfComponents(), _TYPES.get(self.datatype)
        if stored_type is None or (components > 1 and not self._has_vectors):
            return None
        return stored_type if stored_type.kind == "f" or (components > 1 and self.scaled) else None

    @property
    def _has_vectors(self) -> bool:
        """Whether a voxel is a vector along x, y, z (not a colour or a tensor)."""
        known = self.intent in (_INTENT_DISPLACEMENT, _INTENT_VECTOR)
        return known and self.grid.GetNumberOfComponents() == 3


def read_header(path: Path, name: str) -> Header | None:
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
    return _parse(header_path, data_path, grid, name)


def check_placement(path: Path, name: str) -> None:
    """Refuse a NIfTI-1 header whose sform is not finite: ITK 5.4 does not come back from reading it.

    Raises:
        RegistrationError: see above.
    """
    try:
        with _open(path) as stream:
            raw = stream.read(_HEADER_BYTES)
    except _READ_ERRORS:
        return  # said later
    if len(raw) < _HEADER_BYTES or raw[344:348] not in (b"n+1\0", b"ni1\0"):
        return
    order = "<" if raw[:4] == struct.pack("<i", _HEADER_BYTES) else ">"
    if not np.isfinite(struct.unpack_from(order + "12f", raw, 280)).all():
        raise RegistrationError(f"{name} must have a finite placement, got an sform that is not in {path}")


def read_plain_header(path: Path, name: str) -> Header | None:
    """Read the header of a single NIfTI-1 file without SimpleITK, which refuses some placements; None for other files.

    Raises:
        RegistrationError: it is damaged.
    """
    return _parse(path, path, sitk.ImageFileReader(), name)


def _parse(header_path: Path, data_path: Path, grid: sitk.ImageFileReader, name: str) -> Header | None:
    """Parse a header; None where it is not one of NIfTI-1.

    Raises:
        RegistrationError: it cannot be decompressed.
    """
    try:
        with _open(header_path) as stream:
            raw = stream.read(_HEADER_BYTES)
    except _READ_ERRORS:
        raise containers.damaged(header_path, name) from None
    order = next((o for o in "<>" if raw[:4] == struct.pack(o + "i", _HEADER_BYTES)), None)
    if order is None or len(raw) < _HEADER_BYTES:
        return None
    dimensions, *sizes = struct.unpack_from(order + "8h", raw, 40)
    intent, datatype, bits = struct.unpack_from(order + "3h", raw, 68)
    offset, slope, intercept = np.nan_to_num(struct.unpack_from(order + "3f", raw, 108), posinf=0, neginf=0).tolist()
    if raw[344:348] not in (b"n+1\0", b"ni1\0"):  # an Analyze file, which has other things there
        intent, slope, intercept = 0, 1.0, 0.0
    return Header(
        data_path,
        grid,
        order,
        datatype,
        intent,
        raw[328:344].split(b"\0")[0].decode("latin-1"),
        data_offset=max(int(offset), _HEADER_BYTES if data_path == header_path else 0),
        data_bytes=math.prod(max(n, 1) for n in sizes[:dimensions]) * bits // 8,
        slope=slope if slope else 1.0,
        intercept=intercept,
        raw=raw,
    )


def read_values(header: Header, name: str) -> sitk.Image:
    """Read a file as SimpleITK does, but with NaN and infinity kept; `Header.stored_type` tells whether it can.

    Args:
        header: see `read_header`.
        name: what the image is to the user, for messages.

    Returns:
        A scalar image, or one of 3-component vectors. Displacements, which NIfTI has in RAS, come in LPS.

    Raises:
        RegistrationError: the file is cut off or damaged.
    """
    grid = header.grid
    if header.stored_type is None:
        raise ValueError(f"the file must be one that `Header.stored_type` names, got datatype {header.datatype}")
    size, components = grid.GetSize(), grid.GetNumberOfComponents()
    values = read_array(header, math.prod(size) * components, name)
    values = values.reshape(components, *size[::-1])  # components are the slowest axis of a NIfTI file
    if components == 1:
        image = sitk.GetImageFromArray(values[0], isVector=False)
    else:
        if header.intent == _INTENT_DISPLACEMENT:
            values[:2] *= -1
        image = sitk.GetImageFromArray(np.moveaxis(values, 0, -1), isVector=True)
    image.SetSpacing(grid.GetSpacing())
    image.SetOrigin(grid.GetOrigin())
    image.SetDirection(grid.GetDirection())
    return image


def read_array(header: Header, count: int, name: str) -> np.ndarray:
    """Read all values of a file of numbers, scaled as its header says, x fastest.

    Args:
        header: see `read_header`.
        count: how many there should be.
        name: what the image is to the user, for messages.

    Returns:
        (count,), floating-point numbers as they are stored; integers as float32 where they are scaled.

    Raises:
        RegistrationError: the file is cut off or damaged, or holds colours or complex numbers.
    """
    stored_type = _TYPES.get(header.datatype)
    if stored_type is None:
        raise RegistrationError(f"{name} must hold real numbers, got NIfTI's type {header.datatype} in {header.path}")
    length = header.path.stat().st_size * (containers.MOST_INFLATED if containers.is_gzip(header.path) else 1)
    if count * stored_type.itemsize != header.data_bytes or header.data_offset + header.data_bytes > length:
        raise containers.damaged(header.path, name)
    values = np.empty(header.data_bytes // stored_type.itemsize, stored_type)
    try:
        _fill(values.view(np.uint8).data, header)
    except _READ_ERRORS:
        raise containers.damaged(header.path, name) from None
    if header.byte_order != ("<" if sys.byteorder == "little" else ">"):
        values.byteswap(inplace=True)
    if header.scaled:
        scaled = values.astype(np.float64) * header.slope + header.intercept
        values = scaled.astype(stored_type if stored_type.kind == "f" else np.float32)
    return values


def check_complete(header: Header, name: str, *, every_byte: bool = False) -> None:
    """Refuse a file that lacks values.

    Args:
        header: see `read_header`.
        name: what the image is to the user, for messages.
        every_byte: decompress a compressed file to its end. Otherwise only where the length that it says of itself,
            modulo 2^32, is not what it should be.

    Raises:
        RegistrationError: the file is cut off or damaged.
    """
    expected = header.data_offset + header.data_bytes
    length = header.path.stat().st_size
    if containers.is_gzip(header.path):
        with header.path.open("rb") as file:
            file.seek(-min(4, length), os.SEEK_END)
            if int.from_bytes(file.read(), "little") == expected % 2**32 and not every_byte:
                return
            file.seek(0)
            try:
                length = containers.inflated_bytes(file)
            except _READ_ERRORS:
                length = 0
    if length < expected:
        raise containers.damaged(header.path, name)


def describe_placement(header: Header) -> str:
    """Say which of a header's two placements SimpleITK took, and by how much the other differs; "" where they agree.

    A NIfTI file may place its voxels twice, by sform and by qform, and by neither. Programs choose differently.
    """
    if header.raw[344:348] not in (b"n+1\0", b"ni1\0") or header.grid.GetDimension() < 3:
        return ""
    order, raw = header.byte_order, header.raw
    codes = dict(zip(("qform", "sform"), struct.unpack_from(order + "2h", raw, 252), strict=True))
    if not any(codes.values()):
        return "the header places its voxels nowhere (qform and sform code 0): other programs may put them elsewhere"
    if not all(codes.values()):
        return ""
    placements = {"qform": _qform(order, raw), "sform": np.array(struct.unpack_from(order + "12f", raw, 280))}
    corners = np.array([[i, j, k, 1] for i in (0, 1) for j in (0, 1) for k in (0, 1)], dtype=float)
    corners[:, :3] *= np.array(header.grid.GetSize()[:3]) - 1
    axes = np.array(header.grid.GetDirection()).reshape(header.grid.GetDimension(), -1)[:3, :3]
    taken_ras = corners[:, :3] @ (axes * header.grid.GetSpacing()[:3]).T + header.grid.GetOrigin()[:3]
    taken_ras *= (-1, -1, 1)
    far_mm = {
        name: float(np.abs(corners @ matrix.reshape(3, 4).T - taken_ras).max()) for name, matrix in placements.items()
    }
    other, taken = sorted(far_mm, key=lambda name: -far_mm[name])
    if not far_mm[other] > _SAME_PLACE_MM:
        return ""
    return f"the header places its voxels twice: its {taken} was taken, its {other} is up to {far_mm[other]:.1f} mm off"


def _qform(order: str, raw: bytes) -> np.ndarray:
    """Return (3, 4), voxel (i, j, k, 1) -> RAS mm, of a header's quaternion, as the standard defines it."""
    factor, *spacing = struct.unpack_from(order + "4f", raw, 76)
    b, c, d, *offset = struct.unpack_from(order + "6f", raw, 256)
    a = math.sqrt(max(0.0, 1 - b * b - c * c - d * d))
    rotation = [
        [a * a + b * b - c * c - d * d, 2 * (b * c - a * d), 2 * (b * d + a * c)],
        [2 * (b * c + a * d), a * a + c * c - b * b - d * d, 2 * (c * d - a * b)],
        [2 * (b * d - a * c), 2 * (c * d + a * b), a * a + d * d - b * b - c * c],
    ]
    scale = np.array(spacing) * (1, 1, -1 if factor < 0 else 1)
    return np.column_stack([np.array(rotation) * scale, offset])


def _pair(path: Path) -> tuple[Path, Path]:
    """Return the file of the header and that of the values: the same but for pairs of .hdr and .img."""
    match = re.fullmatch(r"(.*)\.(hdr|img|img\.gz)", path.name, re.IGNORECASE | re.DOTALL)
    if match is None:
        return path, path
    header, *values = (path.with_name(match[1] + suffix) for suffix in (".hdr", ".img", ".img.gz"))
    if match[2].lower() != "hdr":
        return header if header.exists() else path, path
    return path, next((file for file in values if file.exists()), path)


def _open(path: Path) -> BufferedIOBase:
    """Open a file for reading, decompressed."""
    return gzip.open(path, "rb") if containers.is_gzip(path) else path.open("rb")


def _fill(buffer: memoryview, header: Header) -> None:
    """Read the values' bytes into a buffer of their length.

    Raises:
        EOFError: there are fewer.
        OSError, zlib.error: they cannot be read, or are not what was compressed.
    """
    with header.path.open("rb") as stream:
        if not containers.is_gzip(header.path):
            stream.seek(header.data_offset)
            if stream.readinto(buffer) != len(buffer):
                raise EOFError
            return
        at = -header.data_offset  # in the buffer, of the next piece; to the end, where gzip has its checksum
        for piece in containers.inflated(stream):
            wanted = piece[max(0, -at) : max(0, len(buffer) - at)]
            buffer[max(0, at) : max(0, at) + len(wanted)] = wanted
            at += len(piece)
    if at < len(buffer):
        raise EOFError
