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
    """Sum a slice over boxes of edge 2 radius + 1, along both axes; zeros outside.

    line: (W + 2 radius), zeros at both ends.
    """
    height, width = source.shape
    middle = line[radius : radius + width]
    for j in range(height):
        row, target = source[j], out[j]
        if radius == 1 and 0 < j < height - 1:
            before, after = source[j - 1], source[j + 1]
            for i in range(width):
                middle[i] = before[i] + row[i] + after[i]
        else:
            for i in range(width):
                middle[i] = row[i]
            for d in range(1, radius + 1):
                if j - d >= 0:
                    _add(middle, source[j - d], np.float32(1))
                if j + d < height:
                    _add(middle, source[j + d], np.float32(1))
        if radius == 1:
            left, right = line[:width], line[2 : width + 2]
            for i in range(width):
                target[i] = left[i] + middle[i] + right[i]
        else:
            for i in range(width):
                target[i] = line[i]
            for d in range(1, 2 * radius + 1):
                _add(target, line[d : d + width], np.float32(1))


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
    line = np.zeros(width + 2 * radius, np.float32)
    totals = np.empty((3, width), np.float32)
    for k in range(begin - radius, end + radius):
        kept = ring[k % count]
        if k < 0 or k >= depth:
            kept[:] = 0
        else:
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


@inline
def _keep_sums(factors, k, radius, line, kept):  # type: ignore[no-untyped-def]
    """Sum slice k of the three factors over windows in its plane; zeros outside of the image."""
    if k < 0 or k >= factors.shape[1]:
        kept[:] = 0
    else:
        for n in range(3):
            _box_rows(factors[n, k], radius, line, kept[n])


@inline
def _force_row(w, f, ring, j, scale, force):  # type: ignore[no-untyped-def]
    """Row j of the gradient by the warped image, from the sums of the slices of a window."""
    for i in range(len(force)):
        force[i] = 0
    for r in range(len(ring)):
        p, pq, rest = ring[r, 0, j], ring[r, 1, j], ring[r, 2, j]
        for i in range(len(force)):
            force[i] += f[i] * p[i] - w[i] * pq[i] + rest[i]
    for i in range(len(force)):
        force[i] *= scale


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
    line, force = np.zeros(width + 2 * radius, np.float32), np.empty(width, np.float32)
    for k in range(begin - radius, end + radius):
        _keep_sums(factors, k, radius, line, ring[k % count])
        m = k - radius
        if m < begin:
            continue
        for j in range(height):
            w = warped[m, j]
            _force_row(w, fixed[m, j], ring, j, scale, force)
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
    _, height, width = warped.shape
    count = 2 * radius + 1
    scale = np.float32(2) / np.float32(count * count * count)
    ring = np.zeros((count, 3, height, width), np.float32)
    line = np.zeros(width + 2 * radius, np.float32)
    for k in range(begin - radius, end + radius):
        _keep_sums(factors, k, radius, line, ring[k % count])
        m = k - radius
        if m < begin:
            continue
        for j in range(height):
            _force_row(warped[m, j], fixed[m, j], ring, j, scale, out[m, j])


@inline
def _add_pair(target, a, b, weight):  # type: ignore[no-untyped-def]
    for n in range(len(target)):
        target[n] += weight * (a[n] + b[n])


@inline
def _add_pairs(target, a, b, c, d, e, f, near, middle, far):  # type: ignore[no-untyped-def]
    """Three pairs at once, as memory is what takes time."""
    for n in range(len(target)):
        target[n] += near * (a[n] + b[n]) + middle * (c[n] + d[n]) + far * (e[n] + f[n])


@inline
def _filter(source, first, step, kernel, target):  # type: ignore[no-untyped-def]
    """target[n]: the symmetric filter about source[first + n], neighbours `step` apart."""
    radius, middle, weight = len(kernel) - 1, source[first:], kernel[0]
    for n in range(len(target)):  # views that begin at 0, and plain factors: only so it becomes vector instructions
        target[n] = weight * middle[n]
    d = 1
    while d + 2 <= radius:
        o, p, q = d * step, (d + 1) * step, (d + 2) * step
        _add_pairs(
            target, source[first - o :], source[first + o :], source[first - p :], source[first + p :],
            source[first - q :], source[first + q :], kernel[d], kernel[d + 1], kernel[d + 2],
        )  # fmt: skip
        d += 3
    while d <= radius:
        _add_pair(target, source[first - d * step :], source[first + d * step :], kernel[d])
        d += 1


