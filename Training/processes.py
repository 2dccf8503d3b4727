"""The processes that train together, one a device: who writes, who takes which pairs, averaged gradients."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Iterable

import torch
from torch import distributed, nn

from Training.config import ConfigError


@dataclasses.dataclass(frozen=True)
class Rank:
    """This process among all that train together."""

    index: int = 0
    count: int = 1
    local: int = 0

    @property
    def leads(self) -> bool:
        """Whether this process writes and prints."""
        return self.index == 0

    def share(self, batch: int) -> range:
        """Indexes of a batch of pairs that are this process's.

        Raises:
            ConfigError: the batch cannot be shared evenly.
        """
        if batch % self.count:
            raise ConfigError(f"batch must be a multiple of the {self.count} processes, got {batch}")
        each = batch // self.count
        return range(self.index * each, (self.index + 1) * each)


def join_processes(device: str = "auto") -> Rank:
    """Join the processes that torchrun started (environment RANK, WORLD_SIZE, LOCAL_RANK); alone without them."""
    count = int(os.environ.get("WORLD_SIZE", "1"))
    if count == 1:
        return Rank()
    rank = Rank(int(os.environ["RANK"]), count, int(os.environ.get("LOCAL_RANK", "0")))
    on_gpu = device != "cpu" and torch.cuda.is_available()
    if on_gpu:
        torch.cuda.set_device(rank.local)
    distributed.init_process_group("nccl" if on_gpu else "gloo")
    return rank


def pick_device(name: str, rank: Rank) -> torch.device:
    """Pick the device by the user's word.

    Raises:
        ConfigError: a GPU was asked for and there is none.
    """
    if name == "auto":
        name = f"cuda:{rank.local}" if torch.cuda.is_available() else "cpu"
    if name.startswith("cuda") and not torch.cuda.is_available():
        raise ConfigError(f'device must be "cpu" where no CUDA GPU is usable, got {name!r}')
    try:
        return torch.device(name)
    except RuntimeError:
        raise ConfigError(f'device must be "auto", "cpu", "cuda" or "cuda:N", got {name!r}') from None


def parallel(model: nn.Module, rank: Rank, device: torch.device) -> nn.Module:
    """Wrap the model so that gradients are averaged over the processes in `backward`."""
    if rank.count == 1:
        return model
    ids = [device.index] if device.type == "cuda" else None
    return nn.parallel.DistributedDataParallel(model, device_ids=ids)


def average_gradients(parameters: Iterable[nn.Parameter], rank: Rank) -> None:
    """Average gradients over the processes, for what DistributedDataParallel cannot wrap (double backward)."""
    if rank.count == 1:
        return
    gradients = [p.grad for p in parameters if p.grad is not None]
    flat = torch.cat([g.flatten() for g in gradients])
    distributed.all_reduce(flat)
    flat /= rank.count
    for gradient, part in zip(gradients, flat.split([g.numel() for g in gradients]), strict=True):
        gradient.copy_(part.view_as(gradient))
