"""DICOM's Deformable Spatial Registration (PS3.3, A.39.2 and C.20.3): LPS mm, registered (fixed) -> source (moving)."""

from __future__ import annotations

import datetime
import os
from pathlib import Path
from typing import Any

import numpy as np
import SimpleITK as sitk

from LDRCore import geometry
from LDRCore.errors import RegistrationError
from LDRCore.io.images import ImageLike
from LDRCore.io.transforms import fields
from LDRCore.io.transforms.base import Context, FileHead, TransformFormat, chain
from LDRCore.io.transforms.grids import grid_from_ras

_DEFORMABLE, _SPATIAL = "1.2.840.10008.5.1.4.1.1.66.3", "1.2.840.10008.5.1.4.1.1.66.1"
_COPIED = (  # of the fixed series: patient, study, frame of reference
    *("PatientName", "PatientID", "PatientBirthDate", "PatientSex", "StudyInstanceUID", "StudyDate", "StudyTime"),
    *("StudyID", "AccessionNumber", "ReferringPhysicianName", "StudyDescription", "PositionReferenceIndicator"),
)
_IDENTITY = [1, 0, 0, 0, 0, 1, 0, 0, 0, 0, 1, 0, 0, 0, 0, 1]


class DicomFormat(TransformFormat):
    """A grid of displacements in the fixed frame of reference, between two matrices.

    PS3.3 C.20.3.1.1: a point x of the registered frame of reference has the coordinates M_post (M_pre x + d(x)) in the
    source frame of reference; d is stored at the voxels of the registered grid. So the map goes fixed -> moving, as
    ours. (The matrices of a Spatial Registration, C.20.2, go the other way.) Written objects have identity matrices.
    A grid is right-handed: that of a left-handed image is stored with its slices in reverse.
    """

    name = "dicom"
    title = "DICOM"
    dense_suffixes = (".dcm",)

    def recognises(self, head: FileHead) -> bool:
        """Return whether the file is DICOM; images and other objects are refused when it is read."""
        return head.first[128:132] == b"DICM"

    def read(self, path: Path, context: Context, name: str) -> sitk.Transform:
        """Read the one registration of an object that deforms, or the matrices of a Spatial Registration."""
        dataset = _read_dataset(path, name)
        kind = str(getattr(dataset, "SOPClassUID", ""))
        if kind == _SPATIAL:
            return geometry.affine_transform(np.linalg.inv(_spatial_matrix(dataset, path, name)))
        if kind != _DEFORMABLE:
            raise RegistrationError(f"{name} must be a DICOM registration, got another object in {path}")
        items = getattr(dataset, "DeformableRegistrationSequence", [])
        items = [item for item in items if _sequence(item, "Grid") is not None]
        if len(items) != 1:
            raise RegistrationError(f"{name} must hold one deformation, got {len(items)} in {path}")
        before, after = (_deformation_matrix(items[0], when, path, name) for when in ("Pre", "Post"))
        field = _read_grid(_sequence(items[0], "Grid"), before, path, name)
        return field if np.array_equal(after, np.eye(4)) else chain(after, field)

    def check_context(self, context: Context) -> None:
        """Refuse images that are not DICOM."""
        _pydicom()
        _series(context.fixed_source, "fixed")
        _series(context.moving_source, "moving")

    def write(self, transform: sitk.Transform, path: Path, context: Context) -> None:
        """Write an object in the study of the fixed series; both images must be DICOM."""
        pydicom = _pydicom()
        fixed = context.fixed_for("a DICOM registration")
        fixed_series = _series(context.fixed_source, "fixed")
        moving_series = _series(context.moving_source, "moving")
        reference = _right_handed(fixed)
        values = fields.vectors_on(transform, reference)

        item = pydicom.Dataset()
        item.SourceFrameOfReferenceUID = moving_series[0].FrameOfReferenceUID
        item.ReferencedImageSequence = [_reference(pydicom, one) for one in moving_series]
        for when in ("Pre", "Post"):
            matrix = pydicom.Dataset()
            matrix.FrameOfReferenceTransformationMatrixType = "RIGID"
            matrix.FrameOfReferenceTransformationMatrix = _IDENTITY
            setattr(item, f"{when}DeformationMatrixRegistrationSequence", [matrix])
        axes = np.array(reference.GetDirection()).reshape(3, 3)
        grid = pydicom.Dataset()
        grid.ImagePositionPatient = [_decimal(v) for v in reference.GetOrigin()]
        grid.ImageOrientationPatient = [_decimal(v) for v in (*axes[:, 0], *axes[:, 1])]
        grid.GridDimensions = list(reference.GetSize())
        grid.GridResolution = list(reference.GetSpacing())
        grid.VectorGridData = np.ascontiguousarray(np.moveaxis(values, 0, -1), dtype="<f4").tobytes()
        item.DeformableRegistrationGridSequence = [grid]
        item.RegistrationTypeCodeSequence = [_code(pydicom, "125024", "Image Content-based Alignment")]

        dataset = _new_dataset(pydicom, fixed_series[0])
        dataset.DeformableRegistrationSequence = [item]
        dataset.ReferencedSeriesSequence = []
        series = {str(one[0].SeriesInstanceUID): one for one in (fixed_series, moving_series)}
        for uid, members in series.items():
            entry = pydicom.Dataset()
            entry.SeriesInstanceUID = uid
            entry.ReferencedInstanceSequence = [_reference(pydicom, one) for one in members]
            dataset.ReferencedSeriesSequence.append(entry)
        dataset.save_as(path, enforce_file_format=True)


