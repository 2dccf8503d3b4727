"""The main thread is never busy for long: images are written, read and shown in steps, one or some a turn."""

from __future__ import annotations

import numpy as np
import pytest

from Testing.slicer_scene import array, blobs, snapshot, wait_until
from Testing.slicer_window import choose, settle

slicer = pytest.importorskip("slicer", reason="needs slicer-core (make test installs it)")


@pytest.fixture
def one_step_a_turn(slicer_module, monkeypatch):
    """Every turn of the event loop does one step, and a step moves a thousand bytes or one row."""
    from LightweightRegistrationLib import background

    monkeypatch.setattr(background, "CHUNK_BYTES", 1000)
    monkeypatch.setattr(background, "TURN_S", 0.0)


def test_arrays_go_to_the_process_and_back_in_steps(logic, scene, one_step_a_turn, monkeypatch):
    from LightweightRegistrationLib import background

    fixed, moving = blobs()
    with monkeypatch.context() as at_once:
        at_once.undo()
        expected = logic.register(fixed, moving, 1, refine="none", inverse=True)
    steps = []
    take = background.take_turn

    def count(work):
        steps.append(work)
        return take(work)

    for module in ("background", "jobs"):
        monkeypatch.setattr(f"LightweightRegistrationLib.{module}.take_turn", count)
    made = logic.register(fixed, moving, 1, refine="none", inverse=True)
    rows = [24, 26, 24, 24]  # slices of the two volumes, and of the two maps; transforms come on top
    assert len(steps) > sum(rows)
    for name in ("warped", "jacobian"):
        assert np.array_equal(array(getattr(made, name)), array(getattr(expected, name)))
    for name in ("transform", "inverse"):
        points = [
            getattr(each, name).GetTransformFromParent().TransformPoint((5.0, 3.0, 2.0)) for each in (made, expected)
        ]
        assert points[0] == pytest.approx(points[1], abs=1e-5)


def test_cancelled_while_outputs_are_being_made_leaves_nothing(logic, scene, one_step_a_turn):
    fixed, moving = blobs()
    before = snapshot()
    job = logic.startRegistration(fixed, moving, 1)
    wait_until(lambda: job.poll() or len(snapshot()) > len(before), lambda: job.message)
    assert not job.finished
    job.cancel()
    assert job.outputs is None
    assert snapshot() == before


def test_an_output_has_its_window_before_its_voxels(logic, scene, monkeypatch):
    """Slicer otherwise computes an automatic one from all of them, for seconds, twice."""
    from LightweightRegistrationLib import outputs

    fixed, moving = blobs()
    fill, filled = outputs.fill_volume, []

    def fill_and_look(node, *arguments):
        filled.append(node.GetDisplayNode().GetAutoWindowLevel())
        return fill(node, *arguments)

    monkeypatch.setattr(outputs, "fill_volume", fill_and_look)
    made = logic.register(fixed, moving, 1)
    assert filled == [0, 0]
    display = made.warped.GetDisplayNode()
    assert (display.GetWindow(), display.GetLevel()) == (
        moving.GetDisplayNode().GetWindow(),
        moving.GetDisplayNode().GetLevel(),
    )


def test_the_checkerboard_is_drawn_in_steps(done, one_step_a_turn):
    choose(done.ui.overlayComboBox, "Checkerboard of fixed and warped")
    assert done.panel.display.busy
    wait_until(lambda: settle() or not done.panel.display.busy, lambda: "still drawing")
    assert array(done.panel.display.computed).max() > 100
    choose(done.ui.overlayComboBox, "Warped volume")
    choose(done.ui.overlayComboBox, "Checkerboard of fixed and warped")
    choose(done.ui.overlayComboBox, "Warped volume")  # in the middle of it
    settle()
    assert not done.panel.display.busy
    assert done.panel.display.computed is None
