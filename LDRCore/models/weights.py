"""Model cards and weights: which models there are, loading them safely, and refusing damaged files.

A model is two files side by side: `NAME.json` (the card: architecture, working grid, data, licence, results, sha256)
and `NAME.pt` (a half-precision state dict, read with weights_only=True, so no code in it can run). Models that ship
lie in `LDRCore/bundled`. What runs a model is `pipeline.model`.
"""

from __future__ import annotations

import hashlib
import io
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from LDRCore.errors import RegistrationError
from LDRCore.models.cards import check_card

if TYPE_CHECKING:
    import torch

    from LDRCore.models.cascade import Cascade

BUNDLED = Path(__file__).parents[1] / "bundled"
DEFAULT = "brain-t1-gradient"  # what `register`, the command line and the panel use where no model is named

NO_NETWORK: dict[str, Any] = {
    "name": "none",
    "title": "Any anatomy (no network)",
    "version": "1",
    "summary": "no network: alignment from several starts, then instance optimisation; for any anatomy",
    "made_for": "any images of the same anatomy",
    "architecture": {"cascades": 0},
    "refine": "fast",
    "working_grid": {
        "spacing_mm": 2.0,
        "margin_mm": 8.0,
        "stem_spacing_mm": 4.0,
        "stem_shape": [64, 64, 64],
        "stem_passes": 0,
    },
}
"""The card that stands for `model="none"`. "refine" is what a registration does where nothing else is asked for."""

ANY = NO_NETWORK | {
    "name": "any",
    "title": "Any images (a model is chosen by the intensities)",
    "summary": "the networks of the model that the images fit, if there is one, between alignment and optimisation",
}
"""The card that stands for `model="any"`; `model_info` adds the most cascades that a model has."""


def list_models() -> list[str]:
    """Return the names of the models that ship with this package."""
    return sorted(p.stem for p in BUNDLED.glob("*.json"))


def _card_path(name_or_path: str | os.PathLike[str]) -> Path:
    if not isinstance(name_or_path, (str, os.PathLike)) or not os.fspath(name_or_path):
        raise RegistrationError(f"model must be a name or a path, got {name_or_path!r}")
    text = os.fspath(name_or_path)
    if text in list_models():
        return BUNDLED / f"{text}.json"
    path = Path(text)
    card = path.with_suffix(".json")
    if path.suffix in (".pt", ".json") and card.is_file():
        return card
    raise RegistrationError(
        f"model must be one of {[*list_models(), *WITHOUT_WEIGHTS]} or a path to a .pt file with its .json card "
        f"beside it, got {text!r}"
    )


def model_info(name_or_path: str | os.PathLike[str]) -> dict[str, Any]:
    """Return the card of a model: what it was made for, from which data, under which licence, with which results.

    Raises:
        RegistrationError: no such model, or a card that cannot be read.
    """
    if isinstance(name_or_path, str) and name_or_path in WITHOUT_WEIGHTS:
        return WITHOUT_WEIGHTS[name_or_path]()
    path = _card_path(name_or_path)
    try:
        card = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise RegistrationError(f"a model card must be readable JSON, got {path} ({error})") from None
    check_card(card, path)
    asked = Path(name_or_path)
    if asked.suffix == ".pt" and asked.name != card["weights"]:
        raise RegistrationError(
            f"the card beside {asked.name} must name it as its weights, got {card['weights']} in {path}"
        )
    return card


def model_titles() -> dict[str, str]:
    """Return what a list of models shows, by name: the one that chooses first, the one without networks last."""
    names = [ANY["name"], *default_first(), NO_NETWORK["name"]]
    cards = [model_info(name) for name in names]
    return {card["name"]: card.get("title") or card.get("made_for") or card["name"] for card in cards}


def default_first() -> list[str]:
    """Return the names of the models that ship, in the order in which they are preferred."""
    return sorted(list_models(), key=lambda name: name != DEFAULT)


def _any_model() -> dict[str, Any]:
    cascades = [model_info(name)["architecture"]["cascades"] for name in list_models()]
    return ANY | {"architecture": {"cascades": max(cascades, default=0)}}


WITHOUT_WEIGHTS: dict[str, Callable[[], dict[str, Any]]] = {"any": _any_model, "none": lambda: NO_NETWORK}
"""The cards of models that have no files, by name."""


def verify(name_or_path: str | os.PathLike[str]) -> Path:
    """Return the path of a model's weights, after their sha256 was found to be the card's.

    Raises:
        RegistrationError: the file is missing or damaged.
    """
    card, folder = model_info(name_or_path), _card_path(name_or_path).parent
    _checked_bytes(card, folder)
    return folder / card["weights"]