def _pydicom() -> Any:
    """Import pydicom.

    Raises:
        RegistrationError: it is not installed.
    """
    try:
        import pydicom
    except ImportError:
        raise RegistrationError(
            'DICOM registrations need the package pydicom, which is not installed: pip install "LDRCore[transforms]"'
        ) from None
    return pydicom


def _read_dataset(path: Path, name: str, *, pixels: bool = True) -> Any:
    pydicom = _pydicom()
    try:
        return pydicom.dcmread(path, stop_before_pixels=not pixels)
    except Exception as error:  # pydicom raises many kinds for damaged files
        reason = str(error).splitlines()[0][:120] if str(error) else type(error).__name__
        raise RegistrationError(f"{name} must be a whole DICOM file, got {path} ({reason})") from None


def _sequence(item: Any, what: str) -> Any:
    sequence = getattr(item, f"DeformableRegistration{what}Sequence", None)
    return sequence[0] if sequence else None


def _numbers(item: Any, key: str, count: int, path: Path, name: str) -> np.ndarray:
    """Return so many numbers of an element.

    Raises:
        RegistrationError: it is missing, or holds others.
    """
    try:
        numbers = np.array([float(v) for v in getattr(item, key)])
    except (AttributeError, TypeError, ValueError):
        numbers = np.zeros(0)
    if len(numbers) != count or not np.isfinite(numbers).all():
        raise RegistrationError(f"{name} must have {count} numbers {key}, got {len(numbers)} in {path}")
    return numbers


def _deformation_matrix(item: Any, when: str, path: Path, name: str) -> np.ndarray:
    sequence = getattr(item, f"{when}DeformationMatrixRegistrationSequence", None)
    if not sequence:
        return np.eye(4)
    return _numbers(sequence[0], "FrameOfReferenceTransformationMatrix", 16, path, name).reshape(4, 4)


def _spatial_matrix(dataset: Any, path: Path, name: str) -> np.ndarray:
    """Return 4x4, moving -> fixed: the product of the matrices of the one item that is not the identity."""
    found = []
    for item in getattr(dataset, "RegistrationSequence", []):
        total = np.eye(4)
        for registration in getattr(item, "MatrixRegistrationSequence", []):
            for one in getattr(registration, "MatrixSequence", []):
                matrix = _numbers(one, "FrameOfReferenceTransformationMatrix", 16, path, name).reshape(4, 4)
                total = matrix @ total
        if not np.allclose(total, np.eye(4), atol=1e-12):
            found.append(total)
    if len(found) > 1 or any(geometry.is_singular(matrix) for matrix in found):
        raise RegistrationError(f"{name} must register one image by an invertible matrix, got another in {path}")
    return found[0] if found else np.eye(4)


def _read_grid(item: Any, before: np.ndarray, path: Path, name: str) -> sitk.Transform:
    size = _numbers(item, "GridDimensions", 3, path, name).astype(int)
    axes = _numbers(item, "ImageOrientationPatient", 6, path, name).reshape(2, 3)
    lps_from_ijk = np.eye(4)
    directions = np.stack([axes[0], axes[1], np.cross(axes[0], axes[1])], axis=1)
    lps_from_ijk[:3, :3] = directions * _numbers(item, "GridResolution", 3, path, name)
    lps_from_ijk[:3, 3] = _numbers(item, "ImagePositionPatient", 3, path, name)
    stored = getattr(item, "VectorGridData", b"")
    if min(size) < 1 or len(stored) != 12 * int(np.prod(size, dtype=float)):
        raise RegistrationError(
            f"{name} must have 3 values a voxel of {size.tolist()}, got {len(stored) // 4} in {path}"
        )
    grid = grid_from_ras(geometry.RAS_TO_LPS @ lps_from_ijk, tuple(size.tolist()), name)
    x, y, z = size.tolist()
    values = np.ascontiguousarray(np.moveaxis(np.frombuffer(stored, "<f4").reshape(z, y, x, 3), -1, 0))
    if np.array_equal(before, np.eye(4)):
        return fields.field_transform(values, grid)
    return fields.field_transform(values, grid, lambda p, v: fields.apply_matrix(before, p) + v - p)


