"""`register()`: two scans in, everything a user wants out; and applying its transform to other images and points.

Ties the layers together. SimpleITK at the surface, torch below `inference`.
"""

from __future__ import annotations

import os
import platform
import time
from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np
import SimpleITK as sitk

from LDRCore import __version__, geometry, images
from LDRCore.errors import RegistrationError
from LDRCore.images import ImageLike
from LDRCore.result import RegistrationResult

if TYPE_CHECKING:
    from LDRCore.report import Progress


def register(
    fixed: ImageLike,
    moving: ImageLike,
    *,
    model: str | os.PathLike[str] = "brain-t1-small",
    cascades: int = 3,
    affine: bool = True,
    initial: str | sitk.Transform | None = None,
    fixed_mask: ImageLike | None = None,
    moving_mask: ImageLike | None = None,
    refine_steps: int = 0,
    inverse: bool = False,
    device: str = "auto",
    progress: Progress | None = None,
    on_transform: Callable[[sitk.Transform], None] | None = None,
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
        refine_steps: steps of instance optimisation after the networks (local NCC; see `refine`), 0 for none.
        inverse: also compute the inverse transform.
        device: "auto" (a GPU if there is one), "cpu", "cuda" ...
        progress: see `Progress`.
        on_transform: called with the transform as soon as it is known, before the moving image is warped, so that
            a viewer can show it early.

    Returns:
        RegistrationResult.

    Raises:
        RegistrationError: input that cannot be registered; the message names the rule and what came.
    """
    began_s = time.perf_counter()
    import torch

    from LDRCore import inference, inversion, native, preprocess, report, sampling, weights

    clock = report.Clock(progress, began_s)
    clock.start("read", 0.0, "reading images")
    fixed_image, moving_image = images.load(fixed, "fixed image"), images.load(moving, "moving image")
    masks = (
        images.load_mask(fixed_mask, fixed_image, "fixed mask"),
        images.load_mask(moving_mask, moving_image, "moving mask"),
    )
    if isinstance(refine_steps, bool) or not isinstance(refine_steps, int) or refine_steps < 0:
        raise RegistrationError(f"refine_steps must be a whole number, 0 or more, got {refine_steps!r}")
    if isinstance(initial, str) and initial not in ("center", "none"):
        raise RegistrationError(f'initial must be "center", "none" or a SimpleITK transform, got {initial!r}')

    clock.start("load_model", 0.05, "loading the model")
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

    def refining(fraction: float) -> None:
        if progress is not None:
            progress(0.5 + 0.2 * fraction, "refining")

    def warping(fraction: float) -> None:
        if progress is not None:
            progress(0.7 + 0.15 * fraction, "warping the moving image")

    dense = inference.estimate_dense(loaded, f, m, matrix, cascades, refine_steps, refining)

    clock.start("warp", 0.7, "warping the moving image")
    transform: sitk.CompositeTransform = geometry.dense_then_affine(dense.displacement_mm(), dense.grid, matrix)
    affine_part: sitk.Transform = geometry.affine_transform(matrix)
    if bent is not None:
        transform, affine_part = (_after(bent, t) for t in (transform, affine_part))
    if on_transform is not None:
        on_transform(transform)
    if bent is None:
        outside = float(sitk.GetArrayViewFromImage(moving_image).min())
        shape = fixed_image.GetSize()[::-1]
        dtype = sitk.GetArrayViewFromImage(moving_image).dtype
        to_lps = geometry.index_to_lps(fixed_image)
        values = native.warp(m.native, shape, to_lps, dense, outside, dtype, warping)
        warped = sitk.GetImageFromArray(values)
        warped.CopyInformation(fixed_image)
    else:
        warped = warp_image(moving_image, transform, fixed_image)

    clock.start("report", 0.85, "measuring")
    similarity = report.similarity(f, m, dense, candidates[0], bent is not None)
    regularity = report.regularity(dense)
    inverse_transform: sitk.Transform | None = None
    residual_mm: float | None = None
    if inverse:
        clock.start("invert", 0.9, "inverting")
        if bent is None:
            field, residual_mm = inference.invert(dense)
            inverse_transform = geometry.affine_then_dense(field.displacement_mm(), field.grid, field.affine_lps)
        else:
            inverse_transform, residual_mm = inversion.invert_transform(transform, fixed_image)
    facts: dict[str, Any] = {
        "model": loaded.name,
        "cascades": cascades,
        "affine": affine,
        "refine_steps": refine_steps,
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
        "warnings": report.warnings(loaded.card, f, m, similarity),
        "device": device,
        "threads": torch.get_num_threads(),
        "compiled_sampling": sampling.compiled() is not None,
        "precision": str(loaded.cascade.precision).removeprefix("torch."),
        "versions": {
            "LDRCore": __version__,
            "torch": torch.__version__,
            "SimpleITK": sitk.Version_VersionString(),
            "numpy": np.__version__,
            "python": platform.python_version(),
        },
    }
    if residual_mm is not None:
        facts["inverse_residual_mm"] = round(residual_mm, 5)
    facts["times_s"] = clock.finish()
    jacobian: Callable[[], np.ndarray] | None = None
    if bent is None:
        shape, to_lps = fixed_image.GetSize()[::-1], geometry.index_to_lps(fixed_image)
        jacobian = partial(native.jacobian_determinant, shape, to_lps, dense)
    return RegistrationResult(warped, transform, affine_part, inverse_transform, facts, jacobian)


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
        if transform.GetName() == "CompositeTransform":  # also when read from a file, as a plain sitk.Transform
            parts = sitk.CompositeTransform(transform)
            for k in range(parts.GetNumberOfTransforms()):
                composite.AddTransform(parts.GetNthTransform(k))
        else:
            composite.AddTransform(transform)
    return composite


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
