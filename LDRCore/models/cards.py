"""Checks model cards, which may come from strangers, before anything that they ask for is made."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

from LDRCore.errors import RegistrationError

MOST_CASCADES = 20
MODALITIES = ("mr", "ct")
_BOUNDS = {  # of `working_grid`
    "spacing_mm": (0.25, 20.0),
    "stem_spacing_mm": (0.5, 40.0),
    "margin_mm": (0.0, 200.0),
    "stem_passes": (1, 100),
}
_STEM_SIZES = (8, 256)  # voxels along a side
_WHOLE_KEYS = ("stem_passes",)
_GRID_KEYS, _STEM_KEYS = ("spacing_mm", "margin_mm", "stem_spacing_mm"), ("stem_shape", "stem_passes")


def check_card(card: Any, path: Path) -> None:
    """Refuse a card that lacks a part, or whose numbers are out of bounds.

    Args:
        card: what the JSON file holds.
        path: of the file, for messages.

    Raises:
        RegistrationError: see above.
    """
    if not isinstance(card, dict):
        raise RegistrationError(f"a model card must be a JSON object, got {path} with a {type(card).__name__}")
    _require(card, ("name", "architecture", "working_grid", "weights", "sha256"), path)
    for key, kind in (("name", str), ("weights", str), ("sha256", str), ("architecture", dict), ("working_grid", dict)):
        if not isinstance(card[key], kind):
            raise RegistrationError(f"{key!r} of a model card must be of type {kind.__name__}, got another in {path}")
    if Path(card["weights"]).name != card["weights"] or card["weights"] in ("", ".", ".."):
        raise RegistrationError(f"the weights of a model must lie beside its card, got {card['weights']!r} in {path}")
    _require(card["architecture"], ("network", "cascades"), path)
    _check_fits(card.get("fits"), path)
    _check_number("cascades", card["architecture"]["cascades"], (1, MOST_CASCADES), True, path)
    grid = card["working_grid"]
    _require(grid, _GRID_KEYS, path)
    if card["architecture"].get("stem"):
        _require(grid, _STEM_KEYS, path)
    for key, bounds in _BOUNDS.items():
        if key in grid:
            _check_number(key, grid[key], bounds, key in _WHOLE_KEYS, path)
    shape = grid.get("stem_shape", [64, 64, 64])
    if not isinstance(shape, list) or len(shape) != 3:
        raise RegistrationError(f"'stem_shape' of a model card must be three sizes, got {str(shape)[:40]} in {path}")
    for size in shape:
        _check_number("stem_shape", size, _STEM_SIZES, True, path)


def _check_fits(fits: Any, path: Path) -> None:
    """Refuse what cannot say which images a model fits."""
    if fits is None:
        return
    extent = fits.get("extent_mm") if isinstance(fits, dict) else None
    numbers = isinstance(extent, list) and len(extent) == 2 and all(isinstance(e, (int, float)) for e in extent)
    if not numbers or fits.get("modality") not in MODALITIES:
        raise RegistrationError(
            f"'fits' of a model card must hold a modality of {MODALITIES} and two lengths 'extent_mm', "
            f"got {str(fits)[:80]} in {path}"
        )


def _require(table: dict[str, Any], keys: Iterable[str], path: Path) -> None:
    missing = [key for key in keys if key not in table]
    if missing:
        raise RegistrationError(f"a model card must hold {missing[0]!r}, got {path} without it")


def _check_number(key: str, value: Any, bounds: tuple[float, float], whole: bool, path: Path) -> None:
    kinds = (int,) if whole else (int, float)
    if not isinstance(value, kinds) or isinstance(value, bool) or not bounds[0] <= value <= bounds[1]:
        raise RegistrationError(
            f"{key!r} of a model card must be {bounds[0]} to {bounds[1]}, got {str(value)[:40]} in {path}"
        )
