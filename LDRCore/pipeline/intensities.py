"""Which of an image's values are background and which are signal, whatever the scanner or an earlier program did.

An ordinary image has a dark background: a robust range of its values is mapped to 0..1. Other images are recognised by
where values lie: a background that was removed and is not the darkest (a brain normalised to mean 0) is one exact value
that most of the border has; padding (-1024, -9999, -32768) is one exact value far below all others; hot voxels are a
small bright share of an image whose content shows only without them.

Statistics come from a regular subsample: a percentile over every voxel of a large scan costs more than the
registration itself.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch

SAMPLE_VOXELS = 100_000
FOREGROUND_LEVEL = 0.15  # of the normalised range; below it lies air or a removed background
_BORDER_SHARE = 0.5  # of the border's voxels have the one value of a removed background
_PADDING_SHARE = 1e-3  # of the voxels, at least, are padding
_PADDING_GAP = 0.2  # of the range of the other values, at least, lies between these and padding
_INSIDE = 0.05  # of the range of the other values, at least, lies below a background that is not the darkest
_AIR_SHARE = 0.2  # of the voxels, at least, lie in the lowest tenth of the range where an image shows air
_FEW, _MOST_HOT = 0.01, 0.005  # content of a smaller share may be hot voxels; these are at most so many
_CONNECTED = 0.5  # of the way from chance to certainty that a voxel of the content has a neighbour in it
_CT_AIR, _CT_BELOW = -1000.0, -200.0  # Hounsfield units


@dataclass(frozen=True)
class Intensities:
    """What an image's values mean.

    Attributes:
        low, high: the range that becomes 0..1: air or background, and bright tissue.
        background: the value of padding or of a removed background, where that is not an ordinary dark one.
        hot: whether there are voxels so bright that they hide the rest; they count as `high`.
        hounsfield: whether the values look like those of CT.
    """

    low: float
    high: float
    background: float | None = None
    hot: bool = False
    hounsfield: bool = False

    def cleaned(self, volume: torch.Tensor) -> torch.Tensor:
        """Return a volume in which background is `low` and hot voxels are `high`; itself where there are none."""
        if self.background is not None:
            volume = torch.where(volume == self.background, self.low, volume)
        return volume.clamp(self.low, self.high) if self.background is not None or self.hot else volume

    def describe(self) -> str:
        """Say what is out of the ordinary; empty where nothing is."""
        found = []
        if self.background is not None:
            found.append(f"voxels of {self.background:g} were taken as background")
        if self.hot:
            found.append(f"values above {self.high:g} were taken as {self.high:g}")
        return ", ".join(found)


def measure(volume: torch.Tensor) -> Intensities:
    """Measure what the values of a scan mean.

    Args:
        volume: (..., D, H, W), any numeric type.
    """
    flat = volume.reshape(-1)
    stride = max(1, flat.numel() // SAMPLE_VOXELS) | 1  # odd: never in step with a power-of-two row length
    values = flat[::stride].float().cpu().numpy()
    background = _odd_background(volume, values)
    rest = values if background is None else values[values != background]
    low, high, hot = _range(rest, len(values), volume)
    if background is not None and np.mean(rest < low + 0.1 * (high - low)) < _AIR_SHARE:
        # the darkest of the rest is tissue: keep it above the background
        low -= FOREGROUND_LEVEL / (1 - FOREGROUND_LEVEL) * (high - low)
    return Intensities(low, high, background, hot, _looks_like_ct(rest, low, background))


def _range(values: np.ndarray, total: int, volume: torch.Tensor) -> tuple[float, float, bool]:
    """Measure background level and upper level, insensitive to a few extreme voxels.

    Args:
        values: a sample of the volume, without background of an odd value.
        total: how many values the sample has with it.
        volume: as a whole.

    Returns:
        (low, high, hot): the 1st percentile of all values, the 99th percentile of those above 10 % of the way from
        there to the 99.9th (so that the amount of empty background does not matter), and whether hot voxels were
        left out.
    """
    low, top = (float(v) for v in np.percentile(values, (1.0, 99.9)))
    if top <= low:
        low, top = float(values.min()), float(values.max())
    foreground, hot = values[values > low + 0.1 * (top - low)], False
    if len(foreground) < _MOST_HOT * total:
        without = float(np.percentile(values, max(0.0, 100 * (1 - _FEW * total / len(values)))))
        threshold = low + 0.1 * (without - low)
        wide = values[(values > threshold) & (values <= low + 0.1 * (top - low))]
        hot = without > low and len(wide) > _FEW * total and _is_connected(volume, threshold)
        foreground = wide if hot else foreground
    high = float(np.percentile(foreground, 99.0)) if foreground.size else top
    if high <= low:  # nearly binary content: fall back to the extremes
        low, high = float(volume.min()), float(volume.max())
    return low, high, hot


def _is_connected(volume: torch.Tensor, threshold: float) -> bool:
    """Return whether voxels above a threshold lie side by side more than by chance, as those of a body do."""
    above = volume > threshold
    share = float(above.float().mean())
    beside = float((above[..., 1:] & above[..., :-1]).sum()) / max(float(above[..., :-1].sum()), 1.0)
    return beside - share > _CONNECTED * (1 - share)


def _odd_background(volume: torch.Tensor, values: np.ndarray) -> float | None:
    """Return the one value of padding, or of a removed background that is not the darkest; None in ordinary images."""
    lowest = float(values.min())
    rest = values[values != lowest]
    if lowest < 0 and rest.size and len(values) - len(rest) >= _PADDING_SHARE * len(values):
        dark, bright = np.percentile(rest, (1.0, 90.0))
        if dark - lowest > _PADDING_GAP * (bright - dark):
            return lowest
    border = torch.cat([volume.select(axis, end).reshape(-1) for axis in (-3, -2, -1) for end in (0, -1)])
    unique, counts = np.unique(border.float().cpu().numpy(), return_counts=True)
    if counts.max() < _BORDER_SHARE * counts.sum():
        return None
    common = float(unique[counts.argmax()])
    rest = values[values != common]
    if not rest.size:
        return None
    dark, bright = np.percentile(rest, (1.0, 90.0))
    return common if common - dark > _INSIDE * (bright - dark) and bright > dark else None


def _looks_like_ct(values: np.ndarray, low: float, background: float | None) -> bool:
    """Return whether dark values are air in Hounsfield units: a level of their own, not the tail of noise about 0.

    Args:
        values: without the background.
        low: their lower level.
        background: the one value of all air; -1000 is that of air, others near it may be padding beside values from 0.
    """
    if background is not None and abs(background - _CT_AIR) < 100:
        return abs(background - _CT_AIR) <= 10 or bool(np.mean(values < -20) > 0.01)
    if low > _CT_BELOW:
        return False
    return bool(np.count_nonzero(values < low / 2) > np.count_nonzero((values >= low / 2) & (values < low / 8)))
