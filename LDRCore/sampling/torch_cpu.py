"""Linear sampling with torch alone, with bounded memory: slab by slab, so that temporaries stay in the cache."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

import numpy as np
import torch

from LDRCore.sampling import lattice
from LDRCore.sampling.lattice import Block
from LDRCore.sampling.precise import PrecisePoints
from LDRCore.sampling.torch_points import ListedPoints, OnGrid, Parallel, points_of_lattice
from LDRCore.sampling.torch_sampler import Edge, SliceSampler

SLAB_POINTS = 1 << 19  # sampled at once: about 20 MB of temporaries


def slab_points(device: torch.device) -> int:
    """Return how many points are sampled at once."""
    return SLAB_POINTS if device.type == "cpu" else 32 * SLAB_POINTS


def at_points(image: torch.Tensor, coordinates: torch.Tensor, padding: str) -> torch.Tensor:
    """See `sampling.at_points`; coordinates (3, n), result (C, n)."""
    sampler = SliceSampler(image, padding)
    result = image.new_empty(image.shape[0], coordinates.shape[1])
    slab = slab_points(image.device)
    for start in range(0, coordinates.shape[1], slab):
        part = coordinates[:, start : start + slab]
        buffer = sampler.buffer(part.shape[1])
        buffer[2], buffer[1], buffer[0] = part
        result[:, start : start + slab] = sampler.sample(part.shape[1])
    return result


def displaced(
    image: torch.Tensor, displacement: torch.Tensor, padding: str, out: torch.Tensor | None = None
) -> torch.Tensor:
    """See `sampling.displaced`."""
    depth, height, width = displacement.shape[1:]
    sampler, points = SliceSampler(image, padding), OnGrid(np.eye(4), displacement, displacement.shape[1:])
    result = image.new_empty(len(image), depth, height, width) if out is None else out
    slab = max(1, slab_points(image.device) // (height * width))
    for start in range(0, depth, slab):
        block = slice(start, min(start + slab, depth)), slice(0, height), slice(0, width)
        size = block[0].stop - start, height, width
        points.write(block, sampler.buffer(math.prod(size)).view(3, *size))
        result[:, block[0]] = sampler.sample(math.prod(size), points.bounds(block)).view(-1, *size)
    return result


def slabs(
    image: torch.Tensor,
    shape: Sequence[int],
    matrix: np.ndarray,
    displacement: torch.Tensor | None,
    to_field: np.ndarray | None,
    padding: str,
    fill: float,
    spans: lattice.Spans | None,
    precise: PrecisePoints | None,
) -> Iterator[tuple[Block, torch.Tensor]]:
    """See `sampling.slabs_on_lattice`."""
    depth, height, width = shape
    slab = max(1, slab_points(image.device) // (height * width))
    sampler = SliceSampler(image[None], padding, fill)
    points = points_of_lattice(matrix, displacement, to_field, shape, image.device)
    for start in range(0, depth, slab):
        stop = min(start + slab, depth)
        rows, columns = (slice(0, height), slice(0, width)) if spans is None else spans.window(start, stop)
        block = slice(start, stop), rows, columns
        size = [part.stop - part.start for part in block]
        count = size[0] * size[1] * size[2]
        if count == 0:
            continue
        if spans is None or isinstance(points, Parallel | OnGrid):
            points.write(block, sampler.buffer(count).view(3, *size))
            edge = _edge(precise, shape, block, image)
            yield block, sampler.sample(count, points.bounds(block), edge).view(size)
            continue
        listed = ListedPoints(spans, block, image.device)
        values = image.new_full((count,), fill)
        points.write_listed(block, listed, sampler.buffer(listed.count))
        edge = _edge(precise, shape, block, image, listed.index)
        values.index_copy_(0, listed.index, sampler.sample(listed.count, points.bounds(block), edge)[0])
        yield block, values.view(size)


def _edge(
    precise: PrecisePoints | None,
    shape: Sequence[int],
    block: Block,
    image: torch.Tensor,
    listed: torch.Tensor | None = None,
) -> Edge | None:
    """How the points of a block are decided at the edge of the image.

    Args:
        precise, shape: see `slabs`.
        block: of the lattice.
        image: (D, H, W).
        listed: of each point its index in the flat block; None where all are sampled.
    """
    if precise is None:
        return None
    size = [part.stop - part.start for part in block]
    start = np.array([[part.start] for part in block])

    def inside(points: torch.Tensor) -> torch.Tensor:
        flat = (points if listed is None else listed[points]).cpu().numpy()
        index = np.stack(np.unravel_index(flat, size)) + start
        return torch.from_numpy(precise.inside(index, image.shape)).to(image)

    return Edge(precise.band(shape), inside)
