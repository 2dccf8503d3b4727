"""Between voxels and millimetres: working grids, and displacements as SimpleITK transforms. SimpleITK and numpy only.

Matrices are 4x4 and homogeneous. "Index" here always means tensor order (k, j, i), the order of a numpy array of a
SimpleITK image; "lps" means (x, y, z) in mm. A transform maps fixed points to moving points (ITK's resampling
convention).
"""

from __future__ import annotations

import csv
import math
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import SimpleITK as sitk

from LDRCore import images
from LDRCore.errors import RegistrationError

SLAB_VOXELS = 2_000_000  # of a Jacobian map made at once
COVERING_VOXELS = 16_000_000  # of a covering field; larger fixed images are sampled at every n-th voxel


def index_to_lps(image: sitk.Image) -> np.ndarray:
    """4x4 from tensor index (k, j, i) to LPS mm (x, y, z) of a SimpleITK image."""
    direction = np.array(image.GetDirection()).reshape(3, 3)
    out = np.eye(4)
    out[:3, :3] = (direction * np.array(image.GetSpacing()))[:, ::-1]
    out[:3, 3] = image.GetOrigin()
    return out


def corners_lps(image: sitk.Image) -> np.ndarray:
    """(8, 3): LPS mm of an image's corner voxels."""
    size = image.GetSize()
    picks = [[(size[a] - 1) * ((k >> a) & 1) for a in range(3)] for k in range(8)]
    return np.array([image.TransformIndexToPhysicalPoint(p) for p in picks])


def points_lps(image: sitk.Image) -> np.ndarray:
    """(D, H, W, 3): LPS mm of every voxel of an image."""
    index = np.stack(np.meshgrid(*[np.arange(n) for n in image.GetSize()[::-1]], indexing="ij"), -1)
    matrix = index_to_lps(image)
    return index @ matrix[:3, :3].T + matrix[:3, 3]


