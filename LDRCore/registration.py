"""`register()`: two scans in, everything a user wants out; and applying its transform to other images and points."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import numpy as np
import SimpleITK as sitk

from LDRCore import geometry
from LDRCore.errors import RegistrationError
from LDRCore.io import images
from LDRCore.io.images import ImageLike
from LDRCore.io.transforms import Context, TransformLike, read_transform
from LDRCore.models.weights import DEFAULT
from LDRCore.result import RegistrationResult

if TYPE_CHECKING:
    from LDRCore.pipeline.inputs import FixedImage
    from LDRCore.report import Progress

INTERPOLATIONS = (*geometry.INTERPOLATIONS, "auto")


def register(
    fixed: ImageLike | FixedImage,
    moving: ImageLike,
    *,
    kind: str = "deformable",
    model: str | os.PathLike[str] = DEFAULT,
    cascades: int | None = None,
    affine: bool = True,
    initial: str | TransformLike | None = None,
    fixed_mask: ImageLike | None = None,
    moving_mask: ImageLike | None = None,
    refine: str | None = None,
    refine_steps: int = 0,
    refine_spacing: str = "working",
    similarity: str = "auto",
    inverse: bool = False,
    device: str = "auto",
    progress: Progress | None = None,
    on_transform: Callable[[sitk.Transform], None] | None = None,
) -> RegistrationResult:
    """Align the moving image with the fixed image, by deforming it or by a rigid or affine map alone.

    The images may differ in size, spacing, direction (oblique, flipped) and field of view.

    Args:
        fixed, moving: a path (file, or a folder with one DICOM series), a sitk.Image, or (array[i, j, k], 4x4 affine
            voxel -> RAS mm). The fixed one may also be a `pipeline.inputs.FixedImage`, which many pairs share.
        kind: "deformable", "affine" (12 parameters) or "rigid" (rotation and translation, 6 parameters). The last two
            run no dense networks and refuse `refine`.
        model: a name of `list_models()`, a path to a .pt file with its card, "none": no network, for anatomy that no
            model knows: images are aligned from several starts and refined; or "any": the same, with the networks of
            the model that the images fit between the two, if there is one. The report says which and why.
        cascades: number of dense cascades, 0 (the affine stem alone) to the model's maximum; None for all.
        affine: align the images by an affine (or rigid) map first.
        initial: "center" (also None: bring the contents' centres together), "none" (trust the scanner coordinates),
            or a transform fixed -> moving: SimpleITK's, a path, or a list of these in ANTs' order.
        fixed_mask, moving_mask: image > 0 inside, on the grid of its image; what lies outside cannot drive the
            result. The warped image is not masked.
        refine: instance optimisation after the networks: "none", "fast", or "best" (see `pipeline.refine`). None is
            "none", for the models "any" and "none" it is "fast".
        refine_steps: iterations of instance optimisation at each of two resolutions, instead of those of `refine`; 0
            for what `refine` says.
        refine_spacing: voxels that the optimisation ends at: "working" (those of the model's working grid, about 2 mm),
            or "native" (the fixed image's own; slower and needs more memory).
        similarity: what the optimisation makes larger: "local-ncc" (squared correlation in small windows), "mind"
            (self-similarity descriptors, for images of unlike contrast), or "auto": by the intensities; the report says
            which and why.
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
    from LDRCore import report
    from LDRCore.pipeline import affine as affine_stage
    from LDRCore.pipeline import dense as dense_stage
    from LDRCore.pipeline import evidence as evidence_stage
    from LDRCore.pipeline import refine as refine_stage
    from LDRCore.pipeline.choice import choose_networks, without_networks
    from LDRCore.pipeline.inputs import prepare_pair, read_inputs
    from LDRCore.pipeline.model import load_model
    from LDRCore.pipeline.options import Options, every_cascade, resolve_initial, resolve_refine
    from LDRCore.pipeline.output import ComposedOutput, DenseOutput, LinearOutput, Output
    from LDRCore.torch_context import own_torch_context

    initial = resolve_initial(initial)
    cascades = every_cascade(model, kind) if cascades is None else cascades
    refine = resolve_refine(refine, model, kind, refine_steps)
    options = Options(
        model, cascades, affine, initial, inverse, device, refine, refine_steps, refine_spacing, similarity, kind
    )
    clock = report.Clock(progress, began_s)
    with own_torch_context():
        clock.start("read", 0.0, "reading images")
        inputs = read_inputs(fixed, moving, fixed_mask, moving_mask)

        clock.start("load_model", 0.05, "loading the model")
        loaded = load_model(model, options.device)

        clock.start("prepare", 0.15, "preparing images")
        pair = prepare_pair(inputs, options.nonlinear_initial, loaded.card, options.device)

        clock.start("affine", 0.3, "affine alignment")
        start = options.initial_matrix
        starts = [start] if start is not None else affine_stage.centring_candidates(pair.fixed, pair.moving)
        alignment = affine_stage.run(loaded, pair, starts, options)

        clock.start("dense", 0.45, "deforming by the networks")
        choice = choose_networks(loaded, pair, alignment.affine_lps, options)
        images = choice.model, pair.fixed, pair.moving, alignment.affine_lps
        field = dense_stage.estimate_dense(*images, choice.options.cascades)
        evidence = evidence_stage.measure(pair, field) if choice.options.cascades else None
        if evidence is not None and dense_stage.made_worse(evidence):
            choice = without_networks(choice, evidence)
            field, evidence = dense_stage.estimate_dense(*images, 0), None
        options = choice.options

        refinement: dict[str, Any] = {}
        grid = field.content_grid
        if options.refines:
            clock.start("refine", 0.5, "refining")
            field, refinement = refine_stage.run(
                field, pair, inputs, options, loaded.card, clock.within(0.5, 0.7, "refining")
            )
            evidence = None  # of another field
        evidence = evidence or evidence_stage.measure(pair, field)

        clock.start("warp", 0.7, "warping the moving image")
        output: Output = DenseOutput(field, inputs.fixed, inputs.moving, pair.moving.native)
        if options.kind != "deformable":
            output = LinearOutput(field, inputs.fixed, inputs.moving, pair.moving.native, options.kind)
        if options.nonlinear_initial is not None:
            output = ComposedOutput(field, options.nonlinear_initial, inputs.fixed, inputs.moving)
        if on_transform is not None:
            on_transform(output.transform)
        warped = output.warp(clock.within(0.7, 0.85, "warping the moving image"))

        clock.start("report", 0.85, "measuring")
        measures = alignment.facts() | choice.facts | refinement
        measures |= report.measure(pair, field, starts[0], grid) | {"evidence": evidence}
        inverse_transform: sitk.Transform | None = None
        if inverse:
            clock.start("invert", 0.9, "inverting")
            inverse_transform = output.invert()
            measures["inverse_consistency_mm"] = report.inverse_consistency(output, inverse_transform, pair)
        facts = report.build(options, loaded, choice.model, inputs, pair, field, measures, clock)
    return RegistrationResult(
        warped, output.transform, output.affine, inverse_transform, facts, output.jacobian, output.summarise_jacobian
    )


def warp_image(
    image: ImageLike,
    transform: TransformLike,
    reference: ImageLike,
    interpolation: str = "linear",
) -> sitk.Image:
    """Warp another image of the moving patient (a second sequence, a segmentation) onto the fixed image's grid.

    Args:
        image: what to warp, in the moving image's space; a series or a vector image volume by volume (vectors are not
            turned).
        transform: fixed -> moving, as `RegistrationResult.transform`: a path, a SimpleITK transform, or several in the
            order in which a fixed point goes through them. (With `inverse_transform` and a reference in moving space,
            images of the fixed patient are brought to the moving one.)
        reference: image whose grid the result shall have.
        interpolation: see `geometry.warp_volume`, or "auto": nearest for what looks like labels, otherwise linear.

    Returns:
        An image of the input's pixel type, integers rounded; outside the input its smallest value (0 for labels).

    Raises:
        RegistrationError: unreadable input, neither 3D nor 4D, or another interpolation.
    """
    if interpolation not in INTERPOLATIONS:
        raise RegistrationError(f"interpolation must be one of {INTERPOLATIONS}, got {interpolation!r}")
    source = images.read(image, "image")
    volumes = geometry.volumes_of(source)
    for volume in volumes:
        images.three_dimensional(volume, "image")
    target = images.three_dimensional(images.read(reference, "reference"), "reference")
    checked = read_transform(transform, context=Context(target, volumes[0]))
    if interpolation == "auto":
        interpolation = "nearest" if images.looks_like_labels(volumes[0]) else "linear"
    return geometry.warp_volumes(source, lambda one: geometry.warp_volume(one, target, checked, interpolation))


def transform_points(points_lps: Any, transform: TransformLike) -> np.ndarray:
    """Map landmarks through a transform.

    `RegistrationResult.transform` takes points of the fixed image to the moving image; landmarks set on the moving
    image need `inverse_transform`.

    Args:
        points_lps: (N, 3), LPS mm.
        transform: a path, a SimpleITK transform, or several in the order in which a point goes through them.

    Returns:
        (N, 3), LPS mm.

    Raises:
        RegistrationError: points of another shape, or that are not finite numbers; a transform that cannot be read.
    """
    try:
        points = np.asarray(points_lps, dtype=float)
    except (TypeError, ValueError):
        raise RegistrationError(f"points must be numbers of shape (N, 3), got {type(points_lps).__name__}") from None
    return geometry.transform_points(points, read_transform(transform))
