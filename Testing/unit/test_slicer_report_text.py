"""A registration's report in words, as the panel shows it."""

from __future__ import annotations

import pytest

pytest.importorskip("slicer", reason="needs slicer-core (make test installs it)")

REPORT = {
    "similarity": {"before": 0.5, "initial": 0.6, "affine": 0.8, "after": 0.9},
    "jacobian_determinant": {"min": 0.25, "max": 2.5},
    "folding_count": 1,
    "folding_fraction": 0.0001,
    "times_s": {"total": 1.25, "refine": 0.5},
    "device": "cpu",
    "threads": 2,
    "model": "brain-t1-small",
    "cascades": 3,
    "refine_steps": 0,
    "warnings": [],
}


def shown(**more):
    from LightweightRegistrationLib import report_text

    return dict(report_text.rows({**REPORT, **more}))


def test_refinement_says_which_levels_iterations_and_seconds(slicer_module):
    levels = [
        {"spacing_mm": [4.0, 4.0, 4.0], "iterations": 10, "similarity": [0.2, 0.3]},
        {"spacing_mm": [2.0, 2.0, 2.5], "iterations": 1, "similarity": [0.25, 0.4]},
    ]
    rest = ": 10 iterations at 4.0 mm, 1 iteration at 2.0 mm; local similarity 0.250 to 0.400 at the finest; 0.50 s"
    assert shown(refine="fast", refinement=levels)["Refinement"] == f"Accurate{rest}"
    assert shown(refine="best", refinement=levels)["Refinement"] == f"Best{rest}"
    assert shown(refine="none", refine_steps=10, refinement=levels)["Refinement"] == f"10 steps{rest}"
    assert "Refinement" not in shown(refine="none")


def test_the_similarity_that_was_chosen_is_named_with_its_reason(slicer_module):
    chosen = {"name": "mind", "why": "the intensities do not correlate"}
    assert shown(similarity_chosen=chosen)["Compared by"] == "mind: the intensities do not correlate"


def test_the_inverse_says_how_far_it_is_off(slicer_module):
    error = {"mean": 0.02, "p99_9": 0.31, "max": 0.76}
    text = "off by 0.020 mm on average, 0.31 mm at 99.9 % of the points, 0.76 mm at most"
    assert shown(inverse_consistency_mm=error, inverse_residual_mm=0.001)["Inverse"] == text


def test_a_report_of_an_earlier_version_is_shown(slicer_module):
    old = shown(refine_steps=25, inverse_residual_mm=0.0021)
    assert old["Model"] == "brain-t1-small, 3 cascades, 25 refinement steps"
    assert old["Inverse"] == "exact to 0.002 mm"
    assert old["Folding"] == "1 voxel (0.010 %)"
