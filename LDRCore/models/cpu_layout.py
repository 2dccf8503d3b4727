"""The first and the last layer of LDR, rearranged for a CPU: the same sums, without gradients.

Convolutions of channels-last volumes work on blocks of 8 channels; two images in and three components out leave most
of a block empty. Neighbouring voxels, seen as channels of one, fill it better. Along a row that is, with channels
last, only another view of the same memory.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn

_LAST = torch.channels_last_3d


def can_take(tensor: torch.Tensor) -> bool:
    """Whether these forms are of use: on a CPU, nobody wants a gradient, rows have an even number of voxels."""
    return tensor.device.type == "cpu" and not torch.is_grad_enabled() and tensor.shape[-1] % 2 == 0


def convolve(
    image: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    stride: tuple[int, int, int] = (1, 1, 1),
    padding: tuple[int, int, int] = (0, 0, 0),
) -> torch.Tensor:
    """A convolution by oneDNN wherever torch has it.

    For small kernels and images torch chooses an implementation of its own by a rule that was made for pictures; for
    volumes it is many times slower.
    """
    if torch.is_autocast_enabled("cpu"):
        dtype = torch.get_autocast_dtype("cpu")
        image, weight, bias = image.to(dtype), weight.to(dtype), None if bias is None else bias.to(dtype)
    image, weight = image.contiguous(memory_format=_LAST), weight.contiguous(memory_format=_LAST)
    if torch.backends.mkldnn.is_available() and image.dtype != torch.float16:
        return torch.mkldnn_convolution(image, weight, bias, padding, stride, (1, 1, 1), 1)
    return F.conv3d(image, weight, bias, stride=stride, padding=padding)


def convolve_pair(layer: nn.Conv3d, moving: torch.Tensor, fixed: torch.Tensor) -> torch.Tensor:
    """A 3x3x3 or 4x4x4, stride 2, padding 1 convolution of two images (B, 1, D, H, W).

    ``layer(torch.cat((moving, fixed), 1))``
    """
    batch, _, depth, height, width = moving.shape
    half = torch.is_autocast_enabled("cpu")  # written in the precision of the convolution, not copied for it
    dtype = torch.get_autocast_dtype("cpu") if half else moving.dtype
    rows = torch.empty(batch, depth, height, width + 2, 2, dtype=dtype)
    rows[..., 0, :] = rows[..., -1, :] = 0
    rows[..., 1:-1, 0], rows[..., 1:-1, 1] = moving[:, 0], fixed[:, 0]
    pairs = rows.view(batch, depth, height, width // 2 + 1, 4).permute(0, 4, 1, 2, 3)
    weight = F.pad(layer.weight, (0, layer.kernel_size[2] % 2))  # four voxels of a row, seen as two pairs
    weight = weight.unflatten(4, (2, 2)).permute(0, 5, 1, 2, 3, 4).flatten(1, 2)
    return convolve(pairs, weight, layer.bias, stride=(2, 2, 1), padding=(1, 1, 0))


def convolve_parts(layer: nn.Conv3d, *parts: torch.Tensor) -> torch.Tensor:
    """A 3x3x3, padding 1 convolution to few channels of features that lie apart: ``layer(cat(parts, 1))``."""
    total: torch.Tensor | None = None
    used = 0
    for part in parts:
        share = layer.weight[:, used : used + part.shape[1]]
        used += part.shape[1]
        # outputs of two voxels side by side, from the four columns about them
        weight = torch.cat((F.pad(share, (0, 1)), F.pad(share, (1, 0))))
        bias = layer.bias.repeat(2) if total is None and layer.bias is not None else None
        found = convolve(part, weight, bias, stride=(1, 1, 2), padding=(1, 1, 1))
        total = found if total is None else total.add_(found)
    assert total is not None
    batch, _, depth, height, half = total.shape
    return total.permute(0, 2, 3, 4, 1).reshape(batch, depth, height, 2 * half, -1).permute(0, 4, 1, 2, 3)


def transpose_parts(layer: nn.ConvTranspose3d, *parts: torch.Tensor) -> torch.Tensor:
    """A 4x4x4, stride 2, padding 1 transposed convolution to few channels of features that lie apart.

    Each of its outputs is a sum over 2x2x2 inputs; the eight outputs that lie about the same inputs are computed as
    channels of one 2x2x2 convolution.
    """
    total: torch.Tensor | None = None
    used = 0
    for part in parts:
        share = layer.weight[used : used + part.shape[1]].flip(2, 3, 4)  # (in, out, 4, 4, 4)
        used += part.shape[1]
        # tap t of the output at parity p is number 2 t + p: the same voxels, seen from the gap between them
        taps = share.unflatten(4, (2, 2)).unflatten(3, (2, 2)).unflatten(2, (2, 2))  # (in, out, t, p, t, p, t, p)
        weight = taps.permute(3, 5, 7, 1, 0, 2, 4, 6).flatten(0, 3)
        found = convolve(part, weight, None, padding=(1, 1, 1))
        total = found if total is None else total.add_(found)
    assert total is not None
    batch, _, depth, height, width = total.shape
    outputs = layer.out_channels
    gaps = total.view(batch, 2, 2, 2, outputs, depth, height, width)
    result = torch.empty(
        batch, outputs, 2 * (depth - 1), 2 * (height - 1), 2 * (width - 1), dtype=total.dtype, device=total.device
    )
    for p in range(8):
        a, b, c = p >> 2, p >> 1 & 1, p & 1
        piece = gaps[:, a, b, c, :, a : a + depth - 1, b : b + height - 1, c : c + width - 1]
        result[..., a::2, b::2, c::2] = piece
    return result if layer.bias is None else result.add_(layer.bias.view(-1, 1, 1, 1).to(result.dtype))
