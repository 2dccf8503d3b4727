"""Upper bounds of this machine, convolutions and memory bandwidth, and the lower bound of a network's time."""

from __future__ import annotations

import time
from collections.abc import Callable

import torch
import torch.nn.functional as F

from LDRCore.models import registry
from LDRCore.models.affine import AffineStem
from LDRCore.models.base import DenseNetwork

_COPY_VALUES = 1 << 26  # 256 MB, far more than any cache
_REPEATS = 7
_MOMENT = 0.04  # seconds


def fastest(action: Callable[[], object], repeats: int = 2) -> float:
    """Return the seconds of the fastest of several runs, after one that does not count.

    Runs `repeats` times or for `_MOMENT`, whichever is longer: for some milliseconds, threads of earlier work still
    spin on the processors that are timed.
    """
    times: list[float] = []
    action()
    while len(times) < repeats or sum(times) < _MOMENT:
        began = time.perf_counter()
        action()
        times.append(time.perf_counter() - began)
    return min(times)


class Convolutions:
    """The fastest convolution of this machine with many channels, timed beside what is compared with it."""

    @torch.no_grad()
    def __init__(self, precision: torch.dtype = torch.float32) -> None:
        """Choose the fastest of several shapes, with the current number of threads."""
        candidates = []
        for channels, size in ((32, 48), (64, 32), (128, 24)):
            image = torch.rand(1, channels, size, size, size).to(precision, memory_format=torch.channels_last_3d)
            weight = torch.rand(channels, channels, 3, 3, 3).to(precision, memory_format=torch.channels_last_3d)
            candidates.append((image, weight, image.numel() * channels * 27))
        rates = [self._rate(*one, _REPEATS) for one in candidates]
        self._best = candidates[rates.index(max(rates))]

    @torch.no_grad()
    def rate(self) -> float:
        """Measure multiply-adds per second."""
        return self._rate(*self._best)

    @staticmethod
    def _rate(image: torch.Tensor, weight: torch.Tensor, multiply_adds: int, repeats: int = 2) -> float:
        return multiply_adds / fastest(lambda: F.conv3d(image, weight, padding=1), repeats)


def bandwidth() -> float:
    """Measure bytes per second, read and written, of a copy with the current number of threads."""
    source, target = torch.rand(_COPY_VALUES), torch.empty(_COPY_VALUES)
    return 2 * source.numel() * 4 / fastest(lambda: target.copy_(source), _REPEATS)


def lower_bound(
    network: DenseNetwork | AffineStem,
    size: int,
    rate: float,
    bytes_per_second: float,
    precision: torch.dtype = torch.float32,
) -> float:
    """Return the least seconds that `network` can take at size^3: the larger of arithmetic and memory traffic."""
    cost = registry.cost(network, (size, size, size))
    return max(cost.multiply_adds / rate, precision.itemsize * cost.values / bytes_per_second)
