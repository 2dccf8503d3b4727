"""The panel's display, its other sections and its end, with real mouse clicks."""

from __future__ import annotations

import re

import numpy as np
import pytest

from Testing.slicer_scene import add_volume, array, frames, local, wait_until
from Testing.slicer_window import check, choose, click, composite, run, settle, unfold

slicer = pytest.importorskip("slicer", reason="needs slicer-core (make test installs it)")
import vtk.util.numpy_support

from Testing.standin import application, sliceview


def test_display_controls_drive_the_slice_views(done):
    ui, p = done.ui, done.p
    ui.fadeSlider.value = 0.8
    assert composite().GetForegroundOpacity() == pytest.approx(0.8)
    assert p.transform.GetDisplayNode() is None or not p.transform.GetDisplayNode().GetVisibility()
    click(ui.showGridCheckBox)
    display = p.transform.GetDisplayNode()
    assert display.GetVisibility()
    assert display.GetVisibility2D()
    assert display.GetVisualizationMode() == display.VIS_MODE_GRID
    assert display.GetRegionNode() is p.fixedVolume
    ui.gridSpacingSlider.value = 14
    assert display.GetGridSpacingMm() == pytest.approx(14)
    click(ui.showGridCheckBox)
    assert not display.GetVisibility()
    choose(ui.overlayComboBox, "Moving volume as it was")
    assert composite().GetForegroundVolumeID() == p.movingVolume.GetID()
    click(ui.flickerButton)
    choose(ui.overlayComboBox, "Nothing")
    assert composite().GetForegroundVolumeID() is None
    assert not ui.flickerButton.enabled
    assert not ui.flickerButton.checked
    assert not done.panel.display.flickerTimer.isActive()
    assert composite().GetForegroundOpacity() == pytest.approx(0.8)


def test_the_jacobian_has_colours_and_a_legend(done):
    ui, p = done.ui, done.p
    choose(ui.overlayComboBox, "Jacobian map (colours)")
    node = done.panel.display.computed
    assert composite().GetForegroundVolumeID() == node.GetID()
    assert node.GetHideFromEditors()
    wait_until(lambda: settle() or not done.panel.display.busy, lambda: "still drawing")
    shown, values = array(node), array(p.jacobianMap)
    inside = np.isfinite(shown)
    assert np.array_equal(shown[inside], values[inside])
    assert not inside[0, 0, 0]  # background
    assert inside[12, 13, 14]
    assert np.array_equal(inside, array(p.fixedVolume) > 0)  # a blob without holes on 0
    assert ui.jacobianFactorSlider.value == pytest.approx(2.0)
    ui.jacobianFactorSlider.value = 4
    assert done.panel.display.computed is node  # other colours need no other voxels
    display = node.GetDisplayNode()
    assert (display.GetWindowLevelMin(), display.GetWindowLevelMax()) == pytest.approx((0.25, 4.0))
    function = display.GetColorNode().GetColorTransferFunction()
    low, middle, high = ([0.0] * 3 for _ in range(3))
    for value, colour in ((0.25, low), (1.0, middle), (4.0, high)):
        function.GetColor(value, colour)
    assert low[2] > low[0] + 0.3  # blue
    assert min(middle) > 0.9  # white
    assert high[0] > high[2] + 0.3  # red
    legend = slicer.vtkSlicerColorLogic.GetColorLegendDisplayNode(node)
    assert legend.GetVisibility()
    (view,) = (slicer.mrmlScene.GetNodeByID(view_id) for view_id in legend.GetViewNodeIDs())
    assert view.GetOrientation() == "Axial"
    choose(ui.overlayComboBox, "Warped volume")
    for gone in (node, legend):
        assert not slicer.mrmlScene.IsNodePresent(gone)
    assert array(p.jacobianMap).min() > 0  # the map itself keeps its background


def test_folding_is_outlined_where_there_is_any(chosen):
    ui, p = chosen.ui, chosen.p
    choose(ui.modelComboBox, "T1 head (larger networks)")  # which folds nothing here
    click(ui.applyButton)
    run(chosen)
    click(ui.showFoldingCheckBox)
    assert ui.statusLabel.text == "Nothing folds: there is no voxel to outline."
    click(ui.showFoldingCheckBox)
    slicer.util.arrayFromVolume(p.jacobianMap)[10:13, 8:12, 9:14] = -0.2
    slicer.util.arrayFromVolumeModified(p.jacobianMap)
    click(ui.showFoldingCheckBox)
    node = p.jacobianMap.GetNodeReference("LightweightRegistrationFolding")
    segment = slicer.vtkOrientedImageData()
    node.GetBinaryLabelmapRepresentation(node.GetSegmentation().GetNthSegmentID(0), segment)
    assert vtk.util.numpy_support.vtk_to_numpy(segment.GetPointData().GetScalars()).sum() == 3 * 4 * 5
    assert node.GetDisplayNode().GetVisibility()
    click(ui.showFoldingCheckBox)
    assert not node.GetDisplayNode().GetVisibility()
    # a run without folding takes the old outline away
    click(ui.showFoldingCheckBox)
    click(ui.applyButton)
    run(chosen)
    assert slicer.mrmlScene.GetFirstNodeByName(f"{p.jacobianMap.GetName()} folding") is None


