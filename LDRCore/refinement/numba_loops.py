"""The steps of an iteration as compiled loops: the same as `torch_ops`, each in one or two passes over memory.

Each loop works on chunks of slices (begin ... end). What it needs of neighbouring slices is kept in a ring buffer of as
many slices as a window or a Gaussian is wide, so that every slice is read once a chunk.
"""

from __future__ import annotations

import functools
import math

import numpy as np
import torch

from LDRCore.refinement import torch_ops
from LDRCore.sampling.numba_support import array, inline, loop, share


@inline
def _box_rows(source, radius, line, out):  # type: ignore[no-untyped-def]
    """Sum a slice over boxes of edge 2 radius + 1, along both axes; zeros outside."""
    height, width = source.shape
    for j in range(height):
        for i in range(width):
            line[i] = source[j, i]
        for d in range(1, radius + 1):
            for i in range(d, width):
                line[i] += source[j, i - d]
            for i in range(width - d):
                line[i] += source[j, i + d]
        for b in range(max(0, j - radius), min(height, j + radius + 1)):
            target = out[b]
            for i in range(width):
                target[i] += line[i]


@loop
def _window_factors(warped, fixed, mean_f, var_f, radius, epsilon, out, similarity, begin, end):  # type: ignore[no-untyped-def]
    """p, p q and p q K(w) - p K(f) of `torch_ops.correlation_force` for the slices begin ... end.

    similarity[k]: the sum of A p over slice k.
    """
    depth, height, width = warped.shape
    count = 2 * radius + 1
    scale = np.float32(1) / np.float32(count * count * count)
    ring = np.zeros((count, 3, height, width), np.float32)
    products = np.empty((3, height, width), np.float32)
    line = np.empty(width, np.float32)
    totals = np.empty((3, width), np.float32)
    for k in range(begin - radius, end + radius):
        kept = ring[k % count]
        kept[:] = 0
        if 0 <= k < depth:
            for j in range(height):
                w, f = warped[k, j], fixed[k, j]
                a, b, c = products[0, j], products[1, j], products[2, j]
                for i in range(width):
                    a[i] = w[i]
                    b[i] = w[i] * w[i]
                    c[i] = w[i] * f[i]
            for n in range(3):
                _box_rows(products[n], radius, line, kept[n])
        m = k - radius
        if m < begin:
            continue
        total = np.float64(0)
        for j in range(height):
            for n in range(3):
                row = totals[n]
                for i in range(width):
                    row[i] = ring[0, n, j, i]
                for r in range(1, count):
                    more = ring[r, n, j]
                    for i in range(width):
                        row[i] += more[i]
            sums, squares, mixed = totals[0], totals[1], totals[2]
            mf, vf = mean_f[m, j], var_f[m, j]
            p, pq, rest = out[0, m, j], out[1, m, j], out[2, m, j]
            row_total = np.float32(0)
            for i in range(width):
                mean = sums[i] * scale
                covariance = mixed[i] * scale - mean * mf[i]
                variance = max(squares[i] * scale - mean * mean, np.float32(0)) + epsilon
                q = covariance / variance
                p_i = q / vf[i]
                p[i] = p_i
                pq[i] = p_i * q
                rest[i] = p_i * (q * mean - mf[i])
                row_total += covariance * p_i
            total += row_total
        similarity[m] = total


@loop
def _gradient(warped, fixed, factors, weight, radius, out, begin, end):  # type: ignore[no-untyped-def]
    """Gradient of local correlation times that of the warped image, for the slices begin ... end.

    weight: the mask, or an array without slices.
    """
    depth, height, width = warped.shape
    count = 2 * radius + 1
    # the factors 2 of the square and 1 / 2 of central differences cancel
    scale = np.float32(1) / np.float32(count * count * count)
    ring = np.zeros((count, 3, height, width), np.float32)
    line, force = np.empty(width, np.float32), np.empty(width, np.float32)
    for k in range(begin - radius, end + radius):
        kept = ring[k % count]
        kept[:] = 0
        if 0 <= k < depth:
            for n in range(3):
                _box_rows(factors[n, k], radius, line, kept[n])
        m = k - radius
        if m < begin:
            continue
        for j in range(height):
            w, f = warped[m, j], fixed[m, j]
            for i in range(width):
                force[i] = 0
            for r in range(count):
                p, pq, rest = ring[r, 0, j], ring[r, 1, j], ring[r, 2, j]
                for i in range(width):
                    force[i] += f[i] * p[i] - w[i] * pq[i] + rest[i]
            for i in range(width):
                force[i] *= scale
            if len(weight) > 0:
                for i in range(width):
                    force[i] *= weight[m, j, i]
            z, y, x = out[0, m, j], out[1, m, j], out[2, m, j]
            if 0 < m < depth - 1:
                above, below = warped[m + 1, j], warped[m - 1, j]
                for i in range(width):
                    z[i] = force[i] * (above[i] - below[i])
            else:
                z[:] = 0
            if 0 < j < height - 1:
                after, before = warped[m, j + 1], warped[m, j - 1]
                for i in range(width):
                    y[i] = force[i] * (after[i] - before[i])
            else:
                y[:] = 0
            x[0] = 0
            x[width - 1] = 0
            for i in range(1, width - 1):
                x[i] = force[i] * (w[i + 1] - w[i - 1])


