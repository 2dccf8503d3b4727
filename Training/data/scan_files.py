"""One scan from disk: read, turned to axes S, P, L, put on an isotropic grid, mapped to uint8.

A scan whose grid already lies along S, P and L with the wanted spacing (both within 1 %) is kept voxel for voxel.
Any other is averaged over whole voxels towards the wanted spacing and sampled linearly, as at inference; labels take
the nearest voxel, landmarks follow exactly.
"""

from __future__ import annotations

import csv
import zipfile
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import SimpleITK as sitk
import torch

from LDRCore import geometry
from LDRCore.errors import RegistrationError
from LDRCore.io import images
from LDRCore.pipeline import preprocess
from LDRCore.transforms import spatial
from LDRCore.transforms.volume import Volume
from Training.data.scan_set import DataError, Scan

FITS = 0.01  # relative deviation of spacing, and of a direction cosine, that counts as none
MAX_LABEL = 32767
MAX_LABEL_VALUES = 1000  # different values in a label map that comes without an image; an image has more
_STATISTICS_VOXELS = 4_000_000  # percentiles of larger volumes come from a regular subsample
_MAX_VOXELS = 1 << 30


@dataclass(frozen=True)
class Item:
    """Where one scan lies on disk.

    Attributes:
        name: unique in its set.
        image, labels: files that SimpleITK reads, or one .npz (see `from_npz`) for both; not both None.
        points: (N, 3) landmarks: LPS mm (x, y, z), or voxels (i, j, k) of the file where `points_in_voxels`.
    """

    name: str
    image: Path | None
    labels: Path | None = None
    points: np.ndarray | None = None
    points_in_voxels: bool = False

    def files(self) -> list[Path]:
        """Every file of the scan."""
        return [p for p in dict.fromkeys((self.image, self.labels)) if p is not None]


@dataclass(frozen=True)
class Header:
    """Grid of a volume file, x, y, z order."""

    size: tuple[int, ...]
    spacing_mm: tuple[float, ...]
    origin_lps: tuple[float, ...]
    direction: tuple[float, ...]

    def same_grid(self, other: Header) -> bool:
        """Whether two files share one grid, within what headers are rounded to."""
        return (
            self.size == other.size
            and np.allclose(self.spacing_mm, other.spacing_mm, rtol=1e-3)
            and np.allclose(self.origin_lps, other.origin_lps, atol=0.01)
            and np.allclose(self.direction, other.direction, atol=1e-3)
        )

    def __str__(self) -> str:
        return f"size {self.size}, spacing {tuple(round(s, 3) for s in self.spacing_mm)} mm"


def read_header(path: Path) -> Header:
    """Grid of a volume without reading its voxels.

    Raises:
        DataError: missing, unreadable, or not three-dimensional.
    """
    if not path.is_file():
        raise DataError(f"every scan must be an existing file, got {path} (not found)")
    if path.suffix == ".npz":
        return _npz_header(path)
    reader = sitk.ImageFileReader()
    reader.SetFileName(str(path))
    try:
        reader.ReadImageInformation()
    except RuntimeError:
        raise DataError(f"every scan must be a file that SimpleITK can read, got {path}") from None
    size, n = reader.GetSize(), reader.GetDimension()
    if n not in (3, 4) or (n == 4 and size[3] != 1):
        raise DataError(f"every scan must be three-dimensional, got size {size} in {path}")
    direction = np.array(reader.GetDirection()).reshape(n, n)[:3, :3]
    return Header(size[:3], reader.GetSpacing()[:3], reader.GetOrigin()[:3], tuple(direction.ravel().tolist()))