@loop
def _smooth(field, kernel, plane, norm_z, out, begin, end):  # type: ignore[no-untyped-def]
    """Smooth the slices begin ... end of (3, D, H, W) by a Gaussian.

    Rows lie one after the other with gaps of zeros between them, so that a slice is filtered in one go.

    kernel: one-sided, from the middle on. plane: (H, W + radius), normalises the weights along y and x, zero in the
    gaps. norm_z: normalises those along z.
    """
    _, depth, height, width = field.shape
    radius = len(kernel) - 1
    count, stride = 2 * radius + 1, width + radius
    size = height * stride
    rows = np.zeros(size + 2 * radius, np.float32)
    columns = np.zeros(size + 2 * radius * stride, np.float32)
    ring, total, factors = np.zeros((count, size), np.float32), np.empty(size, np.float32), plane.ravel()
    for c in range(3):
        for k in range(begin - radius, end + radius):
            kept = ring[k % count]
            if 0 <= k < depth:
                for j in range(height):
                    source, target = field[c, k, j], rows[radius + j * stride :]
                    for i in range(width):
                        target[i] = source[i]
                _filter(rows, radius, 1, kernel, columns[radius * stride : radius * stride + size])
                _filter(columns, radius * stride, stride, kernel, kept)
                for n in range(size):
                    kept[n] *= factors[n]
            else:
                kept[:] = 0
            m = k - radius
            if m < begin:
                continue
            middle, weight = ring[m % count], kernel[0]
            for n in range(size):
                total[n] = weight * middle[n]
            for d in range(1, radius + 1):
                _add_pair(total, ring[(m - d) % count], ring[(m + d) % count], kernel[d])
            for j in range(height):
                source, target = total[j * stride : j * stride + width], out[c, m, j]
                weight = norm_z[m]
                for i in range(width):
                    target[i] = weight * source[i]


@loop
def _largest_squares(field, out, begin, end):  # type: ignore[no-untyped-def]
    """out[k]: the largest squared length of a vector of slice k."""
    _, _, height, width = field.shape
    for k in range(begin, end):
        top = np.float32(0)
        for j in range(height):
            z, y, x = field[0, k, j], field[1, k, j], field[2, k, j]
            for i in range(width):
                top = max(top, z[i] * z[i] + y[i] * y[i] + x[i] * x[i])
        out[k] = top


def smooth(displacement: torch.Tensor, sigma: float, out: torch.Tensor | None = None) -> tuple[torch.Tensor, float]:
    """See `torch_ops.smooth`."""
    if sigma <= 0:
        return torch_ops.smooth(displacement, sigma)
    if out is None:
        out = torch.empty_like(displacement, memory_format=torch.contiguous_format)
    depth, height, width = displacement.shape[1:]
    longest, weights = np.zeros(depth, np.float32), torch_ops.gaussian(sigma)
    norm_z, norm_y, norm_x = (1 / np.array(torch_ops.totals(n, weights), np.float32) for n in (depth, height, width))
    plane = np.pad(norm_y[:, None] * norm_x, ((0, 0), (0, len(weights) - 1)))
    source, target, kernel = array(displacement, 4), array(out, 4), np.array(weights, np.float32)
    share(depth, lambda begin, end: _smooth(source, kernel, plane, norm_z, target, begin, end))
    share(depth, lambda begin, end: _largest_squares(target, longest, begin, end))
    return out, float(np.sqrt(longest.max()))


class Correlation:
    """See `torch_ops.Correlation`."""

    def __init__(self, fixed: torch.Tensor, window: int, epsilon: float) -> None:
        torch_ops.check_window(window)
        mean, variance = torch_ops.window_statistics(fixed, window, epsilon)
        self._fixed, self._mean, self._variance = (array(t, 3) for t in (fixed, mean, variance))
        self._radius, self._epsilon = window // 2, np.float32(epsilon)
        self._buffer = np.empty((3, *self._fixed.shape), np.float32)

    def gradient(
        self,
        warped: torch.Tensor,
        mask: torch.Tensor | None = None,
        out: torch.Tensor | None = None,
        windows: torch.Tensor | None = None,
    ) -> tuple[torch.Tensor, float]:
        """See `torch_ops.Correlation`."""
        similarity, *arguments = self._factors(warped, windows)
        weight = np.empty((0, 1, 1), np.float32) if mask is None else array(mask, 3)
        out = torch.empty(3, *warped.shape, dtype=torch.float32, device=warped.device) if out is None else out
        target = array(out, 4)
        share(len(warped), lambda b, n: _gradient(*arguments, weight, self._radius, target, b, n))
        return out, similarity

    def force(self, warped: torch.Tensor) -> tuple[float, torch.Tensor]:
        """See `torch_ops.Correlation`."""
        similarity, *arguments = self._factors(warped)
        force = np.empty(warped.shape, np.float32)
        share(len(force), lambda begin, end: _force(*arguments, self._radius, force, begin, end))
        return similarity, torch.from_numpy(force)

    def _factors(
        self, warped: torch.Tensor, windows: torch.Tensor | None = None
    ) -> tuple[float, np.ndarray, np.ndarray, np.ndarray]:
        """(mean similarity, warped, fixed, what `_window_factors` computes)."""
        w, f, factors = array(warped, 3), self._fixed, self._buffer
        if w.shape != f.shape:
            raise ValueError(f"both images must have one shape, got {w.shape} and {f.shape}")
        similarity = np.zeros(len(w))
        variance, count = self._variance, w.size
        if windows is not None:  # p is zero where the variance is infinite
            variance, count = np.where(windows.numpy(), variance, np.float32(np.inf)), int(windows.sum())
        arguments = w, f, self._mean, variance, self._radius, self._epsilon, factors, similarity
        share(len(w), lambda begin, end: _window_factors(*arguments, begin, end))
        return float(similarity.sum() / max(count, 1)), w, f, factors
