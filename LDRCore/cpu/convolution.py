"""Convolutions of volumes on a CPU by oneDNN, channels last."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F

from LDRCore.torch_context import own_torch_context

LAST = torch.channels_last_3d


@dataclass(frozen=True)
class Convolution:
    """A convolution with its weights as oneDNN takes them.

    Attributes:
        weight, bias: channels last, in the precision that the convolution is computed in.
        stride, padding: along each axis.
        relu: whether the result is rectified.
    """

    weight: torch.Tensor
    bias: torch.Tensor | None
    stride: tuple[int, int, int] = (1, 1, 1)
    padding: tuple[int, int, int] = (0, 0, 0)
    relu: bool = False

    @classmethod
    def of(cls, weight: torch.Tensor, bias: torch.Tensor | None, precision: torch.dtype, **options: Any) -> Convolution:
        """Copy weights into place."""
        own = weight.detach().to(precision, copy=True).contiguous(memory_format=LAST)
        return cls(own, None if bias is None else bias.detach().to(precision, copy=True), **options)

    def __call__(self, image: torch.Tensor) -> torch.Tensor:
        """Convolve (B, C, D, H, W)."""
        return convolve(image.to(self.weight.dtype), self.weight, self.bias, self.stride, self.padding, relu=self.relu)


def convolve(
    image: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    stride: tuple[int, int, int] = (1, 1, 1),
    padding: tuple[int, int, int] = (0, 0, 0),
    *,
    relu: bool = False,
) -> torch.Tensor:
    """Convolve, and rectify with `relu`, by oneDNN wherever it runs.

    For small kernels and images torch chooses an implementation of its own by a rule that was made for pictures; for
    volumes it is many times slower. With the matrix unit (AMX) and bfloat16 oneDNN reads memory that nobody has written
    where rows of the result have one voxel; these are computed in float32.
    """
    dtype = image.dtype
    if dtype == torch.bfloat16 and image.shape[4] + 2 * padding[2] < weight.shape[4] + stride[2]:
        wide = None if bias is None else bias.float()
        return convolve(image.float(), weight.float(), wide, stride, padding, relu=relu).to(dtype)
    image = image.contiguous(memory_format=LAST)
    by_onednn, fused = _onednn(dtype)
    if fused is not None and relu:
        return fused(image, weight, bias, padding, stride, (1, 1, 1), 1, "relu", [], "")
    if by_onednn is not None:
        result = by_onednn(image, weight, bias, padding, stride, (1, 1, 1), 1)
    else:
        result = F.conv3d(image, weight, bias, stride=stride, padding=padding)
    return result.relu_() if relu else result


@functools.lru_cache(maxsize=8)
@own_torch_context()
def _onednn(dtype: torch.dtype) -> tuple[Callable[..., torch.Tensor] | None, Callable[..., torch.Tensor] | None]:
    """OneDNN's convolution, and the one that rectifies as well; None where torch has none that gives the right result.

    torch exports neither with a promise, so both are tried on a small volume against `F.conv3d`.
    """
    if not torch.backends.mkldnn.is_available():
        return None, None
    generator = torch.Generator("cpu").manual_seed(0)
    image, weight, bias = (
        torch.randn(*shape, generator=generator, device="cpu", dtype=torch.float32).to(dtype)
        for shape in ((1, 8, 6, 6, 6), (8, 8, 2, 2, 2), (8,))
    )
    image, weight = (t.contiguous(memory_format=LAST) for t in (image, weight))
    padding, stride, dilation = (0, 0, 1), (2, 2, 1), (1, 1, 1)  # different, so that their order is tested as well
    expected = F.conv3d(image.double(), weight.double(), bias.double(), stride, padding)

    def is_right(function: Callable[..., torch.Tensor] | None, right: torch.Tensor, *more: object) -> bool:
        if function is None:
            return False
        try:
            result = function(image, weight, bias, padding, stride, dilation, 1, *more)
            return result.dtype == dtype and torch.allclose(result.double(), right, atol=0.1, rtol=0.02)
        except Exception:  # no such processor, other arguments, another result: whatever a private function may do
            return False

    plain = getattr(torch, "mkldnn_convolution", None)
    fused = getattr(torch.ops.mkldnn, "_convolution_pointwise", None)
    return (
        plain if is_right(plain, expected) else None,
        fused if is_right(fused, expected.relu(), "relu", [], "") else None,
    )
