"""The first and the last convolution of LDR, rearranged for a CPU: the same sums, without gradients.

Convolutions of channels-last volumes work on blocks of 8 channels; two images in and three components out leave most
of a block empty. Two neighbouring voxels of a row, seen as channels of one, fill it better. With channels last that
is only another view of the same memory.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn

_LAST = torch.channels_last_3d


def can_take(tensor: torch.Tensor) -> bool:
    """Whether these forms are of use: on a CPU, nobody wants a gradient, rows have an even number of voxels."""
    return tensor.device.type == "cpu" and not torch.is_grad_enabled() and tensor.shape[-1] % 2 == 0


def convolve_pair(layer: nn.Conv3d, moving: torch.Tensor, fixed: torch.Tensor) -> torch.Tensor:
    """A 4x4x4, stride 2, padding 1 convolution of two images (B, 1, D, H, W): ``layer(cat((moving, fixed), 1))``."""
    batch, _, depth, height, width = moving.shape
    half = torch.is_autocast_enabled("cpu")  # written in the precision of the convolution, not copied for it
    dtype = torch.get_autocast_dtype("cpu") if half else moving.dtype
    rows = torch.empty(batch, depth, height, width + 2, 2, dtype=dtype)
    rows[..., 0, :] = rows[..., -1, :] = 0
    rows[..., 1:-1, 0], rows[..., 1:-1, 1] = moving[:, 0], fixed[:, 0]
    pairs = rows.view(batch, depth, height, width // 2 + 1, 4).permute(0, 4, 1, 2, 3)
    weight = layer.weight.unflatten(4, (2, 2)).permute(0, 5, 1, 2, 3, 4).flatten(1, 2).contiguous(memory_format=_LAST)
    return F.conv3d(pairs, weight, layer.bias, stride=(2, 2, 1), padding=(1, 1, 0))


def convolve_parts(layer: nn.Conv3d, *parts: torch.Tensor) -> torch.Tensor:
    """A 3x3x3, padding 1 convolution to few channels of features that lie apart: ``layer(cat(parts, 1))``."""
    total: torch.Tensor | None = None
    used = 0
    for part in parts:
        share = layer.weight[:, used : used + part.shape[1]]
        used += part.shape[1]
        # outputs of two voxels side by side, from the four columns about them
        weight = torch.cat((F.pad(share, (0, 1)), F.pad(share, (1, 0)))).contiguous(memory_format=_LAST)
        bias = layer.bias.repeat(2) if total is None and layer.bias is not None else None
        found = F.conv3d(part.contiguous(memory_format=_LAST), weight, bias, stride=(1, 1, 2), padding=1)
        total = found if total is None else total.add_(found)
    assert total is not None
    batch, _, depth, height, half = total.shape
    return total.permute(0, 2, 3, 4, 1).reshape(batch, depth, height, 2 * half, -1).permute(0, 4, 1, 2, 3)
