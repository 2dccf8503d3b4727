"""Networks by name, and what they cost. Torch only; importing this file builds nothing."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from LDRCore.models.affine import AffineLDR, AffineStem
from LDRCore.models.base import DenseNetwork
from LDRCore.models.cascade import Cascade
from LDRCore.models.ldr import LDR
from LDRCore.models.ldr_release import LDRRelease
from LDRCore.models.mobilenet import MobileNet
from LDRCore.models.unet import UNet, UNetPlusPlus
from LDRCore.models.voxelmorph import VoxelMorph
from LDRCore.models.vtn import VTN, AffineVTN

DENSE: dict[str, Callable[..., DenseNetwork]] = {
    "ldr": LDR,
    "ldr-release": LDRRelease,
    "mobilenet": MobileNet,
    "unet": UNet,
    "unetpp": UNetPlusPlus,
    "voxelmorph": VoxelMorph,
    "vtn": VTN,
}
STEMS: dict[str, Callable[..., AffineStem]] = {"affine-ldr": AffineLDR, "affine-vtn": AffineVTN}
# the paper's systems: (affine stem, base network), the network as often as there are cascades
SYSTEMS: dict[str, tuple[str, str]] = {
    "ldr": ("affine-ldr", "ldr"),
    "ldr-release": ("affine-ldr", "ldr-release"),
    "rcn": ("affine-vtn", "vtn"),  # VTN (ADDD) is "rcn" with three cascades
    "rcn-voxelmorph": ("affine-vtn", "voxelmorph"),  # VoxelMorph of Table I with one
}


def system(name: str, cascades: int) -> dict[str, Any]:
    """The `architecture` entry (see `build_cascade`) of a system of the paper: stem and n base networks.

    Args:
        name: a key of `SYSTEMS`, or of `DENSE` for any other network behind the light stem.
        cascades: n, 1 or more.

    Raises:
        ValueError: the name is unknown, or there is no cascade.
    """
    if name not in SYSTEMS and name not in DENSE:
        raise ValueError(f"system must be one of {sorted({*SYSTEMS, *DENSE})}, got {name!r}")
    if cascades < 1:
        raise ValueError(f"cascades must be at least 1, got {cascades}")
    stem, network = SYSTEMS.get(name, ("affine-ldr", name))
    return {"stem": stem, "network": network, "cascades": cascades}


def build_network(name: str, **options: Any) -> DenseNetwork:
    """A dense network by name (a key of `DENSE`), with its class's options.

    Raises:
        ValueError: the name is unknown.
    """
    if name not in DENSE:
        raise ValueError(f"network must be one of {sorted(DENSE)}, got {name!r}")
    return DENSE[name](**options)


def build_stem(name: str, **options: Any) -> AffineStem:
    """An affine stem by name (a key of `STEMS`), with its class's options.

    Raises:
        ValueError: the name is unknown.
    """
    if name not in STEMS:
        raise ValueError(f"stem must be one of {sorted(STEMS)}, got {name!r}")
    return STEMS[name](**options)


def build_cascade(architecture: dict[str, Any]) -> Cascade:
    """A cascade from a model card's `architecture` entry.

    Keys: `network` and optionally `stem`, each a name or {"name": ..., options}; `cascades`; optional `multiplier`.
    `network` may be a list, one entry a cascade. With the options stands `image_stride`, see `Cascade`.

    Raises:
        ValueError: unknown names, or a list shorter than `cascades`.
    """
    stages = networks_of(architecture)
    networks = [build_network(name, **options) for name, _, options in stages]
    stem, stem_stride = None, 1
    if architecture.get("stem"):
        name, stem_stride, options = _entry(architecture["stem"])
        stem = build_stem(name, **options)
    return Cascade(
        networks,
        stem,
        image_strides=[stride for _, stride, _ in stages],
        stem_stride=stem_stride,
        multiplier=architecture.get("multiplier"),
    )


def networks_of(architecture: dict[str, Any]) -> list[tuple[str, int, dict[str, Any]]]:
    """(name, image stride, options) of every cascade of a model card's `architecture` entry.

    Raises:
        ValueError: a list of networks that is shorter than `cascades`.
    """
    network, cascades = architecture["network"], architecture["cascades"]
    entries = network if isinstance(network, list) else [network] * cascades
    if len(entries) < cascades:
        raise ValueError(f"network must be one entry, or one for each of {cascades} cascades, got {len(entries)}")
    return [_entry(e) for e in entries[:cascades]]


def _entry(entry: str | dict[str, Any]) -> tuple[str, int, dict[str, Any]]:
    options: dict[str, Any] = {"name": entry} if isinstance(entry, str) else dict(entry)
    return options.pop("name"), options.pop("image_stride", 1), options


@dataclass(frozen=True)
class Cost:
    """Size and arithmetic of one network for one pair of `shape`.

    Attributes:
        parameters: their number.
        multiply_adds: of convolutions and linear layers.
        values: numbers that these layers must at least read and write, inputs and results once each.
    """

    parameters: int
    multiply_adds: int
    shape: tuple[int, int, int]
    values: int = 0


def cost(network: DenseNetwork | AffineStem, shape: tuple[int, int, int] = (128, 128, 128)) -> Cost:
    """Count parameters and the multiply-adds of convolutions and linear layers, without computing anything.

    Args:
        network: a dense network or a stem.
        shape: (D, H, W) of the pair.
    """
    total = values = 0

    def count(module: nn.Module, inputs: tuple[torch.Tensor, ...], output: torch.Tensor) -> None:
        nonlocal total, values
        if isinstance(module, nn.Conv3d | nn.ConvTranspose3d | nn.Linear):
            values += inputs[0].numel() + output.numel() + module.weight.numel()
        if isinstance(module, nn.Conv3d):
            total += output.numel() * (module.in_channels // module.groups) * math.prod(module.kernel_size)
        elif isinstance(module, nn.ConvTranspose3d):
            total += inputs[0].numel() * (module.out_channels // module.groups) * math.prod(module.kernel_size)
        elif isinstance(module, nn.Linear):
            total += output.numel() * module.in_features

    parameters = sum(p.numel() for p in network.parameters())
    shapes_only = copy.deepcopy(network).to("meta")
    hooks = [m.register_forward_hook(count) for m in shapes_only.modules() if not list(m.children())]
    image = torch.empty(1, 1, *shape, dtype=next(network.parameters()).dtype, device="meta")
    with torch.no_grad():
        shapes_only.predict(image, image)
    for hook in hooks:
        hook.remove()
    return Cost(parameters, total, shape, values)