@loop
def _smooth(field, kernel, norm_z, norm_y, norm_x, out, longest, begin, end):  # type: ignore[no-untyped-def]
    """Smooth the slices begin ... end of (3, D, H, W) by a Gaussian; its weights are normalised at the borders.

    kernel: one-sided, from the middle on. longest[k]: the largest squared length of a vector of slice k.
    """
    _, depth, height, width = field.shape
    radius = len(kernel) - 1
    count = 2 * radius + 1
    ring = np.zeros((count, 3, height, width), np.float32)
    rows = np.empty((height, width), np.float32)
    length = np.empty(width, np.float32)
    for k in range(begin - radius, end + radius):
        if 0 <= k < depth:
            kept = ring[k % count]
            for c in range(3):
                for j in range(height):
                    source, target = field[c, k, j], rows[j]
                    for i in range(width):
                        target[i] = kernel[0] * source[i]
                    for d in range(1, radius + 1):
                        weight = kernel[d]
                        for i in range(d, width):
                            target[i] += weight * source[i - d]
                        for i in range(width - d):
                            target[i] += weight * source[i + d]
                for j in range(height):
                    target = kept[c, j]
                    middle = rows[j]
                    for i in range(width):
                        target[i] = kernel[0] * middle[i]
                    for d in range(1, radius + 1):
                        weight = kernel[d]
                        if j - d >= 0:
                            row = rows[j - d]
                            for i in range(width):
                                target[i] += weight * row[i]
                        if j + d < height:
                            row = rows[j + d]
                            for i in range(width):
                                target[i] += weight * row[i]
                    factor = norm_y[j]
                    for i in range(width):
                        target[i] *= factor * norm_x[i]
        m = k - radius
        if m < begin:
            continue
        top = np.float32(0)
        for j in range(height):
            for i in range(width):
                length[i] = 0
            for c in range(3):
                target = out[c, m, j]
                middle = ring[m % count, c, j]
                for i in range(width):
                    target[i] = kernel[0] * middle[i]
                for d in range(1, radius + 1):
                    weight = kernel[d]
                    if m - d >= 0:
                        row = ring[(m - d) % count, c, j]
                        for i in range(width):
                            target[i] += weight * row[i]
                    if m + d < depth:
                        row = ring[(m + d) % count, c, j]
                        for i in range(width):
                            target[i] += weight * row[i]
                factor = norm_z[m]
                for i in range(width):
                    target[i] *= factor
                    length[i] += target[i] * target[i]
            for i in range(width):
                top = max(top, length[i])
        longest[m] = top


@functools.lru_cache(maxsize=64)
def _kernel(sigma: float) -> np.ndarray:
    """One-sided weights of a Gaussian."""
    distance = np.arange(math.ceil(torch_ops.TRUNCATE * sigma) + 1)
    return np.exp(-(distance**2) / (2 * sigma**2)).astype(np.float32)


@functools.lru_cache(maxsize=64)
def _norms(n: int, sigma: float) -> np.ndarray:
    """One over the sum of the weights that fall onto a line of n voxels, for each of them."""
    kernel = _kernel(sigma)
    index = np.arange(n)
    total = np.full(n, kernel[0], np.float64)
    for d in range(1, len(kernel)):
        total += kernel[d] * ((index >= d).astype(float) + (index < n - d))
    return (1 / total).astype(np.float32)


def smooth(displacement: torch.Tensor, sigma: float) -> tuple[torch.Tensor, float]:
    """See `torch_ops.smooth`."""
    if sigma <= 0:
        return torch_ops.smooth(displacement, sigma)
    out = torch.empty_like(displacement, memory_format=torch.contiguous_format)
    depth, height, width = displacement.shape[1:]
    longest = np.zeros(depth, np.float32)
    norms = _norms(depth, sigma), _norms(height, sigma), _norms(width, sigma)
    source, target, kernel = array(displacement, 4), out.numpy(), _kernel(sigma)
    share(depth, lambda begin, end: _smooth(source, kernel, *norms, target, longest, begin, end))
    return out, float(np.sqrt(longest.max()))


def correlation_gradient(
    warped: torch.Tensor,
    fixed: torch.Tensor,
    fixed_mean: torch.Tensor,
    fixed_variance: torch.Tensor,
    *,
    window: int,
    epsilon: float,
    mask: torch.Tensor | None,
) -> tuple[torch.Tensor, float]:
    """See `torch_ops.correlation_gradient`."""
    radius = window // 2
    w, f, mean, variance = (array(t, 3) for t in (warped, fixed, fixed_mean, fixed_variance))
    if not w.shape == f.shape == mean.shape == variance.shape:
        raise ValueError(f"all images must have one shape, got {w.shape}, {f.shape}, {mean.shape}, {variance.shape}")
    weight = np.empty((0, 1, 1), np.float32) if mask is None else array(mask, 3)
    depth = w.shape[0]
    factors, gradient = (
        np.empty((3, *w.shape), np.float32),
        torch.empty(3, *w.shape, dtype=torch.float32, device=warped.device),
    )
    similarity, e, target = np.zeros(depth), np.float32(epsilon), gradient.numpy()
    share(depth, lambda b, n: _window_factors(w, f, mean, variance, radius, e, factors, similarity, b, n))
    share(depth, lambda b, n: _gradient(w, f, factors, weight, radius, target, b, n))
    return gradient, float(similarity.sum() / w.size)
