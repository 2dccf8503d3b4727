"""Inverts any transform: splits off its affine part, inverts the rest by a fixed-point iteration."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import SimpleITK as sitk
import torch

from LDRCore import geometry
from LDRCore.errors import RegistrationError
from LDRCore.geometry import Grid
from LDRCore.torch_context import own_torch_context
from LDRCore.transforms.field import DenseField, invert_field

_SPACING_MM = 3.0  # of the grid that a transform is sampled on, unless it holds a finer field
_MAX_VOXELS = 4_000_000
_MARGIN_MM = 24.0
_POINTS = 20_000  # at which an inverse is measured
_CONVERGED_MM = 1e-6  # from a point to the image of its preimage
_ACCEPTED_MM = 1e-3
_NEWTON_STEPS = 40
_HALVINGS = 12  # of one step
_DIFFERENCE_MM = 1e-3  # on each side, for derivatives


@dataclass(frozen=True)
class InverseConsistency:
    """Distances between x and T^-1(T(x)) over many points x, mm.

    Attributes:
        mean, p99_9, max: mean, 99.9th percentile and largest distance.
    """

    mean: float
    p99_9: float
    max: float

    def __str__(self) -> str:
        return f"mean {self.mean:.4f}, 99.9th percentile {self.p99_9:.3f}, largest {self.max:.3f} mm"


def inverse_consistency(
    transform: sitk.Transform, inverse: sitk.Transform, points_lps: np.ndarray
) -> InverseConsistency:
    """Measure how far an inverse brings mapped points back.

    Args:
        transform: fixed -> moving.
        inverse: moving -> fixed.
        points_lps: (N, 3) in fixed space, mm; some of them are taken, moved by up to half a millimetre, so that they
            do not lie at a field's voxels.
    """
    random = np.random.default_rng(0)
    points = np.asarray(points_lps)[random.integers(0, len(points_lps), _POINTS)]
    points = points + random.uniform(-0.5, 0.5, points.shape)
    returned = geometry.transform_points(geometry.transform_points(points, transform), inverse)
    distance = np.linalg.norm(returned - points, axis=1)
    values = distance.mean(), np.percentile(distance, 99.9), distance.max()
    return InverseConsistency(*(round(float(value), 5) for value in values))


@own_torch_context()
def invert_transform(transform: sitk.Transform, reference: sitk.Image) -> tuple[sitk.Transform, InverseConsistency]:
    """Invert a transform fixed -> moving.

    A linear transform is inverted exactly. Of any other, the affine map that fits it best over the reference image is
    split off and inverted exactly; what remains is inverted by fixed point on a grid that covers the image, of 3 mm or
    of the finest displacement field that the transform holds.

    Args:
        transform: fixed -> moving.
        reference: the fixed image; the inverse is good for the points that its content goes to.

    Returns:
        (inverse, consistency): inverse maps moving -> fixed; consistency is measured in the reference image against
        the transform that was given. Where it folds there is no inverse, and distances are large.

    Raises:
        RegistrationError: the linear part cannot be inverted.
    """
    matrix = geometry.linear_matrix(transform)
    if matrix is not None:
        _check_invertible(matrix)
        return geometry.affine_transform(np.linalg.inv(matrix)), InverseConsistency(0.0, 0.0, 0.0)
    inverse = inverse_of(transform, reference)
    points = geometry.points_lps(_lattice(reference, _SPACING_MM)).reshape(-1, 3)
    return inverse, inverse_consistency(transform, inverse, points)


@own_torch_context()
def invert_by_parts(transform: sitk.Transform) -> sitk.Transform:
    """Invert a transform without an image: its parts in reverse order, each over its own grid.

    Linear parts are inverted exactly; displacement fields and B-splines by fixed point over their grids.

    Raises:
        RegistrationError: a part that is not linear and has no grid, or that cannot be inverted.
    """
    field = _own_field(transform)
    if field is not None:
        _check_invertible(field.affine_lps)
        return inverted(field)
    inverses = [_invert_part(part) for part in geometry.transform_parts(transform)]
    return inverses[0] if len(inverses) == 1 else geometry.compose_transforms(*reversed(inverses))


def _invert_part(part: sitk.Transform) -> sitk.Transform:
    matrix = geometry.linear_matrix(part)
    if matrix is not None:
        _check_invertible(matrix)
        return geometry.affine_transform(np.linalg.inv(matrix))
    if part.GetName() == "BSplineTransform":
        return inverse_of(part, sitk.BSplineTransform(part).GetCoefficientImages()[0])
    return inverse_of(part, _field_of_part(part))


def _field_of_part(part: sitk.Transform) -> sitk.Image:
    """Return the displacement field of a part of a transform.

    Raises:
        RegistrationError: it is none.
    """
    if part.GetName() != "DisplacementFieldTransform":
        raise RegistrationError(f"a transform must be linear, a field or a spline to be inverted, got {part.GetName()}")
    return sitk.DisplacementFieldTransform(part).GetDisplacementField()


def map_backwards(points_lps: np.ndarray, transform: sitk.Transform) -> np.ndarray:
    """Map points backwards through a transform: find x with T(x) = y for every point y, without a field of T^-1.

    Goes through the parts of T in reverse order: linear ones are inverted exactly, fields and splines by Newton's
    method at these points alone. Of a point that they reach from inside and from outside of their grid, where nothing
    moves, the one inside is taken.

    Args:
        points_lps: (N, 3), mm.
        transform: T, x -> y.

    Returns:
        (N, 3), mm.

    Raises:
        RegistrationError: a part that cannot be inverted, or a point that T does not reach.
    """
    for part in geometry.transform_parts(transform):
        if part.IsLinear():
            points_lps = geometry.transform_points(points_lps, _invert_part(part))
        else:
            points_lps = _preimages(points_lps, part)
    return points_lps


def _preimages(points: np.ndarray, part: sitk.Transform) -> np.ndarray:
    """Find x with T(x) = y for a field or a spline; see `map_backwards`."""
    lps_from_unit = _domain(part)
    unit_from_lps = np.linalg.inv(lps_from_unit)

    def extended(x: np.ndarray) -> np.ndarray:
        """Map points as T does in its domain, and with the displacement of the nearest border beyond it."""
        unit = np.clip(x @ unit_from_lps[:3, :3].T + unit_from_lps[:3, 3], 0, 1)
        nearest = unit @ lps_from_unit[:3, :3].T + lps_from_unit[:3, 3]
        return geometry.transform_points(nearest, part) + (x - nearest)

    candidates = np.stack([_solve(extended, points), points])
    off_mm = np.stack([np.linalg.norm(geometry.transform_points(x, part) - points, axis=1) for x in candidates])
    chosen = np.where(off_mm[0] <= np.maximum(off_mm[1], _ACCEPTED_MM), 0, 1)
    off_mm = np.take_along_axis(off_mm, chosen[None], 0)[0]
    lost = np.flatnonzero(off_mm > _ACCEPTED_MM)
    if lost.size:
        raise RegistrationError(
            f"points that are mapped backwards must be points that the transform leads to, got {lost.size} of "
            f"{len(points)} that it does not lead to (it folds or ends there), the first is number {lost[0] + 1}"
        )
    return candidates[chosen, np.arange(len(points))]


def _domain(part: sitk.Transform) -> np.ndarray:
    """Return the 4x4 from the unit cube to the box in LPS mm where a field or spline may move points.

    Raises:
        RegistrationError: it is neither.
    """
    out = np.eye(4)
    if part.GetName() == "BSplineTransform":
        spline = sitk.BSplineTransform(part)
        shrink = 1e-9  # on the upper border ITK's spline moves nothing
        extent = (1 - shrink) * np.array(spline.GetTransformDomainPhysicalDimensions())
        out[:3, :3] = np.array(spline.GetTransformDomainDirection()).reshape(3, 3) * extent
        out[:3, 3] = spline.GetTransformDomainOrigin()
        return out
    field = _field_of_part(part)
    extent = (np.array(field.GetSize()) - 1) * field.GetSpacing()
    out[:3, :3] = np.array(field.GetDirection()).reshape(3, 3) * np.maximum(extent, 1e-9)  # of one voxel
    out[:3, 3] = field.GetOrigin()
    return out


def _solve(function: Callable[[np.ndarray], np.ndarray], targets: np.ndarray) -> np.ndarray:
    """Solve f(x) = y by Newton's method with halved steps, from x = y; what does not converge stays at its best.

    Args:
        function: f, (N, 3) -> (N, 3), point by point.
        targets: y, (N, 3).
    """
    solution = np.array(targets, dtype=float)
    residual = function(solution) - targets
    for _ in range(_NEWTON_STEPS):
        active = np.flatnonzero(np.linalg.norm(residual, axis=1) > _CONVERGED_MM)
        if not active.size:
            break
        start, error = solution[active], residual[active]
        steps = _DIFFERENCE_MM * np.eye(3)
        columns = [(function(start + step) - function(start - step)) / (2 * _DIFFERENCE_MM) for step in steps]
        move = -(np.linalg.pinv(np.stack(columns, axis=-1)) @ error[..., None])[..., 0]
        for _ in range(_HALVINGS):
            trial = start + move
            trial_error = function(trial) - targets[active]
            better = np.linalg.norm(trial_error, axis=1) < np.linalg.norm(error, axis=1)
            solution[active[better]], residual[active[better]] = trial[better], trial_error[better]
            active, start, error, move = active[~better], start[~better], error[~better], move[~better] / 2
            if not active.size:
                break
    return solution


def inverse_of(transform: sitk.Transform, reference: sitk.Image) -> sitk.Transform:
    """Invert a transform that is not linear, as `invert_transform`, without measuring it."""
    field = _own_field(transform)
    if field is None:
        field = _sampled_field(transform, reference)
    _check_invertible(field.affine_lps)
    return inverted(field)


def inverted(field: DenseField) -> sitk.Transform:
    """Return the inverse of a dense field as one SimpleITK transform."""
    inverse = invert_field(field)
    return geometry.affine_then_dense(inverse.displacement_mm(), inverse.grid, inverse.affine_lps)


def _check_invertible(affine_lps: np.ndarray) -> None:
    """Refuse a singular 4x4."""
    if abs(np.linalg.det(affine_lps[:3, :3])) < 1e-9:
        raise RegistrationError("the transform must be invertible, got a singular affine part")


def _field(displacement_mm: np.ndarray, grid: Grid, affine_lps: np.ndarray) -> DenseField:
    """Make a dense field of (D, H, W, 3) mm LPS."""
    displacement = geometry.lps_to_displacement(displacement_mm.astype(np.float32), grid)
    return DenseField(torch.from_numpy(displacement)[None], grid, affine_lps)


def _own_field(transform: sitk.Transform) -> DenseField | None:
    """Return the dense field and affine map of a transform written by this package, None for any other."""
    if transform.GetName() != "CompositeTransform":
        return None
    composite = sitk.CompositeTransform(transform)
    if composite.GetNumberOfTransforms() != 2:
        return None
    affine_lps = geometry.linear_matrix(composite.GetNthTransform(0))
    dense = composite.GetNthTransform(1)
    if affine_lps is None or dense.GetName() != "DisplacementFieldTransform":
        return None
    image = sitk.DisplacementFieldTransform(dense).GetDisplacementField()
    if not np.allclose(image.GetDirection(), np.eye(3).ravel()):
        return None
    x, y, z = image.GetOrigin()
    a, b, c = image.GetSpacing()[::-1]
    d, h, w = image.GetSize()[::-1]
    return _field(sitk.GetArrayFromImage(image), Grid((x, y, z), (a, b, c), (d, h, w)), affine_lps)


def _displacement_fields(transform: sitk.Transform) -> list[sitk.Image]:
    """Return the displacement fields that a transform consists of."""
    if transform.GetName() == "CompositeTransform":
        composite = sitk.CompositeTransform(transform)
        parts = [composite.GetNthTransform(n) for n in range(composite.GetNumberOfTransforms())]
        return [field for part in parts for field in _displacement_fields(part)]
    if transform.GetName() == "DisplacementFieldTransform":
        return [sitk.DisplacementFieldTransform(transform).GetDisplacementField()]
    return []


def _sampled_field(transform: sitk.Transform, reference: sitk.Image) -> DenseField:
    """Sample any transform over an image; split it into the affine map that fits best and the rest.

    Outside of the image the rest goes on as at its border: a displacement field says nothing there, and its zeros would
    tear the map apart.
    """
    spacing_mm = min([_SPACING_MM, *(min(field.GetSpacing()) for field in _displacement_fields(transform))])
    lattice = _lattice(reference, spacing_mm)
    points = geometry.points_lps(lattice)
    mapped = points + sitk.GetArrayFromImage(geometry.displacement_field_image(transform, lattice))
    affine_lps = geometry.fit_affine(points.reshape(-1, 3), mapped.reshape(-1, 3))
    _check_invertible(affine_lps)
    inverse = np.linalg.inv(affine_lps)
    rest = sitk.GetImageFromArray(mapped @ inverse[:3, :3].T + inverse[:3, 3] - points, isVector=True)
    rest.CopyInformation(lattice)
    corners = geometry.corners_lps(reference)
    grid = Grid.around(
        corners.min(0),
        corners.max(0),
        spacing_mm=spacing_mm,
        margin_mm=_MARGIN_MM,
        multiple=1,
        max_voxels=_MAX_VOXELS,
    )
    extended = sitk.Resample(
        rest, grid.reference_image(), sitk.Transform(), sitk.sitkLinear, 0.0, sitk.sitkVectorFloat32, True
    )
    return _field(sitk.GetArrayFromImage(extended), grid, affine_lps)


def _lattice(reference: sitk.Image, spacing_mm: float) -> sitk.Image:
    """Return an empty image of about a spacing whose first and last voxels are the reference's."""
    extent = [(n - 1) * s for n, s in zip(reference.GetSize(), reference.GetSpacing(), strict=True)]
    spacing_mm = max(spacing_mm, (np.prod(extent) / _MAX_VOXELS) ** (1 / 3))
    count = [max(2, int(np.ceil(e / spacing_mm)) + 1) for e in extent]
    spacing = [e / (n - 1) for e, n in zip(extent, count, strict=True)]
    return geometry.empty_image(count, spacing, reference.GetOrigin(), reference.GetDirection())
