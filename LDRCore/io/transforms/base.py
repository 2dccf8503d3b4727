"""What every transform format shares: its contract, the grids of the two images, the beginning of a file."""

from __future__ import annotations

import zlib
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
import SimpleITK as sitk

from LDRCore import geometry
from LDRCore.errors import RegistrationError
from LDRCore.io.images import ImageLike
from LDRCore.io.nifti_header import Header
from LDRCore.io.transforms.grids import read_grid

HEAD_BYTES = 1 << 16  # of a file, by which its format is recognised


@dataclass(frozen=True)
class Context:
    """What files do not say of themselves: the two images, for formats that count in their voxels.

    Attributes:
        fixed_source: image whose points a transform maps, see `ImageLike`; None where it is not known.
        moving_source: image that they are mapped to, likewise.
        modeling: accept a field that says that it goes from moving to fixed; the caller inverts it.
    """

    fixed_source: ImageLike | None = None
    moving_source: ImageLike | None = None
    modeling: bool = False

    def swapped(self) -> Context:
        """Return the context of the way back."""
        return Context(self.moving_source, self.fixed_source, self.modeling)

    def accepting_modeling(self) -> Context:
        """Return the context with `modeling` set."""
        return Context(self.fixed_source, self.moving_source, True)

    @cached_property
    def fixed(self) -> sitk.Image | None:
        """An image on the grid of the fixed image; of a file only the header is read."""
        return None if self.fixed_source is None else read_grid(self.fixed_source, "fixed image")

    @cached_property
    def moving(self) -> sitk.Image | None:
        """An image on the grid of the moving image."""
        return None if self.moving_source is None else read_grid(self.moving_source, "moving image")

    def fixed_for(self, what: str) -> sitk.Image:
        """Return the grid of the fixed image.

        Raises:
            RegistrationError: it is not known; `what` begins the sentence.
        """
        return self._needed(self.fixed, "fixed image (the reference)", what)

    def moving_for(self, what: str) -> sitk.Image:
        """Return the grid of the moving image.

        Raises:
            RegistrationError: it is not known; `what` begins the sentence.
        """
        return self._needed(self.moving, "moving image", what)

    @staticmethod
    def _needed(image: sitk.Image | None, which: str, what: str) -> sitk.Image:
        if image is None:
            raise RegistrationError(f"{what} must come with the grid of the {which}, got none: name that image")
        return image


@dataclass(frozen=True)
class FileHead:
    """The beginning of a file, by which formats recognise their own.

    Attributes:
        path: of the file.
        first: its first `HEAD_BYTES`, decompressed.
    """

    path: Path
    first: bytes

    @classmethod
    def of(cls, path: Path) -> FileHead:
        """Read the beginning of an existing file."""
        with path.open("rb") as stream:
            first = stream.read(HEAD_BYTES)
        if first[:2] == b"\x1f\x8b":
            try:
                first = zlib.decompressobj(31).decompress(first, HEAD_BYTES)
            except zlib.error:
                first = b""
        return cls(path, first)

    @cached_property
    def nifti(self) -> Header | None:
        """The header of a NIfTI-1 file, None for others."""
        header = Header.parse(self.first)
        return header if header is not None and header.is_nifti else None

    @cached_property
    def text(self) -> str:
        """The beginning of a text file, "" for others."""
        if b"\0" in self.first:
            return ""
        return self.first.decode("utf-8-sig", "replace")

    def named(self, *suffixes: str) -> bool:
        """Return whether the file's name ends in one of these."""
        return self.path.name.lower().endswith(suffixes)


class TransformFormat:
    """A format of transforms: a point map fixed -> moving in LPS mm, read from and written to the files of a program.

    Attributes:
        name: what users call it by.
        title: of the program, for sentences.
        linear_suffixes: of the files to which `write` writes linear transforms, () for none.
        dense_suffixes: of those to which it writes any transform, as a field on the fixed image's grid or whole.
    """

    name = ""
    title = ""
    linear_suffixes: tuple[str, ...] = ()
    dense_suffixes: tuple[str, ...] = ()

    def recognises(self, head: FileHead) -> bool:
        """Return whether the content of a file is certainly of this format."""
        return False

    def read(self, path: Path, context: Context, name: str) -> sitk.Transform:
        """Read a file that exists.

        Args:
            path: of the file.
            context: the grids of the two images, where known.
            name: what it is to the user, for messages.

        Raises:
            RegistrationError: it is of another kind, damaged, or needs a grid that is not known.
        """
        raise RegistrationError(f"{name} cannot be read in the format of {self.title}, got {path}")

    def files(self, path: Path, name: str) -> list[Path]:
        """Return the files that `read` reads of this one: itself, and others that it names.

        Raises:
            RegistrationError: one is missing or damaged.
        """
        return [path]

    def write(self, transform: sitk.Transform, path: Path, context: Context) -> None:
        """Write a file.

        Args:
            transform: fixed -> moving, LPS mm.
            path: its suffix is one of `suffixes`.
            context: the grids of the two images, where known.

        Raises:
            RegistrationError: the format cannot hold this transform, or needs a grid that is not known.
            OSError: the disk is full.
        """
        raise RegistrationError(f"a transform cannot be written in the format of {self.title}")

    def check_context(self, context: Context) -> None:
        """Refuse to write for two images before any work is done.

        Raises:
            RegistrationError: the format cannot be written for them.
        """

    def result_name(self, linear: bool) -> str:
        """Return the name of a transform's file in a folder of results."""
        suffix = self.linear_suffixes[0] if linear and self.linear_suffixes else self.dense_suffixes[0]
        return f"transform_{self.name}{suffix}"

    @property
    def suffixes(self) -> tuple[str, ...]:
        """Of the files that are written."""
        return (*self.linear_suffixes, *self.dense_suffixes)

    def writes_matrix(self, path: Path) -> bool:
        """Return whether the name is one of a file that holds a linear transform only."""
        return path.name.lower().endswith(self.linear_suffixes) and not path.name.lower().endswith(self.dense_suffixes)


def matrix_of(transform: sitk.Transform, title: str) -> np.ndarray:
    """Return the 4x4 in LPS mm of a linear transform that is about to be written.

    Raises:
        RegistrationError: it is not linear.
    """
    matrix = geometry.linear_matrix(transform)
    if matrix is None:
        raise RegistrationError(
            f"a matrix file of {title} must hold a linear transform, got a deformable one: write a field"
        )
    return matrix


def ras_matrix(matrix: np.ndarray) -> np.ndarray:
    """Turn a 4x4 from LPS to LPS into one from RAS to RAS, or back."""
    return geometry.RAS_TO_LPS @ matrix @ geometry.RAS_TO_LPS


def lps_from_ijk(image: sitk.Image) -> np.ndarray:
    """Return the 4x4 from voxel (i, j, k), first axis first, to LPS mm."""
    return geometry.index_to_lps(image)[:, [2, 1, 0, 3]]


def chain(*transforms: sitk.Transform | np.ndarray) -> sitk.Transform:
    """Compose transforms and 4x4 matrices in LPS mm: a point goes through the last one first."""
    parts = [geometry.affine_transform(one) if isinstance(one, np.ndarray) else one for one in transforms]
    return parts[0] if len(parts) == 1 else geometry.compose_transforms(*parts)
