"""elastix' parameter files, `TransformParameters.N.txt`, and the chains that they form; LPS mm, fixed -> moving."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import SimpleITK as sitk

from LDRCore import geometry
from LDRCore.errors import RegistrationError
from LDRCore.io.files import read_text
from LDRCore.io.transforms import fields, splines
from LDRCore.io.transforms.base import Context, FileHead, TransformFormat, chain

_INITIAL = ("InitialTransformParameterFileName", "InitialTransformParametersFileName")  # elastix 5.1 and later, before
_LONGEST_CHAIN = 32
_LARGEST_TEXT = 2_000_000  # voxels of a field that is written as text
_COUNTS = {"TranslationTransform": 3, "EulerTransform": 6, "SimilarityTransform": 7, "AffineTransform": 12}
_SPLINES = ("BSplineTransform", "RecursiveBSplineTransform")

Parameters = dict[str, list[str]]


class ElastixFormat(TransformFormat):
    """Translation, Euler, similarity, affine and B-spline transforms, composed or added.

    The last file of a chain applies last. Directions are stored by columns. Deformable transforms are written as
    linear splines on the fixed image's voxels, which transformix evaluates exactly there.
    """

    name = "elastix"
    title = "elastix"
    dense_suffixes = (".txt",)

    def recognises(self, head: FileHead) -> bool:
        """Return whether a text begins as a parameter file."""
        return bool(re.search(r"^\s*\(Transform\s+\"", head.text, re.MULTILINE))

    def read(self, path: Path, context: Context, name: str) -> sitk.Transform:
        """Read a file and the chain of files that it names."""
        *later, (first, parameters) = _read_chain(path, name)
        made = _transform(parameters, first, name)
        for member, parameters in reversed(later):
            made = _combined(_transform(parameters, member, name), made, parameters, member, name)
        return made

    def files(self, path: Path, name: str) -> list[Path]:
        """Return the files of a chain."""
        return [member for member, _ in _read_chain(path, name)]

    def write(self, transform: sitk.Transform, path: Path, context: Context) -> None:
        """Write one file without a chain."""
        fixed = context.fixed_for("a parameter file of elastix")
        matrix = geometry.linear_matrix(transform)
        lines = [
            ("InitialTransformParametersFileName", '"NoInitialTransform"'),
            ("HowToCombineTransforms", '"Compose"'),
        ]
        if matrix is not None:
            values = np.array([*matrix[:3, :3].ravel(), *matrix[:3, 3]])
            lines = [("Transform", '"AffineTransform"'), *lines, ("CenterOfRotationPoint", "0 0 0")]
        else:
            if np.prod(fixed.GetSize()) > _LARGEST_TEXT:
                raise RegistrationError(
                    f"a deformable transform in elastix' text must have at most {_LARGEST_TEXT} voxels, got the grid "
                    f"{fixed.GetSize()}: name a coarser reference, or write a field for transformix"
                )
            stored = fields.vectors_on(transform, fixed)
            stored = np.pad(stored, ((0, 0), *[(1, 1)] * 3), mode="edge")  # outermost coefficients move nothing
            values = stored.ravel()
            lines = [("Transform", '"BSplineTransform"'), *lines, ("BSplineTransformSplineOrder", "1")]
            lines += [("UseCyclicTransform", '"false"'), ("GridIndex", "0 0 0")]
            lines += _placement(_grown(fixed), "Grid")
        lines[1:1] = [("NumberOfParameters", str(len(values)))]
        lines += [("FixedImageDimension", "3"), ("MovingImageDimension", "3"), ("Index", "0 0 0")]
        lines += [("UseDirectionCosines", '"true"'), ("FixedInternalImagePixelType", '"float"')]
        lines += [("MovingInternalImagePixelType", '"float"'), *_placement(fixed, "")]
        lines += [("ResampleInterpolator", '"FinalBSplineInterpolator"'), ("FinalBSplineInterpolationOrder", "1")]
        lines += [("Resampler", '"DefaultResampler"'), ("DefaultPixelValue", "0"), ("ResultImageFormat", '"nii.gz"')]
        lines += [("ResultImagePixelType", '"float"'), ("CompressResultImage", '"true"')]
        with path.open("w", encoding="ascii") as stream:
            stream.writelines(f"({key} {value})\n" for key, value in lines)
            stream.write("(TransformParameters")
            for start in range(0, len(values), 1000):
                stream.write("".join(f" {value:.9g}" for value in values[start : start + 1000]))
            stream.write(")\n")


def _grown(image: sitk.Image) -> sitk.Image:
    """Return the grid of an image with a voxel more on every side."""
    origin = image.TransformContinuousIndexToPhysicalPoint((-1.0, -1.0, -1.0))
    return geometry.empty_image([n + 2 for n in image.GetSize()], image.GetSpacing(), origin, image.GetDirection())


def _placement(image: sitk.Image, prefix: str) -> list[tuple[str, str]]:
    columns = np.array(image.GetDirection()).reshape(3, 3).T.ravel()
    rows = {"Size": image.GetSize(), "Spacing": image.GetSpacing(), "Origin": image.GetOrigin(), "Direction": columns}
    return [(prefix + key, " ".join(f"{value:.17g}" for value in values)) for key, values in rows.items()]


def _read_chain(path: Path, name: str) -> list[tuple[Path, Parameters]]:
    """Return the files of a chain with what they say; a point goes through the last one first.

    Raises:
        RegistrationError: one is missing or damaged, or they are too many, as where a file names itself.
    """
    members: list[tuple[Path, Parameters]] = []
    while len(members) < _LONGEST_CHAIN:
        parameters = _parse(path, name)
        members.append((path, parameters))
        initial = next((parameters[key][0] for key in _INITIAL if parameters.get(key)), "NoInitialTransform")
        if initial == "NoInitialTransform":
            return members
        path = _locate(initial, path, name)
    raise RegistrationError(f"{name} must be a chain of at most {_LONGEST_CHAIN} files, got more at {path}")


def _locate(initial: str, path: Path, name: str) -> Path:
    """Find a member of a chain: where it was, or beside the file that names it, since folders are moved."""
    for candidate in (Path(initial), path.parent / initial, path.parent / re.split(r"[\\/]", initial)[-1]):
        if candidate.is_file():
            return candidate
    raise RegistrationError(f"{name} must come with its initial transform, got {path} without {initial}")


def _combined(
    own: sitk.Transform, before: sitk.Transform, parameters: Parameters, path: Path, name: str
) -> sitk.Transform:
    """Compose a file's transform with those before it, or add them: ``x -> own(x) + before(x) - x`` on the file's grid.

    Raises:
        RegistrationError: neither is asked for, or the grid is missing.
    """
    how = parameters.get("HowToCombineTransforms", ["Compose"])[0]
    if how == "Compose":
        return chain(own, before)
    if how != "Add":
        raise RegistrationError(f"{name} must be composed or added, got {how!r} in {path}")
    size, spacing, origin = (_numbers(parameters, key, 3, path, name) for key in ("Size", "Spacing", "Origin"))
    direction = np.array(_numbers(parameters, "Direction", 9, path, name)).reshape(3, 3).T  # stored by columns
    grid = geometry.empty_image([int(n) for n in size], spacing, origin, direction)
    total = geometry.displacement_field_image(own, grid) + geometry.displacement_field_image(before, grid)
    return sitk.DisplacementFieldTransform(sitk.Cast(total, sitk.sitkVectorFloat64))


def _parse(path: Path, name: str) -> Parameters:
    """Return the words of every line "(Key word word ...)"."""
    found: Parameters = {}
    for line in read_text(path, name, "parameter file").splitlines():
        match = re.fullmatch(r"\s*\((\w+)\s+(.*?)\)\s*(//.*)?", line)
        if match:
            words = re.findall(r'"([^"]*)"|(\S+)', match[2])
            found[match[1]] = [quoted or plain for quoted, plain in words]
    return found


def _numbers(parameters: Parameters, key: str, count: int, path: Path, name: str) -> list[float]:
    """Return so many numbers of a line.

    Raises:
        RegistrationError: it is missing, or holds others.
    """
    words = parameters.get(key, [])
    try:
        numbers = [float(word) for word in words]
    except ValueError:
        numbers = []
    if len(numbers) != count or not np.isfinite(numbers).all():
        raise RegistrationError(f"{name} must have {count} numbers {key} in {path}, got {len(words)} words")
    return numbers


def _transform(parameters: Parameters, path: Path, name: str) -> sitk.Transform:
    """Make the transform of one file alone."""
    kind = parameters.get("Transform", [""])[0]
    if (
        parameters.get("FixedImageDimension", ["3"])[0] != "3"
        or parameters.get("MovingImageDimension", ["3"])[0] != "3"
    ):
        raise RegistrationError(f"{name} must be 3D, got {path}")
    if parameters.get("UseDirectionCosines", ["true"])[0] != "true":
        raise RegistrationError(f"{name} must use direction cosines, got {path}, which ignores the images' directions")
    if parameters.get("UseBinaryFormatForTransformationParameters", ["false"])[0] == "true":
        raise RegistrationError(f"{name} must hold its parameters as text, got {path} with a binary file")
    if kind in _SPLINES:
        return _spline(parameters, path, name)
    if kind not in _COUNTS:
        known = ", ".join([*_COUNTS, *_SPLINES])
        raise RegistrationError(
            f"{name} must be one of {known}, got {kind!r} in {path}: write its field by transformix -def all"
        )
    values = _numbers(parameters, "TransformParameters", _COUNTS[kind], path, name)
    if kind == "TranslationTransform":
        return sitk.TranslationTransform(3, values)
    centre = _numbers(parameters, "CenterOfRotationPoint", 3, path, name)
    if kind == "EulerTransform":
        euler = sitk.Euler3DTransform(centre, *values[:3], values[3:])
        euler.SetComputeZYX(parameters.get("ComputeZYX", ["false"])[0] == "true")
        return euler
    transform = sitk.Similarity3DTransform() if kind == "SimilarityTransform" else sitk.AffineTransform(3)
    transform.SetFixedParameters(centre)
    transform.SetParameters(values)
    return transform


def _spline(parameters: Parameters, path: Path, name: str) -> sitk.Transform:
    if parameters.get("UseCyclicTransform", ["false"])[0] == "true":
        raise RegistrationError(f"{name} must not be cyclic, got {path}")
    size = [int(n) for n in _numbers(parameters, "GridSize", 3, path, name)]
    word = parameters.get("BSplineTransformSplineOrder", ["3"])[0]
    order = int(word) if word.isdecimal() else 0
    if min(size) < 1 or order not in (1, 2, 3):
        raise RegistrationError(f"{name} must have splines of order 1 to 3 on a grid, got {path}")
    values = _numbers(parameters, "TransformParameters", 3 * int(np.prod(size)), path, name)
    spacing = _numbers(parameters, "GridSpacing", 3, path, name)
    direction = np.array(_numbers(parameters, "GridDirection", 9, path, name)).reshape(3, 3).T  # stored by columns
    index = np.array(_numbers(parameters, "GridIndex", 3, path, name))
    origin = np.array(_numbers(parameters, "GridOrigin", 3, path, name)) + direction @ (index * spacing)
    coefficients = np.array(values).reshape(3, *size[::-1])
    return splines.spline_transform(coefficients, origin.tolist(), spacing, direction.ravel().tolist(), order=order)
