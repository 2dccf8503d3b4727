"""Facts about a model in the report, from its card."""

from __future__ import annotations

from LDRCore.models import weights
from Training import export_weights, report


def test_the_teacher_of_an_exported_student_is_named():
    """The card as `export_weights` writes it: the facts of the run under `networks`."""
    state = {
        "config": {},
        "step": 3,
        "seconds": 1.0,
        "facts": {"teacher": {"teacher": "vtn, 3 cascades", "shape": [8]}},
    }
    card = {"recipe": {"networks": export_weights.run_facts(state)}}
    assert report.teacher_name(card) == "vtn, 3 cascades"
    assert report.teacher_name({"recipe": {"networks": export_weights.run_facts({**state, "facts": {}})}}) == "none"


def test_cards_written_by_hand_name_their_teacher_as_a_text():
    assert report.teacher_name({"recipe": {"cascades": {"teacher": "ANTs SyN"}}}) == "ANTs SyN"
    assert report.teacher_name({}) == "none"
    names = {name: report.teacher_name(weights.model_info(name)) for name in weights.list_models()}
    assert names.pop("brain-t1-distilled") == "brain-t1-small 50764d08975135e5"  # refined pair by pair
    assert set(names.values()) == {"none"}
