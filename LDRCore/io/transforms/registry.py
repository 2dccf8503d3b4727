"""All formats: which one a file has, by its content where that is certain; reading and writing by name."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import SimpleITK as sitk

from LDRCore.errors import RegistrationError
from LDRCore.io.images import ImageLike
from LDRCore.io.transforms import matrices
from LDRCore.io.transforms.afni import AfniFormat
from LDRCore.io.transforms.arrays import ConvexAdamFormat, VoxelMorphFormat
from LDRCore.io.transforms.base import Context, FileHead, TransformFormat
from LDRCore.io.transforms.dicom import DicomFormat
from LDRCore.io.transforms.dipy import DipyFormat
from LDRCore.io.transforms.elastix import ElastixFormat
from LDRCore.io.transforms.freesurfer import FreeSurferFormat
from LDRCore.io.transforms.fsl import FslFormat
from LDRCore.io.transforms.greedy import GreedyFormat
from LDRCore.io.transforms.itk import AntsFormat, ItkFormat, SlicerFormat
from LDRCore.io.transforms.niftyreg import NiftyRegFormat
from LDRCore.io.transforms.spm import SpmFormat
from LDRCore.io.transforms.x5 import X5Format
from LDRCore.io.writing import write_file

_ALL: tuple[TransformFormat, ...] = (
    *(DicomFormat(), X5Format(), FreeSurferFormat(), ElastixFormat(), SpmFormat(), NiftyRegFormat(), FslFormat()),
    *(DipyFormat(), AfniFormat(), ItkFormat(), AntsFormat(), SlicerFormat(), GreedyFormat()),
    *(ConvexAdamFormat(), VoxelMorphFormat()),
)
FORMATS: dict[str, TransformFormat] = {one.name: one for one in _ALL}
"""Every format by the name that users call it by; the earlier ones are asked first what they recognise."""

_BY_SUFFIX = dict.fromkeys((".lta", ".mgz", ".mgh", ".m3z"), "freesurfer")  # other names are ITK's
_BY_SUFFIX |= {".x5": "x5", ".dcm": "dicom", ".1d": "afni"}
_DEFAULT_TARGETS = {".h5", ".hdf5", ".tfm", ".nrrd", ".mha", ".x5", ".lta", ".dcm", ".mgz", ".mgh", ".1d", ".xfm"}


RESULT_NAMES = tuple(one.result_name(linear) for one in _ALL for linear in (False, True))
"""Names of files that a folder of results may hold."""


def format_named(name: str) -> TransformFormat:
    """Return a format by its name.

    Raises:
        RegistrationError: there is none of this name.
    """
    if name not in FORMATS:
        raise RegistrationError(f"the format of a transform must be one of {', '.join(sorted(FORMATS))}, got {name!r}")
    return FORMATS[name]


def identify(path: Path, name: str) -> TransformFormat:
    """Return the format of a file by its content, or by its name where that is enough.

    Args:
        path: of an existing file.
        name: what it is to the user, for messages.

    Raises:
        RegistrationError: several formats look like this, so that the user must say which it is.
    """
    head = FileHead.of(path)
    for one in _ALL:
        if one.recognises(head):
            return one
    if matrices.is_square(head.text):
        raise _ask(name, path, "a 4x4 matrix", "greedy", "niftyreg", "fsl")
    if path.name.lower().endswith((".npy", ".npz")):
        raise _ask(name, path, "an array", "voxelmorph", "convexadam")
    if head.nifti is not None and len(head.nifti.shape) > 3 and 3 in (head.nifti.shape[0], *head.nifti.shape[3:]):
        raise _ask(name, path, "vectors of no stated kind", "fsl", "itk", "afni", "convexadam", "voxelmorph")
    return FORMATS[_format_of_name(path)]


def files_of(path: Path, format_name: str = "auto", name: str = "the transform") -> list[Path]:
    """Return the files that a transform is read from: that of its name, and those that it names itself.

    Args:
        path: of a file, which need not exist.
        format_name: see `FORMATS`; "auto" by the content.
        name: what it is to the user, for messages.

    Raises:
        RegistrationError: a format that must be named, or a chain with a missing member.
    """
    if not path.is_file():
        return [path]
    return (identify(path, name) if format_name == "auto" else format_named(format_name)).files(path, name)


def _format_of_name(path: Path) -> str:
    return _BY_SUFFIX.get(path.suffix.lower(), "itk")


def _ask(name: str, path: Path, what: str, *candidates: str) -> RegistrationError:
    return RegistrationError(
        f"{name} must say its format where its content does not, got {what} in {path}: name one of "
        f"{', '.join(candidates)}"
    )


def check_target(path: Path, format_name: str) -> TransformFormat:
    """Return the format in which a file of this name is written.

    Args:
        path: of the file.
        format_name: see `FORMATS`; "auto" by the name, where one format alone has it.

    Raises:
        RegistrationError: an unknown format, or a suffix that it does not have.
    """
    if format_name == "auto":
        if path.suffix.lower() not in _DEFAULT_TARGETS:
            raise RegistrationError(
                f"the format to write must be named where the file's name does not tell, got {path.name}: "
                f"one of {', '.join(sorted(FORMATS))}"
            )
        format_name = _format_of_name(path)
    chosen = format_named(format_name)
    if not path.name.lower().endswith(chosen.suffixes):
        raise RegistrationError(f"{chosen.title} has {' '.join(chosen.suffixes)}, got the name {path.name}")
    return chosen


def write(
    transform: sitk.Transform,
    path: str | os.PathLike[str],
    format_name: str = "auto",
    *,
    fixed: ImageLike | None = None,
    moving: ImageLike | None = None,
) -> None:
    """Write a transform in the format of a program; the file appears complete or not at all.

    >>> write(sitk.TranslationTransform(3, (1, 2, 3)), "shift.mat", "greedy")  # doctest: +SKIP

    Args:
        transform: fixed -> moving, LPS mm.
        path: of the file; its suffix chooses between matrix and field where a format has both.
        format_name: see `FORMATS`; "auto" by the file's name.
        fixed, moving: the two images, or their paths, for formats that need their grids (or DICOM's identifiers).

    Raises:
        RegistrationError: the format cannot hold the transform, needs an image, or the file cannot be written.
    """
    target = Path(path)
    chosen = check_target(target, format_name)
    context = Context(fixed, moving)
    write_file(target, writer(chosen, transform, context))


def writer(chosen: TransformFormat, transform: sitk.Transform, context: Context) -> Callable[[Path], None]:
    """Return what writes a transform to the path that it is given."""
    return lambda path: chosen.write(transform, path, context)