def test_what_cannot_be_shown_is_said_and_said_no_longer(chosen):
    ui = chosen.ui
    text = "There is no {} to show: check it under Outputs and press Apply."
    click(ui.showGridCheckBox)
    assert ui.statusLabel.text == text.format("transform")
    click(ui.showGridCheckBox)
    assert ui.statusLabel.text == ""
    choose(ui.overlayComboBox, "Checkerboard of fixed and warped")
    assert ui.statusLabel.text == text.format("warped volume")
    choose(ui.overlayComboBox, "Jacobian map (colours)")
    assert ui.statusLabel.text == text.format("Jacobian map")
    click(ui.wantJacobianCheckBox)
    click(ui.applyButton)
    run(chosen)
    assert re.fullmatch(rf"Done in \d+\.\d s\. {re.escape(text.format('Jacobian map'))}", ui.statusLabel.text)
    choose(ui.overlayComboBox, "Warped volume")
    click(ui.showFoldingCheckBox)
    assert ui.statusLabel.text == text.format("Jacobian map")


def test_flicker_alternates_and_gives_the_fade_back(done):
    ui = done.ui
    ui.fadeSlider.value = 0.4
    click(ui.flickerButton)
    seen = set()
    for _ in range(3):
        done.panel.display.onFlickerTimer()
        seen.add(composite().GetForegroundOpacity())
    assert seen == {0.0, 1.0}
    assert done.panel.display.flickerTimer.isActive()
    click(ui.flickerButton)
    assert not done.panel.display.flickerTimer.isActive()
    assert composite().GetForegroundOpacity() == pytest.approx(0.4)


def test_before_and_after_is_one_switch(done):
    ui, p = done.ui, done.p
    assert composite().GetForegroundVolumeID() == p.warpedVolume.GetID()
    click(ui.beforeButton)
    assert composite().GetForegroundVolumeID() == p.movingVolume.GetID()
    assert ui.beforeButton.text == "Show the result again"
    click(ui.beforeButton)
    assert composite().GetForegroundVolumeID() == p.warpedVolume.GetID()
    click(ui.beforeButton)
    click(ui.applyButton)
    run(done)
    assert composite().GetForegroundVolumeID() == p.warpedVolume.GetID()
    assert ui.beforeButton.text == "Show before registration"


def test_warnings_stand_in_colour_below_apply(done):
    from LightweightRegistrationLib import outputs

    ui, p = done.ui, done.p
    report = outputs.read_report(p.transform)
    report |= {"similarity": {**report["similarity"], "affine": 0.9, "after": 0.8}, "warnings": ["a <b> warning"]}
    report |= {"verdict": {"verdict": "trust", "reasons": []}}
    outputs.write_report(p.transform, report)
    done.panel.updateGUIFromParameterNode()
    assert ui.verdictLabel.isVisible()
    assert "color:#b45309" in ui.verdictLabel.text
    assert "less similar (0.800) than affine alone (0.900)" in ui.verdictLabel.text
    assert "A &lt;b&gt; warning." in ui.verdictLabel.text
    assert "warning" not in ui.resultsLabel.text.lower()
    report |= {"similarity": {**report["similarity"], "after": 0.95}, "warnings": []}
    outputs.write_report(p.transform, report)
    done.panel.updateGUIFromParameterNode()
    assert ui.verdictLabel.text == '<span style="color:#15803d"><b>The result looks right.</b></span>'
    del report["verdict"]  # of an earlier version, from a saved scene
    outputs.write_report(p.transform, report)
    done.panel.updateGUIFromParameterNode()
    assert not ui.verdictLabel.isVisible()


def test_a_fault_while_an_overlay_is_drawn_is_shown(done, monkeypatch):
    from LightweightRegistrationLib import background, overlays

    def draw(*_):
        yield
        raise MemoryError

    monkeypatch.setattr(overlays, "checkerboard", draw)
    monkeypatch.setattr(background, "TURN_S", 0.0)  # the fault is in a later turn of the event loop
    choose(done.ui.overlayComboBox, "Checkerboard of fixed and warped")
    run(done, until=lambda: not done.panel.display.busy)
    assert done.said == ["Slicer needs more memory than it could have: close other programs and try again."]


