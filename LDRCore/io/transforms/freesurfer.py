"""FreeSurfer's linear transforms (.lta) and warps (.mgz)."""

from __future__ import annotations

import gzip
import re
import struct
import zlib
from pathlib import Path

import numpy as np
import SimpleITK as sitk

from LDRCore import geometry
from LDRCore.errors import RegistrationError
from LDRCore.io import containers
from LDRCore.io.files import read_text
from LDRCore.io.transforms import fields
from LDRCore.io.transforms.base import Context, FileHead, TransformFormat, lps_from_ijk, matrix_of, ras_matrix
from LDRCore.io.transforms.grids import grid_from_ras

_VOXELS, _RAS = 0, 1  # types of .lta
_WARP_INTENT = 3  # in a .mgz file's version
_COORDINATE_VOX, _DISPLACEMENT_VOX, _COORDINATE_RAS, _DISPLACEMENT_RAS = range(4)
_GEOMETRY_TAG, _META_TAG = 10, 13
_GEOMETRY_BYTES = 4 + 12 + 60 + 512
_HEADER_BYTES = 284
_PARAMETER_BYTES = 20  # after the values
_DAMAGED = (EOFError, OSError, zlib.error, struct.error, ValueError)


class FreeSurferFormat(TransformFormat):
    """A .lta takes points of its source (moving) to its destination (fixed): its inverse is the point map.

    A .mgz warp holds coordinates or displacements, in voxels or mm RAS, at every voxel of the atlas (fixed). A .m3z is
    read by FreeSurfer alone: `mri_warp_convert` makes a .mgz of it.
    """

    name = "freesurfer"
    title = "FreeSurfer"
    linear_suffixes = (".lta",)
    dense_suffixes = (".mgz", ".mgh")

    def recognises(self, head: FileHead) -> bool:
        """Return whether the content is a .lta, or a .mgz that says that it is a warp."""
        if head.text:
            return "nxforms" in head.text[:400]
        return head.first[:4] == struct.pack(">I", _WARP_INTENT << 8 | 1)

    def read(self, path: Path, context: Context, name: str) -> sitk.Transform:
        """Read a matrix or a warp."""
        if path.name.lower().endswith(".m3z"):
            raise RegistrationError(f"{name} must be a .lta or .mgz, got {path}: convert it by mri_warp_convert")
        if FileHead.of(path).text:
            return _read_lta(path, name)
        return _read_warp(path, name)

    def write(self, transform: sitk.Transform, path: Path, context: Context) -> None:
        """Write a matrix, or displacements in mm RAS on the grid of the fixed image."""
        fixed = context.fixed_for("a transform of FreeSurfer")
        moving = context.moving_for("a transform of FreeSurfer")
        if self.writes_matrix(path):
            matrix = np.linalg.inv(ras_matrix(matrix_of(transform, self.title)))
            rows = "\n".join(" ".join(f"{value:.15e}" for value in row) for row in matrix)
            path.write_text(
                "type      = 1 # LINEAR_RAS_TO_RAS\nnxforms   = 1\nmean      = 0.0000 0.0000 0.0000\n"
                f"sigma     = 1.0000\n1 4 4\n{rows}\n"
                f"src volume info\n{_describe(moving)}dst volume info\n{_describe(fixed)}",
                encoding="ascii",
            )
            return
        values = fields.vectors_on(transform, fixed, fields.to_ras)
        with fields.open_for_writing(path) as stream:
            stream.write(struct.pack(">7I", _WARP_INTENT << 8 | 1, *fixed.GetSize(), 3, 3, 1))
            stream.write((b"\0\1" + _placement(fixed)).ljust(_HEADER_BYTES - 28, b"\0"))
            for component in values:
                stream.write(component.astype(">f4").data)
            stream.write(bytes(_PARAMETER_BYTES))
            stream.write(struct.pack(">I", _GEOMETRY_TAG))
            for image in (moving, fixed):
                stream.write(struct.pack(">I3i", 1, *image.GetSize()) + _placement(image) + bytes(512))
            stream.write(struct.pack(">IQ2if", _META_TAG, 12, _DISPLACEMENT_RAS, 1, 0.0))


