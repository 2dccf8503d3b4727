"""Levenberg and Marquardt's method over the parameters of a rigid or an affine map.

The curvature is computed once, at the first map; from step to step it is corrected by the change of the gradient (the
update of Broyden, Fletcher, Goldfarb and Shanno), which takes half as many steps as computing it anew.
"""

from __future__ import annotations

import numpy as np

from LDRCore.alignment.objective import Objective

DAMPING = 1e-3  # of the curvature's diagonal, at first; five times less after a step that was a gain
REFUSED_DAMPING, MOST_DAMPING = 0.1, 100.0  # at least, after a step that was none, and ten times more each time
LEAST_GAIN = 6e-4  # of the value: where a step promises less than about half of it, there is none
LEAST_CURVATURE = 1e-3  # of the expected one along a step: where less is found, the curvature is kept


def rotation_matrix(vector: np.ndarray) -> np.ndarray:
    """Return the rotation (3, 3) about a vector by its length, radians (Rodrigues' formula)."""
    angle = float(np.linalg.norm(vector))
    x, y, z = vector
    cross = np.array([[0, -z, y], [z, 0, -x], [-y, x, 0]])
    if angle < 1e-12:
        return np.eye(3) + cross
    out: np.ndarray = np.eye(3) + np.sin(angle) / angle * cross + (1 - np.cos(angle)) / angle**2 * cross @ cross
    return out


def _generators() -> np.ndarray:
    """(12, 6): the rows of (E | b) for a rotation about x, y, z, and a shift."""
    out = np.zeros((3, 4, 6))
    for axis in range(3):
        i, j = (axis + 1) % 3, (axis + 2) % 3
        out[j, i, axis], out[i, j, axis] = 1, -1
        out[axis, 3, 3 + axis] = 1
    return out.reshape(12, 6)


_RIGID = _generators()


def step_lps(parameters: np.ndarray, centre_lps: np.ndarray, radius_mm: float) -> np.ndarray:
    """Return the 4x4 of a step: of 12 parameters an affine map, of 6 a rigid one."""
    out = np.eye(4)
    if len(parameters) == 6:
        out[:3, :3] = rotation_matrix(parameters[:3] / radius_mm)
        shift = parameters[3:]
    else:
        rows = parameters.reshape(3, 4)
        out[:3, :3] += rows[:, :3] / radius_mm
        shift = rows[:, 3]
    out[:3, 3] = centre_lps + shift - out[:3, :3] @ centre_lps
    return out


def optimise(objective: Objective, affine_lps: np.ndarray, kind: str, iterations: int) -> tuple[np.ndarray, float]:
    """Improve a map; the result is never worse than the given one.

    Args:
        objective: what to make larger.
        affine_lps: 4x4, to start from; for "rigid" a rigid one.
        kind: "rigid" or "affine".
        iterations: at most.

    Returns:
        (4x4, its value).
    """
    basis = _RIGID if kind == "rigid" else np.eye(12)
    state = objective.evaluate(affine_lps)
    assert state.curvature is not None
    gradient, curvature = basis.T @ state.gradient, basis.T @ state.curvature @ basis
    damping = DAMPING
    for _ in range(iterations):
        diagonal = np.diag(np.maximum(np.diag(curvature), 1e-9))
        step = np.linalg.solve(curvature + damping * diagonal, gradient)
        if gradient @ step <= LEAST_GAIN * abs(state.value):
            break
        trial = affine_lps @ step_lps(step, objective.centre_lps, objective.radius_mm)
        new = objective.evaluate(trial, curvature=False)
        if not new.value > state.value:
            damping = max(10 * damping, REFUSED_DAMPING)
            if damping > MOST_DAMPING:
                break
            continue
        new_gradient = basis.T @ new.gradient
        fallen, expected = gradient - new_gradient, curvature @ step
        if fallen @ step > LEAST_CURVATURE * (expected @ step):
            curvature = curvature + np.outer(fallen, fallen) / (fallen @ step)
            curvature = curvature - np.outer(expected, expected) / (expected @ step)
        affine_lps, state, gradient = trial, new, new_gradient
        damping /= 5
    return affine_lps, state.value
