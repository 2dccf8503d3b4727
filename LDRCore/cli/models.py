"""`ldr models`: list models and networks, or show one model's card."""

from __future__ import annotations

import argparse
from typing import Any

from LDRCore.cli.output import CommandOutput
from LDRCore.models import registry, weights
from LDRCore.models.registry import Cost


def run(options: argparse.Namespace) -> CommandOutput:
    """List models and networks, or show one model's card."""
    if options.name:
        card = weights.model_info(options.name)
        return CommandOutput(card, describe_card(card))
    cards = [weights.model_info(name) for name in weights.model_titles()]
    costs = count_costs()
    lines = ["models"]
    for card in cards:
        lines.append(f"  {card['name']:<18} {_cascades(card):<15}  {card['title']}: {card['summary']}")
    lines += ["networks (one, at 128 x 128 x 128)", f"  {'name':<18} {'parameters':>12} {'multiply-adds':>14}"]
    for name, cost in costs.items():
        lines.append(f"  {name:<18} {cost.parameters:>12,} {cost.multiply_adds / 1e9:>12.2f} G")
    networks = {
        name: {"parameters": cost.parameters, "multiply_adds": cost.multiply_adds, "shape": list(cost.shape)}
        for name, cost in costs.items()
    }
    return CommandOutput({"models": cards, "networks": networks}, "\n".join(lines))


def _cascades(card: dict[str, Any]) -> str:
    most = card["architecture"]["cascades"]
    return f"0 to {most} cascades" if most else "no network"


def count_costs() -> dict[str, Cost]:
    """Count the cost of every network and stem, by name."""
    costs = {name: registry.cost(registry.build_network(name)) for name in sorted(registry.DENSE)}
    costs["ldr (head=half)"] = registry.cost(registry.build_network("ldr", head="half"))
    return costs | {name: registry.cost(registry.build_stem(name)) for name in sorted(registry.STEMS)}


def describe_card(card: dict[str, Any], indent: int = 0) -> str:
    """Describe a model card as an indented list."""
    lines = []
    for key, value in card.items():
        head = f"{'  ' * indent}{key.replace('_', ' ')}"
        if isinstance(value, dict):
            lines += [head, describe_card(value, indent + 1)]
        else:
            lines.append(f"{head}: {value}")
    return "\n".join(lines)
