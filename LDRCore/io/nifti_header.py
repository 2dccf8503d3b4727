"""The header of a NIfTI-1 file: its fields, unpacked where the standard puts them."""

from __future__ import annotations

import math
import struct
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

HEADER_BYTES = 348  # of NIfTI-1; NIfTI-2 has 540, and no ITK 5 reads it
INTENT_DISPLACEMENT, INTENT_VECTOR = 1006, 1007
_EXTENSIONS_BEGIN = 352
_TYPES = {  # by the header's `datatype`
    code: np.dtype(name)
    for code, name in {2: "u1", 4: "i2", 8: "i4", 16: "f4", 64: "f8", 256: "i1", 512: "u2", 768: "u4"}.items()
}
_TYPES |= {1024: np.dtype("i8"), 1280: np.dtype("u8")}


@dataclass(frozen=True)
class Header:
    """What a NIfTI-1 header says, or one of Analyze, which has other things in some places.

    Attributes:
        raw: the beginning of a file, decompressed: the header, and what follows it as far as it was read.
        byte_order: "<" or ">".
    """

    raw: bytes
    byte_order: Literal["<", ">"]

    @classmethod
    def parse(cls, raw: bytes) -> Header | None:
        """Recognise a header by its length, which its first number says; None for any other file."""
        if len(raw) < HEADER_BYTES:
            return None
        if raw[:4] == struct.pack("<i", HEADER_BYTES):
            return cls(raw, "<")
        return cls(raw, ">") if raw[:4] == struct.pack(">i", HEADER_BYTES) else None

    def _numbers(self, kinds: str, offset: int) -> tuple[Any, ...]:
        return struct.unpack_from(self.byte_order + kinds, self.raw, offset)

    @property
    def is_nifti(self) -> bool:
        """Whether it is one of NIfTI-1, not of Analyze."""
        return self.raw[344:348] in (b"n+1\0", b"ni1\0")

    @property
    def shape(self) -> tuple[int, ...]:
        """Sizes along the axes of the array, x first."""
        dimensions, *sizes = self._numbers("8h", 40)
        return tuple(sizes[: max(dimensions, 0)])

    @property
    def spacing(self) -> tuple[float, ...]:
        """The header's pixdim along the axes of the array."""
        spacing: tuple[float, ...] = self._numbers("7f", 80)
        return spacing[: len(self.shape)]

    @property
    def vector_shape(self) -> bool:
        """Whether the array is one of 3-vectors: (x, y, z, 1, 3), or (x, y, z, 3) with or without axes of 1."""
        return [n for n in self.shape[3:] if n != 1] == [3]

    @property
    def stored_type(self) -> np.dtype | None:
        """The type of a stored value, in this machine's byte order; None for colours, complex numbers and others."""
        return _TYPES.get(self.datatype)

    @property
    def datatype(self) -> int:
        """NIfTI's code of the type of a value."""
        return int(self._numbers("h", 70)[0])

    @property
    def data_offset(self) -> int:
        """Bytes before the first value, uncompressed, in the file of the values."""
        (offset,) = self._numbers("f", 108)
        return int(offset) if math.isfinite(offset) else 0

    @property
    def data_bytes(self) -> int:
        """Bytes of all values, uncompressed."""
        return math.prod(max(n, 1) for n in self.shape) * int(self._numbers("h", 72)[0]) // 8

    @property
    def scaling(self) -> tuple[float, float]:
        """(slope, intercept): a value is ``slope * stored + intercept``."""
        slope, intercept = (n if math.isfinite(n) else 0.0 for n in self._numbers("2f", 112))
        return (slope or 1.0, intercept) if self.is_nifti else (1.0, 0.0)

    @property
    def intent(self) -> int:
        """NIfTI's code of what a value means."""
        return int(self._numbers("h", 68)[0]) if self.is_nifti else 0

    @property
    def intent_name(self) -> str:
        """What programs write there in words."""
        return self.raw[328:344].split(b"\0")[0].decode("latin-1")

    @property
    def parameters(self) -> tuple[float, ...]:
        """The intent's three parameters."""
        return self._numbers("3f", 56)

    @property
    def placement_codes(self) -> dict[str, int]:
        """Codes of qform and sform; 0 where there is none."""
        return dict(zip(("qform", "sform"), self._numbers("2h", 252), strict=True))

    @property
    def sform(self) -> np.ndarray:
        """4x4, voxel (i, j, k, 1) -> RAS mm, as stored."""
        return np.array([*self._numbers("12f", 280), 0, 0, 0, 1]).reshape(4, 4)

    @property
    def qform(self) -> np.ndarray:
        """4x4, voxel (i, j, k, 1) -> RAS mm, of the quaternion, as the standard defines it."""
        factor, *spacing = self._numbers("4f", 76)
        b, c, d, *offset = self._numbers("6f", 256)
        a = math.sqrt(max(0.0, 1 - b * b - c * c - d * d))
        rotation = [
            [a * a + b * b - c * c - d * d, 2 * (b * c - a * d), 2 * (b * d + a * c)],
            [2 * (b * c + a * d), a * a + c * c - b * b - d * d, 2 * (c * d - a * b)],
            [2 * (b * d - a * c), 2 * (c * d + a * b), a * a + d * d - b * b - c * c],
        ]
        out = np.eye(4)
        out[:3, :3] = np.array(rotation) * spacing * (1, 1, -1 if factor < 0 else 1)
        out[:3, 3] = offset
        return out

    @property
    def extensions(self) -> bytes:
        """What lies between header and values, as far as it was read (AFNI writes its attributes there)."""
        if self.raw[HEADER_BYTES : HEADER_BYTES + 1] in (b"", b"\0"):
            return b""
        return self.raw[_EXTENSIONS_BEGIN : max(_EXTENSIONS_BEGIN, self.data_offset)]