def _checked_bytes(card: dict[str, Any], folder: Path) -> bytes:
    """Read a model's weights, and check the very bytes that are used against the card."""
    path = folder / card["weights"]
    try:
        data = path.read_bytes()
    except OSError:
        message = f"the weights of {card['name']} must lie beside their card, got no readable file {path}"
        raise RegistrationError(message) from None
    digest = hashlib.sha256(data).hexdigest()
    if digest != card["sha256"]:
        raise RegistrationError(
            f"the weights of {card['name']} must have sha256 {str(card['sha256'])[:12]}..., got another "
            f"({path} is damaged)"
        )
    return data


def load_cascade(name_or_path: str | os.PathLike[str], card: dict[str, Any] | None = None) -> Cascade:
    """Read a model's stem and networks as they train: float32, on the CPU.

    Args:
        name_or_path: a name of `list_models`, or a path to a .pt (its card beside it).
        card: as `model_info` returned it; read again if not given.

    Raises:
        RegistrationError: unknown model, damaged weights, or weights that do not fit the card.
    """
    import torch

    from LDRCore.models.registry import build_cascade

    card = model_info(name_or_path) if card is None else card
    data = _checked_bytes(card, _card_path(name_or_path).parent)
    with torch.inference_mode(False), torch.device("cpu"):
        state = _state_dict(card, data)
        _check_shapes(card, state)
        cascade = build_cascade(card["architecture"]).float()
        try:
            cascade.load_state_dict({k: v.float() for k, v in state.items()})
        except RuntimeError as error:
            reason = str(error).splitlines()[1].strip()
            message = f"the weights of {card['name']} must fit its card's architecture, got {reason}"
            raise RegistrationError(message) from None
    return cascade


def _check_shapes(card: dict[str, Any], state: dict[str, torch.Tensor]) -> None:
    """Refuse an architecture that the weights do not fit, without allocating it, and weights that are not finite.

    Raises:
        RegistrationError: see above.
    """
    import torch
    from torch.overrides import TorchFunctionMode

    from LDRCore.models.registry import build_cascade

    class WithoutInitialising(TorchFunctionMode):
        """On "meta" one random number makes torch import 800 modules, which takes more than a second."""

        def __torch_function__(self, called: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            if getattr(called, "__module__", "") == "torch.nn.init":
                return args[0] if args else kwargs["tensor"]
            return called(*args, **(kwargs or {}))

    try:
        with torch.device("meta"), WithoutInitialising():
            expected = {key: value.shape for key, value in build_cascade(card["architecture"]).state_dict().items()}
    except Exception as error:  # of any kind, as the card may say anything
        reason = " ".join(str(error).split())[:120]
        message = f"the card of {card['name']} must describe a network, got {type(error).__name__} ({reason})"
        raise RegistrationError(message) from None
    for key in sorted(set(expected) ^ set(state)) or [key for key in expected if expected[key] != state[key].shape]:
        raise RegistrationError(f"the weights of {card['name']} must fit its card's architecture, got another {key}")
    if not all(bool(value.isfinite().all()) for value in state.values()):
        raise RegistrationError(f"the weights of {card['name']} must be finite, got NaN or infinite ones")


def _state_dict(card: dict[str, Any], data: bytes) -> dict[str, torch.Tensor]:
    """Parse a weights file without running anything in it."""
    import torch

    try:
        state = torch.load(io.BytesIO(data), map_location="cpu", weights_only=True)
    except Exception:  # of any kind, as the bytes may be anything
        state = None
    if not isinstance(state, dict) or not all(isinstance(value, torch.Tensor) for value in state.values()):
        raise RegistrationError(f"the weights of {card['name']} must be a plain state dict, got something else")
    return state


def save_model(folder: str | os.PathLike[str], card: dict[str, Any], state: dict[str, Any]) -> Path:
    """Write a model's two files (weights first, both complete or not at all) and return the card's path.

    Args:
        folder: created if needed.
        card: everything but `weights` and `sha256`, which are filled in.
        state: state dict of `build_cascade(card["architecture"])`; stored in half precision.
    """
    import torch

    target = Path(folder)
    target.mkdir(parents=True, exist_ok=True)
    name = card["name"]
    part = target / f"{name}.pt.part"
    torch.save({k: v.detach().cpu().half().contiguous() for k, v in state.items()}, part)
    full = {**card, "weights": f"{name}.pt", "sha256": hashlib.sha256(part.read_bytes()).hexdigest()}
    card_part = target / f"{name}.json.part"
    card_part.write_text(json.dumps(full, indent=1) + "\n", encoding="utf-8")
    part.replace(target / f"{name}.pt")
    card_part.replace(target / f"{name}.json")
    return target / f"{name}.json"
