"""The torch state that this package computes in, whatever the caller's: no gradient, no inference mode, no autocast."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch


@contextmanager
def own_torch_context() -> Iterator[None]:
    """Compute in this package's own torch state; also a decorator.

    Tensors that are kept between calls (a loaded model) must not be inference tensors, and results must be the same
    bit for bit in any caller's inference mode or autocast. Default dtype and default device need no entry here: every
    tensor of this package names its own.
    """
    with (
        torch.inference_mode(False),
        torch.no_grad(),
        torch.autocast("cpu", enabled=False),
        torch.autocast("cuda", enabled=False),
    ):
        yield
