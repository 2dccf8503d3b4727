"""Random changes of scans, made on the device where the tensors live.

Every function draws a few numbers from a numpy generator, so that a sample is determined by where that generator
starts, and does the work on its tensor's device. Random voxels come from torch's generator of that device: the same
seed gives the same noise again on the same kind of device, and other noise on another kind.

Smooth fields and blur are separable: one small matrix along each axis.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

from LDRCore.transforms import spatial


def along_axes(volume: torch.Tensor, matrices: Sequence[np.ndarray]) -> torch.Tensor:
    """Multiply the last three axes of a tensor by one matrix each, (out, in): (..., d, h, w) -> (..., D, H, W)."""
    for axis, matrix in enumerate(matrices, start=-3):
        factor = torch.from_numpy(matrix.astype(np.float32)).to(volume.device)
        volume = torch.movedim(torch.tensordot(volume, factor, dims=([axis], [1])), -1, axis)
    return volume.contiguous()


def spline_basis(size: int, control: int) -> np.ndarray:
    """(size, control + 2): cubic B-spline weights of voxel centres over `control` points from edge to edge.

    The first and last column belong to one more point beyond each edge. Voxel x lies at (x + 1/2) / size of the way.
    """
    where = (np.arange(size) + 0.5) * (control - 1) / size
    first = np.minimum(where.astype(int), control - 2)
    u = where - first
    weights = [(1 - u) ** 3, 3 * u**3 - 6 * u**2 + 4, -3 * u**3 + 3 * u**2 + 3 * u + 1, u**3]
    basis = np.zeros((size, control + 2))
    for k, weight in enumerate(weights):
        basis[np.arange(size), first + k] = weight / 6
    return basis


def free_form(
    rng: np.random.Generator,
    shape: Sequence[int],
    *,
    control: int = 5,
    amplitude: float = 0.4,
    device: torch.device | str = "cpu",
) -> torch.Tensor:
    """A random free-form deformation, as RCN and LDR deform the moving image while training.

    Cubic B-splines over `control`^3 points that span the grid; beyond its edge the points rest. Each coordinate of a
    point moves by amplitude * spacing * u^3, u uniform in (-1, 1), spacing the distance of the points. (Layout and
    numbers: the published code of Recursive Cascaded Networks, ICCV 2019.) Up to an amplitude of 0.4 such a deformation
    cannot fold (Choi and Lee, 2000), so labels and points can follow: sample images and labels at x + u(x) alike, and
    see `move_points`.

    Args:
        rng: draws 3 * control^3 numbers.
        shape: (D, H, W).
        control: points along an axis, at least 2.
        amplitude: largest movement, in distances between points.
        device: where the result lives.

    Returns:
        (1, 3, D, H, W), voxels.
    """
    if control < 2:
        raise ValueError(f"control must be at least 2, got {control}")
    moves = amplitude * rng.uniform(-1, 1, (1, 3, control, control, control)) ** 3
    moves *= (np.array(tuple(shape)) / (control - 1)).reshape(1, 3, 1, 1, 1)
    padded = np.pad(moves, ((0, 0), (0, 0), (1, 1), (1, 1), (1, 1)))
    points = torch.from_numpy(padded.astype(np.float32)).to(device)
    return along_axes(points, [spline_basis(n, control) for n in shape])


def move_points(points_vox: np.ndarray, displacement: torch.Tensor, iterations: int = 60) -> np.ndarray:
    """Where points of an image lie once the image was warped by a displacement that does not fold.

    The warped image shows at p what was at p + u(p), so a point q is found at the p with p + u(p) = q.

    Args:
        points_vox: (N, 3), tensor-axis order; NaN rows stay NaN.
        displacement: u, (1, 3, D, H, W) voxels, continued at its edge value.
        iterations: damped fixed-point steps.

    Returns:
        (N, 3) float64.
    """
    target = torch.from_numpy(np.nan_to_num(points_vox).T.copy()).float().to(displacement.device)
    where = target
    for _ in range(iterations):
        moved = spatial.sample(displacement, where.view(1, 3, 1, 1, -1), padding="border").view(3, -1)
        where = where - 0.6 * (where + moved - target)
    found = where.T.double().cpu().numpy()
    found[np.isnan(points_vox).any(axis=1)] = np.nan
    return found


def blur(image: torch.Tensor, sigma_vox: Sequence[float]) -> torch.Tensor:
    """Gaussian blur of (..., D, H, W), one width per axis (0 leaves it alone); the edge value continues outside."""
    matrices = []
    for size, sigma in zip(image.shape[-3:], sigma_vox, strict=True):
        reach = int(np.ceil(4 * sigma))  # no farther: weights that small would be denormal, and slow
        folded = np.zeros((size, size))
        for step in range(-reach, reach + 1):
            target = np.clip(np.arange(size) + step, 0, size - 1)
            np.add.at(folded, (np.arange(size), target), np.exp(-0.5 * (step / max(sigma, 1e-3)) ** 2))
        matrices.append(folded / folded.sum(axis=1, keepdims=True))
    return along_axes(image, matrices)


def bias_field(
    rng: np.random.Generator, shape: Sequence[int], sigma: float, device: torch.device | str, knots: int = 4
) -> torch.Tensor:
    """(1, 1, D, H, W) smooth positive field: exp of normal values (0, sigma) at knots^3 points, joined linearly."""
    values = torch.from_numpy(rng.normal(0, sigma, (1, 1, knots, knots, knots)).astype(np.float32)).to(device)
    hats = []
    for size in shape:
        where = np.linspace(0, knots - 1, size)
        hats.append(np.clip(1 - np.abs(where[:, None] - np.arange(knots)), 0, None))
    return along_axes(values, hats).exp()


def noise(rng: np.random.Generator, shape: Sequence[int], device: torch.device | str) -> torch.Tensor:
    """Standard normal values of a shape, made on the device."""
    generator = torch.Generator(device=device).manual_seed(int(rng.integers(2**62)))
    return torch.randn(tuple(shape), generator=generator, device=device)


def intensity(image: torch.Tensor, rng: np.random.Generator) -> torch.Tensor:
    """Gamma, gain, smooth bias field, blur and noise, as between scanners. Background is kept 0.

    Args:
        image: (1, 1, D, H, W) in 0..1.
        rng: one numpy generator.

    Returns:
        The same shape, in 0..1.
    """
    empty = image <= 0
    image = image.pow(float(np.exp(rng.normal(0, 0.2)))) * float(rng.uniform(0.8, 1.1))
    if rng.random() < 0.7:
        image = image * bias_field(rng, image.shape[2:], 0.12, image.device)
    if rng.random() < 0.3:
        image = blur(image, rng.uniform(0, 1, 3))
    if rng.random() < 0.7:
        image = image + noise(rng, image.shape, image.device) * float(rng.uniform(0, 0.04))
    return image.masked_fill(empty, 0).clamp(0, 1)
