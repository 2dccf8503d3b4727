"""BIDS X5 files, as nitransforms writes them: HDF5, RAS mm, reference (fixed) -> moving."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import SimpleITK as sitk

from LDRCore import geometry
from LDRCore.errors import RegistrationError
from LDRCore.io.transforms import fields
from LDRCore.io.transforms.base import Context, FileHead, TransformFormat, chain, lps_from_ijk, ras_matrix
from LDRCore.io.transforms.grids import grid_from_ras

_HDF5 = b"\x89HDF"


class X5Format(TransformFormat):
    """A chain of matrices and dense fields.

    The draft names neither the frame nor the direction: what nitransforms 25.1 does holds, RAS and fixed -> moving.
    Several transforms apply in the order of their numbers. Its own to_filename refuses dense fields, so the groups are
    written here.
    """

    name = "x5"
    title = "X5"
    dense_suffixes = (".x5",)

    def recognises(self, head: FileHead) -> bool:
        """Return whether a file is HDF5 with X5's mark."""
        return head.first.startswith(_HDF5) and (head.named(".x5") or b"Representation" in head.first)

    def read(self, path: Path, context: Context, name: str) -> sitk.Transform:
        """Read all transforms of a file."""
        with _opened(path, "r", name) as file:
            try:
                if _text(file.attrs.get("Format", "")) != "X5":
                    raise RegistrationError(f"{name} must be an X5 file, got {path} without its mark")
                group = file["TransformGroup"]
                parts = [_read_node(group[key], path, name) for key in sorted(group, key=int)]
            except (KeyError, ValueError, TypeError, AttributeError, OSError, RuntimeError) as error:
                if isinstance(error, RegistrationError):
                    raise
                raise RegistrationError(f"{name} must be a complete X5 file, got {path} ({error})") from None
        if not parts:
            raise RegistrationError(f"{name} must hold a transform, got none in {path}")
        return chain(*reversed(parts))

    def check_context(self, context: Context) -> None:
        """Refuse where h5py is not installed."""
        _h5py()

    def write(self, transform: sitk.Transform, path: Path, context: Context) -> None:
        """Write a matrix, or displacements on the grid of the fixed image."""
        matrix = geometry.linear_matrix(transform)
        with _opened(path, "w", "the output") as file:
            file.attrs["Format"] = "X5"
            file.attrs["Version"] = np.uint16(1)
            node = file.create_group("TransformGroup/0")
            node.attrs["ArrayLength"] = 1
            node.attrs["Type"] = "linear" if matrix is not None else "nonlinear"
            node.create_dataset("DimensionKinds", data=np.array(["space"] * 3 + ["vector"], dtype="S"))
            if matrix is not None:
                node.attrs["SubType"], node.attrs["Representation"] = "affine", "matrix"
                node.create_dataset("Transform", data=ras_matrix(matrix))
            else:
                node.attrs["SubType"], node.attrs["Representation"] = "densefield", "displacements"
                fixed = context.fixed_for("a field of X5")
                values = fields.vectors_on(transform, fixed, fields.to_ras)
                w, h, d = fixed.GetSize()
                data = node.create_dataset("Transform", (w, h, d, 3), "f4", compression=1, chunks=(w, h, 1, 3))
                for k in range(d):
                    data[:, :, k] = values[:, k].T
            if context.fixed is not None:
                domain = node.create_group("Domain")
                domain.attrs["Coordinates"] = "cartesian"
                domain.create_dataset("Grid", data=np.uint8(1))
                domain.create_dataset("Size", data=np.array(context.fixed.GetSize()))
                domain.create_dataset("Mapping", data=geometry.RAS_TO_LPS @ lps_from_ijk(context.fixed))


def _h5py() -> Any:
    """Import h5py.

    Raises:
        RegistrationError: it is not installed.
    """
    try:
        import h5py
    except ImportError:
        raise RegistrationError(
            'X5 files need the package h5py, which is not installed: pip install "LDRCore[transforms]"'
        ) from None
    return h5py


def _opened(path: Path, mode: str, name: str) -> Any:
    """Open an HDF5 file.

    Raises:
        RegistrationError: h5py is missing, or it is none.
    """
    try:
        return _h5py().File(path, mode)
    except OSError:
        if mode == "w":
            raise
        raise RegistrationError(f"{name} must be an X5 file, got {path} (no HDF5, or damaged)") from None


def _text(value: Any) -> str:
    return value.decode("utf-8", "replace") if isinstance(value, bytes) else str(value)


def _read_node(node: Any, path: Path, name: str) -> sitk.Transform:
    kind, subtype = _text(node.attrs["Type"]), _text(node.attrs.get("SubType", ""))
    if kind == "linear":
        matrix = np.asarray(node["Transform"], dtype=float)
        if matrix.shape == (1, 4, 4):
            matrix = matrix[0]
        if matrix.shape != (4, 4):
            raise RegistrationError(f"{name} must be one 4x4, got an array of shape {matrix.shape} in {path}")
        return geometry.affine_transform(ras_matrix(matrix))
    representation = _text(node.attrs.get("Representation", ""))
    if kind != "nonlinear" or subtype != "densefield" or representation not in ("displacements", "deformations"):
        what = f"{kind} {subtype} {representation}".strip()
        raise RegistrationError(f"{name} must be linear or a dense field, got {what!r} in {path}")
    shape = node["Transform"].shape
    if "Domain" not in node or len(shape) != 4 or shape[3] != 3:
        raise RegistrationError(f"{name} must be a field of 3-vectors with its domain, got shape {shape} in {path}")
    grid = grid_from_ras(np.asarray(node["Domain/Mapping"], dtype=float), shape[:3], name)
    values = np.asarray(node["Transform"], dtype=np.float32).transpose(3, 2, 1, 0)
    convert = fields.to_ras if representation == "displacements" else fields.from_absolute_ras
    return fields.field_transform(np.ascontiguousarray(values), grid, convert)
