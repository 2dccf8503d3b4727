"""`ldr models`."""

from __future__ import annotations

import argparse
from typing import Any

from LDRCore.cli.files import Outcome
from LDRCore.models import registry, weights


def run(options: argparse.Namespace) -> Outcome:
    """List models and networks, or show one model's card."""
    if options.name:
        card = weights.model_info(options.name)
        return card, _card_text(card)
    cards = [weights.model_info(name) for name in weights.list_models()]
    networks = {}
    for name in sorted(registry.DENSE):
        networks[name] = registry.cost(registry.build_network(name))
    networks["ldr (head=half)"] = registry.cost(registry.build_network("ldr", head="half"))
    for name in sorted(registry.STEMS):
        networks[name] = registry.cost(registry.build_stem(name))
    lines = ["models"]
    for card in cards:
        lines.append(f"  {card['name']:<18} 1 to {card['architecture']['cascades']} cascades  {card['summary']}")
    lines += ["networks (one, at 128 x 128 x 128)", f"  {'name':<18} {'parameters':>12} {'multiply-adds':>14}"]
    for name, c in networks.items():
        lines.append(f"  {name:<18} {c.parameters:>12,} {c.multiply_adds / 1e9:>12.2f} G")
    result = {
        "models": cards,
        "networks": {
            n: {"parameters": c.parameters, "multiply_adds": c.multiply_adds, "shape": list(c.shape)}
            for n, c in networks.items()
        },
    }
    return result, "\n".join(lines)


def _card_text(card: dict[str, Any], indent: int = 0) -> str:
    """A model card as an indented list."""
    lines = []
    for key, value in card.items():
        head = f"{'  ' * indent}{key.replace('_', ' ')}"
        if isinstance(value, dict):
            lines += [head, _card_text(value, indent + 1)]
        else:
            lines.append(f"{head}: {value}")
    return "\n".join(lines)
