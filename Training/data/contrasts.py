"""Other sequences and other protocols from one scan: contrast, slice thickness, field of view.

For models that shall not mind any of these: each image of a pair draws its own. As in `augmentation`, every function
draws a few numbers from a numpy generator and works on its tensor's device. Images are (1, 1, D, H, W) in 0..1.
"""

from __future__ import annotations

import numpy as np
import torch

from LDRCore.pipeline import preprocess
from Training.data import augmentation

AIR = 0.06  # of a normalised image; below it lies background
KNOTS = 5  # of a random curve, from the darkest tissue to the brightest
CURVES = {  # brightness of what is 0.06, 0.25, 0.45, 0.7, 0.9 and 1 in a T1 image: fluid, grey, white matter, fat
    "inverted": (1.0, 0.85, 0.65, 0.4, 0.2, 0.1),
    "T2": (0.15, 1.0, 0.75, 0.45, 0.3, 0.35),
    "FLAIR": (0.05, 0.1, 0.85, 0.65, 0.5, 0.9),
}
_LEVELS = (AIR, 0.25, 0.45, 0.7, 0.9, 1.0)
MAX_SLICE_MM = 5.0
MOST_CUT = 0.5  # of an image's content along an axis


def remap(rng: np.random.Generator, image: torch.Tensor, *, stripped: bool = False) -> torch.Tensor:
    """Send an image's brightness through one of `CURVES`, each a little changed, or in one case of four a random one.

    Background stays 0; in one inverted image of two with its skull it is inverted too.
    """
    names = [*CURVES, "random"]
    name = names[int(rng.integers(len(names)))]
    if name == "random":
        values = np.interp(_LEVELS, np.linspace(AIR, 1, KNOTS), rng.uniform(0, 1, KNOTS))
    else:
        values = np.clip(np.array(CURVES[name]) + rng.normal(0, 0.08, len(_LEVELS)), 0, 1)
    bright_background = rng.random() < 0.5 and name == "inverted" and not stripped
    changed = _through(image, np.array(_LEVELS), values)
    changed = torch.where(image > AIR, changed, float(values[0]) if bright_background else 0.0)
    return preprocess.normalise(changed, *preprocess.intensity_range(changed))


def _through(image: torch.Tensor, levels: np.ndarray, values: np.ndarray) -> torch.Tensor:
    """Interpolate linearly in a table, beyond its ends by the end's value."""
    x, y = (torch.from_numpy(a.astype(np.float32)).to(image.device) for a in (levels, values))
    index = torch.searchsorted(x, image.contiguous()).clamp(1, len(x) - 1)
    share = ((image - x[index - 1]) / (x[index] - x[index - 1])).clamp(0, 1)
    return y[index - 1] + share * (y[index] - y[index - 1])


def thick_slices(rng: np.random.Generator, image: torch.Tensor, spacing_mm: float) -> torch.Tensor:
    """Average over slices of up to `MAX_SLICE_MM` along an axis at random, and interpolate between their middles."""
    axis = int(rng.integers(3))
    size, thickness = image.shape[2 + axis], rng.uniform(1, max(MAX_SLICE_MM / spacing_mm, 1.0))
    matrices = [np.eye(n) for n in image.shape[2:]]
    matrices[axis] = slice_matrix(size, max(2, int(size / thickness)))
    return augmentation.along_axes(image, matrices)


def slice_matrix(size: int, count: int) -> np.ndarray:
    """(size, size): averages `size` voxels over `count` slices, and interpolates linearly between these.

    Beyond the middle of the first and last slice their values go on.
    """
    edges = np.linspace(0, size, count + 1)
    voxel = np.arange(size)
    covered = np.minimum(edges[1:, None], voxel + 1) - np.maximum(edges[:-1, None], voxel)
    average = np.clip(covered, 0, None) / (size / count)
    position = np.clip((voxel + 0.5) / size * count - 0.5, 0, count - 1)
    between = np.clip(1 - np.abs(position[:, None] - np.arange(count)), 0, None)
    matrix: np.ndarray = between @ average
    return matrix


def field_of_view(rng: np.random.Generator, image: torch.Tensor) -> torch.Tensor:
    """Choose a field of view that ends within the content: 1 inside, 0 beyond one face, (1, 1, D, H, W).

    The face is drawn at random, those across axis 0 twice as often; up to `MOST_CUT` of the content lies beyond.
    """
    axis, upper = int(rng.choice(3, p=(0.5, 0.25, 0.25))), rng.random() < 0.5
    index = (image[0, 0] > AIR).movedim(axis, 0).flatten(1).any(1).nonzero()[:, 0]
    seen = torch.ones_like(image)
    if not len(index):
        return seen
    first, last = int(index[0]), int(index[-1])
    beyond = round(float(rng.uniform(0, MOST_CUT)) * (last - first + 1))
    size = image.shape[2 + axis]
    if upper:
        seen.narrow(2 + axis, last + 1 - beyond, size - last - 1 + beyond).zero_()
    else:
        seen.narrow(2 + axis, 0, first + beyond).zero_()
    return seen