def test_the_checkerboard_is_a_hidden_node_that_goes_away(done):
    ui = done.ui
    choose(ui.overlayComboBox, "Checkerboard of fixed and warped")
    node = done.panel.display.computed
    assert composite().GetForegroundVolumeID() == node.GetID()
    assert composite().GetForegroundOpacity() == 1.0
    assert node.GetHideFromEditors()
    assert not node.GetSaveWithScene()
    from LightweightRegistrationLib import outputs, overlays

    fixed, warped = (
        overlays._displayed_grey(slicer.util.arrayFromVolume(v), outputs.displayed_range(v))
        for v in (done.p.fixedVolume, done.p.warpedVolume)
    )
    values = slicer.util.arrayFromVolume(node)
    assert np.array_equal(values[:8, :8, :8], fixed[:8, :8, :8])  # the first cube of 25 mm
    assert np.array_equal(values[:8, :8, 9:16], warped[:8, :8, 9:16])
    choose(ui.overlayComboBox, "Warped volume")
    assert not slicer.mrmlScene.IsNodePresent(node)


def test_opening_the_panel_does_not_touch_the_views(done):
    from LightweightRegistrationLib import slice_display

    slice_display.show_layers(done.moving, None, 0.1)
    done.widget.exit()
    done.widget.enter()
    done.panel.updateGUIFromParameterNode()
    assert composite().GetBackgroundVolumeID() == done.moving.GetID()


def test_apply_also_to_brings_points_and_volumes_along(done):
    ui, p = done.ui, done.p
    points = slicer.mrmlScene.AddNewNodeByClass("vtkMRMLMarkupsFiducialNode", "landmarks")
    points.AddControlPoint(vtk.vtkVector3d(5, 5, 5))
    unfold(ui.othersCollapsibleButton)
    click(ui.otherButton)
    assert ui.statusLabel.text == "Check what to bring along."
    check(ui.othersList, "landmarks")
    choose(ui.directionComboBox, "fixed scan")
    click(ui.otherButton)
    run(done)
    assert ui.statusLabel.text == "Created “landmarks on blob 1”."
    new = slicer.mrmlScene.GetFirstNodeByName("landmarks on blob 1")
    there = p.transform.GetTransformFromParent().TransformPoint((5.0, 5.0, 5.0))
    assert new.GetNthControlPointPosition(0) == pytest.approx(there, abs=1e-3)
    second = add_volume("second", slicer.util.arrayFromVolume(p.movingVolume), local(p.movingVolume))
    for name in ("second", "landmarks"):
        check(ui.othersList, name)
    choose(ui.directionComboBox, "moving scan")
    click(ui.otherButton)
    run(done, until=lambda: not done.panel.others.checked())
    run(done)
    assert ui.statusLabel.text == "Created “second on blob 0”, “landmarks on blob 0”."
    brought = slicer.mrmlScene.GetFirstNodeByName("second on blob 0")
    assert np.abs(array(brought) - array(p.warpedVolume)).max() <= 1
    slicer.mrmlScene.RemoveNode(second)
    settle()
    assert "second" not in [ui.othersList.item(n).text() for n in range(ui.othersList.count())]
    assert done.said == []


def test_a_sequence_runs_from_the_panel_and_can_be_cancelled(chosen):
    application.clear()
    sliceview.add_views()
    frames(slicer.mrmlScene, 2)
    ui = chosen.ui
    choose(ui.fixedSelector, "blob 0")
    chosen.widget._parameterNode.cascades = 1
    unfold(ui.sequenceCollapsibleButton)
    choose(ui.sequenceSelector, "breathing")
    click(ui.sequenceButton)
    run(chosen, until=lambda: "frame 2 of 2" in ui.statusLabel.text.lower())
    click(ui.applyButton)
    assert ui.statusLabel.text == "Cancelled; nothing was changed."
    assert slicer.mrmlScene.GetNumberOfNodesByClass("vtkMRMLSequenceNode") == 1
    click(ui.sequenceButton)
    run(chosen)
    assert ui.statusLabel.text.startswith("Created “breathing on blob 0” with 2 frames")
    assert slicer.mrmlScene.GetNumberOfNodesByClass("vtkMRMLSequenceBrowserNode") == 1


def test_a_sequence_that_needed_too_much_memory_runs_again_with_fewer_cascades(chosen):
    application.clear()
    sliceview.add_views()
    frames(slicer.mrmlScene, 2)
    ui = chosen.ui
    choose(ui.fixedSelector, "blob 0")  # and no moving volume
    p = chosen.widget._parameterNode
    p.cascades = 2
    unfold(ui.sequenceCollapsibleButton)
    choose(ui.sequenceSelector, "breathing")
    click(ui.sequenceButton)
    run(chosen, until=lambda: chosen.panel.job.fraction > 0)
    chosen.panel.logic.worker.process.kill()  # as Linux does when memory runs out
    run(chosen)
    (text,) = chosen.said
    assert text.endswith("Try again with 1 cascade?")
    assert p.cascades == 1
    assert ui.statusLabel.text.startswith("Created “breathing on blob 0” with 2 frames")


def test_cleanup_ends_the_process(done):
    worker = done.panel.logic.worker
    assert worker.exit_code() is None
    done.widget.cleanup()
    assert worker.process is None
    assert done.widget.Observations == []