def _npz_header(path: Path) -> Header:
    try:
        with zipfile.ZipFile(path) as archive:
            shapes = {}
            for key in ("ct", "labels"):
                with archive.open(f"{key}.npy") as stream:
                    np.lib.format.read_magic(stream)
                    shapes[key] = np.lib.format.read_array_header_1_0(stream)[0]
            with archive.open("spacing.npy") as stream:
                spacing = np.lib.format.read_array(stream)
    except (KeyError, ValueError, zipfile.BadZipFile):
        raise DataError(f"an .npz scan must hold arrays ct, labels and spacing, got {path}") from None
    if len(set(shapes.values())) > 1 or len(shapes["ct"]) != 3 or spacing.shape != (3,):
        raise DataError(f"ct and labels must share one 3D shape and spacing hold 3 numbers, got {shapes} in {path}")
    p, x, i = shapes["ct"]
    return Header((x, p, i), tuple(spacing[[1, 0, 2]].tolist()), (0.0,) * 3, tuple(np.eye(3).ravel().tolist()))


def from_npz(path: Path, key: str) -> sitk.Image:
    """`ct` or `labels` of an .npz scan of the OpenKBP data, whose array axes point to P, L and I, as an image."""
    with np.load(path) as stored:
        values, spacing = stored[key], stored["spacing"]
    image = sitk.GetImageFromArray(np.ascontiguousarray(values.transpose(2, 0, 1)[::-1]))
    image.SetSpacing([float(spacing[a]) for a in (1, 0, 2)])
    return image


def read_volume(path: Path, what: str) -> sitk.Image:
    """A three-dimensional scalar image; `what` is "image" (finite, not constant) or "labels".

    Raises:
        DataError: unreadable, and the file's name.
    """
    if path.suffix == ".npz":
        return from_npz(path, "ct" if what == "image" else "labels")
    name = f"the {what} {path}" if what == "labels" else f"the scan {path}"
    try:
        if what == "image":
            return images.load(path, name)
        return images.three_dimensional(images.read(path, name), name)
    except RegistrationError as error:
        raise DataError(str(error)) from None


def label_array(image: sitk.Image, source: Path) -> np.ndarray:
    """Label values as uint8, or int16 where one is above 255.

    Raises:
        DataError: not whole numbers from 0 to 32767.
    """
    values = sitk.GetArrayFromImage(image)
    whole = not np.issubdtype(values.dtype, np.floating) or bool((values == np.round(values)).all())
    low, high = values.min(), values.max()
    if not whole or low < 0 or high > MAX_LABEL:
        raise DataError(f"labels must be whole numbers from 0 to {MAX_LABEL}, got {low:g} to {high:g} in {source}")
    return values.astype(np.uint8 if high < 256 else np.int16)


