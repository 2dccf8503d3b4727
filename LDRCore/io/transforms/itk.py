"""ITK's transform files and displacement field images: LPS mm, fixed -> moving. What ANTs and SimpleITK write, too."""

from __future__ import annotations

import re
import struct
from pathlib import Path

import SimpleITK as sitk

from LDRCore import geometry
from LDRCore.errors import RegistrationError
from LDRCore.io import containers, images, nifti, trial, writing
from LDRCore.io.nifti_header import INTENT_DISPLACEMENT, INTENT_VECTOR
from LDRCore.io.quiet import collected_warnings, silent_libraries
from LDRCore.io.transforms import fields
from LDRCore.io.transforms.base import Context, FileHead, TransformFormat, matrix_of

_SUFFIXES = (".h5", ".hdf5", ".tfm", ".txt", ".mat", ".xfm")  # of transform files; others are field images
_HDF5_SUFFIXES = (".h5", ".hdf5")
_TEXT_SUFFIXES = (".tfm", ".txt")
_NIFTI_SUFFIXES = (".nii", ".nii.gz")
_IMAGE_SUFFIXES = (*_NIFTI_SUFFIXES, ".nrrd", ".mha")
_MATRIX, _MATRIX_SWAPPED = struct.Struct("<5i"), struct.Struct(">5i")  # type, rows, columns, imaginary, length of name
_TRANSFORM_FILES = {  # suffixes by the first bytes
    rb"#Insight Transform File": (".tfm", ".txt"),
    rb"MNI Transform File": (".xfm",),
    rb"\x89HDF\r\n\x1a\n": _HDF5_SUFFIXES,
    rb".{20}\w+_(double|float)_3_3\0": (".mat",),  # the name of the first matrix
}


class ItkFormat(TransformFormat):
    """Transform files (.h5, .tfm, .txt, .mat, .xfm) and displacement field images (.nii.gz, .nrrd, .mha).

    Fields hold vectors in mm LPS; those of NIfTI's displacement intent (1006) in RAS, which ITK turns. Outside its grid
    a field moves nothing.
    """

    name = "itk"
    title = "ITK"
    _nifti_intent = INTENT_VECTOR
    _nifti_vectors: fields.Convert | None = None
    linear_suffixes: tuple[str, ...] = (".mat", ".xfm")
    dense_suffixes: tuple[str, ...] = (".h5", ".hdf5", ".tfm", ".txt", *_IMAGE_SUFFIXES)

    def recognises(self, head: FileHead) -> bool:
        """Return whether the content is one of ITK's."""
        if _suffixes(head):
            return True
        if head.nifti is not None:
            known = head.nifti.intent in (INTENT_VECTOR, INTENT_DISPLACEMENT)
            return known and head.nifti.vector_shape and not head.nifti.intent_name
        return head.first.startswith((b"NRRD000", b"ObjectType", b"NDims"))

    def read(self, path: Path, context: Context, name: str) -> sitk.Transform:
        """Read a file by SimpleITK; also composites of every depth."""
        with containers.named_by_content(path, _suffixes(FileHead.of(path))) as named:
            if named.name.lower().endswith(_SUFFIXES):
                return _read_transform(named, name)
            return _read_field(path, name, context.modeling)

    def write(self, transform: sitk.Transform, path: Path, context: Context) -> None:
        """Write a transform file whole, or a field on the grid of the fixed image."""
        if path.name.lower().endswith(_IMAGE_SUFFIXES):
            fixed = context.fixed_for(f"a displacement field of {self.title}")
            if path.name.lower().endswith(_NIFTI_SUFFIXES):  # SimpleITK would hold it once more
                values = fields.vectors_on(transform, fixed, self._nifti_vectors)
                fields.write_nifti(path, values, fixed, (1, 3), intent=self._nifti_intent)
                return
            writing.write_image(sitk.Cast(fields.sampled(transform, fixed), sitk.sitkVectorFloat32), path)
            return
        if path.name.lower().endswith(self.linear_suffixes):
            transform = geometry.affine_transform(matrix_of(transform, self.title))
        writing.write_transform(transform, path)


class AntsFormat(ItkFormat):
    """ANTs' files are ITK's: `0GenericAffine.mat`, `1Warp.nii.gz`, composite .h5.

    Of ANTs' pair a point goes through the warp first and the affine last.
    """

    name = "ants"
    title = "ANTs"
    linear_suffixes = (".mat",)
    dense_suffixes = (".nii.gz", ".nii", ".h5")

    def recognises(self, head: FileHead) -> bool:
        """ITK's class recognises them."""
        return False


class SlicerFormat(ItkFormat):
    """3D Slicer's files: ITK's .h5 and .tfm; grids as .nrrd in LPS, and as .nii.gz with intent 1006 in RAS.

    A grid transform that is inverted in Slicer is written with its forward field and the mark "modeling": the caller
    must invert it.
    """

    name = "slicer"
    title = "3D Slicer"
    _nifti_intent = INTENT_DISPLACEMENT  # by which Slicer knows a grid transform
    _nifti_vectors: fields.Convert | None = staticmethod(fields.to_ras)
    linear_suffixes = (".mat",)
    dense_suffixes = (".h5", ".tfm", ".nrrd", ".nii.gz", ".nii")

    def recognises(self, head: FileHead) -> bool:
        """ITK's class recognises them."""
        return False


