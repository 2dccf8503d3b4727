"""Networks by name, and their cost. Torch only; importing this file builds nothing."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, TypeVar

import torch
from torch import nn

from LDRCore.models.affine import AffineLDR, AffineStem
from LDRCore.models.base import DenseNetwork
from LDRCore.models.cascade import Cascade
from LDRCore.models.ldr import LDR
from LDRCore.models.ldr_gradient import LDRGradient
from LDRCore.models.ldr_release import LDRRelease
from LDRCore.models.mobilenet import MobileNet
from LDRCore.models.unet import UNet, UNetPlusPlus
from LDRCore.models.voxelmorph import VoxelMorph
from LDRCore.models.vtn import VTN, AffineVTN

T = TypeVar("T", bound=nn.Module)

DENSE: dict[str, Callable[..., DenseNetwork]] = {
    "ldr": LDR,
    "ldr-gradient": LDRGradient,
    "ldr-release": LDRRelease,
    "mobilenet": MobileNet,
    "unet": UNet,
    "unetpp": UNetPlusPlus,
    "voxelmorph": VoxelMorph,
    "vtn": VTN,
}
STEMS: dict[str, Callable[..., AffineStem]] = {"affine-ldr": AffineLDR, "affine-vtn": AffineVTN}
# the paper's systems: (affine stem, base network); the network is used once for each cascade
SYSTEMS: dict[str, tuple[str, str]] = {
    "ldr": ("affine-ldr", "ldr"),
    "ldr-release": ("affine-ldr", "ldr-release"),
    "rcn": ("affine-vtn", "vtn"),  # VTN (ADDD) is "rcn" with three cascades
    "rcn-voxelmorph": ("affine-vtn", "voxelmorph"),  # VoxelMorph of Table I with one
}


def system(name: str, cascades: int) -> dict[str, Any]:
    """Return the `architecture` entry (see `build_cascade`) of a system of the paper: stem and n base networks.

    >>> system("rcn", 3)
    {'stem': 'affine-vtn', 'network': 'vtn', 'cascades': 3}

    Args:
        name: a key of `SYSTEMS`, or of `DENSE` for any other network after the light stem.
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
    """Build a dense network by name (a key of `DENSE`), with its class's options.

    Raises:
        ValueError: the name is unknown.
    """
    return _choose("network", name, DENSE)(**options)


def build_stem(name: str, **options: Any) -> AffineStem:
    """Build an affine stem by name (a key of `STEMS`), with its class's options.

    Raises:
        ValueError: the name is unknown.
    """
    return _choose("stem", name, STEMS)(**options)


def _choose(kind: str, name: str, classes: dict[str, Callable[..., T]]) -> Callable[..., T]:
    if name not in classes:
        raise ValueError(f"{kind} must be one of {sorted(classes)}, got {name!r}")
    return classes[name]


def build_cascade(architecture: dict[str, Any]) -> Cascade:
    """Build a cascade from a model card's `architecture` entry.

    Args:
        architecture: `network` and optionally `stem`, each a name or {"name": ..., options}; `cascades`; optionally
            `multiplier`. `network` may be a list, one entry for each cascade; an entry with "repeat": n is applied n
            times with the same weights. `image_stride` (see `Cascade`) is given among the options.

    Raises:
        ValueError: unknown names, or a list shorter than `cascades`.
    """
    entries = networks_of(architecture)
    stem, stem_stride = None, 1
    if architecture.get("stem"):
        entry = _read_entry(architecture["stem"])
        stem, stem_stride = build_stem(entry.name, **entry.options), entry.image_stride
    return Cascade(
        [build_network(entry.name, **entry.options) for entry in entries],
        stem,
        repeats=[entry.repeat for entry in entries],
        image_strides=[entry.image_stride for entry in entries],
        stem_stride=stem_stride,
        multiplier=architecture.get("multiplier"),
    )


@dataclass(frozen=True)
class Entry:
    """A network of a model card's `architecture` entry.

    Attributes:
        name: a key of `DENSE` or `STEMS`.
        options: of its class.
        image_stride: see `Cascade`.
        repeat: how often it is applied in a row.
    """

    name: str
    options: dict[str, Any]
    image_stride: int = 1
    repeat: int = 1


def networks_of(architecture: dict[str, Any]) -> list[Entry]:
    """Return the networks of a model card's `architecture` entry, without those that `cascades` leaves out.

    >>> networks_of({"network": {"name": "ldr", "head": "half", "image_stride": 2}, "cascades": 1})
    [Entry(name='ldr', options={'head': 'half'}, image_stride=2, repeat=1)]

    Raises:
        ValueError: a list of networks that is shorter than `cascades`, or a `repeat` that is not 1 or more.
    """
    network, cascades = architecture["network"], architecture["cascades"]
    if not isinstance(network, list):
        entry = _read_entry(network)
        network = [network] * (cascades if entry.repeat == 1 else 1)
    found: list[Entry] = []
    missing = cascades
    for entry in map(_read_entry, network):
        if missing > 0:
            found.append(replace(entry, repeat=min(entry.repeat, missing)))
            missing -= entry.repeat
    if missing > 0:
        raise ValueError(
            f"network must be one entry, or one for each of {cascades} cascades (repeat counted), "
            f"got {cascades - missing}"
        )
    return found


def _read_entry(entry: str | dict[str, Any]) -> Entry:
    options: dict[str, Any] = {"name": entry} if isinstance(entry, str) else dict(entry)
    name, stride, repeat = options.pop("name"), options.pop("image_stride", 1), options.pop("repeat", 1)
    if not isinstance(repeat, int) or repeat < 1:
        raise ValueError(f"repeat must be a whole number from 1, got {repeat!r}")
    return Entry(name, options, stride, repeat)


@dataclass(frozen=True)
class Cost:
    """Size and arithmetic of one network for one pair of `shape`.

    Attributes:
        parameters: their number.
        multiply_adds: of convolutions and linear layers.
        shape: (D, H, W) of the pair.
        values: numbers that these layers read and write at least: inputs, weights and results, once each.
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
    multiply_adds = values = 0

    def count(module: nn.Module, inputs: tuple[torch.Tensor, ...], output: torch.Tensor) -> None:
        nonlocal multiply_adds, values
        if isinstance(module, nn.Conv3d | nn.ConvTranspose3d | nn.Linear):
            values += inputs[0].numel() + output.numel() + module.weight.numel()
        if isinstance(module, nn.Conv3d):
            multiply_adds += output.numel() * (module.in_channels // module.groups) * math.prod(module.kernel_size)
        elif isinstance(module, nn.ConvTranspose3d):
            multiply_adds += inputs[0].numel() * (module.out_channels // module.groups) * math.prod(module.kernel_size)
        elif isinstance(module, nn.Linear):
            multiply_adds += output.numel() * module.in_features

    parameters = sum(p.numel() for p in network.parameters())
    shapes_only = copy.deepcopy(network).to("meta")
    hooks = [m.register_forward_hook(count) for m in shapes_only.modules() if not list(m.children())]
    image = torch.empty(1, 1, *shape, dtype=next(network.parameters()).dtype, device="meta")
    with torch.no_grad():
        shapes_only.predict(image, image)
    for hook in hooks:
        hook.remove()
    return Cost(parameters, multiply_adds, shape, values)
