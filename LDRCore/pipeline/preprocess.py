"""Turns a scan of any scanner and any grid into what a network sees, with the geometry kept exactly.

Intensities: a robust range is mapped to 0..1. Training and inference use the same functions. Statistics
come from a regular subsample: a percentile over every voxel of a large scan costs more than the registration itself.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import SimpleITK as sitk
import torch

from LDRCore import geometry
from LDRCore.transforms.volume import Volume

_SAMPLE_VOXELS = 100_000
FOREGROUND_LEVEL = 0.15  # of the normalised range; below it lies air or a removed background


def intensity_range(volume: torch.Tensor) -> tuple[float, float]:
    """Measure background level and upper level of a scan, insensitive to a few extreme voxels.

    Args:
        volume: any shape, any numeric type.

    Returns:
        (low, high): the 1st percentile of all voxels, and the 99th percentile of those above 10 % of the way from
        there to the 99.9th (so that the amount of empty background does not matter).
    """
    flat = volume.reshape(-1)
    stride = max(1, flat.numel() // _SAMPLE_VOXELS) | 1  # odd: never in step with a power-of-two row length
    values = flat[::stride].float().cpu().numpy()
    low, top = np.percentile(values, (1.0, 99.9))
    if top <= low:
        low, top = float(values.min()), float(values.max())
    foreground = values[values > low + 0.1 * (top - low)]
    high = float(np.percentile(foreground, 99.0)) if foreground.size else float(top)
    if high <= low:  # nearly binary content: fall back to the extremes
        low, high = float(volume.min()), float(volume.max())
    return float(low), high


def normalise(volume: torch.Tensor, low: float, high: float) -> torch.Tensor:
    """Map [low, high] to [0, 1] and clip. `volume` of any shape; returns float32."""
    scale = 1 / max(high - low, 1e-12)
    offset = torch.tensor(-low * scale, dtype=torch.float32, device=volume.device)
    return torch.add(offset, volume.float(), alpha=scale).clamp_(0.0, 1.0)


def foreground_index(normalised: torch.Tensor) -> np.ndarray:
    """Return the indices (N, 3) of what is not air in a normalised (D, H, W) volume; of every voxel if all is air."""
    index = (normalised > FOREGROUND_LEVEL).nonzero().cpu().numpy()
    return index if len(index) else np.argwhere(np.ones(normalised.shape, dtype=bool))


@dataclass
class PreparedImage:
    """A prepared scan: the original to warp, two normalised copies for the networks, and the box of its content.

    Attributes:
        native: original intensities at full resolution (masked-out voxels untouched).
        fine, coarse: normalised 0..1, masked, averaged to about the two working spacings.
        low, high: the intensity range that became 0..1.
        centroid_lps: centre of the foreground, mm.
        box_lps: (2, 3) lower and upper bound of the foreground, mm.
        mask: 1 inside, 0 outside, at about the resolution of `fine`; None without a mask.
    """

    native: Volume
    fine: Volume
    coarse: Volume
    low: float
    high: float
    centroid_lps: np.ndarray
    box_lps: np.ndarray
    mask: Volume | None = None

    def copy_for(self, spacing_mm: float) -> Volume:
        """Return the coarse copy where it is hardly coarser than `spacing_mm`, else the fine one."""
        return self.coarse if max(self.coarse.spacing_mm) <= 1.15 * spacing_mm else self.fine


def to_tensor(image: sitk.Image, device: torch.device | str = "cpu") -> torch.Tensor:
    """Copy a SimpleITK image to a tensor (1, 1, D, H, W), float32."""
    array = sitk.GetArrayViewFromImage(image)
    return torch.from_numpy(array.astype(np.float32))[None, None].to(device)


def prepare(
    image: sitk.Image,
    mask: np.ndarray | None,
    *,
    fine_mm: float,
    coarse_mm: float,
    device: torch.device | str = "cpu",
) -> PreparedImage:
    """Prepare a scan for registration.

    Args:
        image: three-dimensional scalar image (checked by `images.load`).
        mask: (D, H, W) boolean; what lies outside is replaced by the smallest value inside before anything is
            measured, so it cannot influence the result.
        fine_mm, coarse_mm: working spacings of the dense networks and of the affine stem.
        device: where the tensors live.
    """
    native = Volume(to_tensor(image, device), geometry.index_to_lps(image))
    masked, allowed = native.data, None
    if mask is not None:
        inside = torch.from_numpy(mask).to(device)[None, None]
        masked = torch.where(inside, masked, masked[inside].min())
        allowed = Volume(inside.to(torch.float32), native.to_lps).averaged(fine_mm)
    low, high = intensity_range(masked)
    fine = Volume(masked, native.to_lps).averaged(fine_mm)
    fine = Volume(normalise(fine.data, low, high), fine.to_lps, lowest=0.0)
    coarse = fine.averaged(coarse_mm)
    points = foreground_index(coarse.data[0, 0]) @ coarse.to_lps[:3, :3].T + coarse.to_lps[:3, 3]
    box = np.percentile(points[:: max(1, len(points) // 50_000)], (0.2, 99.8), axis=0)
    return PreparedImage(native, fine, coarse, low, high, points.mean(axis=0), box, allowed)
