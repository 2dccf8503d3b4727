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


@pytest.mark.parametrize(
    ("verdict", "heading", "colour"),
    [
        ("trust", "The result looks right.", "#15803d"),
        ("look", "Check the result.", "#b45309"),
        ("failed", "The registration failed: do not use the result.", "#dc2626"),
    ],
)
def test_a_verdict_is_shown_in_its_colour_with_its_reasons(slicer_module, verdict, heading, colour):
    from LightweightRegistrationLib import report_text

    reasons = [] if verdict == "trust" else ["the edges lie <apart>", "it folds"]
    html = report_text.verdict_as_html({**REPORT, "verdict": {"verdict": verdict, "reasons": reasons}})
    lines = "" if verdict == "trust" else "<br>The edges lie &lt;apart&gt;.<br>It folds."
    assert html == f'<span style="color:{colour}"><b>{heading}</b>{lines}</span>'


def test_what_the_panel_warns_of_is_not_trusted(slicer_module):
    from LightweightRegistrationLib import report_text

    worse = {**REPORT, "similarity": {"before": 0.5, "initial": 0.6, "affine": 0.9, "after": 0.8}}
    for report in (worse, {**worse, "verdict": {"verdict": "trust", "reasons": []}}):
        html = report_text.verdict_as_html(report)
        assert "Check the result." in html
        assert "less similar (0.800) than affine alone (0.900)" in html
    assert report_text.verdict_as_html(REPORT) == ""
    assert report_text.verdict_as_html({}) == ""


def test_a_rigid_map_is_described_by_its_turn_and_an_affine_one_by_its_stretch(slicer_module):
    turn = [[0.0, -1.0, 0.0, 5.0], [1.0, 0.0, 0.0, 6.0], [0.0, 0.0, 1.0, 7.0], [0.0, 0.0, 0.0, 1.0]]
    rigid = shown(kind="rigid", affine_matrix_lps=turn, alignment={"local_agreement": 0.66})
    assert rigid["Transform"] == "rigid, 6 parameters: turned by 90.0°, no volume change"
    assert rigid["Left over"].startswith("local similarity 0.66 of 1")
    assert rigid["Similarity after"] == "0.900"
    assert rigid["Model"] == "brain-t1-small"
    stretched = [[0.0, -0.9, 0.0, 5.0], [1.2, 0.0, 0.0, 6.0], [0.0, 0.0, 1.0, 7.0], [0.0, 0.0, 0.0, 1.0]]
    affine = shown(kind="affine", affine_matrix_lps=stretched, jacobian_determinant={"min": 1.08, "max": 1.08})
    assert affine["Transform"] == "affine: turned by 90.0°, stretched by 0.90 to 1.20, volume times 1.08"
    assert "Folding" not in affine


@pytest.mark.parametrize(
    ("more", "expected"),
    [
        ({"model_chosen": {"name": "brain-t1", "why": "MR"}}, "Heads (brain-t1), 3 cascades: MR"),
        ({"model_chosen": {"name": "mine", "why": "it was asked for"}}, "mine, 3 cascades: it was asked for"),
        ({"model_chosen": {"name": "none", "why": "no network fits"}, "cascades": 0}, "none: no network fits"),
        (
            {"model_chosen": {"name": "brain-t1", "why": "MR"}, "networks_left_out": "contrasts", "cascades": 0},
            "none: contrasts",
        ),
    ],
)
def test_the_networks_that_ran_are_named_with_the_reason(slicer_module, more, expected):
    from LightweightRegistrationLib import report_text

    assert dict(report_text.rows(REPORT | more, {"brain-t1": "Heads"}))["Networks"] == expected
