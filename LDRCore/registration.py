"""`register()`: two scans in, everything a user wants out; and applying its transform to other images and points.

Ties the layers together and writes result folders. SimpleITK at the surface, torch below `inference`.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import os
import platform
import shutil
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import SimpleITK as sitk

from LDRCore import __version__, geometry, images
from LDRCore.errors import RegistrationError
from LDRCore.images import ImageLike

Progress = Callable[[float, str], None]
"""Called with (fraction done, what comes now); an exception raised in it cancels the registration."""

RESULT_FILES = (
    "warped.nii.gz",
    "transform.h5",
    "displacement_field.nii.gz",
    "jacobian_determinant.nii.gz",
    "report.json",
)


@dataclasses.dataclass
class RegistrationResult:
    """What a registration found.

    Attributes:
        warped: the moving image on the fixed image's grid, in the moving image's pixel type, sampled once.
        transform: fixed points -> moving points (LPS mm): an affine map applied after a dense displacement, in one
            composite transform. `sitk.Resample(moving, fixed, transform)` gives `warped`.
        affine: the affine part alone, fixed -> moving.
        inverse_transform: moving points -> fixed points, or None unless it was asked for.
        report: times in seconds per stage, similarity before and after, folding, model, versions, warnings.
    """

    warped: sitk.Image
    transform: sitk.Transform
    affine: sitk.Transform
    inverse_transform: sitk.Transform | None
    report: dict[str, Any]

    @functools.cached_property
    def displacement_field(self) -> sitk.Image:
        """``T(x) - x`` in mm LPS on the fixed image's grid, float32 vectors (computed when first asked for)."""
        return geometry.displacement_field_image(self.transform, self.warped)

    @functools.cached_property
    def jacobian_determinant(self) -> sitk.Image:
        """det(dT/dx) on the fixed image's grid, float32; right on oblique grids (computed when first asked for)."""
        return geometry.jacobian_determinant_image(self.displacement_field)

    def save(self, folder: str | os.PathLike[str], *, overwrite: bool = False, extra: Any = None) -> list[Path]:
        """Write the result into a folder, complete or not at all.

        Files: warped.nii.gz, transform.h5 (and inverse_transform.h5), displacement_field.nii.gz,
        jacobian_determinant.nii.gz, report.json. Everything is written under a temporary name beside the folder
        first and moved when complete.

        Args:
            folder: created if needed.
            overwrite: replace files of these names; otherwise their presence is an error.
            extra: called with the temporary folder, to add files that shall appear together with the others.

        Raises:
            RegistrationError: the folder cannot be written, or holds such files and `overwrite` is false.
        """
        target = Path(folder)
        check_output_folder(target, overwrite=overwrite)
        target.parent.mkdir(parents=True, exist_ok=True)
        part = Path(tempfile.mkdtemp(prefix=f".{target.name}.", suffix=".part", dir=target.parent))
        try:
            sitk.WriteImage(self.warped, str(part / "warped.nii.gz"), useCompression=True)
            sitk.WriteTransform(self.transform, str(part / "transform.h5"))
            if self.inverse_transform is not None:
                sitk.WriteTransform(self.inverse_transform, str(part / "inverse_transform.h5"))
            sitk.WriteImage(self.displacement_field, str(part / "displacement_field.nii.gz"), useCompression=True)
            sitk.WriteImage(self.jacobian_determinant, str(part / "jacobian_determinant.nii.gz"), useCompression=True)
            (part / "report.json").write_text(json.dumps(self.report, indent=1) + "\n", encoding="utf-8")
            if extra is not None:
                extra(part)
            target.mkdir(exist_ok=True)
            written = []
            for file in sorted(part.iterdir()):
                os.replace(file, target / file.name)
                written.append(target / file.name)
            return written
        except (OSError, RuntimeError) as error:
            raise RegistrationError(f"the output folder must be writable, got {target} ({error})") from None
        finally:
            shutil.rmtree(part, ignore_errors=True)


def check_output_folder(folder: Path, *, overwrite: bool = False) -> None:
    """Refuse an output folder before any work is done for it.

    Raises:
        RegistrationError: it is a file, cannot be written, or holds an earlier result and `overwrite` is false.
    """
    if folder.exists() and not folder.is_dir():
        raise RegistrationError(f"the output must be a folder, got the file {folder}")
    existing = folder.resolve()
    while not existing.exists():
        existing = existing.parent
    for place in {existing, folder.resolve().parent} if folder.exists() else {existing}:
        try:
            with tempfile.TemporaryFile(dir=place):
                pass
        except OSError as error:
            raise RegistrationError(f"the output folder must be writable, got {folder} ({error.strerror})") from None
    if folder.exists() and not overwrite:
        taken = [name for name in (*RESULT_FILES, "overview.png") if (folder / name).exists()]
        if taken:
            raise RegistrationError(
                f"the output folder must not hold an earlier result (or overwrite must be set), got {folder} "
                f"with {taken[0]}"
            )


