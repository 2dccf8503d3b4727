"""Overlap of labels with its gradient as compiled loops. Importing this file imports numba."""

from __future__ import annotations

import numpy as np
import torch

from LDRCore.sampling.numba_support import array, inline, loop, share

_BLOCK = 1 << 14  # points that share one histogram


@inline
def _corner(position, stride, top):  # type: ignore[no-untyped-def]
    """(index of the lower and of the upper neighbour, weight of the upper) along one axis; outside, the nearest."""
    scaled = position / stride
    low = np.floor(scaled) if abs(scaled) < np.float32(1e6) else np.float32(0)
    first = int(low) * stride
    return min(max(first, 0), top), min(max(first + stride, 0), top), scaled - low


@inline
def _label_everywhere(moving, z0, z1, y0, y1, x0, x1):  # type: ignore[no-untyped-def]
    """The label of all eight corners, -1 where they differ."""
    label = moving[z0, y0, x0]
    same = label == moving[z0, y0, x1] and label == moving[z0, y1, x0] and label == moving[z0, y1, x1]
    same = same and label == moving[z1, y0, x0] and label == moving[z1, y0, x1]
    same = same and label == moving[z1, y1, x0] and label == moving[z1, y1, x1]
    return int(label) if same else -1


@loop
def _masses(points, moving, fixed, stride, block, masses, begin, end):  # type: ignore[no-untyped-def]
    """Histograms of the blocks begin ... end: masses[n, 0] of all labels sampled, masses[n, 1] of those that agree."""
    depth, height, width = moving.shape
    count = points.shape[1]
    one = np.float32(1)
    for n in range(begin, end):
        for p in range(n * block, min((n + 1) * block, count)):
            z0, z1, a = _corner(points[0, p], stride, depth - 1)
            y0, y1, b = _corner(points[1, p], stride, height - 1)
            x0, x1, c = _corner(points[2, p], stride, width - 1)
            own = fixed[p]
            everywhere = _label_everywhere(moving, z0, z1, y0, y1, x0, x1)
            if everywhere >= 0:
                masses[n, 0, everywhere] += one
                if everywhere == own:
                    masses[n, 1, everywhere] += one
                continue
            for corner in range(8):
                z, wz = (z1, a) if corner & 1 else (z0, one - a)
                y, wy = (y1, b) if corner & 2 else (y0, one - b)
                x, wx = (x1, c) if corner & 4 else (x0, one - c)
                label = moving[z, y, x]
                weight = wz * wy * wx
                masses[n, 0, label] += weight
                if label == own:
                    masses[n, 1, label] += weight


@loop
def _slopes(points, moving, fixed, stride, block, by_mass, by_overlap, out, begin, end):  # type: ignore[no-untyped-def]
    """Derivative by the points of the blocks begin ... end, given that by every label's mass and overlap."""
    depth, height, width = moving.shape
    count = points.shape[1]
    one = np.float32(1)
    for n in range(begin, end):
        for p in range(n * block, min((n + 1) * block, count)):
            z0, z1, a = _corner(points[0, p], stride, depth - 1)
            y0, y1, b = _corner(points[1, p], stride, height - 1)
            x0, x1, c = _corner(points[2, p], stride, width - 1)
            own = fixed[p]
            if _label_everywhere(moving, z0, z1, y0, y1, x0, x1) >= 0:  # the weights add up to 1 wherever the point is
                out[0, p] = out[1, p] = out[2, p] = 0
                continue
            dz = dy = dx = np.float32(0)
            for corner in range(8):
                z, wz, sz = (z1, a, one) if corner & 1 else (z0, one - a, -one)
                y, wy, sy = (y1, b, one) if corner & 2 else (y0, one - b, -one)
                x, wx, sx = (x1, c, one) if corner & 4 else (x0, one - c, -one)
                label = moving[z, y, x]
                slope = by_mass[label]
                if label == own:
                    slope += by_overlap[label]
                dz += slope * sz * wy * wx
                dy += slope * wz * sy * wx
                dx += slope * wz * wy * sx
            out[0, p], out[1, p], out[2, p] = dz / stride, dy / stride, dx / stride


def overlap(
    coordinates: torch.Tensor, moving_labels: torch.Tensor, fixed_labels: torch.Tensor, stride: int, n_labels: int
) -> tuple[float, torch.Tensor]:
    """See `supervision.label_overlap`.

    Returns:
        (loss, its derivative by the coordinates, (3, N)).
    """
    points, moving, fixed = array(coordinates, 2), moving_labels.contiguous().numpy(), fixed_labels.numpy()
    blocks = -(-points.shape[1] // _BLOCK)
    histograms = np.zeros((blocks, 2, n_labels), np.float32)
    share(blocks, lambda begin, end: _masses(points, moving, fixed, stride, _BLOCK, histograms, begin, end))
    mass, agreeing = histograms.sum(0, dtype=np.float64)
    fixed_mass = np.bincount(fixed, minlength=n_labels)
    total = np.maximum(mass + fixed_mass, 1e-6)
    present = fixed_mass > 0
    present[0] = False
    share_of_one = present / max(present.sum(), 1)
    by_mass = (share_of_one * 2 * agreeing / total**2).astype(np.float32)
    by_overlap = (-2 * share_of_one / total).astype(np.float32)
    out = np.empty(points.shape, np.float32)
    share(blocks, lambda b, e: _slopes(points, moving, fixed, stride, _BLOCK, by_mass, by_overlap, out, b, e))
    return float(1 - (share_of_one * 2 * agreeing / total).sum()), torch.from_numpy(out)
