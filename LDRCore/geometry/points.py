"""Maps landmarks through a transform."""

from __future__ import annotations

import numpy as np
import SimpleITK as sitk

from LDRCore.errors import RegistrationError


def transform_points(points_lps: np.ndarray, transform: sitk.Transform) -> np.ndarray:
    """Map points (N, 3), LPS mm, through a transform.

    Raises:
        RegistrationError: another shape, or coordinates that are NaN or infinite.
    """
    points = np.asarray(points_lps, dtype=float)
    if points.ndim != 2 or points.shape[1] != 3:
        raise RegistrationError(f"points must have shape (N, 3), got {points.shape}")
    if not np.isfinite(points).all():
        raise RegistrationError("points must be finite, got NaN or infinite coordinates")
    return np.array([transform.TransformPoint(p) for p in points.tolist()]).reshape(-1, 3)