def _suffixes(head: FileHead) -> tuple[str, ...]:
    """Return the suffixes of the transform file that a file is by its content, none where it is no such file."""
    return next((names for start, names in _TRANSFORM_FILES.items() if re.match(start, head.first, re.DOTALL)), ())


def _read_transform(path: Path, name: str) -> sitk.Transform:
    if path.suffix.lower() == ".mat":
        _check_matrices(path, name)
    with collected_warnings() as warnings, silent_libraries():
        try:
            if path.suffix.lower() in _HDF5_SUFFIXES and not trial.works(lambda: sitk.ReadTransform(str(path))):
                raise RuntimeError
            transform = sitk.ReadTransform(str(path))
        except (RuntimeError, UnicodeError):
            raise RegistrationError(f"{name} must be a file that SimpleITK can read, got {path}") from None
    if any("more than one transform" in text for text in warnings):
        raise RegistrationError(f"{name} must be one transform or a composite of several, got {path} with several")
    if path.suffix.lower() in _TEXT_SUFFIXES:
        _check_counts(path, transform, name)
    return transform


def holds_modeling_field(path: Path) -> bool:
    """Return whether an image file says that its field goes from moving to fixed."""
    with path.open("rb") as stream:
        header = stream.read(4096).partition(b"\n\n")[0].lower()
    return header.startswith(b"nrrd000") and b"displacement field type:=modeling" in header.replace(b" :=", b":=")


def _check_matrices(path: Path, name: str) -> None:
    """Refuse a MATLAB file (level 4) with a matrix that is larger than the file; ITK would take memory for it first.

    Raises:
        RegistrationError: see above.
    """
    data, at = path.read_bytes(), 0
    while at + _MATRIX.size <= len(data):
        kind, rows, columns, _, length = _MATRIX.unpack_from(data, at)
        if not 0 <= kind < 10000:  # of the other byte order
            kind, rows, columns, _, length = _MATRIX_SWAPPED.unpack_from(data, at)
        at += _MATRIX.size + length + rows * columns * (4 if kind // 10 % 10 else 8)
        if min(rows, columns, length) < 0 or at > len(data):
            raise RegistrationError(
                f"{name} must be a whole MATLAB file (level 4), "
                f"got {path} with less in it than its {rows} x {columns} numbers"
            )


def _check_counts(path: Path, transform: sitk.Transform, name: str) -> None:
    """Refuse a text file with more or fewer parameters than its transforms have; ITK passes over some of these.

    Raises:
        RegistrationError: see above.
    """
    counts: list[dict[str, int]] = []
    for line in path.read_text(encoding="latin-1").splitlines():
        key, _, rest = line.partition(":")
        if key == "Transform" and not rest.strip().startswith("CompositeTransform"):
            counts.append({})
        elif counts and key in ("Parameters", "FixedParameters"):
            counts[-1][key] = len(rest.split())
    for count, part in zip(counts, geometry.transform_parts(transform), strict=False):
        expected = {"Parameters": part.GetNumberOfParameters(), "FixedParameters": len(part.GetFixedParameters())}
        for key, number in expected.items():
            if count.get(key, 0) != number:
                raise RegistrationError(f"{name} must have {number} {key} in {path}, got {count.get(key, 0)}")


def _read_field(path: Path, name: str, modeling: bool) -> sitk.Transform:
    """Read a displacement field image: vectors in mm, LPS (NIfTI's displacement intent: RAS, converted)."""
    with silent_libraries():
        with containers.named_by_content(path) as named:
            file = nifti.find(named, "the displacement field")
        if file is not None and file.header.is_nifti and file.header.vector_shape:  # ITK: a series where it is 4D
            turned = fields.to_ras if file.header.intent == INTENT_DISPLACEMENT else None
            return fields.read_vectors(path, name, turned)
        field = images.read_file(path, "the displacement field")
    if field.GetDimension() != 3 or field.GetNumberOfComponentsPerPixel() != 3:
        raise RegistrationError(
            "a displacement field must be 3D with 3 components a voxel, "
            f"got {field.GetDimension()}D with {field.GetNumberOfComponentsPerPixel()}"
        )
    kinds = [field.GetMetaData(key) for key in field.GetMetaDataKeys() if "displacement field type" in key.lower()]
    if any("modeling" in kind.lower() for kind in kinds) and not modeling:
        raise RegistrationError(
            f"a displacement field must be fixed -> moving, got a modeling transform, its inverse, in {path}: "
            "add ,inverse for the way from moving to fixed"
        )
    return sitk.DisplacementFieldTransform(sitk.Cast(field, sitk.sitkVectorFloat64))