class _Clock:
    """Seconds per stage, and progress for the user."""

    def __init__(self, progress: Progress | None) -> None:
        self.times_s: dict[str, float] = {}
        self._progress = progress
        self._began = self._last = time.perf_counter()
        self._stage = ""

    def start(self, stage: str, fraction: float, message: str) -> None:
        self.stop()
        self._stage = stage
        if self._progress is not None:
            self._progress(fraction, message)
        self._last = time.perf_counter()

    def stop(self) -> None:
        if self._stage:
            self.times_s[self._stage] = round(time.perf_counter() - self._last, 4)
        self._stage = ""

    def finish(self) -> dict[str, float]:
        self.stop()
        self.times_s["total"] = round(time.perf_counter() - self._began, 4)
        if self._progress is not None:
            self._progress(1.0, "done")
        return self.times_s


def register(
    fixed: ImageLike,
    moving: ImageLike,
    *,
    model: str | os.PathLike[str] = "brain-t1",
    cascades: int = 3,
    affine: bool = True,
    initial: str | sitk.Transform | None = None,
    fixed_mask: ImageLike | None = None,
    moving_mask: ImageLike | None = None,
    refine_steps: int = 0,
    inverse: bool = False,
    device: str = "auto",
    progress: Progress | None = None,
) -> RegistrationResult:
    """Deform the moving image onto the fixed image.

    The images may differ in size, spacing, direction (oblique, flipped) and field of view.

    Args:
        fixed, moving: a path (file, or a folder with one DICOM series), a sitk.Image, or (array[i, j, k], 4x4 affine
            voxel -> RAS mm).
        model: a name of `list_models()`, or a path to a .pt file with its card.
        cascades: number of dense cascades, 1 to the model's maximum.
        affine: let the model's affine stem align the images first.
        initial: "center" (also None: bring the contents' centres together), "none" (trust the scanner coordinates),
            or a SimpleITK transform fixed -> moving.
        fixed_mask, moving_mask: image > 0 inside, on the grid of its image; what lies outside cannot drive the
            result. The warped image is not masked.
        refine_steps: reserved for instance optimisation; must be 0 in this version.
        inverse: also compute the inverse transform.
        device: "auto" (a GPU if there is one), "cpu", "cuda" ...
        progress: see `Progress`.

    Returns:
        RegistrationResult.

    Raises:
        RegistrationError: input that cannot be registered; the message names the rule and what came.
    """
    clock = _Clock(progress)
    clock.start("read", 0.0, "reading images")
    fixed_image, moving_image = images.load(fixed, "fixed image"), images.load(moving, "moving image")
    masks = (
        images.load_mask(fixed_mask, fixed_image, "fixed mask"),
        images.load_mask(moving_mask, moving_image, "moving mask"),
    )
    if refine_steps != 0:
        raise RegistrationError(f"refine_steps must be 0 in this version, got {refine_steps}")
    if isinstance(initial, str) and initial not in ("center", "none"):
        raise RegistrationError(f'initial must be "center", "none" or a SimpleITK transform, got {initial!r}')

    clock.start("load_model", 0.05, "loading the model")
    import torch

    from LDRCore import inference, preprocess, weights

    device = _device(device)
    loaded = weights.load_model(model, device)
    if isinstance(cascades, bool) or not isinstance(cascades, int) or not 1 <= cascades <= loaded.max_cascades:
        raise RegistrationError(
            f"cascades must be 1 to {loaded.max_cascades} for model {loaded.name}, got {cascades!r}"
        )

    clock.start("prepare", 0.15, "preparing images")
    start, bent = _initial_matrix(initial)
    seen_moving, moving_seen_mask = moving_image, masks[1]
    if bent is not None:  # a non-linear start: register to what it makes of the moving image
        seen_moving, moving_seen_mask = _resample_through(moving_image, masks[1], fixed_image, bent)
    settings = loaded.card["working_grid"]
    spacings = {"fine_mm": settings["spacing_mm"], "coarse_mm": settings["stem_spacing_mm"], "device": device}
    f = preprocess.prepare(fixed_image, masks[0], **spacings)
    m = preprocess.prepare(seen_moving, moving_seen_mask, **spacings)

    clock.start("affine", 0.3, "affine alignment")
    candidates = [start] if start is not None else inference.centring_candidates(f, m)
    matrix = inference.estimate_affine(loaded, f, m, candidates) if affine else candidates[0]

    clock.start("dense", 0.45, f"{cascades} cascade{'s' if cascades > 1 else ''}")
    dense = inference.estimate_dense(loaded, f, m, matrix, cascades)

    clock.start("warp", 0.7, "warping the moving image")
    transform: sitk.CompositeTransform = geometry.dense_then_affine(dense.displacement_mm(), dense.grid, matrix)
    affine_part: sitk.Transform = geometry.affine_transform(matrix)
    if bent is None:
        outside = float(sitk.GetArrayViewFromImage(moving_image).min())
        shape = fixed_image.GetSize()[::-1]
        values = inference.warp_native(m.native, shape, geometry.index_to_lps(fixed_image), dense, outside)
        warped = _as_image(values, moving_image, fixed_image)
    else:
        transform, affine_part = (_after(bent, t) for t in (transform, affine_part))
        warped = warp_image(moving_image, transform, fixed_image)

    clock.start("report", 0.85, "measuring")
    similarity = _similarity(f, m, dense, candidates[0], bent is not None)
    regularity = _regularity(dense)
    inverse_transform, residual_mm = None, None
    if inverse:
        clock.start("invert", 0.9, "inverting")
        field, residual_mm = inference.invert(dense)
        inverse_transform = geometry.affine_then_dense(field.displacement_mm(), field.grid, field.affine_lps)
        if bent is not None:
            inverse_transform = None
    report: dict[str, Any] = {
        "model": loaded.name,
        "cascades": cascades,
        "affine": affine,
        "initial": "center" if initial is None else initial if isinstance(initial, str) else "transform",
        "masks": {"fixed": masks[0] is not None, "moving": masks[1] is not None},
        "fixed": images.describe(fixed_image),
        "moving": images.describe(moving_image),
        "similarity": similarity,
        **regularity,
        "affine_matrix_lps": np.round(matrix, 6).tolist(),
        "field_grid": {
            "shape": list(dense.grid.shape),
            "spacing_mm": [round(s, 4) for s in dense.grid.spacing_mm],
        },
        "warnings": _warnings(loaded.card, f, m, similarity),
        "device": device,
        "threads": torch.get_num_threads(),
        "versions": {
            "LDRCore": __version__,
            "torch": torch.__version__,
            "SimpleITK": sitk.Version_VersionString(),
            "numpy": np.__version__,
            "python": platform.python_version(),
        },
    }
    if residual_mm is not None:
        report["inverse_residual_mm"] = round(residual_mm, 5)
    report["times_s"] = clock.finish()
    return RegistrationResult(warped, transform, affine_part, inverse_transform, report)


