"""Judges a result by the measures of `evidence`: trust, look, or failed, with the reasons in words.

"failed": it is as good as certain that the images were not brought together. "look": something is out of the ordinary,
and a reader decides. The bounds were chosen on training subjects (docs/verdict.md); none depends on anatomy or spacing.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

CLEAR, CLEAR_DENSE = 1.2, 2.0  # clearness of the affine part, and after, below which a result is none
DOUBTFUL = 1.25  # clearness of the affine part below which it is doubtful
WORSE, SPOILT = 0.95, 0.6  # of the affine part's local correlation that a deformation must keep
LEAST_CORRELATION = 0.15  # local correlation of the affine part
CONTRAST = 0.6  # same contrast below which networks made for one contrast are not to be relied on
LEAST_INSIDE, NOTHING_INSIDE = 0.6, 0.1
MISSING, MOST_MISSING = 0.1, 0.3
DETERMINANT, STRETCHES = (0.6, 1.65), 1.35  # of the affine part; largest over smallest stretch
EXTREME, FOLDING = 0.05, 0.001
FLAT = 0.8  # of the content's voxels have the value of the next one, as in label maps


def judge(evidence: dict[str, Any], *, one_contrast: bool, more: Iterable[str] = ()) -> dict[str, Any]:
    """Judge a result.

    Args:
        evidence: see `evidence.measure`.
        one_contrast: whether networks that were made for two images of one contrast took part.
        more: further reasons to look: images unlike those that the model was made for, a deformation that was left out.

    Returns:
        verdict: "trust", "look" or "failed"; reasons: a sentence each, the gravest first; none for "trust".
    """
    failures, doubts = _alignment(evidence), list(more)
    failures += _deformation(evidence)
    doubts = _doubts(evidence, one_contrast=one_contrast) + doubts
    word = "failed" if failures else "look" if doubts else "trust"
    return {"verdict": word, "reasons": failures + doubts}


def _is_unclear(clearness: dict[str, Any]) -> bool:
    return bool(clearness["affine"] < CLEAR and clearness["after"] < CLEAR_DENSE)


def _alignment(evidence: dict[str, Any]) -> list[str]:
    """Reasons to think that the images were not brought together."""
    clearness, found = evidence["clearness"], []
    if evidence["inside"] < NOTHING_INSIDE:
        share = f"only {_percent(evidence['inside'])}" if evidence["inside"] else "nothing"
        found.append(f"{share} of the fixed content meets the moving image")
    if _is_unclear(clearness):
        found.append(
            f"the images agree hardly better than shifted ones ({clearness['affine']:.2f} times as well after the "
            f"affine alignment, below {CLEAR})"
        )
    if evidence["missing"] > MOST_MISSING:
        found.append(f"the moving image shows nothing at {_percent(evidence['missing'])} of the fixed tissue")
    return found


def _deformation(evidence: dict[str, Any]) -> list[str]:
    """Reasons to think that the deformation spoilt the result."""
    correlation = evidence["local_correlation"]
    if correlation["after"] < SPOILT * correlation["affine"]:
        return [
            f"the deformation took the images apart: local correlation {correlation['after']:.2f} after it, "
            f"{correlation['affine']:.2f} with the affine map alone"
        ]
    return []


def _doubts(evidence: dict[str, Any], *, one_contrast: bool) -> list[str]:
    correlation, clearness, found = evidence["local_correlation"], evidence["clearness"], []
    if clearness["affine"] < DOUBTFUL and not _is_unclear(clearness):
        found.append(f"the affine alignment agrees only {clearness['affine']:.2f} times as well as shifted ones")
    if SPOILT <= correlation["after"] / max(correlation["affine"], 1e-6) < WORSE:
        found.append(
            f"with the deformation local correlation fell from {correlation['affine']:.2f} "
            f"to {correlation['after']:.2f}"
        )
    if correlation["affine"] < LEAST_CORRELATION:
        found.append(
            f"the images have little in common: local correlation {correlation['affine']:.2f} with the affine map alone"
        )
    if one_contrast and evidence["same_contrast"] < CONTRAST:
        found.append("the contrast of the images differs, which the model was not made for")
    found += [
        f"the {side} image has regions of one value, as masks and label maps have: within them nothing can be aligned"
        for side in ("fixed", "moving")
        if evidence["flat"][side] > FLAT
    ]
    if NOTHING_INSIDE <= evidence["inside"] < LEAST_INSIDE:
        found.append(f"only {_percent(evidence['inside'])} of the fixed content meets the moving image")
    if MISSING < evidence["missing"] <= MOST_MISSING:
        found.append(f"the moving image shows nothing at {_percent(evidence['missing'])} of the fixed tissue")
    low, high = evidence["stretches"]
    if evidence["determinant"] < 0:
        found.append("the affine part mirrors the image: is the initial transform meant to?")
    elif not DETERMINANT[0] <= evidence["determinant"] <= DETERMINANT[1]:
        found.append(
            f"the affine part changes the volume {evidence['determinant']:.2f} times: are both spacings right?"
        )
    elif high > STRETCHES * low:
        found.append(f"the affine part stretches one direction {high / low:.2f} times as much as another")
    if evidence["folding"] > FOLDING:
        found.append(f"the deformation folds at {_percent(evidence['folding'])} of the fixed content")
    if evidence["extreme"] > EXTREME:
        found.append(f"the deformation changes the volume more than fivefold at {_percent(evidence['extreme'])} of it")
    return found


def _percent(share: float) -> str:
    return f"{100 * share:.3g} %"
