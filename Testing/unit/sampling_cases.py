"""Images, points and expected values that the tests of sampling share."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from LDRCore import sampling

BACKENDS = ("torch", "numba")


def use_backend(name: str) -> Iterator[str]:
    """Use a backend until the fixture ends; skip where it cannot be used."""
    with sampling.forced(name):
        if sampling.backend_name() != name:
            pytest.skip("needs the package numba (pip install 'LDRCore[fast]')")
        yield name


def smooth(*shape: int, seed: int = 0) -> torch.Tensor:
    """Noise (C, D, H, W) of low frequency, 0 to 1."""
    generator = torch.Generator().manual_seed(seed)
    coarse = torch.rand(1, shape[0], *(max(1, n // 6) for n in shape[1:]), generator=generator)
    return F.interpolate(coarse, size=shape[1:], mode="trilinear", align_corners=True)[0]


def exact(image: torch.Tensor, coordinates: torch.Tensor, padding: str) -> torch.Tensor:
    """Sample by torch's sampler of volumes in float64: image (C, D, H, W), coordinates (3, n).

    Along an axis of one voxel torch ignores the coordinate, so there the zeros about the image are made by hand.
    """
    if padding == "zeros" and 1 in image.shape[1:]:
        return exact(F.pad(image, (1,) * 6), coordinates + 1, "border")
    size = torch.tensor(image.shape[1:], dtype=torch.float64)[:, None]
    normalised = (2 * coordinates.double() / (size - 1).clamp_min(1) - 1).flip(0).T[None, None, None]
    values = F.grid_sample(image[None].double(), normalised, padding_mode=padding, align_corners=True)
    return values[0].flatten(1)


def scattered(shape: tuple[int, ...], count: int, seed: int = 0) -> torch.Tensor:
    """Points inside, on the faces, just outside and far away, (3, count)."""
    generator = torch.Generator().manual_seed(seed)
    size = torch.tensor(shape)[:, None]
    points = (torch.rand(3, count, generator=generator) * 1.4 - 0.2) * size
    points[:, : count // 4] = points[:, : count // 4].round()
    points[:, 0], points[:, 1], points[:, 2] = -1e4, 1e4, size[:, 0] - 1
    return points


def turned(degrees: float) -> np.ndarray:
    """Rotate in the plane of the first two axes: 4x4."""
    a = np.deg2rad(degrees)
    matrix = np.eye(4)
    matrix[:2, :2] = [[np.cos(a), -np.sin(a)], [np.sin(a), np.cos(a)]]
    return matrix


PARALLEL = np.array([[0.4, 0, 0, -1.5], [0, 0.3, 0, 0.7], [0, 0, 0.5, -2.0], [0, 0, 0, 1]])
FLIPPED_AND_PERMUTED = np.array([[0, 0, 0.3, 1.0], [-0.4, 0, 0, 9.0], [0, 0.35, 0, 0.5], [0, 0, 0, 1]])
TO_FIELD = {
    "parallel, field smaller than the lattice": PARALLEL,
    "flipped and permuted": FLIPPED_AND_PERMUTED,
    "oblique": turned(20) @ PARALLEL,
}