def _ras_and_centre(image: sitk.Image) -> tuple[np.ndarray, np.ndarray]:
    """Return (axes, centre): unit axes in RAS as columns, and the RAS mm of the voxel at half the size."""
    ras_from_ijk = geometry.RAS_TO_LPS @ lps_from_ijk(image)
    centre = ras_from_ijk @ np.append(np.array(image.GetSize()) / 2, 1)
    return ras_from_ijk[:3, :3] / np.array(image.GetSpacing()), centre[:3]


def _placement(image: sitk.Image) -> bytes:
    axes, centre = _ras_and_centre(image)
    return struct.pack(">15f", *image.GetSpacing(), *axes.T.ravel(), *centre)


def _describe(image: sitk.Image) -> str:
    axes, centre = _ras_and_centre(image)
    rows = {"voxelsize": image.GetSpacing(), "xras  ": axes[:, 0], "yras  ": axes[:, 1], "zras  ": axes[:, 2]}
    lines = [f"{key} = " + " ".join(f"{v:.15e}" for v in values) for key, values in (rows | {"cras  ": centre}).items()]
    size = " ".join(str(n) for n in image.GetSize())
    return "\n".join(["valid = 1", "filename = none", f"volume = {size}", *lines]) + "\n"


def _ras_from_ijk(size: np.ndarray, spacing: np.ndarray, axes: np.ndarray, centre: np.ndarray) -> np.ndarray:
    """Return 4x4, voxel -> RAS mm; `axes` as columns."""
    out = np.eye(4)
    out[:3, :3] = axes * spacing
    out[:3, 3] = centre - out[:3, :3] @ (size / 2)
    return out


def _read_lta(path: Path, name: str) -> sitk.Transform:
    text = "\n".join(line.partition("#")[0].strip() for line in read_text(path, name, ".lta file").splitlines())
    kind, count = (re.search(rf"^{key}\s*=\s*(\d+)", text, re.MULTILINE) for key in ("type", "nxforms"))
    rows = re.search(r"^1\s+4\s+4\s*\n((?:.*\n){4})", text + "\n", re.MULTILINE)
    try:
        matrix = np.array(rows[1].split() if rows else [], dtype=float).reshape(4, 4)
    except ValueError:
        matrix = np.zeros((4, 4))
    if kind is None or count is None or geometry.is_singular(matrix) or not np.isfinite(matrix).all():
        raise RegistrationError(f"{name} must be a .lta with an invertible 4x4, got {path}")
    if count[1] != "1":
        raise RegistrationError(f"{name} must hold one transform, got {count[1]} in {path}")
    if int(kind[1]) not in (_VOXELS, _RAS):
        raise RegistrationError(f"{name} must be of type 0 (voxels) or 1 (RAS), got {kind[1]} in {path}")
    if int(kind[1]) == _VOXELS:
        source, destination = (_volume(text, side, path, name) for side in ("src", "dst"))
        matrix = destination @ matrix @ np.linalg.inv(source)
    return geometry.affine_transform(ras_matrix(np.linalg.inv(matrix)))


def _volume(text: str, side: str, path: Path, name: str) -> np.ndarray:
    """Return 4x4, voxel -> RAS mm, of one of the volumes that a .lta names."""
    block = text.partition(f"{side} volume info")[2]
    rows = []
    for key in ("volume", "voxelsize", "xras", "yras", "zras", "cras"):
        match = re.search(rf"^{key}\s*=\s*(\S+)\s+(\S+)\s+(\S+)\s*$", block, re.MULTILINE)
        try:
            rows.append(np.array(match.groups() if match else (), dtype=float).reshape(3))
        except ValueError:
            raise RegistrationError(f"{name} must name its two volumes, got {path} without {side}'s {key}") from None
    size, spacing, x, y, z, centre = rows
    if re.search(r"^valid\s*=\s*0", block, re.MULTILINE):
        raise RegistrationError(f"{name} must name its two volumes, got {path} with an invalid {side} volume")
    return _ras_from_ijk(size, spacing, np.stack([x, y, z], axis=1), centre)