def _device(device: str) -> str:
    import torch

    if device == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    try:
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError):
        raise RegistrationError(f'device must be "auto" or one that torch can use here, got {device!r}') from None
    return device


def _initial_matrix(initial: str | sitk.Transform | None) -> tuple[np.ndarray | None, sitk.Transform | None]:
    """(4x4 to start from or None for centring, non-linear transform or None)."""
    if initial is None or initial == "center":
        return None, None
    if isinstance(initial, str):
        return np.eye(4), None
    if not isinstance(initial, sitk.Transform) or initial.GetDimension() != 3:
        raise RegistrationError(f'initial must be "center", "none" or a 3D SimpleITK transform, got {initial!r}')
    matrix = geometry.linear_matrix(initial)
    return (matrix, None) if matrix is not None else (np.eye(4), initial)


def _resample_through(
    image: sitk.Image, mask: np.ndarray | None, reference: sitk.Image, transform: sitk.Transform
) -> tuple[sitk.Image, np.ndarray | None]:
    low = float(sitk.GetArrayViewFromImage(image).min())
    resampled = sitk.Resample(image, reference, transform, sitk.sitkLinear, low, sitk.sitkFloat32)
    if mask is None:
        return resampled, None
    mask_image = sitk.GetImageFromArray(mask.astype(np.uint8))
    mask_image.CopyInformation(image)
    inside = sitk.Resample(mask_image, reference, transform, sitk.sitkNearestNeighbor, 0)
    return resampled, sitk.GetArrayFromImage(inside) > 0


def _after(last: sitk.Transform, first: sitk.Transform) -> sitk.CompositeTransform:
    """``x -> last(first(x))``, flattened so that it can be written to a file."""
    composite = sitk.CompositeTransform(3)
    for transform in (last, first):
        if isinstance(transform, sitk.CompositeTransform):
            for k in range(transform.GetNumberOfTransforms()):
                composite.AddTransform(transform.GetNthTransform(k))
        else:
            composite.AddTransform(transform)
    return composite


