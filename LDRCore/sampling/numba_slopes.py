"""A warp with its derivative by the displacement as one compiled loop. Importing this file imports numba."""

from __future__ import annotations

import numpy as np
import torch

from LDRCore.sampling.numba_support import array, inline, loop, share


@inline
def _voxel(image, z, y, x):  # type: ignore[no-untyped-def]
    """The value at an index, zero outside."""
    depth, height, width = image.shape
    if 0 <= z < depth and 0 <= y < height and 0 <= x < width:
        return image[z, y, x]
    return np.float32(0)


@loop
def _sample(image, displacement, values, slopes, begin, end):  # type: ignore[no-untyped-def]
    """Values and derivatives for the slices begin ... end; zeros outside, and where a coordinate is not a number."""
    depth, height, width = image.shape
    one = np.float32(1)
    for k in range(begin, end):
        for j in range(height):
            for i in range(width):
                z = np.float32(k) + displacement[0, k, j, i]
                y = np.float32(j) + displacement[1, k, j, i]
                x = np.float32(i) + displacement[2, k, j, i]
                if not (-1 < z < depth and -1 < y < height and -1 < x < width):
                    values[k, j, i] = 0
                    slopes[0, k, j, i] = slopes[1, k, j, i] = slopes[2, k, j, i] = 0
                    continue
                # truncation after adding 1 is the floor, as no coordinate is below -1
                z0, y0, x0 = int(z + one) - 1, int(y + one) - 1, int(x + one) - 1
                a, b, c = z - np.float32(z0), y - np.float32(y0), x - np.float32(x0)
                if 0 <= z0 < depth - 1 and 0 <= y0 < height - 1 and 0 <= x0 < width - 1:
                    v000, v001 = image[z0, y0, x0], image[z0, y0, x0 + 1]
                    v010, v011 = image[z0, y0 + 1, x0], image[z0, y0 + 1, x0 + 1]
                    v100, v101 = image[z0 + 1, y0, x0], image[z0 + 1, y0, x0 + 1]
                    v110, v111 = image[z0 + 1, y0 + 1, x0], image[z0 + 1, y0 + 1, x0 + 1]
                else:
                    v000, v001 = _voxel(image, z0, y0, x0), _voxel(image, z0, y0, x0 + 1)
                    v010, v011 = _voxel(image, z0, y0 + 1, x0), _voxel(image, z0, y0 + 1, x0 + 1)
                    v100, v101 = _voxel(image, z0 + 1, y0, x0), _voxel(image, z0 + 1, y0, x0 + 1)
                    v110, v111 = _voxel(image, z0 + 1, y0 + 1, x0), _voxel(image, z0 + 1, y0 + 1, x0 + 1)
                d00, d01, d10, d11 = v001 - v000, v011 - v010, v101 - v100, v111 - v110
                w00, w01, w10, w11 = v000 + c * d00, v010 + c * d01, v100 + c * d10, v110 + c * d11
                low, high = w00 + b * (w01 - w00), w10 + b * (w11 - w10)
                values[k, j, i] = low + a * (high - low)
                slopes[0, k, j, i] = high - low
                slopes[1, k, j, i] = (one - a) * (w01 - w00) + a * (w11 - w10)
                slopes[2, k, j, i] = (one - a) * (d00 + b * (d01 - d00)) + a * (d10 + b * (d11 - d10))


def displaced_with_slopes(image: torch.Tensor, displacement: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Compute ``image(x + u(x))``, zeros outside, and its derivative by u(x).

    Args:
        image: (D, H, W) float32 on the CPU.
        displacement: u, (3, D, H, W), voxels.

    Returns:
        (D, H, W) and (3, D, H, W).
    """
    source, field = array(image, 3), array(displacement, 4)
    values, slopes = np.empty(source.shape, np.float32), np.empty(field.shape, np.float32)
    share(source.shape[0], lambda begin, end: _sample(source, field, values, slopes, begin, end))
    return torch.from_numpy(values), torch.from_numpy(slopes)
