"""Which networks a pair gets: those of the model that was named; for "any" those of a model made for such images.

The networks that ship with a condition on contrast were trained on pairs of one contrast. On others they move tissue
onto what merely looks like it, and the result is worse than the affine map. Torch, no files.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch

from LDRCore.geometry import Grid
from LDRCore.models.weights import ANY, default_first, model_info
from LDRCore.pipeline.inputs import Pair
from LDRCore.pipeline.intensities import FOREGROUND_LEVEL
from LDRCore.pipeline.model import Model, load_model
from LDRCore.pipeline.options import Options
from LDRCore.refinement import torch_ops

# Share of the squared local correlation that is positive, after the affine map: pairs of T1 heads came to .88 to 1.00,
# a whole one and one without skull to .59 to 1.00, with one of them FLAIR-like to .07 to .67, T2-like to 0 to .25,
# inverted to 0 to .09.
ALIKE = 0.85  # from here on the contrast is taken for one
DOUBTFUL = 0.7  # below, a result of a model for one contrast that was asked for is to be looked at
UNLIKE = 0.55  # below, a model for one contrast is not run although it was asked for
_WINDOW, _EPSILON = 3, 3e-4  # voxels; variance of intensities from 0 to 1
_LEAST = 0.05  # of the moving image, which may show as dark what the fixed one shows as bright
_MARGIN_MM, _MAX_VOXELS = 8.0, 1_000_000


@dataclass(frozen=True)
class Choice:
    """The networks of a registration.

    Attributes:
        model: whose networks run.
        options: of the registration, with the number of networks that run.
        facts: for the report.
    """

    model: Model
    options: Options
    facts: dict[str, Any]


@torch.no_grad()
def choose_networks(model: Model, pair: Pair, affine_lps: np.ndarray, options: Options) -> Choice:
    """Choose the networks of a pair that is aligned.

    Args:
        model: the one that was named. Its networks are left out where they were trained on pairs of one contrast and
            these images' contrasts clearly differ.
        pair: prepared.
        affine_lps: 4x4, fixed -> moving.
        options: of the registration.
    """
    if model.name != ANY["name"]:
        facts: dict[str, Any] = {"model_chosen": {"name": model.name, "why": "it was asked for"}}
        if not options.cascades or not model.card.get("fits", {}).get("one_contrast"):
            return Choice(model, options, facts)
        alike = contrast_agreement(pair, affine_lps)
        if alike >= UNLIKE:
            if alike < DOUBTFUL:
                facts["contrast_doubtful"] = (
                    f"the images' contrasts may differ ({_describe(alike)}), and {model.name} was made for pairs of "
                    'one contrast: compare with "any"'
                )
            return Choice(model, options, facts)
        why = (
            f"the images' contrasts differ ({_describe(alike)}), and {model.name} was made for pairs of one contrast: "
            'choose "any"'
        )
        return Choice(model, replace(options, cascades=0), facts | {"networks_left_out": why})
    if not options.cascades:
        return Choice(model, options, {"model_chosen": {"name": "none", "why": "no network was asked for"}})
    reasons = []
    for card in candidates():
        obstacle, reason = _judge(card, pair, affine_lps)
        if not obstacle:
            networks = load_model(card["name"], model.device)
            cascades = min(options.cascades, card["architecture"]["cascades"])
            found = {"model_chosen": {"name": card["name"], "why": reason}}
            return Choice(networks, replace(options, cascades=cascades), found)
        reasons.append(f"{card['name']}: {reason}")
    why = "no network fits: " + "; ".join(reasons) if reasons else "no network is known"
    return Choice(model, replace(options, cascades=0), {"model_chosen": {"name": "none", "why": why}})


def without_networks(choice: Choice, evidence: dict[str, Any]) -> Choice:
    """Say in a choice's facts that its networks are left out, as they made the pair of `evidence` agree less."""
    before, after = (evidence["local_correlation"][name] for name in ("affine", "after"))
    why = f"the networks' deformation would lower local correlation from {before:.3f} to {after:.3f}"
    return replace(choice, facts=choice.facts | {"networks_left_out": why})


def candidates() -> Iterator[dict[str, Any]]:
    """Yield the cards that say which images they fit, preferred ones first."""
    for name in default_first():
        card = model_info(name)
        if "fits" in card:
            yield card


def _judge(card: dict[str, Any], pair: Pair, affine_lps: np.ndarray) -> tuple[bool, str]:
    """Return (whether something speaks against a model, the reason in words)."""
    fits = card["fits"]
    for side, image in (("fixed", pair.fixed), ("moving", pair.moving)):
        modality = "ct" if image.intensities.hounsfield else "mr"
        if modality != fits["modality"]:
            return True, f"the {side} image looks like {modality.upper()}, not like {fits['modality'].upper()}"
        low, high = fits["extent_mm"]
        extent = image.box_lps[1] - image.box_lps[0]
        if extent.min() < low or extent.max() > high:
            measured = " x ".join(f"{e:.0f}" for e in extent)
            return True, f"the {side} content of {measured} mm is not within {low:g} to {high:g} mm"
    known = f"{fits['modality'].upper()} of a fitting size"
    if not fits.get("one_contrast"):
        return False, f"{known}, of any contrast"
    alike = contrast_agreement(pair, affine_lps)
    return alike < ALIKE, f"{known}, contrasts {'differ' if alike < ALIKE else 'agree'} ({_describe(alike)})"


def _describe(alike: float) -> str:
    return f"{100 * alike:.0f} % of the local correlation is positive"


def contrast_agreement(pair: Pair, affine_lps: np.ndarray) -> float:
    """Measure which share of the squared local correlation of two aligned images is positive, 0 to 1.

    Only windows within tissue count, as the edges of two bodies against air are alike whatever the contrast. About 1
    for images of one contrast, 0 for an inverted one, between for others. Where nothing correlates it is 1.

    Args:
        pair: prepared.
        affine_lps: 4x4, fixed -> moving.
    """
    spacing = float(pair.fixed.coarse.spacing_mm.max())
    grid = Grid.around(
        *pair.fixed.box_lps, spacing_mm=spacing, margin_mm=_MARGIN_MM, multiple=1, max_voxels=_MAX_VOXELS
    )
    fixed = pair.fixed.coarse.on(grid)[0, 0]
    moving = pair.moving.coarse.averaged(spacing).on(grid, affine_lps)[0, 0]
    (fixed_mean, fixed_variance), (moving_mean, moving_variance) = (
        torch_ops.window_statistics(image, _WINDOW, _EPSILON) for image in (fixed, moving)
    )
    covariance = torch_ops.window_means(fixed * moving, _WINDOW) - fixed_mean * moving_mean
    tissue = ((fixed > FOREGROUND_LEVEL) & (moving > _LEAST)).to(fixed.dtype)
    inside = torch_ops.window_means(tissue, _WINDOW + 2) > 1 - 1e-4
    squared = covariance.square() / (fixed_variance * moving_variance) * inside
    total = float(squared.sum())
    return float(squared[covariance > 0].sum()) / total if total > 0 else 1.0
