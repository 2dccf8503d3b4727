"""The steps of an iteration as compiled loops: the same as `torch_ops`, each in one or two passes over memory.

Each loop works on chunks of slices (begin ... end). What it needs of neighbouring slices is kept in a ring buffer of as
many slices as a window or a Gaussian is wide, so that every slice is read once a chunk.
"""

from __future__ import annotations

import numpy as np
import torch

from LDRCore.refinement import torch_ops
from LDRCore.sampling.numba_support import array, inline, loop, share


@inline
def _add(target, source, weight):  # type: ignore[no-untyped-def]
    """Add a weighted row to another; both begin at index 0, which the compiler makes vector instructions of."""
    for i in range(len(source)):
        target[i] += weight * source[i]


@inline
def _box_rows(source, radius, line, out):  # type: ignore[no-untyped-def]
    """Sum a slice over boxes of edge 2 radius + 1, along both axes; zeros outside."""
    height, width = source.shape
    for j in range(height):
        row = source[j]
        for i in range(width):
            line[i] = row[i]
        for d in range(1, radius + 1):
            _add(line[d:], row[: width - d], np.float32(1))
            _add(line[: width - d], row[d:], np.float32(1))
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
def _force(warped, fixed, factors, radius, out, begin, end):  # type: ignore[no-untyped-def]
    """Gradient of local correlation by the warped image, for the slices begin ... end."""
    depth, height, width = warped.shape
    count = 2 * radius + 1
    scale = np.float32(2) / np.float32(count * count * count)
    ring = np.zeros((count, 3, height, width), np.float32)
    line = np.empty(width, np.float32)
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
            w, f, force = warped[m, j], fixed[m, j], out[m, j]
            force[:] = 0
            for r in range(count):
                p, pq, rest = ring[r, 0, j], ring[r, 1, j], ring[r, 2, j]
                for i in range(width):
                    force[i] += f[i] * p[i] - w[i] * pq[i] + rest[i]
            for i in range(width):
                force[i] *= scale


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
                        _add(target[d:], source[: width - d], kernel[d])
                        _add(target[: width - d], source[d:], kernel[d])
                for j in range(height):
                    target, source = kept[c, j], rows[j]
                    for i in range(width):
                        target[i] = kernel[0] * source[i]
                    for d in range(1, radius + 1):
                        if j - d >= 0:
                            _add(target, rows[j - d], kernel[d])
                        if j + d < height:
                            _add(target, rows[j + d], kernel[d])
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
                target, source = out[c, m, j], ring[m % count, c, j]
                for i in range(width):
                    target[i] = kernel[0] * source[i]
                for d in range(1, radius + 1):
                    if m - d >= 0:
                        _add(target, ring[(m - d) % count, c, j], kernel[d])
                    if m + d < depth:
                        _add(target, ring[(m + d) % count, c, j], kernel[d])
                factor = norm_z[m]
                for i in range(width):
                    target[i] *= factor
                    length[i] += target[i] * target[i]
            for i in range(width):
                top = max(top, length[i])
        longest[m] = top


def smooth(displacement: torch.Tensor, sigma: float) -> tuple[torch.Tensor, float]:
    """See `torch_ops.smooth`."""
    if sigma <= 0:
        return torch_ops.smooth(displacement, sigma)
    out = torch.empty_like(displacement, memory_format=torch.contiguous_format)
    depth, height, width = displacement.shape[1:]
    longest = np.zeros(depth, np.float32)
    weights = torch_ops.gaussian(sigma)
    norms = [1 / np.array(torch_ops.totals(n, weights), np.float32) for n in (depth, height, width)]
    source, target, kernel = array(displacement, 4), out.numpy(), np.array(weights, np.float32)
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


def mean_correlation_force(
    warped: torch.Tensor,
    fixed: torch.Tensor,
    fixed_mean: torch.Tensor,
    fixed_variance: torch.Tensor,
    window: int,
    epsilon: float,
) -> tuple[float, torch.Tensor]:
    """See `torch_ops.mean_correlation_force`."""
    radius = window // 2
    w, f, mean, variance = (array(t, 3) for t in (warped, fixed, fixed_mean, fixed_variance))
    depth = w.shape[0]
    factors, force = np.empty((3, *w.shape), np.float32), np.empty(w.shape, np.float32)
    similarity, e = np.zeros(depth), np.float32(epsilon)
    share(depth, lambda b, n: _window_factors(w, f, mean, variance, radius, e, factors, similarity, b, n))
    share(depth, lambda b, n: _force(w, f, factors, radius, force, b, n))
    return float(similarity.sum() / w.size), torch.from_numpy(force)