def to_uint8(values: np.ndarray) -> np.ndarray:
    """Map intensities to 0..255 so that a few extreme voxels do not matter.

    255 is the 99.95th percentile. 0 is 0 where no value is negative (MRI keeps its empty background), otherwise the
    0.05th percentile (CT). Volumes of more than 4 million voxels are measured on every n-th voxel.
    """
    flat = values.reshape(-1)
    flat = flat[:: max(1, -(-flat.size // _STATISTICS_VOXELS)) | 1]
    low = 0.0 if values.min() >= 0 else np.percentile(flat, 0.05)
    top = np.percentile(flat, 99.95)
    if top <= low:
        low, top = min(low, values.min()), values.max()
    return np.clip((values - low) * (255.0 / (top - low)), 0, 255).round().astype(np.uint8)


def load(item: Item, spacing_mm: float) -> Scan:
    """Read one scan onto its isotropic grid.

    Raises:
        DataError: a file cannot be read, or is not what it should be.
    """
    image = read_volume(item.image, "image") if item.image else None
    labels = read_volume(item.labels, "labels") if item.labels else None
    if image is not None and labels is not None and image.GetSize() != labels.GetSize():
        raise DataError(f"labels must lie on the grid of their image, got {labels.GetSize()} in {item.labels}")
    first = labels if image is None else image
    assert first is not None
    oriented = sitk.DICOMOrient(first, "LPS")
    fits = np.allclose(oriented.GetSpacing(), spacing_mm, rtol=FITS) and np.allclose(
        np.array(oriented.GetDirection()), np.eye(3).ravel(), atol=FITS
    )
    if fits:
        to_lps = geometry.index_to_lps(oriented)
        values = None if image is None else sitk.GetArrayFromImage(oriented)
        if labels is not None:
            labels = sitk.DICOMOrient(labels, "LPS")
    else:
        corners = geometry.corners_lps(first)
        grid = geometry.Grid.around(
            corners.min(0), corners.max(0), spacing_mm=spacing_mm, margin_mm=0, multiple=1, max_voxels=_MAX_VOXELS
        )
        to_lps = grid.to_lps
        values = None if image is None else _resampled(image, grid)
        if labels is not None:
            transform = sitk.Transform(3, sitk.sitkIdentity)
            labels = sitk.Resample(labels, grid.reference_image(), transform, sitk.sitkNearestNeighbor, 0)
    found = None
    if labels is not None:
        assert item.labels is not None
        found = label_array(labels, item.labels)
        if image is None and np.count_nonzero(np.bincount(found.reshape(-1))) > MAX_LABEL_VALUES:
            raise DataError(
                f"a label map must hold at most {MAX_LABEL_VALUES} different values, got more in {item.labels} "
                "(a folder of images needs a manifest.csv)"
            )
    points = None
    if item.points is not None:
        lps = item.points
        if item.points_in_voxels:
            matrix = geometry.index_to_lps(first)
            lps = item.points[:, ::-1] @ matrix[:3, :3].T + matrix[:3, 3]
        inverse = np.linalg.inv(to_lps)
        points = lps @ inverse[:3, :3].T + inverse[:3, 3]
    return Scan(item.name, None if values is None else to_uint8(values), found, points, spacing_mm, to_lps)


def _resampled(image: sitk.Image, grid: geometry.Grid) -> np.ndarray:
    """Averaged towards the grid's spacing, then sampled linearly; outside the image lies its smallest value."""
    native = Volume(preprocess.to_tensor(image), geometry.index_to_lps(image))
    volume = native.averaged(grid.spacing_mm[0])
    matrix = torch.from_numpy((np.linalg.inv(volume.to_lps) @ grid.to_lps)[:3])
    where = spatial.affine_coordinates(matrix, grid.shape)
    factors = volume.spacing_mm / native.spacing_mm
    top = torch.from_numpy(np.array(native.data.shape[2:]) / factors - 0.5).view(1, 3, 1, 1, 1)
    inside = ((where >= -0.5) & (where <= top)).all(dim=1, keepdim=True)
    sampled = spatial.sample(volume.data, where.float(), padding="border")
    return torch.where(inside, sampled, native.data.min())[0, 0].numpy()


def read_landmarks(path: Path) -> np.ndarray:
    """Landmarks of a CSV with columns x, y, z (LPS mm); an empty field makes the landmark absent (NaN).

    Returns:
        (N, 3) float64.

    Raises:
        DataError: missing, other columns, or not numbers.
    """
    if not path.is_file():
        raise DataError(f"landmarks must be an existing CSV, got {path} (not found)")
    with path.open(newline="", encoding="utf-8-sig") as stream:
        reader = csv.DictReader(stream)
        if not {"x", "y", "z"} <= set(reader.fieldnames or []):
            raise DataError(f"landmarks must have columns x, y, z (LPS mm), got {reader.fieldnames} in {path}")
        try:
            rows = [[float(row[c]) if row[c].strip() else np.nan for c in "xyz"] for row in reader]
        except (ValueError, AttributeError, TypeError):
            raise DataError(f"landmarks must be numbers, got a row that is not in {path}") from None
    points = np.array(rows, dtype=float).reshape(-1, 3)
    points[np.isnan(points).any(axis=1)] = np.nan
    return points


def read_keypoints(path: Path) -> np.ndarray:
    """Keypoints of Learn2Reg: a CSV without header, three voxel coordinates (i, j, k) a row.

    Raises:
        DataError: missing, or not three numbers a row.
    """
    if not path.is_file():
        raise DataError(f"keypoints must be an existing CSV, got {path} (not found)")
    try:
        points = np.loadtxt(path, delimiter=",", ndmin=2)
    except ValueError:
        points = np.empty((0, 0))
    if points.shape[1:] != (3,):
        raise DataError(f"keypoints must be three numbers a row, got another layout in {path}")
    return points
