"""Turns a scan of any scanner and any grid into what a network sees, with the geometry kept exactly.

Intensities: a robust range is mapped to 0..1, see `intensities`. Training and inference use the same functions.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import SimpleITK as sitk
import torch
import torch.nn.functional as F

from LDRCore import geometry
from LDRCore.pipeline import intensities
from LDRCore.pipeline.intensities import FOREGROUND_LEVEL
from LDRCore.transforms.volume import Volume

_UNKNOWN = -1e9  # with the least weight that an interpolation can give it still below 0


def intensity_range(volume: torch.Tensor) -> tuple[float, float]:
    """Return background level and upper level of a scan, see `intensities.measure`."""
    measured = intensities.measure(volume)
    return measured.low, measured.high


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
        intensities: what the values mean, and the range that became 0..1.
        centroid_lps: centre of the foreground, mm.
        box_lps: (2, 3) lower and upper bound of the foreground, mm.
        mask: 1 inside, 0 outside, at about the resolution of `fine`; None without a mask.
    """

    native: Volume
    fine: Volume
    coarse: Volume
    intensities: intensities.Intensities
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
    measured = intensities.measure(masked)
    fine = Volume(measured.cleaned(masked), native.to_lps).averaged(fine_mm)
    fine = Volume(normalise(fine.data, measured.low, measured.high), fine.to_lps, lowest=0.0)
    coarse = fine.averaged(coarse_mm)
    points = foreground_index(coarse.data[0, 0]) @ coarse.to_lps[:3, :3].T + coarse.to_lps[:3, 3]
    box = np.percentile(points[:: max(1, len(points) // 50_000)], (0.2, 99.8), axis=0)
    return PreparedImage(native, fine, coarse, measured, points.mean(axis=0), box, allowed)


def ends_in_tissue(volume: Volume) -> bool:
    """Return whether an image, prepared, has more than air at an end of its field of view."""
    data = volume.data[0, 0]
    ends = (data.select(axis, index) for axis in range(3) for index in (0, -1))
    return any(bool((end >= FOREGROUND_LEVEL).any()) for end in ends)


def continued(volume: Volume) -> Volume:
    """Continue an image by a voxel on each side, to be sampled with border padding.

    What lies beyond air is taken for air, 0; beyond anything else it is unknown and gets a value far below 0, so that
    nothing which is interpolated from it can come to 0. An end of the field of view is no edge of a body.
    """
    data = F.pad(volume.data, (1,) * 6, mode="replicate")
    data = (data >= FOREGROUND_LEVEL).to(data) * _UNKNOWN
    data[..., 1:-1, 1:-1, 1:-1] = volume.data
    to_lps = volume.to_lps.copy()
    to_lps[:3, 3] -= to_lps[:3, :3].sum(1)
    return Volume(data, to_lps)
