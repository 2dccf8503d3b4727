"""Linear sampling at many points without gradients: one small interface, a backend in torch and one in numba.

`backend` chooses once: the compiled loops of `numba_loops` where numba is installed and passes its self-test, otherwise
`torch_cpu`. Both return the values of torch's own sampler of volumes to within the rounding of coordinates (some 1e-3
voxel at most). Where a gradient is required, `transforms.spatial.sample` uses torch's sampler.

Coordinates are voxels of the sampled image along tensor axes; nothing here knows millimetres. What lies outside of an
image is told by its `padding`: "border", the nearest voxel's value; "zeros", a fall to zero within one voxel of the
last centre, as torch has it; "half", ITK's rule: the nearest voxel's value up to half a voxel beyond the last centre,
then the fill value.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Protocol

import numpy as np
import torch

from LDRCore.sampling import jacobian, lattice, numba_check, torch_cpu, torch_points
from LDRCore.sampling.lattice import Block
from LDRCore.sampling.precise import PrecisePoints

PADDINGS = ("zeros", "border", "half")
BACKENDS = ("numba", "torch", "reference")
_MIN_POINTS = 1 << 15  # fewer are not worth the preparation

_forced: str | None = None
_loading = threading.Lock()  # so that two threads neither test numba twice nor tell twice of its failure


class Backend(Protocol):
    """What a backend offers; images are float32, tensors on one device."""

    def at_points(self, image: torch.Tensor, coordinates: torch.Tensor, padding: str) -> torch.Tensor:
        """(C, D, H, W) at (3, n): (C, n)."""

    def displaced(
        self, image: torch.Tensor, displacement: torch.Tensor, padding: str, out: torch.Tensor | None = None
    ) -> torch.Tensor:
        """``image(x + u(x))`` on the image's own grid: (C, D, H, W)."""

    def slabs(
        self,
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
        """See `slabs_on_lattice`."""


def backend_name(image: torch.Tensor | None = None) -> str:
    """Return "numba", "torch" or "reference": what samples here (an image of this kind, where given)."""
    forced_name = _forced  # read once, as another thread may change it
    if forced_name == "reference":
        return "reference"
    usable = image is None or (_is_plain(image) and image.numel() < 1 << 31)  # numba_loops count voxels in 32 bits
    return "numba" if usable and forced_name != "torch" and _numba_loops() is not None else "torch"


def backend(image: torch.Tensor) -> Backend:
    """Return the backend that samples this image."""
    loops = _numba_loops() if backend_name(image) == "numba" else None
    return loops if loops is not None else torch_cpu  # type: ignore[return-value]


@contextmanager
def forced(name: str) -> Iterator[None]:
    """Use a given backend within the block, in every thread: to compare, in benchmarks and tests.

    Args:
        name: "numba" (where it is usable), "torch", or "reference": torch's own sampler of volumes wherever it can be.
    """
    global _forced
    if name not in BACKENDS:
        raise ValueError(f"backend must be one of {BACKENDS}, got {name!r}")
    before, _forced = _forced, name
    try:
        yield
    finally:
        _forced = before


def _numba_loops() -> Backend | None:
    """The compiled loops; None where they cannot be used."""
    with _loading:
        return numba_check.load()  # type: ignore[return-value]


def can_take(count: int, *tensors: torch.Tensor) -> bool:
    """Return whether sampling at `count` points belongs here: many, float32 on a CPU, and no gradient is required."""
    gradient = torch.is_grad_enabled() and any(t.requires_grad for t in tensors)
    return _forced != "reference" and count >= _MIN_POINTS and not gradient and all(_is_plain(t) for t in tensors)


def _is_plain(tensor: torch.Tensor) -> bool:
    return tensor.device.type == "cpu" and tensor.dtype == torch.float32


def _check_padding(padding: str) -> None:
    if padding not in PADDINGS:
        raise ValueError(f"padding must be one of {PADDINGS}, got {padding!r}")


def at_points(image: torch.Tensor, coordinates: torch.Tensor, padding: str = "zeros") -> torch.Tensor:
    """Sample an image at given points.

    Args:
        image: (C, D, H, W) float32.
        coordinates: (3, ...), voxels of `image`, component c along its tensor axis c.
        padding: see the top of this file.

    Returns:
        (C, ...).
    """
    _check_padding(padding)
    flat = coordinates.reshape(3, -1)
    return backend(image).at_points(image, flat, padding).view(-1, *coordinates.shape[1:])


def displaced(
    image: torch.Tensor, displacement: torch.Tensor, padding: str = "zeros", out: torch.Tensor | None = None
) -> torch.Tensor:
    """Compute ``image(x + u(x))`` for every voxel x.

    Args:
        image: (C, D, H, W) float32.
        displacement: u, (3, D, H, W), voxels.
        padding: see the top of this file.
        out: (C, D, H, W) that the result is written to; a new tensor if not given.

    Returns:
        (C, D, H, W).
    """
    _check_padding(padding)
    return backend(image).displaced(image, displacement, padding, out)


def composed(first: torch.Tensor, second: torch.Tensor, out: torch.Tensor | None = None) -> torch.Tensor:
    """Compute ``u2(x) + u1(x + u2(x))``, u1 with border padding.

    Args:
        first, second: u1 and u2, (3, D, H, W) float32, voxels.
        out: as in `displaced`.

    Returns:
        (3, D, H, W).
    """
    return displaced(first, second, "border", out).add_(second)


def content_box(image: torch.Tensor, background: float) -> lattice.Box | None:
    """Return the box, in indices, that holds every voxel of an image (D, H, W) above `background`; None without any.

    Args:
        image: any type; no voxel is below `background`.
        background: its smallest value.
    """
    plane = image.amax(0) > background  # (H, W)
    depth = image.flatten(1).amax(1) > background
    found = [line.nonzero()[:, 0] for line in (depth, plane.any(1), plane.any(0))]
    if not len(found[0]):
        return None
    return np.array([float(n[0]) for n in found]), np.array([float(n[-1]) for n in found])


def on_lattice(
    image: torch.Tensor,
    shape: Sequence[int],
    matrix: np.ndarray,
    displacement: torch.Tensor | None = None,
    to_field: np.ndarray | None = None,
    *,
    padding: str = "zeros",
    content: lattice.Box | None = None,
) -> torch.Tensor:
    """Sample an image at ``M x + u(F x)`` for every index x of a lattice; see `slabs_on_lattice`.

    Args:
        padding, content: see `slabs_on_lattice`.

    Returns:
        (D', H', W') float32.
    """
    everything = content is None
    result = (torch.empty if everything else torch.zeros)(tuple(shape), dtype=torch.float32, device=image.device)
    for block, values in slabs_on_lattice(
        image, shape, matrix, displacement, to_field, padding=padding, content=content
    ):
        if everything and values.shape == result.shape:
            return values
        result[block] = values
    return result


def slabs_on_lattice(
    image: torch.Tensor,
    shape: Sequence[int],
    matrix: np.ndarray,
    displacement: torch.Tensor | None = None,
    to_field: np.ndarray | None = None,
    *,
    padding: str = "zeros",
    fill: float = 0.0,
    content: lattice.Box | None = None,
    precise: PrecisePoints | None = None,
) -> Iterator[tuple[Block, torch.Tensor]]:
    """Sample an image at ``M x + u(F x)`` for every index x of a lattice, u interpolated linearly on the way.

    One pass: neither the coordinates nor the field at the lattice's size are ever whole in memory.

    Args:
        image: (D, H, W) float32.
        shape: (D', H', W') of the lattice.
        matrix: M, 3x4 or 4x4, lattice index -> image index (tensor-axis order).
        displacement: u, (3, d, h, w), in voxels of `image`, with border padding.
        to_field: F, 4x4, lattice index -> index of `displacement`.
        padding, fill: see the top of this file.
        content: the box outside of which every voxel of the image has the fill value (see `content_box`). What can only
            meet that value is left out of the blocks, or is there as the fill value.
        precise: the same points in double precision, which decide at the edge of the image with padding "half"; from
            the other arguments if not given, so that u is as precise as its numbers.

    Yields:
        (block, values): a part of the lattice, and its values, float32.
    """
    _check_padding(padding)
    spans = None
    if content is not None:
        spans = _reachable(shape, matrix, displacement, content)
        last = np.array(image.shape) - 1
        if (content[0] > 0).all() and (content[1] < last).all():
            padding = "border"  # the same, as the outermost voxels have the fill value, and no edge need be found
    if padding != "half":
        precise = None
    elif precise is None:
        precise = PrecisePoints(matrix, displacement, np.eye(3), to_field)
    yield from backend(image).slabs(image, shape, matrix, displacement, to_field, padding, fill, spans, precise)


def _reachable(
    shape: Sequence[int], matrix: np.ndarray, displacement: torch.Tensor | None, content: lattice.Box
) -> lattice.Spans:
    """Where ``M x + u`` is less than a voxel away from the content."""
    reach = None
    if displacement is not None:
        reach = torch_points.component_bounds(displacement)
    return lattice.spans_within(matrix, shape, (content[0] - 1, content[1] + 1), reach)


def points_on_lattice(
    shape: Sequence[int], matrix: np.ndarray, displacement: torch.Tensor, to_field: np.ndarray, halo: int = 0
) -> Iterator[tuple[int, int, torch.Tensor]]:
    """Compute the points ``M x + u(F x)`` themselves, slab by slab; arguments as in `slabs_on_lattice`.

    Args:
        halo: so many slices more on either side of each slab, as far as the lattice has them.

    Yields:
        (start, stop, points): of slices start to stop, (3, slices, H', W'), component c of M's row c.
    """
    yield from jacobian.points_on_lattice(shape, matrix, displacement, to_field, halo)


def determinants_on_lattice(
    shape: Sequence[int], matrix: np.ndarray, displacement: torch.Tensor, to_field: np.ndarray
) -> Iterator[tuple[int, int, torch.Tensor]]:
    """Compute the Jacobian determinant of ``M x + u(F x)`` by x at every index x of a lattice, slab by slab.

    Central differences along the lattice's axes, one-sided at its borders.

    Args:
        shape: (D', H', W') of the lattice, 2 or more each.
        matrix: M, 4x4, lattice index -> target, of any unit.
        displacement: u, (3, d, h, w), in units of the target, with border padding.
        to_field: F, 4x4, lattice index -> index of `displacement`.

    Yields:
        (start, stop, determinant): of slices start to stop, (slices, H', W') float32.
    """
    if min(shape) < 2:
        raise ValueError(f"a lattice with a Jacobian must have 2 points or more along each axis, got {tuple(shape)}")
    if backend_name(displacement) == "numba" and lattice.parallel_axes(to_field, shape) is not None:
        from LDRCore.sampling import numba_jacobian

        yield from numba_jacobian.determinants(shape, matrix, displacement, to_field)
    else:
        yield from jacobian.determinants(shape, matrix, displacement, to_field)
