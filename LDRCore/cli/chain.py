"""The transforms of a command: several files, each of any program's format and optionally inverted."""

from __future__ import annotations

import os
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

import numpy as np
import SimpleITK as sitk

from LDRCore import geometry
from LDRCore.errors import RegistrationError
from LDRCore.io import transforms
from LDRCore.io.images import ImageLike
from LDRCore.transforms import inversion

INVERSE = "inverse"  # the word after a path


class TransformArgument(NamedTuple):
    """One transform as it was typed, ``PATH[,FORMAT][,inverse]``.

    Attributes:
        path: of the file.
        format_name: see `io.transforms.FORMATS`; "auto" by the content.
        inverse: whether points go through it backwards.
    """

    path: str
    format_name: str
    inverse: bool


def parse(text: str, format_name: str = "auto") -> TransformArgument:
    """Split what was typed; a file may have commas in its name.

    Args:
        text: see `TransformArgument`.
        format_name: of a file that names none itself.

    Raises:
        RegistrationError: two formats for one file.
    """
    inverse, named = False, ""
    while not os.path.exists(text):
        path, comma, word = text.rpartition(",")
        if not comma or (word != INVERSE and word not in transforms.FORMATS):
            break
        text = path
        if word == INVERSE:
            inverse = not inverse
        elif named:
            raise RegistrationError(f"a transform must name one format, got {word} and {named} for {path}")
        else:
            format_name = named = word
    return TransformArgument(text, format_name, inverse)


def paths(arguments: Sequence[str], format_name: str = "auto") -> list[str]:
    """Return the files that are read for what was typed, arguments as of `read_chain`: also those that a file names.

    What cannot be read is refused later, when it is read.
    """
    found: list[str] = []
    for argument in (parse(text, format_name) for text in arguments):
        found.append(argument.path)
        with suppress(RegistrationError):
            found += map(str, transforms.files_of(Path(argument.path), argument.format_name))
    return found


def read_chain(
    arguments: Sequence[str],
    fixed: ImageLike | None = None,
    moving: ImageLike | None = None,
    *,
    format_name: str = "auto",
    name: str = "the transform",
) -> sitk.Transform:
    """Read transforms that a fixed point goes through in order, as in ANTs.

    Args:
        arguments: see `TransformArgument`.
        fixed, moving: the images at the ends of the chain, for formats that count in their voxels; None where not
            known. Of one that is inverted they change places.
        format_name: of files that name none themselves.
        name: what a transform is to the user, for messages.

    Raises:
        RegistrationError: see `read_transform` and `invert_by_parts`.
    """
    context = transforms.Context(fixed, moving)
    parts = []
    for text in arguments:
        transform, backwards = _read(parse(text, format_name), context, name)
        parts.append(inversion.invert_by_parts(transform) if backwards else transform)
    return parts[0] if len(parts) == 1 else geometry.compose_transforms(*reversed(parts))


def map_points(
    points_lps: np.ndarray, arguments: Sequence[str], fixed: ImageLike | None = None, moving: ImageLike | None = None
) -> np.ndarray:
    """Map points (N, 3), LPS mm, through transforms; what is inverted is inverted at the points alone.

    Args:
        points_lps: in the fixed image.
        arguments, fixed, moving: see `read_chain`.

    Raises:
        RegistrationError: see `read_transform` and `inversion.map_backwards`.
    """
    context = transforms.Context(fixed, moving)
    parts = [_read(parse(text), context, "the transform") for text in arguments]
    for transform, backwards in parts:
        points_lps = (inversion.map_backwards if backwards else geometry.transform_points)(points_lps, transform)
    return points_lps


def _read(argument: TransformArgument, context: transforms.Context, name: str) -> tuple[sitk.Transform, bool]:
    """Read one transform; returns it, and whether points still have to go through it backwards.

    A field that says that it goes from moving to fixed ("modeling", as 3D Slicer writes inverted grid transforms) is
    already the inverse of what its file stands for.
    """
    path, format_name, inverse = argument
    backwards = inverse
    if inverse:
        context = context.swapped()
        if Path(path).is_file() and transforms.holds_modeling_field(Path(path)):
            context, backwards = context.accepting_modeling(), False
    return transforms.read_transform(path, name, format_name=format_name, context=context), backwards
