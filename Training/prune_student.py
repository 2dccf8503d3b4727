r"""Make a student of fewer channels from a trained one: keep what its next layers hear, then train it on.

    python -m Training.prune_student --config Training/configs/student-brain-t1-small.toml --data DIR \
        --init runs/wide.pt --out runs/pruned.pt
    python -m Training.train_student --config Training/configs/student-brain-t1-small.toml --data DIR \
        --init runs/pruned.pt --out runs/small.pt

For LDR networks with ``head="half"``. Of every layer those channels stay whose standard deviation, times the norm of
the weights that read them, is largest on training pairs; what the others add in the mean goes into the next biases. Of
the finest features those stay that a least-squares fit of the flow misses most, and that fit is the new flow layer.
"""

from __future__ import annotations

import dataclasses
import math
import sys
from pathlib import Path
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import nn

from LDRCore.models import registry, weights
from LDRCore.models.cascade import Cascade
from LDRCore.models.ldr import LDR
from Training import checkpoints, config, engine, objectives
from Training.config import ConfigError, option
from Training.pairs import PairSource, validation_pairs
from Training.train_student import StudentSettings, from_card

# name of a layer's output -> the layers that read it and where its channels begin there, as (layer, other input first)
READERS = {
    "encoder.0": [("encoder.1", None), ("flow", "decoder.2")],
    "encoder.1": [("encoder.2", None), ("decoder.2", "decoder.1")],
    "encoder.2": [("encoder.3", None), ("decoder.1", "decoder.0")],
    "encoder.3": [("decoder.0", None)],
    "decoder.0": [("decoder.1", None)],
    "decoder.1": [("decoder.2", None)],
    "decoder.2": [("flow", None)],
}
POINTS = 12_000  # of a pair, that the flow layer is fitted at


@dataclasses.dataclass(frozen=True, kw_only=True)
class PruneSettings(StudentSettings):
    """As of a student's training; `init` is the wide model or checkpoint, `options` what is left of it."""

    samples: int = option(16, "training pairs to look at")