def _right_handed(image: sitk.Image) -> sitk.Image:
    """Return the grid of an image with its slices in reverse where its axes are left-handed: the same voxels."""
    axes = np.array(image.GetDirection()).reshape(3, 3)
    if np.linalg.det(axes) > 0:
        return image
    last_slice = image.TransformIndexToPhysicalPoint((0, 0, image.GetSize()[2] - 1))
    return geometry.empty_image(image.GetSize(), image.GetSpacing(), last_slice, axes * (1, 1, -1))


def _series(given: ImageLike | None, side: str) -> list[Any]:
    """Read what the files of a series say of themselves.

    Raises:
        RegistrationError: it is not DICOM, or has no frame of reference.
    """
    what = f"a DICOM registration must name the {side} image's frame of reference"
    source = Path(given) if isinstance(given, (str, os.PathLike)) else None
    if source is None or not source.exists():
        raise RegistrationError(f"{what}, got no DICOM series: give the folder or file of the {side} image")
    files = [source]
    if source.is_dir():
        series = sitk.ImageSeriesReader.GetGDCMSeriesIDs(str(source))
        names = sitk.ImageSeriesReader.GetGDCMSeriesFileNames(str(source), series[0]) if series else ()
        files = [Path(name) for name in names]
    files = [file for file in files if FileHead.of(file).first[128:132] == b"DICM"]
    if not files:
        raise RegistrationError(f"{what}, got {source}, which is not DICOM")
    members = [_read_dataset(file, f"the {side} image", pixels=False) for file in files]
    needed = ("FrameOfReferenceUID", "SOPInstanceUID", "SOPClassUID", "SeriesInstanceUID", "StudyInstanceUID")
    missing = next((key for key in needed if not getattr(members[0], key, "")), None)
    if missing is not None:
        raise RegistrationError(f"{what}, got {source} without {missing}")
    return members


def _reference(pydicom: Any, member: Any) -> Any:
    item = pydicom.Dataset()
    item.ReferencedSOPClassUID = member.SOPClassUID
    item.ReferencedSOPInstanceUID = member.SOPInstanceUID
    return item


def _code(pydicom: Any, value: str, meaning: str) -> Any:
    item = pydicom.Dataset()
    item.CodeValue, item.CodingSchemeDesignator, item.CodeMeaning = value, "DCM", meaning
    return item


def _decimal(value: float) -> str:
    """Return a number in the 16 characters of a decimal string."""
    return next(text for digits in range(16, 0, -1) if len(text := f"{value:.{digits}g}") <= 16)


def _new_dataset(pydicom: Any, fixed: Any) -> Any:
    """Make the object without its registration."""
    now = datetime.datetime.now()
    dataset = pydicom.Dataset()
    dataset.file_meta = pydicom.dataset.FileMetaDataset()
    dataset.file_meta.TransferSyntaxUID = pydicom.uid.ExplicitVRLittleEndian
    dataset.file_meta.MediaStorageSOPClassUID = _DEFORMABLE
    dataset.SpecificCharacterSet = getattr(fixed, "SpecificCharacterSet", "ISO_IR 192")
    for key in _COPIED:
        setattr(dataset, key, getattr(fixed, key, ""))
    dataset.FrameOfReferenceUID = fixed.FrameOfReferenceUID
    dataset.SOPClassUID = _DEFORMABLE
    dataset.SOPInstanceUID = dataset.file_meta.MediaStorageSOPInstanceUID = pydicom.uid.generate_uid()
    dataset.SeriesInstanceUID = pydicom.uid.generate_uid()
    dataset.Modality, dataset.Manufacturer = "REG", "LDRCore"
    dataset.ManufacturerModelName = dataset.DeviceSerialNumber = dataset.SoftwareVersions = "LDRCore"
    dataset.SeriesNumber = dataset.InstanceNumber = "1"
    dataset.ContentLabel, dataset.ContentDescription = "REGISTRATION", "Deformable registration"
    dataset.ContentCreatorName = ""
    for key in ("InstanceCreation", "Content", "Series"):
        setattr(dataset, f"{key}Date", now.strftime("%Y%m%d"))
        setattr(dataset, f"{key}Time", now.strftime("%H%M%S"))
    return dataset
