"""Cubic B-splines of other programs as ITK's transform, which is exact everywhere."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import SimpleITK as sitk


def spline_transform(
    coefficients: np.ndarray,
    origin: Sequence[float],
    spacing: Sequence[float],
    direction: Sequence[float] = (1, 0, 0, 0, 1, 0, 0, 0, 1),
    *,
    order: int = 3,
    padding: int = 0,
) -> sitk.Transform:
    """Make ``x -> x + sum of coefficients times splines``.

    Args:
        coefficients: (3, K, J, I), displacements along x, y, z; the first index along the grid's last axis.
        origin: of the coefficient (0, 0, 0).
        spacing: between coefficients along the grid's axes (first axis first).
        direction: 3x3 by rows, as SimpleITK has it.
        order: of the spline.
        padding: so many zero coefficients on every side: ITK's spline moves nothing where it lacks coefficients,
            others take missing ones for zero.
    """
    values = np.pad(coefficients, ((0, 0), *[(padding, padding)] * 3))
    axes = np.array(direction, dtype=float).reshape(3, 3)
    first = np.asarray(origin, dtype=float) - padding * axes @ np.asarray(spacing, dtype=float)
    transform = sitk.BSplineTransform(3, order)
    transform.SetFixedParameters([*values.shape[:0:-1], *first.tolist(), *spacing, *axes.ravel().tolist()])
    transform.SetParameters(values.astype(np.float64).ravel().tolist())
    return transform
