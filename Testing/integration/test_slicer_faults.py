"""Faults injected at each step of Apply: each ends in an error dialog with details, and the next Apply works."""

from __future__ import annotations

import numpy as np
import pytest

from Testing.slicer_scene import array, snapshot
from Testing.slicer_window import check, click, run

slicer = pytest.importorskip("slicer", reason="needs slicer-core (make test installs it)")

# of an object that has the name at run time: what fails, and whether the outputs are in the scene by then
STEPS = {
    "reading the volumes": ("volume_nodes", "check_pair", False),
    "building the request": ("registration_job", "register_request", False),
    "writing the images": ("background.Worker", "start", False),
    "reading events": ("background.Run", "poll", False),
    "showing the early view": ("slice_display", "EarlyView", False),
    "reading an array": ("background.Run", "read", False),
    "allocating an array": ("jobs", "new_image", False),
    "writing an array": ("background", "write_array", False),
    "creating a node": ("outputs", "new_node", False),
    "filling a volume": ("outputs", "fill_volume", False),
    "recording the roles": ("outputs", "record_roles", False),
    "writing the report": ("outputs", "write_report", False),
    "showing the layers": ("slice_display", "show_layers", True),
    "colouring the Jacobian map": ("slice_display", "color_jacobian", True),
    "showing the results": ("report_text", "rows", True),
}


def target(path: str):
    """The module of LightweightRegistrationLib, or the class in it."""
    import importlib

    module, _, name = path.partition(".")
    found = importlib.import_module(f"LightweightRegistrationLib.{module}")
    return getattr(found, name) if name else found


def nodes() -> dict:
    return {k: v for k, v in snapshot().items() if "ScriptedModule" not in k and "Slice" not in k}


@pytest.mark.parametrize("error", [MemoryError, RuntimeError("boom")], ids=["memory", "unexpected"])
@pytest.mark.parametrize("step", STEPS)
def test_a_fault_at_any_step_is_shown_and_survived(chosen, monkeypatch, step, error):
    path, name, has_outputs = STEPS[step]
    before = nodes()
    with monkeypatch.context() as broken:

        def fail(*_arguments, **_options):
            raise error

        broken.setattr(target(path), name, fail)
        click(chosen.ui.applyButton)
        run(chosen)
    assert chosen.panel.job is None
    assert chosen.ui.applyButton.text == "Apply"
    (text,) = chosen.said
    if error is MemoryError:
        assert text == "Slicer needs more memory than it could have: close other programs and try again."
    else:
        assert text == "Something went wrong that should not: RuntimeError: boom. Please report it."
    assert "Traceback" in chosen.details[0]
    if not has_outputs:
        assert nodes() == before
    chosen.said.clear()
    click(chosen.ui.applyButton)
    run(chosen)
    assert chosen.said == []
    assert array(chosen.p.warpedVolume).max() > 0


def test_a_fault_while_given_nodes_are_filled_leaves_them_as_they_were(done, monkeypatch):
    from LightweightRegistrationLib import outputs

    before = {name: array(getattr(done.p, name)) for name in ("warpedVolume", "jacobianMap")}
    transform = done.p.transform.GetTransformFromParent()
    point = transform.TransformPoint((1.0, 2.0, 3.0))

    def fail(*_):
        raise MemoryError

    done.p.prealignment = type(done.p.prealignment).none
    with monkeypatch.context() as broken:
        broken.setattr(outputs, "write_report", fail)
        click(done.ui.applyButton)
        run(done)
    assert len(done.said) == 1
    for name, values in before.items():
        assert (array(getattr(done.p, name)) == values).all()
    assert done.p.transform.GetTransformFromParent().TransformPoint((1.0, 2.0, 3.0)) == point


@pytest.mark.parametrize("button", ["otherButton", "sequenceButton", "tryItButton", "copyButton"])
def test_faults_behind_the_other_buttons_are_shown(done, monkeypatch, button):
    steps = {
        "otherButton": (done.panel.logic, "startBringingAlong"),
        "sequenceButton": (done.panel.logic, "startSequence"),
        "tryItButton": (target("sample"), "load_pair"),
        "copyButton": (target("report_text"), "as_text"),
    }

    def fail(*_arguments, **_options):
        raise RuntimeError("boom")

    slicer.mrmlScene.AddNewNodeByClass("vtkMRMLMarkupsFiducialNode", "landmarks")
    check(done.ui.othersList, "landmarks")
    monkeypatch.setattr(*steps[button], fail)
    getattr(done.ui, button).clicked.emit()
    assert done.said == ["Something went wrong that should not: RuntimeError: boom. Please report it."]


def test_the_verdict_on_an_earlier_result_does_not_stand_below_an_error(done):
    from LightweightRegistrationLib.parameters import Kind, Prealignment

    ui, p = done.ui, done.p
    assert ui.verdictLabel.isVisible()
    p.kind, p.prealignment = Kind.rigid, Prealignment.none
    click(ui.applyButton)
    run(done)
    assert ui.statusLabel.text.startswith("The rigid registration must align something")
    assert not ui.verdictLabel.isVisible()
    p.prealignment = Prealignment.centre
    assert not ui.verdictLabel.isVisible()
    click(ui.applyButton)
    click(ui.applyButton)
    assert ui.statusLabel.text == "Cancelled; nothing was changed."
    assert ui.verdictLabel.isVisible()  # the earlier result is still there


def test_names_are_shown_as_they_are(chosen):
    from PySide6 import QtCore

    chosen.moving.SetName("<b>flat</b>")
    slicer.util.updateVolumeFromArray(chosen.moving, np.full((8, 8, 8), 3, np.int16))
    click(chosen.ui.applyButton)
    run(chosen)
    assert "<b>flat</b>" in chosen.ui.statusLabel.text
    assert chosen.ui.statusLabel.textFormat() == QtCore.Qt.TextFormat.PlainText
