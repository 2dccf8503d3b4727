"""Warping, composition, inversion and Jacobians of displacement fields, in torch alone.

Every displacement here is a tensor (B, 3, D, H, W): component c points along tensor axis c, in voxels of
the grid it lives on. Warping pulls, ``warped(x) = moving(x + u(x))``, and corner voxels of two resolutions
of the same grid coincide (align_corners=True). Nothing here knows millimetres: that is `geometry`.
All functions are differentiable unless they say otherwise.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
import torch.nn.functional as F

from LDRCore import sampling
from LDRCore.transforms import gradients, separable

_INTERPOLATIONS = {"linear": "bilinear", "nearest": "nearest"}  # torch calls trilinear sampling "bilinear"
_PADDINGS = ("zeros", "border")


def identity_grid(
    shape: Sequence[int], *, device: torch.device | str = "cpu", dtype: torch.dtype = torch.float32
) -> torch.Tensor:
    """Return the voxel coordinates of a grid.

    >>> identity_grid((4, 4, 4))[0, :, 1, 2, 3]
    tensor([1., 2., 3.])

    Args:
        shape: (D, H, W).

    Returns:
        (1, 3, D, H, W); channel c holds the voxel index along tensor axis c.
    """
    axes = [torch.arange(n, device=device, dtype=dtype) for n in shape]
    return torch.stack(torch.meshgrid(*axes, indexing="ij"))[None]


def _check_displacement(displacement: torch.Tensor, name: str = "displacement") -> None:
    if displacement.ndim != 5 or displacement.shape[1] != 3:
        raise ValueError(f"{name} must have shape (B, 3, D, H, W), got {tuple(displacement.shape)}")


def sample(
    image: torch.Tensor, coordinates_vox: torch.Tensor, *, interpolation: str = "linear", padding: str = "zeros"
) -> torch.Tensor:
    """Sample an image at voxel coordinates.

    Args:
        image: (B, C, D, H, W).
        coordinates_vox: (B or 1, 3, d, h, w), in voxels of `image`, component c along its tensor axis c.
        interpolation: "linear" or "nearest".
        padding: boundary condition: "zeros", or "border" (the nearest voxel's value).

    Returns:
        (B, C, d, h, w).

    Raises:
        ValueError: unknown interpolation or padding, or shapes that do not fit.
    """
    if interpolation not in _INTERPOLATIONS:
        raise ValueError(f"interpolation must be one of {sorted(_INTERPOLATIONS)}, got {interpolation!r}")
    if padding not in _PADDINGS:
        raise ValueError(f"padding must be one of {_PADDINGS}, got {padding!r}")
    if image.ndim != 5:
        raise ValueError(f"image must have shape (B, C, D, H, W), got {tuple(image.shape)}")
    _check_displacement(coordinates_vox, "coordinates_vox")
    if interpolation == "linear" and sampling.can_take(coordinates_vox[0, 0].numel(), image, coordinates_vox):
        points = coordinates_vox.expand(image.shape[0], -1, -1, -1, -1)
        return batch([sampling.at_points(i, p, padding) for i, p in zip(image, points, strict=True)])
    # grid_sample wants (x, y, z) = (W, H, D) in [-1, 1]
    size = torch.tensor(image.shape[2:], dtype=coordinates_vox.dtype, device=coordinates_vox.device)
    scale = (2.0 / (size - 1).clamp(min=1)).view(1, 3, 1, 1, 1)
    normalised = (coordinates_vox * scale - 1.0).flip(1).permute(0, 2, 3, 4, 1)
    if normalised.shape[0] != image.shape[0]:
        normalised = normalised.expand(image.shape[0], -1, -1, -1, -1)
    return F.grid_sample(
        image, normalised, mode=_INTERPOLATIONS[interpolation], padding_mode=padding, align_corners=True
    )


def affine_coordinates(matrix: torch.Tensor, shape: Sequence[int]) -> torch.Tensor:
    """Map every voxel of a grid into another grid by an affine map.

    Args:
        matrix: (B, 3, 4) or (3, 4); maps a voxel index of the output grid (tensor-axis order, homogeneous) to a
            voxel index of the sampled grid.
        shape: (D, H, W) of the output grid.

    Returns:
        (B, 3, D, H, W), ready for `sample`.
    """
    if matrix.shape[-2:] != (3, 4):
        raise ValueError(f"matrix must have shape (B, 3, 4), got {tuple(matrix.shape)}")
    matrix = matrix.reshape(-1, 3, 4)
    total = matrix[:, :, 3].view(-1, 3, 1, 1, 1)
    for axis, n in enumerate(shape):  # one broadcast sum per axis instead of a matrix product per voxel
        view = [1, 1, 1, 1, 1]
        view[2 + axis] = n
        line = torch.arange(n, device=matrix.device, dtype=matrix.dtype).view(view)
        total = total + matrix[:, :, axis].view(-1, 3, 1, 1, 1) * line
    return total


def warp(
    image: torch.Tensor, displacement: torch.Tensor, *, interpolation: str = "linear", padding: str = "zeros"
) -> torch.Tensor:
    """Warp an image by a displacement: ``warped(x) = image(x + u(x))``.

    >>> image = torch.arange(4.0).view(1, 1, 1, 1, 4)
    >>> shift = torch.tensor([0.0, 0.0, 0.5]).view(1, 3, 1, 1, 1).expand(1, 3, 1, 1, 4)  # half a voxel along W
    >>> warp(image, shift, padding="border").flatten()
    tensor([0.5000, 1.5000, 2.5000, 3.0000])

    Args:
        image: (B, C, D, H, W).
        displacement: (B, 3, D, H, W) in voxels of the same grid.
        interpolation: "linear", or "nearest" for labels (no gradient to the displacement).
        padding: "zeros" or "border", as in `sample`.

    Returns:
        (B, C, D, H, W).

    Raises:
        ValueError: the two grids differ.
    """
    _check_displacement(displacement)
    if image.shape[2:] != displacement.shape[2:]:
        raise ValueError(
            "image and displacement must share one grid, "
            f"got {tuple(image.shape[2:])} and {tuple(displacement.shape[2:])}"
        )
    if _samples_fast(interpolation, padding, image, displacement):
        return batch([sampling.displaced(i, u, padding) for i, u in zip(image, displacement, strict=True)])
    if (interpolation, padding) == ("linear", "zeros") and gradients.can_take(image, displacement):
        return gradients.warp(image, displacement)
    grid = identity_grid(displacement.shape[2:], device=displacement.device, dtype=displacement.dtype)
    return sample(image, grid + displacement, interpolation=interpolation, padding=padding)


def _samples_fast(interpolation: str, padding: str, image: torch.Tensor, displacement: torch.Tensor) -> bool:
    """Return whether `sampling` can warp a batch."""
    known = interpolation == "linear" and padding in _PADDINGS and image.shape[0] == displacement.shape[0]
    return known and sampling.can_take(displacement[0, 0].numel(), image, displacement)


def batch(entries: Sequence[torch.Tensor]) -> torch.Tensor:
    """Stack tensors to one batch; a single one is not copied."""
    return entries[0][None] if len(entries) == 1 else torch.stack(list(entries))


def compose(first: torch.Tensor, second: torch.Tensor) -> torch.Tensor:
    """Compose two displacements: warp by `first`, then warp the result by `second`.

    Computes ``u(x) = u2(x) + u1(x + u2(x))`` (paper, Eq. 1-5), with linear interpolation and border padding of `first`.

    >>> ones = torch.ones(1, 3, 2, 2, 2)
    >>> compose(ones, 2 * ones).unique()
    tensor([3.])

    Args:
        first: u1, (B, 3, D, H, W), voxels.
        second: u2, of the same shape.
    """
    _check_displacement(first, "first")
    if first.shape == second.shape and _samples_fast("linear", "border", first, second):
        return batch([sampling.composed(u1, u2) for u1, u2 in zip(first, second, strict=True)])
    return second + warp(first, second, padding="border")


def upsample(displacement: torch.Tensor, shape: Sequence[int]) -> torch.Tensor:
    """Resample a displacement on a finer or coarser grid with the same corners.

    Vectors are scaled by (out - 1) / (in - 1) along each axis, to voxels of the new grid.

    >>> upsample(torch.ones(1, 3, 2, 2, 2), (4, 3, 2))[0, :, 0, 0, 0]
    tensor([3., 2., 1.])

    Args:
        displacement: (B, 3, d, h, w) in voxels of its grid.
        shape: (D, H, W) of the new grid.

    Returns:
        (B, 3, D, H, W) in voxels of the new grid.
    """
    _check_displacement(displacement)
    old = displacement.shape[2:]
    if tuple(old) == tuple(shape):
        return displacement
    factor = displacement.new_tensor([(n - 1) / max(m - 1, 1) for n, m in zip(shape, old, strict=True)])
    return separable.interpolate(displacement * factor.view(3, 1, 1, 1), shape)


def warp_by_coarse(image: torch.Tensor, displacement: torch.Tensor) -> torch.Tensor:
    """Warp an image by a displacement on a coarser grid with the same corners: ``warp(image, upsample(u))``.

    Without gradients on a CPU this is one pass, and the displacement at the image's size is never whole in memory.

    Args:
        image: (B, C, D, H, W).
        displacement: (B, 3, d, h, w) in voxels of its own grid.

    Returns:
        (B, C, D, H, W), zero outside the image.
    """
    _check_displacement(displacement)
    shape = tuple(image.shape[2:])
    if image.shape[2:] == displacement.shape[2:]:
        return warp(image, displacement)
    if image.shape[1] != 1 or not sampling.can_take(image[0, 0].numel(), image, displacement):
        return warp(image, upsample(displacement, shape))
    ratio = np.array([(n - 1) / max(m - 1, 1) for n, m in zip(shape, displacement.shape[2:], strict=True)])
    coarse_from_fine = np.diag([*(1 / r if r else 1.0 for r in ratio), 1.0])
    scaled = displacement * torch.from_numpy(ratio).to(displacement).view(3, 1, 1, 1)
    pairs = zip(image[:, 0], scaled, strict=True)
    return batch([sampling.on_lattice(i, shape, np.eye(4), u, coarse_from_fine)[None] for i, u in pairs])


def integrate(velocity: torch.Tensor, steps: int = 7) -> torch.Tensor:
    """Integrate a stationary velocity field to time 1, by scaling and squaring.

    Args:
        velocity: (B, 3, D, H, W), voxels per unit time.
        steps: number of squarings; the field is first divided by 2**steps.
    """
    if steps < 0:
        raise ValueError(f"steps must be 0 or more, got {steps}")
    displacement = velocity / 2**steps
    for _ in range(steps):
        displacement = compose(displacement, displacement)
    return displacement


def invert(
    displacement: torch.Tensor, *, iterations: int = 50, tolerance_vox: float = 1e-3
) -> tuple[torch.Tensor, float]:
    """Invert a displacement: find v with ``(id + u)(id + v) = id`` by iterating ``v <- v - w (v + u(x + v))``.

    The damping w starts at 1. It is halved at each voxel where a step did not lower the residual; that step is taken
    back. Only voxels above the tolerance are iterated; the few left after 20 iterations, where the field is steep, get
    Newton steps. Where the field folds no inverse exists, and the residual is large. Not differentiable.

    Args:
        displacement: u, (B, 3, D, H, W), voxels, with border padding.
        iterations: at most so many.
        tolerance_vox: a voxel is done when ``|v(x) + u(x + v(x))|`` is not larger.

    Returns:
        (v, residual): v of u's shape, and the largest ``|v(x) + u(x + v(x))|`` in voxels over the voxels x with
        x + v(x) inside the grid.
    """
    _check_displacement(displacement)
    with torch.no_grad():
        pairs = [_invert_one(u[None], iterations, tolerance_vox) for u in displacement]
    return torch.cat([v for v, _ in pairs]), max(residual for _, residual in pairs)


_NEWTON_AFTER = 20  # fixed-point iterations of `invert` before Newton steps


def _newton_step(displacement: torch.Tensor, points: torch.Tensor, error: torch.Tensor) -> torch.Tensor:
    """Compute (I + du/dx)^-1 e at points (3, N), du/dx by central differences over half a voxel each way."""
    offsets = 0.5 * torch.eye(3, device=points.device, dtype=points.dtype)
    columns = []
    for offset in offsets:
        both = torch.cat((points + offset[:, None], points - offset[:, None]), dim=1).view(1, 3, 1, 1, -1)
        plus, minus = sample(displacement, both, padding="border").view(3, -1).chunk(2, dim=1)
        columns.append(plus - minus + 2 * offset[:, None])
    jacobian = torch.stack(columns).permute(2, 1, 0)  # (N, component, axis)
    solved = torch.linalg.solve_ex(jacobian, error.T[:, :, None])[0][:, :, 0].T
    return torch.where(torch.isfinite(solved), solved, error).clamp(-4, 4)


def _invert_one(displacement: torch.Tensor, iterations: int, tolerance_vox: float) -> tuple[torch.Tensor, float]:
    """Invert a displacement (1, 3, D, H, W), see `invert`."""
    shape = displacement.shape[2:]
    grid = identity_grid(shape, device=displacement.device, dtype=displacement.dtype).reshape(3, -1)

    def residual_vector(points: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        mapped = (points + v).view(1, 3, 1, 1, -1)
        return v + sample(displacement, mapped, padding="border").view(3, -1)

    inverse = torch.zeros_like(grid)
    error = residual_vector(grid, inverse)
    size = error.norm(dim=0)
    active = (size > tolerance_vox).nonzero()[:, 0]
    damping = torch.ones_like(size)
    for iteration in range(iterations):
        if not len(active):
            break
        step = error[:, active]
        if iteration == _NEWTON_AFTER:
            damping[active] = 1.0
        if iteration >= _NEWTON_AFTER:
            step = _newton_step(displacement, grid[:, active] + inverse[:, active], step)
        tried = inverse[:, active] - damping[active] * step
        new_error = residual_vector(grid[:, active], tried)
        new_size = new_error.norm(dim=0)
        better = new_size < size[active]
        helped = active[better]
        inverse[:, helped] = tried[:, better]
        error[:, helped] = new_error[:, better]
        size[helped] = new_size[better]
        damping[active[~better]] *= 0.5
        active = active[size[active] > tolerance_vox]
    upper = torch.tensor(shape, device=grid.device, dtype=grid.dtype)[:, None] - 1
    target = grid + inverse
    inside = ((target >= 0) & (target <= upper)).all(dim=0)
    residual = float(size[inside].max()) if bool(inside.any()) else 0.0
    return inverse.view(1, 3, *shape), residual


def affine_to_displacement(matrix: torch.Tensor, translation: torch.Tensor, shape: Sequence[int]) -> torch.Tensor:
    """Make the displacement of an affine map about the grid's centre c: ``x + u(x) = c + A (x - c) + b``.

    Args:
        matrix: A, (B, 3, 3), in tensor-axis order.
        translation: b, (B, 3), in voxels of the grid.
        shape: (D, H, W).

    Returns:
        (B, 3, D, H, W), voxels.
    """
    if matrix.ndim != 3 or matrix.shape[1:] != (3, 3):
        raise ValueError(f"matrix must have shape (B, 3, 3), got {tuple(matrix.shape)}")
    if translation.shape != (matrix.shape[0], 3):
        raise ValueError(f"translation must have shape ({matrix.shape[0]}, 3), got {tuple(translation.shape)}")
    difference = matrix - torch.eye(3, device=matrix.device, dtype=matrix.dtype)
    centre = (torch.tensor(tuple(shape), device=matrix.device, dtype=matrix.dtype) - 1) / 2
    offset = translation - difference @ centre
    return affine_coordinates(torch.cat((difference, offset[:, :, None]), dim=2), shape)


def jacobian_determinant(displacement: torch.Tensor) -> torch.Tensor:
    """Compute det(I + du/dx) at every voxel: central differences, one-sided at the borders (as numpy.gradient).

    >>> displacement = torch.zeros(1, 3, 3, 3, 3)
    >>> displacement[:, 0] = 0.5 * torch.arange(3.0).view(3, 1, 1)  # the first axis is stretched by 1.5
    >>> jacobian_determinant(displacement).unique()
    tensor([1.5000])

    Args:
        displacement: (B, 3, D, H, W), voxels; every axis needs at least 2 voxels.

    Returns:
        (B, 1, D, H, W); 1 where nothing changes, below 1 shrinking, 0 or less folding.
    """
    _check_displacement(displacement)
    if min(displacement.shape[2:]) < 2:
        raise ValueError(f"every axis needs at least 2 voxels, got grid {tuple(displacement.shape[2:])}")
    du = torch.gradient(displacement, dim=(2, 3, 4))  # du[a][:, c] = d u_c / d x_a
    rows = [[du[a][:, c] + 1 if a == c else du[a][:, c] for a in range(3)] for c in range(3)]
    return determinant(rows)[:, None]


def determinant(matrix: torch.Tensor | Sequence[Sequence[torch.Tensor]]) -> torch.Tensor:
    """Return the determinants of 3x3 matrices whose entries are tensors of one shape."""
    (a, b, c), (d, e, f), (g, h, i) = matrix
    return a * (e * i - f * h) - b * (d * i - f * g) + c * (d * h - e * g)


def folding_count(displacement: torch.Tensor) -> int:
    """Count the voxels with a non-positive Jacobian determinant (paper, Table IV). Not differentiable."""
    return int((jacobian_determinant(displacement.detach()) <= 0).sum())


def folding_fraction(displacement: torch.Tensor) -> float:
    """Return the share of voxels, 0 to 1, with a non-positive Jacobian determinant. Not differentiable."""
    determinant = jacobian_determinant(displacement.detach())
    return float((determinant <= 0).float().mean())
