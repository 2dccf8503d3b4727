"""A model ready to run: its card, and its networks in the layout and precision that suit the device."""

from __future__ import annotations

import functools
import json
import os
import threading
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from LDRCore.models.weights import WITHOUT_WEIGHTS, load_cascade, model_info

if TYPE_CHECKING:
    import torch

    from LDRCore.models.affine import AffineStem
    from LDRCore.models.cascade import Cascade


@dataclass(frozen=True, eq=False)
class Model:
    """A model ready to run.

    Attributes:
        name: the card's name.
        card: the whole card.
        cascade: stem and networks for inference on `device`; not for training, see `weights.load_cascade`. None for
            the models "none" and "any".
        device: where it lives.
    """

    name: str
    card: dict[str, Any]
    cascade: Cascade | None
    device: str

    @property
    def stem(self) -> AffineStem | None:
        """The affine stem, where there is one."""
        return None if self.cascade is None else self.cascade.stem


def load_model(name_or_path: str | os.PathLike[str], device: str = "cpu") -> Model:
    """Load a model by name or path, kept in memory for the next call.

    Args:
        name_or_path: a name of `list_models`, or a path to a .pt (its card beside it).
        device: "cpu", "cuda", "cuda:1" ...

    Raises:
        RegistrationError: unknown model, damaged weights, weights that do not fit the card, or an LDR_PRECISION that
            is none.
    """
    from LDRCore.cpu import precision

    card = json.dumps(model_info(name_or_path))
    with _LOADING:
        return _load(os.fspath(name_or_path), device, card, precision.of_convolutions(device))


_LOADING = threading.Lock()  # so that two threads do not load one model twice


@functools.lru_cache(maxsize=4)
def _load(name_or_path: str, device: str, card_text: str, convolutions: torch.dtype) -> Model:
    """The card is part of the key: a model that was replaced on disk is loaded anew."""
    from LDRCore.torch_context import own_torch_context

    card = json.loads(card_text)
    if card["name"] in WITHOUT_WEIGHTS and "weights" not in card:
        return Model(card["name"], card, None, device)
    with own_torch_context():
        return Model(card["name"], card, deploy(load_cascade(name_or_path, card), device, convolutions), device)


def deploy(cascade: Cascade, device: str, convolutions: torch.dtype) -> Cascade:
    """Return a trained cascade in the layout for inference on a device; what was given is no longer to be used.

    Args:
        cascade: float32, on the CPU.
        device: "cpu", "cuda", "cuda:1" ...
        convolutions: precision of the dense networks' convolutions.
    """
    import torch

    from LDRCore.cpu import layout

    cascade.eval().requires_grad_(False)
    cascade.to(device).to(memory_format=torch.channels_last_3d)  # type: ignore[call-overload]
    if torch.device(device).type == "cpu":
        return layout.arrange(cascade, convolutions)
    cascade.precision = convolutions
    return cascade
