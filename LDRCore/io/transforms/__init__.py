"""Transforms of all programs as one thing: a point map fixed -> moving in LPS mm, SimpleITK's transform.

`read_transform` reads them, `write` writes them, `FORMATS` names them; a class a format, a file a program.
"""

from __future__ import annotations

from LDRCore.io.transforms.base import Context, TransformFormat
from LDRCore.io.transforms.itk import holds_modeling_field
from LDRCore.io.transforms.reading import TransformLike, read_transform, transform_lattice
from LDRCore.io.transforms.registry import FORMATS, RESULT_NAMES, check_target, files_of, format_named, write, writer

__all__ = [
    "FORMATS",
    "RESULT_NAMES",
    "Context",
    "TransformFormat",
    "TransformLike",
    "check_target",
    "files_of",
    "format_named",
    "holds_modeling_field",
    "read_transform",
    "transform_lattice",
    "write",
    "writer",
]
