"""Layers of LDR rearranged for a CPU: the same sums, without gradients.

Convolutions of channels-last volumes work on blocks of 8 channels; two images in and three components out leave most
of a block empty. Neighbouring voxels, seen as channels of one, fill it better. Along a row that is, with channels
last, only another view of the same memory.
"""

from __future__ import annotations

import functools
import math
import weakref
from collections.abc import Callable, Iterator, Sequence
from types import ModuleType
from typing import Any, TypeVar

import torch
import torch.nn.functional as F
from torch import nn

from LDRCore import sampling

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
    *,
    relu: bool = False,
) -> torch.Tensor:
    """A convolution, with `relu` rectified, by oneDNN wherever it runs.

    For small kernels and images torch chooses an implementation of its own by a rule that was made for pictures; for
    volumes it is many times slower. With the matrix unit (AMX) and bfloat16 oneDNN reads memory that nobody has written
    where rows of the result have one voxel; these are computed in float32.
    """
    precision = precision_of(image.dtype)
    if precision == torch.bfloat16 and image.shape[4] + 2 * padding[2] < weight.shape[4] + stride[2]:
        with torch.autocast("cpu", enabled=False):
            return convolve(image.float(), weight, bias, stride, padding, relu=relu).to(precision)
    image = image.to(precision).contiguous(memory_format=_LAST)
    weight, bias = weight.to(image.dtype), None if bias is None else bias.to(image.dtype)
    if not onednn_takes(image.dtype):
        found = F.conv3d(image, weight, bias, stride=stride, padding=padding)
    elif relu and _pointwise() is not None:
        return _pointwise()(image, weight, bias, padding, stride, (1, 1, 1), 1, "relu", [], "")
    else:
        found = torch.mkldnn_convolution(image, weight, bias, padding, stride, (1, 1, 1), 1)
    return found.relu_() if relu else found


def precision_of(given: torch.dtype) -> torch.dtype:
    """What convolutions compute in here: that of autocast where it is on."""
    return torch.get_autocast_dtype("cpu") if torch.is_autocast_enabled("cpu") else given


_Weights = tuple[torch.Tensor, torch.Tensor | None]  # of a convolution: weight and bias
_Made = TypeVar("_Made")
_kept: weakref.WeakKeyDictionary[nn.Module, dict[str, tuple[object, Any]]] = weakref.WeakKeyDictionary()


def _parameters_of(module: nn.Module) -> Iterator[nn.Parameter]:
    """As `module.parameters`, in half the time, which counts beside a network of two milliseconds."""
    for parameter in module._parameters.values():
        if parameter is not None:
            yield parameter
    for child in module._modules.values():
        if child is not None:
            yield from _parameters_of(child)


def kept(module: nn.Module, form: str, make: Callable[[], _Made], size: object = None) -> _Made:
    """A module's weights in another form, kept until they or `size` change."""
    now = size, *((w.data_ptr(), w._version) for w in _parameters_of(module))
    forms = _kept.setdefault(module, {})
    if form not in forms or forms[form][0] != now:
        forms[form] = now, make()
    return forms[form][1]


def _prepare(layer: nn.Conv3d | nn.ConvTranspose3d, form: str, make: Callable[[], _Weights]) -> _Weights:
    """A layer's weights in another form, channels last, in the precision of convolutions, kept until they change."""
    precision = precision_of(layer.weight.dtype)

    def made() -> _Weights:
        weight, bias = make()
        return weight.to(precision).contiguous(memory_format=_LAST), None if bias is None else bias.to(precision)

    return kept(layer, f"{form}, {precision}", made)


def bias_of(layer: nn.Conv3d | nn.ConvTranspose3d, repeats: int = 1) -> torch.Tensor:
    """A layer's bias, `repeats` times; zeros where it has none."""
    bias = layer.bias if layer.bias is not None else layer.weight.new_zeros(layer.out_channels)
    return bias.repeat(repeats)


@functools.lru_cache
def onednn_takes(dtype: torch.dtype) -> bool:
    """Whether oneDNN convolves in this precision on this processor; it refuses bfloat16 on those without AVX-512."""
    if not torch.backends.mkldnn.is_available():
        return False
    if dtype == torch.bfloat16:
        return bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())
    return dtype == torch.float32


@functools.lru_cache
def _pointwise() -> Any:
    """OneDNN's convolution with a function of its result, which torch's compiler uses; None where torch lacks it."""
    return getattr(torch.ops.mkldnn, "_convolution_pointwise", None)


