"""An image prepared for linear sampling with torch alone, as fast as it allows on a CPU.

On a CPU torch's sampler of volumes takes one point after the other, while its sampler of pictures uses the vector
units but shares only whole batch entries out between threads. So a volume is sampled here as a tall picture, its
slices one below the other, two neighbouring slices and all components at once (of a single image nothing is copied),
with one batch entry a thread. On other devices torch's sampler of volumes does the same.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F

_RUN = 128  # points that are looked at together

Bounds = Sequence[tuple[float, float]]
"""For x, y and z: no point is lower, no point is higher."""


class Edge(NamedTuple):
    """How points at the edge of an image are decided with padding "half".

    Attributes:
        band: how wrong coordinates may be, voxels.
        inside: tells of points, by their numbers (n,) int64, which lie inside: 1 or 0, (n,) float32.
    """

    band: float
    inside: Callable[[torch.Tensor], torch.Tensor]


class SliceSampler:
    """An image prepared for sampling at slabs of points."""

    def __init__(self, image: torch.Tensor, padding: str = "border", fill: float = 0.0) -> None:
        """Prepare.

        Args:
            image: (C, D, H, W) float32.
            padding, fill: see `LDRCore.sampling`.
        """
        self._margin = int(padding == "zeros")  # a shell of zeros, whose border padding is then what lies outside
        self.image = F.pad(image, (1,) * 6) if self._margin else image.contiguous()
        self._padding, self._fill = padding, fill
        self._last = [float(n - 1) for n in image.shape[:0:-1]]  # x, y, z
        on_cpu = image.device.type == "cpu"
        self._parts = torch.get_num_threads() if on_cpu else 1
        self._pairs = self._with_next_slices() if on_cpu else self.image
        self._buffer = torch.empty(3, 0, dtype=torch.float32, device=image.device)
        self._inside_buffer, self._work = self._buffer[:2]

    def _with_next_slices(self) -> torch.Tensor:
        """Channels and, as further channels, the slice above each: (2 C, D or D - 1, H, W); of one image a view."""
        channels, depth, height, width = self.image.shape
        if depth == 1:
            return self.image.expand(2, -1, -1, -1, -1).flatten(0, 1)
        if channels == 1:
            strides = height * width, height * width, width, 1
            return self.image.as_strided((2, depth - 1, height, width), strides, self.image.storage_offset())
        return torch.cat((self.image[:, :-1], self.image[:, 1:]))

    def buffer(self, count: int) -> torch.Tensor:
        """Return a buffer for the (x, y, z) coordinates of `count` points, (3, count), to fill before `sample`."""
        unit = self._parts * _RUN  # every thread gets as many, in whole runs
        size = -(-count // unit) * unit
        if self._buffer.numel() != 3 * size:
            self._buffer = self._buffer.new_empty(3, size)
            self._work = self._buffer.new_empty(size)
            self._inside_buffer = self._buffer.new_empty(size if self._padding == "half" else 0)
        return self._buffer[:, :count]

    def sample(self, count: int, bounds: Bounds | None = None, edge: Edge | None = None) -> torch.Tensor:
        """Sample at the points in the buffer, whose coordinates are overwritten.

        Args:
            count: as given to `buffer`.
            bounds: of the points; computed if not given. NaN where a point is not a number.
            edge: with padding "half", decides where the coordinates alone cannot.

        Returns:
            (C, count).
        """
        xyz = self._buffer
        xyz[:, count:] = xyz[:, count - 1 : count]
        if bounds is None:
            bounds = [(float(low), float(high)) for low, high in (axis.aminmax() for axis in xyz)]
        inside = self._inside(xyz, bounds, count, edge) if self._padding == "half" else None
        if any(math.isnan(end) for ends in bounds for end in ends):
            xyz.nan_to_num_(nan=-float(self._margin), posinf=float("inf"), neginf=-float("inf"))
            bounds = [(-float("inf"), float("inf"))] * 3
        values = self._by_slices(xyz, *bounds[2]) if xyz.device.type == "cpu" else self._by_volume(xyz)
        if inside is not None:
            torch.lerp(values.new_tensor(self._fill).expand_as(values), values, inside, out=values)
        return values[:, :count]

    def _inside(self, xyz: torch.Tensor, bounds: Bounds, count: int, edge: Edge | None) -> torch.Tensor | None:
        """1 for points at most half a voxel beyond the last voxel centres, 0 for others, (n,); None if all are within.

        Comparing to numbers is several times faster than to truth values.
        """
        band = 0.0 if edge is None else edge.band
        axes = [  # that have points outside; true also for what is not a number
            (axis, last)
            for axis, last, (lowest, highest) in zip(xyz, self._last, bounds, strict=True)
            if not (lowest >= band - 0.5 and highest <= last + 0.5 - band)
        ]
        if not axes:
            return None
        beyond, work = self._inside_buffer, self._work  # how far outside, voxels; negative inside
        for n, (axis, last) in enumerate(axes):
            torch.sub(axis, last / 2, out=work if n else beyond).abs_().sub_((last + 1) / 2)
            if n:
                torch.maximum(beyond, work, out=beyond)
        points = None if edge is None else _within(beyond, band, work)
        inside = beyond.le_(0)
        if edge is not None and points is not None:
            points = points[points < count]
            inside[points] = edge.inside(points)
        return inside

    def _by_volume(self, xyz: torch.Tensor) -> torch.Tensor:
        """(C, n) by torch's sampler of volumes. Overwrites `xyz`."""
        for axis, size in zip(xyz, self.image.shape[:0:-1], strict=True):
            scale = 2 / max(size - 1, 1)
            axis.mul_(scale).add_(self._margin * scale - 1)
        grid = xyz.T[None, None, None]
        return F.grid_sample(self.image[None], grid, padding_mode="border", align_corners=True)[0].flatten(1)

    def _by_slices(self, xyz: torch.Tensor, z_lowest: float, z_highest: float) -> torch.Tensor:
        """(C, n) at points moved to the nearest point inside. Overwrites `xyz`; every operation counts here."""
        x, y, z = xyz
        margin = self._margin
        channels, depth, height, width = self.image.shape
        top = float(np.nextafter(np.float32(depth - 1), np.float32(0))) - margin  # so that there is a slice above
        first, last = (int(np.floor(min(max(e, -margin), top))) + margin for e in (z_lowest, z_highest))
        below = torch.floor(z.clamp_(-margin, top), out=self._work)
        z.sub_(below)  # from here on the weight of the slice above
        # slices first..last as one picture, slice under slice; rows do not mix, as y ends at the last row
        rows = (last - first + 1) * height
        scale = 2 / max(rows - 1, 1)
        start = below.new_tensor(((margin - first) * height + margin) * scale - 1)
        torch.add(start, below, alpha=height * scale, out=below)
        torch.add(below, y.clamp_(-margin, height - 1 - margin), alpha=scale, out=y)
        scale = 2 / max(width - 1, 1)
        torch.add(x.new_tensor(margin * scale - 1), x, alpha=scale, out=x)
        parts = xyz.view(3, self._parts, -1)
        grid = parts[:2].permute(1, 2, 0)[:, None]
        picture = self._pairs[:, first]
        strides = 0, self._pairs.stride(0), width, 1
        picture = picture.as_strided((self._parts, 2 * channels, rows, width), strides, picture.storage_offset())
        values = F.grid_sample(picture, grid, padding_mode="border", align_corners=True)
        low, high = values.view(self._parts, 2, channels, -1).unbind(1)
        result = values.new_empty(channels, *parts.shape[1:])
        torch.lerp(low, high, parts[2][:, None], out=result.transpose(0, 1))
        return result.flatten(1)


def _within(values: torch.Tensor, band: float, work: torch.Tensor) -> torch.Tensor:
    """The indices of the few values (n,) that lie within `band` of zero; only runs that have one are searched.

    Args:
        values, band: see above.
        work: (n,), overwritten.
    """
    runs = torch.abs(values, out=work).view(-1, _RUN)
    found = (runs.amin(1) > band).logical_not_().nonzero()[:, 0]  # also where one is not a number
    run, number = (runs[found] <= band).nonzero().T
    return found[run] * _RUN + number