@dataclass(frozen=True)
class Grid:
    """A grid whose axes are the patient's (tensor axes S, P, L; identity direction), for working in.

    Attributes:
        origin_lps: (x, y, z) mm of voxel (0, 0, 0).
        spacing_mm: along the tensor axes (D, H, W).
        shape: (D, H, W).
    """

    origin_lps: tuple[float, float, float]
    spacing_mm: tuple[float, float, float]
    shape: tuple[int, int, int]

    @property
    def to_lps(self) -> np.ndarray:
        """4x4 from tensor index to LPS mm."""
        out = np.zeros((4, 4))
        for axis in range(3):
            out[2 - axis, axis] = self.spacing_mm[axis]
        out[:3, 3] = self.origin_lps
        out[3, 3] = 1
        return out

    @property
    def centre_lps(self) -> np.ndarray:
        """(x, y, z) mm of the grid's middle."""
        return (self.to_lps @ np.append((np.array(self.shape) - 1) / 2, 1))[:3]

    @classmethod
    def centred(cls, centre_lps: Sequence[float], spacing_mm: float, shape: Sequence[int]) -> Grid:
        """An isotropic grid about a point."""
        half = (np.array(shape)[::-1] - 1) / 2 * spacing_mm
        x, y, z = (np.asarray(centre_lps, dtype=float) - half).tolist()
        d, h, w = (int(n) for n in shape)
        return cls((x, y, z), (spacing_mm,) * 3, (d, h, w))

    @classmethod
    def around(
        cls,
        low_lps: np.ndarray,
        high_lps: np.ndarray,
        *,
        spacing_mm: float,
        margin_mm: float,
        multiple: int,
        max_voxels: int,
    ) -> Grid:
        """The isotropic grid that covers a box, sizes rounded up to `multiple`.

        The spacing grows where the box would need more than `max_voxels`.
        """
        extent = np.asarray(high_lps) - np.asarray(low_lps) + 2 * margin_mm
        while True:
            shape = [max(1, math.ceil(e / spacing_mm / multiple)) * multiple for e in extent[::-1]]
            if math.prod(shape) <= max_voxels:
                break
            spacing_mm *= 1.05
        return cls.centred((np.asarray(low_lps) + np.asarray(high_lps)) / 2, spacing_mm, shape)

    def coarser(self, stride: int) -> Grid:
        """The grid with the same corners and `stride` times fewer voxels along each axis."""
        if stride == 1:
            return self
        d, h, w = (n // stride for n in self.shape)
        a, b, c = (s * (n - 1) / (m - 1) for s, n, m in zip(self.spacing_mm, self.shape, (d, h, w), strict=True))
        return Grid(self.origin_lps, (a, b, c), (d, h, w))

    def reference_image(self) -> sitk.Image:
        """An empty image that lies on the grid."""
        image = sitk.Image(self.shape[::-1], sitk.sitkUInt8)
        image.SetOrigin(self.origin_lps)
        image.SetSpacing(self.spacing_mm[::-1])
        return image

    def padded(self, cells: int) -> Grid:
        """The grid grown by `cells` voxels on every side."""
        x, y, z = (o - cells * s for o, s in zip(self.origin_lps, self.spacing_mm[::-1], strict=True))
        d, h, w = (n + 2 * cells for n in self.shape)
        return Grid((x, y, z), self.spacing_mm, (d, h, w))


def displacement_to_lps(displacement_vox: np.ndarray, grid: Grid) -> np.ndarray:
    """(3, D, H, W) voxels along tensor axes -> (D, H, W, 3) mm along (x, y, z)."""
    scaled = displacement_vox * np.array(grid.spacing_mm, dtype=displacement_vox.dtype)[:, None, None, None]
    return np.ascontiguousarray(np.moveaxis(scaled[::-1], 0, -1))


def lps_to_displacement(displacement_mm: np.ndarray, grid: Grid) -> np.ndarray:
    """(D, H, W, 3) mm along (x, y, z) -> (3, D, H, W) voxels along tensor axes."""
    moved = np.moveaxis(displacement_mm, -1, 0)[::-1]
    return np.ascontiguousarray(moved / np.array(grid.spacing_mm, dtype=displacement_mm.dtype)[:, None, None, None])


def tensor_affine_to_lps(matrix: np.ndarray, translation_vox: np.ndarray, grid: Grid) -> np.ndarray:
    """``x -> c + A (x - c) + b`` of an isotropic grid (A in tensor-axis order, b in voxels) as a 4x4 in LPS mm."""
    out = np.eye(4)
    out[:3, :3] = np.asarray(matrix, dtype=float)[::-1, ::-1]
    shift = np.asarray(translation_vox, dtype=float)[::-1] * np.array(grid.spacing_mm)[::-1]
    out[:3, 3] = grid.centre_lps + shift - out[:3, :3] @ grid.centre_lps
    return out


def affine_transform(matrix_lps: np.ndarray) -> sitk.AffineTransform:
    """A 4x4 in LPS mm as a SimpleITK transform."""
    transform = sitk.AffineTransform(3)
    transform.SetMatrix(np.asarray(matrix_lps)[:3, :3].ravel().tolist())
    transform.SetTranslation(np.asarray(matrix_lps)[:3, 3].tolist())
    return transform


def linear_matrix(transform: sitk.Transform) -> np.ndarray | None:
    """The 4x4 in LPS mm of a linear SimpleITK transform, None if the transform is not linear."""
    if not transform.IsLinear():
        return None
    origin = np.array(transform.TransformPoint((0.0, 0.0, 0.0)))
    out = np.eye(4)
    for axis in range(3):
        unit = [0.0, 0.0, 0.0]
        unit[axis] = 1.0
        out[:3, axis] = np.array(transform.TransformPoint(unit)) - origin
    out[:3, 3] = origin
    return out


def fit_affine(points: np.ndarray, moved: np.ndarray, weights: np.ndarray | None = None) -> np.ndarray:
    """The affine map (4x4) that takes points (N, 3) nearest to their images (N, 3), by (weighted) least squares.

    More than some 20,000 points are subsampled regularly. `weights` (N,) multiply the residuals.
    """
    every = max(1, len(points) // 20_000)
    factor = np.ones((len(points), 1)) if weights is None else weights[:, None]
    design = np.concatenate([points, np.ones((len(points), 1))], axis=1) * factor
    solution, *_ = np.linalg.lstsq(design[::every], (moved * factor)[::every], rcond=None)
    out = np.eye(4)
    out[:3] = solution.T
    return out


def field_image(displacement_mm: np.ndarray, grid: Grid) -> sitk.Image:
    """(D, H, W, 3) mm LPS vectors on a grid as a vector image of doubles."""
    image = sitk.GetImageFromArray(displacement_mm.astype(np.float64), isVector=True)
    image.SetOrigin(grid.origin_lps)
    image.SetSpacing(grid.spacing_mm[::-1])
    return image


def dense_then_affine(displacement_mm: np.ndarray, grid: Grid, affine_lps: np.ndarray) -> sitk.CompositeTransform:
    """``x -> A (x + u(x))`` as one transform: outside the field's grid u is 0 and the affine part still holds."""
    composite = sitk.CompositeTransform(3)
    composite.AddTransform(affine_transform(affine_lps))
    composite.AddTransform(sitk.DisplacementFieldTransform(field_image(displacement_mm, grid)))  # applied first
    return composite


def affine_then_dense(displacement_mm: np.ndarray, grid: Grid, affine_lps: np.ndarray) -> sitk.CompositeTransform:
    """``y -> A y + v(A y)`` as one transform (the inverse of `dense_then_affine` has this form)."""
    composite = sitk.CompositeTransform(3)
    composite.AddTransform(sitk.DisplacementFieldTransform(field_image(displacement_mm, grid)))
    composite.AddTransform(affine_transform(affine_lps))  # applied first
    return composite


def read_transform(path: str) -> sitk.Transform:
    """A transform file (.h5, .tfm, .mat, .xfm) or a displacement field image (.nii.gz, .nrrd, .mha) as a transform.

    Raises:
        RegistrationError: missing, unreadable, or a field without 3 components or with NaN or infinite values.
    """
    if not os.path.isfile(path):
        raise RegistrationError(f"the transform must be an existing file, got {path} (not found)")
    if path.lower().endswith((".h5", ".hdf5", ".tfm", ".txt", ".mat", ".xfm")):
        try:
            return sitk.ReadTransform(path)
        except RuntimeError:
            raise RegistrationError(f"the transform must be a file that SimpleITK can read, got {path}") from None
    try:
        field = sitk.ReadImage(path, sitk.sitkVectorFloat64)
    except RuntimeError:
        raise RegistrationError(
            f"the transform must be a transform file or a displacement field image, got {path}"
        ) from None
    if field.GetDimension() != 3 or field.GetNumberOfComponentsPerPixel() != 3:
        raise RegistrationError(
            "a displacement field must be 3D with 3 components a voxel, "
            f"got {field.GetDimension()}D with {field.GetNumberOfComponentsPerPixel()}"
        )
    values = sitk.GetArrayViewFromImage(field)
    wrong = images.count_non_finite(values) or images.count_non_finite_in_nifti(Path(path))
    if wrong:
        raise RegistrationError(f"a displacement field must hold only finite values, got {wrong} others in {path}")
    return sitk.DisplacementFieldTransform(field)


def displacement_field_image(transform: sitk.Transform, reference: sitk.Image) -> sitk.Image:
    """A transform sampled on a reference grid: ``T(x) - x`` in mm LPS, float32 vectors."""
    return sitk.TransformToDisplacementField(
        transform,
        sitk.sitkVectorFloat32,
        reference.GetSize(),
        reference.GetOrigin(),
        reference.GetSpacing(),
        reference.GetDirection(),
    )


def transform_lattice(
    transform_or_path: sitk.Transform | str | os.PathLike[str], to_lps: np.ndarray, shape: Sequence[int]
) -> np.ndarray:
    """Where any transform, or the file of one, takes the points of a lattice: a teacher can come from any program.

    Takes what ITK reads: transforms (.h5, .tfm, .mat, .xfm) and displacement field images in mm LPS (ANTs' Warp.nii.gz,
    the deformationField of elastix, SimpleITK, Slicer), on any grid. ITK's rule holds outside a field's own grid:
    nothing moves there, so a field should cover the lattice.

    Args:
        transform_or_path: fixed -> moving, LPS mm.
        to_lps: 4x4, lattice index (tensor order) -> LPS mm, axes at right angles.
        shape: (d, h, w).

    Returns:
        (d, h, w, 3) LPS mm.

    Raises:
        RegistrationError: see `read_transform`; not 3D; or a transform that is not finite on the lattice.
    """
    transform = transform_or_path
    if not isinstance(transform, sitk.Transform):
        transform = read_transform(os.fspath(transform))
    if transform.GetDimension() != 3:
        raise RegistrationError(f"the transform must be 3D, got {transform.GetDimension()}D")
    spacing = np.linalg.norm(to_lps[:3, :3], axis=0)
    reference = sitk.Image([int(n) for n in shape[::-1]], sitk.sitkUInt8)
    reference.SetSpacing(spacing[::-1].tolist())
    reference.SetDirection((to_lps[:3, :3] / spacing)[:, ::-1].ravel().tolist())
    reference.SetOrigin(to_lps[:3, 3].tolist())
    field = displacement_field_image(transform, reference)
    moved: np.ndarray = points_lps(reference) + sitk.GetArrayViewFromImage(field)
    wrong = images.count_non_finite(moved)
    if wrong:
        raise RegistrationError(f"the transform must be finite on the lattice, got {wrong} values that are not")
    return moved


def field_in_voxels(field: sitk.Image) -> np.ndarray:
    """A displacement field image (mm LPS) as (3, D, H, W) float32: along tensor axes, in voxels of its grid."""
    to_index = np.linalg.inv(index_to_lps(field)[:3, :3]).astype(np.float32)
    return np.einsum("ac,dhwc->adhw", to_index, sitk.GetArrayViewFromImage(field).astype(np.float32), optimize=True)


def covering_field_image(
    transform: sitk.Transform, fixed: sitk.Image, moving: sitk.Image, spacing_mm: float = 0.0
) -> sitk.Image:
    """A transform as one displacement field for programs that know no composites: ``T(x) - x``, mm LPS, float32.

    Its voxels are voxels of the fixed image, so it is exact there whatever interpolation its reader uses: every voxel,
    or every n-th along axes that are finer than `spacing_mm`. The lattice is grown in whole cells to hold what T takes
    into the moving image, unless that needs more than `COVERING_VOXELS`.
    """
    while True:
        stride = np.array([max(1, int(spacing_mm / s + 1e-6)) for s in fixed.GetSpacing()])
        high = -(-(np.array(fixed.GetSize()) - 1) // stride)
        if np.prod(high + 1.0) <= COVERING_VOXELS:
            break
        spacing_mm = max(1.2 * spacing_mm, min(fixed.GetSpacing()))
    low = np.zeros(3, dtype=int)
    to_lps = index_to_lps(fixed)[:, [2, 1, 0, 3]] @ np.diag([*stride, 1])  # from (i, j, k) of the lattice
    far = corners_lps(fixed)
    far = far.mean(0) + 20 * (far - far.mean(0))  # beyond any dense field, where only the affine part is left
    affine = fit_affine(far, transform_points(far, transform))
    if abs(np.linalg.det(affine[:3, :3])) > 1e-6:
        back = np.linalg.inv(affine @ to_lps)
        reach = corners_lps(moving) @ back[:3, :3].T + back[:3, 3]
        wide = np.minimum(low, np.floor(reach.min(0)).astype(int)), np.maximum(high, np.ceil(reach.max(0)).astype(int))
        if np.prod(wide[1] - wide[0] + 1.0) <= COVERING_VOXELS:
            low, high = wide
    return sitk.TransformToDisplacementField(
        transform,
        sitk.sitkVectorFloat32,
        (high - low + 1).tolist(),
        (to_lps[:3, :3] @ low + to_lps[:3, 3]).tolist(),
        (np.array(fixed.GetSpacing()) * stride).tolist(),
        fixed.GetDirection(),
    )


def jacobian_determinant_image(field: sitk.Image) -> sitk.Image:
    """det(I + du/dx) of a displacement field image, right on any direction, spacing and flip.

    Central differences of the vectors along the grid's axes (one-sided at the borders) are turned into derivatives
    along x, y, z by the inverse of the index -> LPS matrix. (SimpleITK's own filter ignores the direction.) Works in
    slabs: peak memory stays a small multiple of one slab.

    Args:
        field: 3-component vector image, mm LPS.

    Returns:
        float32 image on the same grid; below 1 shrinking, 0 or less folding.
    """
    vectors = sitk.GetArrayViewFromImage(field)
    to_index = np.linalg.inv(index_to_lps(field)[:3, :3]).astype(np.float32)  # d index / d lps
    depth = vectors.shape[0]
    result = np.empty(vectors.shape[:3], dtype=np.float32)
    slab = max(2, SLAB_VOXELS // int(np.prod(vectors.shape[1:3])))
    for start in range(0, depth, slab):
        stop = min(start + slab, depth)
        low, high = max(start - 1, 0), min(stop + 1, depth)
        if high - low < 2:
            low = max(high - 2, 0)
        part = np.asarray(vectors[low:high], dtype=np.float32)
        by_index = np.gradient(part, axis=(0, 1, 2))  # each (..., 3): d u / d index
        jac = [[sum(by_index[a][..., r] * to_index[a, c] for a in range(3)) for c in range(3)] for r in range(3)]
        for r in range(3):
            jac[r][r] = jac[r][r] + 1.0
        (a, b, c), (d, e, f), (g, h, i) = jac
        det = a * (e * i - f * h) - b * (d * i - f * g) + c * (d * h - e * g)
        result[start:stop] = det[start - low : stop - low]
    image = sitk.GetImageFromArray(result)
    image.CopyInformation(field)
    return image


def transform_points(points_lps: np.ndarray, transform: sitk.Transform) -> np.ndarray:
    """Map points (N, 3), LPS mm, through a transform."""
    points = np.asarray(points_lps, dtype=float)
    if points.ndim != 2 or points.shape[1] != 3:
        raise RegistrationError(f"points must have shape (N, 3), got {points.shape}")
    if not np.isfinite(points).all():
        raise RegistrationError("points must be finite, got NaN or infinite coordinates")
    return np.array([transform.TransformPoint(p) for p in points.tolist()]).reshape(-1, 3)


def read_points(path: Path) -> np.ndarray:
    """Points of a CSV with three columns x,y,z (a header line and lines starting with # are passed over): (N, 3).

    Raises:
        RegistrationError: missing file, no point, or a line without three numbers.
    """
    if not path.is_file():
        raise RegistrationError(f"points must be an existing CSV file, got {path} (not found)")
    rows: list[list[float]] = []
    with path.open(newline="", encoding="utf-8", errors="replace") as stream:
        for number, row in enumerate(csv.reader(stream), start=1):
            if not row or row[0].lstrip().startswith("#"):
                continue
            try:
                x, y, z = (float(v) for v in row[:3])  # ValueError also when there are fewer than three
                rows.append([x, y, z])
            except ValueError:
                if number == 1:  # a header
                    continue
                raise RegistrationError(
                    f"points must have three numbers a line (x,y,z in mm), got {','.join(row)!r} in line {number}"
                ) from None
    if not rows:
        raise RegistrationError(f"points must have at least one line x,y,z, got none in {path}")
    return np.array(rows)