class ImagePair:
    """Two images as LDR's first layer reads them on a CPU, so that a warped one is written in place.

    For compiled layers (see `compiled_layers`) in blocks of 2x2x2 voxels; elsewhere the images' voxels take turns, and
    a row has a voxel of zeros at both ends.

    Attributes:
        values: (B, D / 2 + 1, H / 2 + 1, `blocks_of_row(W)`, 2, 2, 2, 2), or (B, D, H, W + 2, 2), moving image first.
        blocks: whether it is the former.
        shape: (D, H, W).
    """

    def __init__(self, fixed: torch.Tensor, precision: torch.dtype, *, blocks: bool = False) -> None:
        """Room for a moving image, and a copy of the fixed one, (B, 1, D, H, W).

        Args:
            fixed: the fixed image; its axes are even.
            precision: of convolutions.
            blocks: how they shall lie; blocks need compiled loops (`sampling.compiled`).
        """
        batch, _, *shape = fixed.shape
        self.blocks, self.shape = blocks, tuple(shape)
        if blocks:
            size = batch, *(n // 2 + 1 for n in shape[:2]), blocks_of_row(shape[2]), 2, 2, 2, 2
            values = torch.empty(math.prod(size) + 16, dtype=precision)
            values[-16:] = 0  # a block that may be read, but does not count
            self.values = values[:-16].view(size)
            # beyond the images: voxels of one parity of the first blocks, of the other of the last ones
            for axis in (1, 2, 3):
                for end, parity in ((0, 0), (shape[axis - 1] // 2, 1)):
                    self.values.select(axis, end).select(axis + 2 if axis < 3 else 6, parity).zero_()
            self.values[:, :, :, shape[2] // 2 + 1 :] = 0
        else:
            self.values = torch.empty(batch, *shape[:2], shape[2] + 2, 2, dtype=precision)
            self.values[..., 0, :] = self.values[..., -1, :] = 0
        self._put(fixed, 1)

    def _put(self, images: torch.Tensor, number: int) -> None:
        for image, values in zip(images[:, 0], self.values, strict=True):
            loops = sampling.compiled() if self.blocks else None
            if loops:
                loops.into_blocks(image, values, number)
            else:
                values[..., 1:-1, number].copy_(image)

    def put(self, moving: torch.Tensor) -> None:
        """Copy a moving image (B, 1, D, H, W)."""
        self._put(moving, 0)

    def pull(self, pullers: Sequence[sampling.Puller], displacement: torch.Tensor) -> None:
        """The moving images of `pullers` behind a displacement (B, 3, d, h, w); see `sampling.Puller`."""
        for puller, field, values in zip(pullers, displacement, self.values, strict=True):
            if self.blocks:
                puller.write_blocks(field, values)
            else:
                puller.write(field, values[..., 1:-1, 0])


def blocks_of_row(width: int) -> int:
    """Blocks of a row of so many voxels, an even number: in bfloat16 two of them are a line of the cache."""
    count = width // 2 + 1
    return count + count % 2


def compiled_layers(precision: torch.dtype) -> ModuleType | None:
    """LDR's layers as compiled code; None where `sampling` has no compiled loops, or not in this precision."""
    layers = _import_layers() if sampling.compiled() else None
    return layers if layers and layers.takes(precision) else None


@functools.lru_cache(maxsize=1)
def _import_layers() -> ModuleType | None:
    try:
        from LDRCore.models import compiled_layers as layers
    except Exception:  # as in `sampling`: an optional package that is broken must not break a registration
        return None
    return layers


def convolve_half(layer: nn.Conv3d, features: torch.Tensor, *, relu: bool = False) -> torch.Tensor:
    """A stride 2, padding 1 convolution: ``layer(features)``, with `relu` rectified."""
    weights = _prepare(layer, "as it is", lambda: (layer.weight, bias_of(layer)))
    return convolve(features, *weights, (2, 2, 2), (1, 1, 1), relu=relu)


def convolve_pair(layer: nn.Conv3d, pair: ImagePair, *, relu: bool = False) -> torch.Tensor:
    """A 3x3x3 or 4x4x4, stride 2, padding 1 convolution of two images that take turns, with `relu` rectified."""
    batch, depth, height, width, _ = pair.values.shape
    pairs = pair.values.view(batch, depth, height, width // 2, 4).permute(0, 4, 1, 2, 3)

    def make() -> _Weights:
        weight = F.pad(layer.weight, (0, layer.kernel_size[2] % 2))  # four voxels of a row, seen as two pairs
        return weight.unflatten(4, (2, 2)).permute(0, 5, 1, 2, 3, 4).flatten(1, 2), bias_of(layer)

    return convolve(pairs, *_prepare(layer, "pairs", make), stride=(2, 2, 1), padding=(1, 1, 0), relu=relu)


def transposed_gaps(layer: nn.ConvTranspose3d, features: torch.Tensor, *, relu: bool = False) -> torch.Tensor:
    """A 4x4x4, stride 2, padding 1 transposed convolution, its result left where it is computed: by gaps.

    Each output is a sum over 2x2x2 inputs, and eight outputs lie about the same inputs: in the gap between them. Gap g
    of an axis holds the outputs 2 g (parity 0) and 2 g - 1 (parity 1); what lies outside of the result is zero.

    Args:
        layer: to c channels.
        features: (B, channels, D, H, W).
        relu: rectify.

    Returns:
        (B, 8 c, D + 1, H + 1, W + 1), parities of the three axes slowest, then channels; `from_gaps` puts it in order.
    """

    def make() -> _Weights:
        return by_parity(layer.weight).flatten(0, 1), bias_of(layer, 8)

    found = convolve(features, *_prepare(layer, "gaps", make), padding=(1, 1, 1), relu=relu)
    parities = found.unflatten(1, (2, 2, 2, -1))
    for axis in range(3):
        for parity, end in ((1, 0), (0, -1)):
            parities.select(axis + 5, end).select(axis + 1, parity).zero_()
    return found


def from_gaps(gaps: torch.Tensor, result: torch.Tensor | None = None) -> torch.Tensor:
    """(B, c, 2 D, 2 H, 2 W) in order, from `transposed_gaps`; written into `result` where given."""
    parities = gaps.unflatten(1, (2, 2, 2, -1))
    batch, _, _, _, channels, *shape = parities.shape
    depth, height, width = (n - 1 for n in shape)
    if result is None:
        result = torch.empty(batch, channels, 2 * depth, 2 * height, 2 * width, dtype=gaps.dtype)
    for p in range(8):
        a, b, c = p >> 2, p >> 1 & 1, p & 1
        piece = parities[:, a, b, c, :, a : a + depth, b : b + height, c : c + width]
        result[..., a::2, b::2, c::2] = piece
    return result


def convolve_gaps(layer: nn.Conv3d, gaps: torch.Tensor, skip: torch.Tensor) -> torch.Tensor:
    """A 3x3x3, padding 1 convolution to few channels of ``cat((from_gaps(gaps), skip), 1)``, neither put together.

    Blocks of 2x2x2 outputs are computed as channels of one: they see two gaps along each axis, four voxels of `skip`.
    """
    c = gaps.shape[1] // 8

    def of_skip() -> _Weights:
        return _whole_blocks(by_blocks(layer.weight[:, c:])), _whole_blocks(bias_of(layer, 8))

    def of_gaps() -> _Weights:
        return _whole_blocks(by_gaps(layer.weight[:, :c])), None

    found = convolve(skip, *_prepare(layer, "skip", of_skip), (2, 2, 2), (1, 1, 1))
    found += convolve(gaps, *_prepare(layer, "flow of gaps", of_gaps))
    batch, _, depth, height, width = found.shape
    blocks = found[:, : 8 * layer.out_channels].unflatten(1, (2, 2, 2, -1)).permute(0, 4, 5, 1, 6, 2, 7, 3)
    return blocks.reshape(batch, -1, 2 * depth, 2 * height, 2 * width)


def by_parity(weight: torch.Tensor) -> torch.Tensor:
    """Weights of a transposed convolution, (in, out, 4, 4, 4), for gaps: (8 parities, out, in, 2, 2, 2)."""
    # tap t of the output at parity p is number 2 t + p: the same voxels, seen from the gap between them
    return by_twos(weight.flip(2, 3, 4)).permute(3, 5, 7, 1, 0, 2, 4, 6).flatten(0, 2)


def by_blocks(weight: torch.Tensor) -> torch.Tensor:
    """Weights of a 3x3x3, padding 1 convolution for blocks of 2x2x2 outputs: (8 c, channels, 4, 4, 4), stride 2."""
    # output r of a block sees the voxels -1 + s (s = 0 ... 3) of the block by the weights s - r
    return torch.cat([F.pad(weight, _shifts(r)) for r in _PARITIES])


def by_gaps(weight: torch.Tensor) -> torch.Tensor:
    """The same for inputs that lie by gaps, (8 c, 8 channels, 2, 2, 2)."""
    # the four voxels that a block sees are, gap by gap, parity 1 and parity 0
    return by_twos(by_blocks(weight)).flip(3, 5, 7).permute(0, 3, 5, 7, 1, 2, 4, 6).flatten(1, 4)


def _whole_blocks(weights: torch.Tensor) -> torch.Tensor:
    """With outputs of zeros up to a multiple of 16, the numbers of a vector: 24 outputs take longer than 32."""
    return F.pad(weights, [0, 0] * (weights.ndim - 1) + [0, -len(weights) % 16])


_PARITIES = [(a, b, c) for a in (0, 1) for b in (0, 1) for c in (0, 1)]


def by_twos(weight: torch.Tensor) -> torch.Tensor:
    """(a, b, 4, 4, 4) as (a, b, 2, 2, 2, 2, 2, 2), each axis split."""
    return weight.unflatten(4, (2, 2)).unflatten(3, (2, 2)).unflatten(2, (2, 2))


def _shifts(parities: tuple[int, int, int]) -> list[int]:
    """Padding (last axis first) that brings three weights to their places among four."""
    return [p for r in reversed(parities) for p in (r, 1 - r)]


def join_gaps(gaps: torch.Tensor, skip: torch.Tensor) -> torch.Tensor:
    """``cat((from_gaps(gaps), skip), 1)``, channels last."""
    c = gaps.shape[1] // 8
    joined = torch.empty(skip.shape[0], c + skip.shape[1], *skip.shape[2:], dtype=gaps.dtype, memory_format=_LAST)
    from_gaps(gaps, joined[:, :c])
    joined[:, c:] = skip
    return joined
