"""The volumes of the viewer's page: on the fixed grid, 8 bit, as NIfTI in memory. SimpleITK and numpy only."""

from __future__ import annotations

import gzip
import json
import struct
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import SimpleITK as sitk

from LDRCore import geometry
from LDRCore.errors import RegistrationError
from LDRCore.io import images
from LDRCore.io.transforms import read_transform

MOST_VOXELS = 12_000_000  # of a volume of the page; larger grids are shown coarser
GRID_MM = 10.0  # between lines of the deformation grid
JACOBIAN_RANGE = (0.0, 2.0)  # of the overlay's colours
_SAMPLE = 100_000  # voxels that an intensity window is chosen by


@dataclass(frozen=True)
class ViewedResult:
    """What is shown of a result; all volumes on one grid.

    Attributes:
        title: one line.
        volumes: {name: bytes of a .nii.gz}: fixed, moving (where the scanner put it), warped, jacobian, grid.
        facts: lines of text about the result.
        sources: files that it was read from.
    """

    title: str
    volumes: dict[str, bytes]
    facts: list[str]
    sources: list[Path]


def read_result(folder: Path, fixed: str | None, moving: str | None) -> ViewedResult:
    """Read a result folder, and the images that it is of.

    Args:
        folder: as `RegistrationResult.save` or a cohort writes it, with transform.h5 and report.json.
        fixed, moving: paths of the images; None: those that the report names.

    Raises:
        RegistrationError: no such result, or images that are not where the report says.
    """
    report_path, transform_path = folder / "report.json", folder / "transform.h5"
    try:
        report = json.loads(report_path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        raise RegistrationError(f"a result must be a folder with report.json, got {folder}") from None
    named = report.get("inputs", {}) if isinstance(report, dict) else {}
    sources = {"fixed": fixed or named.get("fixed"), "moving": moving or named.get("moving")}
    missing = next((side for side, path in sources.items() if not path), None)
    if missing is not None:
        raise RegistrationError(f"the report must name its images, got none in {folder}: give --{missing}")
    fixed_image, moving_image = (images.load(str(path), f"{side} image") for side, path in sources.items())
    transform = read_transform(transform_path)
    reference = _coarse_enough(fixed_image)
    identity = sitk.Transform(3, sitk.sitkIdentity)
    field = geometry.displacement_field_image(transform, reference)
    determinant = sitk.GetArrayFromImage(geometry.jacobian_determinant_image(field))
    warped_window = _window(sitk.GetArrayViewFromImage(moving_image))
    scan = {
        "fixed": (fixed_image, identity, _window(sitk.GetArrayViewFromImage(fixed_image))),
        "moving": (moving_image, identity, warped_window),
        "warped": (moving_image, transform, warped_window),
    }
    volumes = {name: _encode(_resample(image, reference, t), reference, w) for name, (image, t, w) in scan.items()}
    volumes["jacobian"] = _encode(determinant, reference, JACOBIAN_RANGE)
    volumes["grid"] = _encode(_grid_lines(field), reference, (0.0, 255.0))
    title = f"{Path(str(sources['moving'])).name} onto {Path(str(sources['fixed'])).name}"
    files = [report_path, transform_path, *(Path(str(path)) for path in sources.values())]
    return ViewedResult(title, volumes, _describe(report), files)


def _describe(report: dict) -> list[str]:
    """Return what the report says in a few lines."""
    verdict = report.get("verdict", {})
    lines = ["; ".join([verdict["verdict"], *verdict["reasons"]])] if verdict else []
    similarity, jacobian = report.get("similarity", {}), report.get("jacobian_determinant", {})
    if {"before", "after"} <= set(similarity):
        lines.append(f"correlation {similarity['before']:.3f} before, {similarity['after']:.3f} after")
    if {"min", "max"} <= set(jacobian):
        folding = 100 * report.get("folding_fraction", 0.0)
        lines.append(f"Jacobian {jacobian['min']:.2g} to {jacobian['max']:.3g}, folding {folding:.3g} %")
    told = verdict.get("reasons", [])
    return [*lines, *(text for text in report.get("warnings", []) if text not in told)]


def _coarse_enough(fixed: sitk.Image) -> sitk.Image:
    """Return an empty image on the fixed grid, with larger voxels where it has too many."""
    factor = max(1.0, (np.prod(fixed.GetSize(), dtype=float) / MOST_VOXELS) ** (1 / 3))
    size = [max(4, int(n / factor)) for n in fixed.GetSize()]
    reference = sitk.Image(size, sitk.sitkUInt8)
    reference.SetOrigin(fixed.GetOrigin())
    reference.SetDirection(fixed.GetDirection())
    reference.SetSpacing(
        [s * (n - 1) / (m - 1) for s, n, m in zip(fixed.GetSpacing(), fixed.GetSize(), size, strict=True)]
    )
    return reference


def _resample(image: sitk.Image, reference: sitk.Image, transform: sitk.Transform) -> np.ndarray:
    fill = float(sitk.GetArrayViewFromImage(image).min())
    return sitk.GetArrayFromImage(sitk.Resample(image, reference, transform, sitk.sitkLinear, fill, sitk.sitkFloat32))


def _window(values: np.ndarray) -> tuple[float, float]:
    low, high = np.percentile(values.ravel()[:: max(1, values.size // _SAMPLE) | 1].astype(float), (1, 99.7))
    return float(low), float(max(high, low + 1e-6))


def _grid_lines(field: sitk.Image) -> np.ndarray:
    """Draw where planes of the moving image, every `GRID_MM`, come to lie after the affine part is undone.

    Returns 128 on one plane and 255 where planes cross. A slice that itself lies on a plane so shows the lines of the
    two others on it.

    Args:
        field: ``T(x) - x``, mm LPS.
    """
    points = geometry.points_lps(field)
    mapped = points + sitk.GetArrayViewFromImage(field)
    step = max(1, round((points[..., 0].size / 50_000) ** (1 / 3)))
    some = (slice(None, None, step),) * 3
    affine = geometry.fit_affine(points[some].reshape(-1, 3), mapped[some].reshape(-1, 3))
    back = np.linalg.inv(affine)
    nonlinear = mapped @ back[:3, :3].T + back[:3, 3]
    near = np.abs(np.mod(nonlinear + GRID_MM / 2, GRID_MM) - GRID_MM / 2)  # mm from the nearest plane
    width = 0.5 * max(field.GetSpacing())
    count = (near < width).sum(-1)
    return np.take(np.array([0, 128, 255, 255], np.uint8), count)


def _encode(values: np.ndarray, reference: sitk.Image, window: tuple[float, float]) -> bytes:
    """Return a .nii.gz of 8 bit whose slope and intercept give the values back.

    Args:
        values: (D, H, W).
        reference: image of that size: the grid.
        window: values that become 0 and 255.
    """
    low, high = window
    slope = (high - low) / 255
    stored = np.rint(np.clip((values - low) / slope, 0, 255)).astype(np.uint8)
    lps_from_index = geometry.index_to_lps(reference)[:, [2, 1, 0, 3]]  # index in the order i, j, k
    ras_from_index = geometry.RAS_TO_LPS @ lps_from_index
    header = bytearray(352)
    struct.pack_into("<i", header, 0, 348)
    struct.pack_into("<8h", header, 40, 3, *reference.GetSize(), 1, 1, 1, 1)
    struct.pack_into("<2h", header, 70, 2, 8)  # unsigned, 8 bit
    struct.pack_into("<8f", header, 76, 1, *reference.GetSpacing(), 0, 0, 0, 0)
    struct.pack_into("<3f", header, 108, 352, slope, low)
    struct.pack_into("<B", header, 123, 2)  # mm
    struct.pack_into("<2f", header, 124, high, low)
    struct.pack_into("<2h", header, 252, 0, 1)  # the sform places the voxels
    struct.pack_into("<12f", header, 280, *ras_from_index[:3].ravel())
    header[344:348] = b"n+1\0"
    return gzip.compress(bytes(header) + stored.tobytes(), 6, mtime=0)