def _as_image(values: np.ndarray, like: sitk.Image, grid: sitk.Image) -> sitk.Image:
    """Float values in another image's pixel type on a grid (integers rounded, never wrapped around)."""
    dtype = sitk.GetArrayViewFromImage(like).dtype
    if np.issubdtype(dtype, np.integer):
        np.rint(values, out=values)
        limits = np.iinfo(dtype)
        values = np.clip(values, limits.min, limits.max)
    image = sitk.GetImageFromArray(values.astype(dtype))
    image.CopyInformation(grid)
    return image


def _similarity(f: Any, m: Any, dense: Any, start: np.ndarray, bent: bool) -> dict[str, float]:
    """Correlation (paper, Eq. 10) on the field's grid at each stage."""
    from LDRCore import inference, spatial

    fixed = f.fine.on(dense.grid)
    aligned = m.fine.on(dense.grid, dense.affine_lps)
    stages = {
        "before": m.fine.on(dense.grid, start if bent else None),
        "initial": m.fine.on(dense.grid, start),
        "affine": aligned,
        "after": spatial.warp(aligned, dense.displacement_vox),
    }
    return {name: round(float(inference.ncc(moved, fixed)), 5) for name, moved in stages.items()}


def _regularity(dense: Any) -> dict[str, Any]:
    """Jacobian statistics of the whole transform on the field's own grid."""
    from LDRCore import spatial

    determinant = spatial.jacobian_determinant(dense.displacement_vox)
    whole = determinant * float(np.linalg.det(dense.affine_lps[:3, :3]))
    length = np.linalg.norm(dense.displacement_mm(), axis=-1)
    return {
        "folding_fraction": float((whole <= 0).float().mean()),
        "folding_count": int((whole <= 0).sum()),
        "jacobian_determinant": {"min": round(float(whole.min()), 5), "max": round(float(whole.max()), 5)},
        "dense_displacement_mm": {
            "mean": round(float(length.mean()), 4),
            "max": round(float(length.max()), 4),
        },
    }


def _warnings(card: dict[str, Any], f: Any, m: Any, similarity: dict[str, float]) -> list[str]:
    """What a careful reader would want to be told about this pair and this model."""
    found = []
    made_for = card.get("made_for", "other images")
    for name, image in (("fixed", f), ("moving", m)):
        if card.get("expects_nonnegative") and image.low < -200:
            found.append(
                f"the {name} image looks like CT (background {image.low:.0f}, as in Hounsfield units), "
                f"but the model {card['name']} was made for {made_for}"
            )
    if similarity["after"] < max(similarity["initial"], similarity["before"]):
        found.append(
            f"the images correlate less after registration ({similarity['after']:.3f}) than before "
            f"({max(similarity['initial'], similarity['before']):.3f}): look at the result before you use it"
        )
    elif similarity["after"] < 0.5:
        found.append(
            f"the images correlate only {similarity['after']:.3f} after registration: look at the result before you "
            "use it"
        )
    return found


def warp_image(
    image: ImageLike,
    transform: sitk.Transform,
    reference: ImageLike,
    interpolation: str = "linear",
) -> sitk.Image:
    """Another image of the moving patient (a second sequence, a segmentation) on the fixed image's grid.

    Args:
        image: what to warp, in the moving image's space.
        transform: fixed -> moving, as `RegistrationResult.transform`. (With `inverse_transform` and a reference in
            moving space, images of the fixed patient are brought to the moving one.)
        reference: image whose grid the result shall have.
        interpolation: "linear", or "nearest" for labels.

    Returns:
        An image of the input's pixel type; outside the input its smallest value (0 for "nearest").

    Raises:
        RegistrationError: unreadable input, not 3D, or another interpolation.
    """
    kinds = {"linear": sitk.sitkLinear, "nearest": sitk.sitkNearestNeighbor}
    if interpolation not in kinds:
        raise RegistrationError(f"interpolation must be one of {sorted(kinds)}, got {interpolation!r}")
    source = images.three_dimensional(images.read(image, "image"), "image")
    target = images.three_dimensional(images.read(reference, "reference"), "reference")
    outside = 0.0 if interpolation == "nearest" else float(sitk.GetArrayViewFromImage(source).min())
    return sitk.Resample(source, target, transform, kinds[interpolation], outside)


def transform_points(points_lps: Any, transform: sitk.Transform) -> np.ndarray:
    """Map landmarks through a transform.

    `RegistrationResult.transform` takes points of the fixed image to the moving image; landmarks set on the moving
    image need `inverse_transform`.

    Args:
        points_lps: (N, 3), LPS mm.

    Returns:
        (N, 3), LPS mm.
    """
    return geometry.transform_points(np.asarray(points_lps, dtype=float), transform)