class Watched:
    """What one network's layers give on the pairs that are run through it."""

    def __init__(self, network: LDR) -> None:
        self.network = network
        self._sums: dict[str, torch.Tensor] = {}
        self._count = 0
        for name in READERS:
            network.get_submodule(name).register_forward_hook(lambda _m, _i, out, name=name: self._add(name, out))
        network.flow.register_forward_hook(self._add_flow)
        taps = math.prod(network.flow.kernel_size)
        size = network.flow.in_channels * taps + 1
        self.taps, self.normal = taps, torch.zeros(size, size, dtype=torch.float64)
        self.right, self.power = torch.zeros(size, 3, dtype=torch.float64), 0.0

    def _add(self, name: str, out: torch.Tensor) -> None:
        values = out[0].float().relu().flatten(1)
        moments = torch.stack((values.mean(1), values.square().mean(1)))
        self._sums[name] = self._sums.get(name, 0) + moments

    def _add_flow(self, _module: nn.Module, inputs: tuple[torch.Tensor], out: torch.Tensor) -> None:
        self._count += 1
        edge, (height, width) = self.network.flow.kernel_size[0], out.shape[3:]
        where = torch.randperm(out[0, 0].numel())[:POINTS]
        z, y, x = where // (height * width), where // width % height, where % width
        padded = F.pad(inputs[0][0].float(), (edge // 2,) * 6)
        shifts = [(a, b, c) for a in range(edge) for b in range(edge) for c in range(edge)]
        rows = torch.stack([padded[:, z + a, y + b, x + c] for a, b, c in shifts], 1).flatten(0, 1)  # by channel, tap
        rows = torch.cat((rows, torch.ones(1, len(where)))).double()
        target = out[0].float().flatten(1)[:, where].double()
        self.normal += rows @ rows.T
        self.right += rows @ target.T
        self.power += float(target.square().sum())

    def mean(self, name: str) -> torch.Tensor:
        """Of a layer's rectified output, channel by channel."""
        return self._sums[name][0] / self._count

    def deviation(self, name: str) -> torch.Tensor:
        """Standard deviation of the same."""
        mean, square = self._sums[name] / self._count
        return (square - mean.square()).clamp_min(0).sqrt()

    def fit(self, channels: list[int]) -> tuple[torch.Tensor, torch.Tensor, float]:
        """(weight, bias, share of the flow's power that it misses) of the best flow layer that reads these channels."""
        rows = torch.tensor([c * self.taps + t for c in channels for t in range(self.taps)] + [len(self.normal) - 1])
        normal, right = self.normal[rows][:, rows], self.right[rows]
        solved = torch.linalg.solve(normal + 1e-6 * normal.diagonal().mean() * torch.eye(len(normal)), right)
        missed = 1 - float(2 * (solved * right).sum() - (solved * (normal @ solved)).sum()) / self.power
        weight = solved[:-1].T.float().reshape(3, len(channels), *self.network.flow.kernel_size)
        return weight, solved[-1].float(), missed


def _read(layer: nn.Module) -> torch.Tensor:
    """A convolution's weights as (channels that it reads, all others)."""
    weight = cast(torch.Tensor, layer.weight)
    return (weight if isinstance(layer, nn.ConvTranspose3d) else weight.transpose(0, 1)).flatten(1)


def _widths(network: LDR) -> dict[str, int]:
    return {name: cast(Any, network.get_submodule(name)).out_channels for name in READERS}


def choose(watched: Watched, wanted: dict[str, int]) -> dict[str, list[int]]:
    """The channels of each layer that stay."""
    network, kept = watched.network, {}
    widths = _widths(network)
    for name, readers in READERS.items():
        power = torch.zeros(widths[name])
        for reader, before in readers:
            begin = widths[before] if before else 0
            power += _read(network.get_submodule(reader))[begin : begin + widths[name]].square().sum(1)
        order = (watched.deviation(name) * power.sqrt()).argsort(descending=True)
        kept[name] = sorted(order[: wanted[name]].tolist())
    finest, skips = list(range(widths["decoder.2"])), [widths["decoder.2"] + c for c in kept["encoder.0"]]
    while len(finest) > wanted["decoder.2"]:
        left = {c: watched.fit([o for o in finest if o != c] + skips)[2] for c in finest}
        finest.remove(min(left, key=left.__getitem__))
    kept["decoder.2"] = finest
    return kept


@torch.no_grad()
def prune(watched: Watched, target: LDR) -> float:
    """Fill a narrower network from a watched one; the share of the flow's power that its flow layer misses."""
    network, kept = watched.network, choose(watched, _widths(target))
    widths = _widths(network)
    inputs: dict[str, list[str]] = {}  # of each layer, in the order of its channels
    for name, readers in READERS.items():
        for reader, before in readers:
            inputs.setdefault(reader, []).insert(0 if before is None else 1, name)
    for name in READERS:
        old, new = cast(Any, network.get_submodule(name)), cast(Any, target.get_submodule(name))
        across = isinstance(old, nn.ConvTranspose3d)
        weight = old.weight.transpose(0, 1) if across else old.weight
        weight, bias, begin, stay = weight[kept[name]], old.bias[kept[name]].clone(), 0, []
        for source in inputs.get(name, []):
            gone = [c for c in range(widths[source]) if c not in kept[source]]
            share = weight[:, [begin + c for c in gone]].sum((2, 3, 4)) / (8 if across else 1)  # of the taps, an eighth
            bias += share @ watched.mean(source)[gone]
            stay += [begin + c for c in kept[source]]
            begin += widths[source]
        weight = weight[:, stay] if stay else weight
        new.weight.copy_(weight.transpose(0, 1) if across else weight)
        new.bias.copy_(bias)
    weight, bias, missed = watched.fit(kept["decoder.2"] + [widths["decoder.2"] + c for c in kept["encoder.0"]])
    target.flow.weight.copy_(weight)
    cast(torch.Tensor, target.flow.bias).copy_(bias)
    return missed


def wide_model(source: str | None) -> Cascade:
    """The cascade to prune, in float32, without its stem.

    Raises:
        ConfigError: none given.
    """
    if not source:
        raise ConfigError("init must name the model or checkpoint to prune, got none")
    if checkpoints.is_checkpoint(source):
        found = checkpoints.read_checkpoint(Path(source))
        model = registry.build_cascade(found["facts"]["architecture"])
        model.load_state_dict(found["model"])
    else:
        model = weights.load_cascade(source)
    model.stem, model.precision = None, torch.float32
    return model.float().requires_grad_(False)


def run(settings: PruneSettings) -> None:
    """Prune, print what is missed and the Dice of the validation pairs, write the checkpoint."""
    torch.manual_seed(settings.seed)
    wide = wide_model(settings.init)
    try:
        narrow = registry.build_cascade(settings.architecture())
    except (ValueError, TypeError) as error:
        raise ConfigError(str(error)) from None
    check(wide, narrow)
    device = torch.device("cpu")
    source = PairSource(settings, settings.split, settings.seed, device)
    watched = [Watched(cast(LDR, network)) for network in wide.networks]
    for step in range(settings.samples):
        sample = source.sample(step, 0)
        wide(sample.moving, sample.fixed)  # the hooks of `Watched` see what every layer gives
    for k, (one, network) in enumerate(zip(watched, narrow.networks, strict=True)):
        print(f"cascade {k + 1}: the new flow layer misses {100 * prune(one, cast(LDR, network)):.1f} % of the power")
    if settings.val_split:
        print(objectives.validate(narrow, validation_pairs(settings, device)))
    facts = {"architecture": settings.architecture(), "data_identity": source.scans.identity}
    state = {"model": narrow.state_dict(), "step": 0, "seconds": 0.0, "facts": facts}
    state["config"] = config.as_dict(settings)
    checkpoints.save_atomically(state, settings.out)


def check(wide: Cascade, narrow: Cascade) -> None:
    """Refuse what cannot be pruned into each other.

    Raises:
        ConfigError: naming the rule.
    """
    if len(wide) != len(narrow):
        raise ConfigError(f"cascades must be those of init, {len(wide)}, got {len(narrow)}")
    for old, new in zip(wide.networks, narrow.networks, strict=True):
        for network in (old, new):
            if not isinstance(network, LDR) or not isinstance(network.flow, nn.Conv3d):
                raise ConfigError(f'both networks must be ldr with head="half", got {type(network).__name__}')
        before, after = _widths(old), _widths(new)
        wider = [name for name in before if after[name] > before[name]]
        if wider:
            raise ConfigError(
                f"channels and up must not exceed those of init, got {after[wider[0]]} for {wider[0]} "
                f"where there are {before[wider[0]]}"
            )


def main() -> None:
    """Read the configuration and prune."""
    run(config.load(PruneSettings, sys.argv[1:], __doc__, from_card))


if __name__ == "__main__":
    engine.run_script(main)