def _read_warp(path: Path, name: str) -> sitk.Transform:
    try:
        with gzip.open(path, "rb") if containers.is_gzip(path) else path.open("rb") as stream:
            header = stream.read(_HEADER_BYTES)
            version, x, y, z, frames, kind = struct.unpack_from(">6I", header)
            if version >> 8 & 0xFFFF != _WARP_INTENT or frames != 3 or kind != 3:
                raise RegistrationError(f"{name} must be a warp of three float frames, got another .mgz, {path}")
            numbers = np.array(struct.unpack_from(">15f", header, 30))
            count = 3 * x * y * z
            most = containers.MOST_INFLATED * path.stat().st_size
            content = stream.read(4 * count) if 4 * count < most else b""
            values = np.frombuffer(content, ">f4").reshape(3, z, y, x).astype(np.float32)
            stream.read(_PARAMETER_BYTES)
            rest = stream.read()
    except _DAMAGED as error:
        if isinstance(error, RegistrationError):
            raise
        raise containers.damaged(path, name) from None
    fixed_ras = _ras_from_ijk(np.array([x, y, z]), numbers[:3], numbers[3:12].reshape(3, 3).T, numbers[12:])
    grid = grid_from_ras(fixed_ras, (x, y, z), name)
    format_of_values, moving_ras = _warp_tags(rest, path, name)
    if format_of_values == _COORDINATE_RAS:
        return fields.field_transform(values, grid, fields.from_absolute_ras)
    if format_of_values == _DISPLACEMENT_RAS:
        return fields.field_transform(values, grid, fields.to_ras)
    read, _ = fields.between_voxels(geometry.RAS_TO_LPS @ moving_ras, grid)
    if format_of_values == _DISPLACEMENT_VOX:
        return fields.field_transform(values, grid, read)
    moving_lps = geometry.RAS_TO_LPS @ moving_ras
    return fields.field_transform(values, grid, lambda points, v: fields.apply_matrix(moving_lps, v) - points)


def _warp_tags(rest: bytes, path: Path, name: str) -> tuple[int, np.ndarray]:
    """Return what the values are, and 4x4, voxel -> RAS mm, of the moving image, from the tags behind the values."""
    at = 0
    kind: int | None = None
    moving_ras: np.ndarray | None = None
    while at + 4 <= len(rest):
        (tag,) = struct.unpack_from(">I", rest, at)
        at += 4
        if tag == 0:
            break
        if tag == _GEOMETRY_TAG:
            if at + _GEOMETRY_BYTES > len(rest):
                break
            size = np.array(struct.unpack_from(">3i", rest, at + 4), dtype=float)
            numbers = np.array(struct.unpack_from(">15f", rest, at + 16), dtype=float)
            moving_ras = _ras_from_ijk(size, numbers[:3], numbers[3:12].reshape(3, 3).T, numbers[12:])
            at += 2 * _GEOMETRY_BYTES
            continue
        if at + 8 > len(rest):
            break
        (length,) = struct.unpack_from(">Q", rest, at)
        at += 8
        if tag == _META_TAG and at + 4 <= len(rest):
            (kind,) = struct.unpack_from(">i", rest, at)
        at += length
    if kind is None or kind not in range(4) or moving_ras is None or geometry.is_singular(moving_ras):
        raise RegistrationError(f"{name} must say of what kind its values are and where its image lies, got {path}")
    return kind, moving_ras
