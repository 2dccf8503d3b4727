"""The panel on PySide6 with stand-ins for Slicer's own widgets: real mouse clicks on the real .ui file."""

from __future__ import annotations

import re
import time
import types
import xml.etree.ElementTree as ET
from pathlib import Path

import numpy as np
import pytest

from Testing.slicer_scene import add_volume, array, blobs, local, snapshot

slicer = pytest.importorskip("slicer", reason="needs slicer-core (make test installs it)")
try:
    from PySide6 import QtTest
except ImportError as error:  # also where a library of the system is missing: README, "Tests", names the packages
    pytest.skip(f"PySide6 cannot be used here: {error}", allow_module_level=True)
from PySide6 import QtCore, QtWidgets

from Testing.standin import application, sliceview, widgets

UI = Path(application.MODULE / "Resources" / "UI" / "LightweightRegistration.ui")


def click(widget) -> None:
    """Press and release the left mouse button in the middle of a widget (on the box of a check box)."""
    assert widget.isVisible()
    at = QtCore.QPoint(8, widget.height() // 2) if isinstance(widget, QtWidgets.QCheckBox) else widget.rect().center()
    QtTest.QTest.mouseClick(widget, QtCore.Qt.MouseButton.LeftButton, QtCore.Qt.KeyboardModifier.NoModifier, at)
    QtWidgets.QApplication.processEvents()


def choose(selector, text: str) -> None:
    """Pick an entry of a node selector or combo box by what is read there, with the keyboard's Return."""
    box = getattr(selector, "_box", selector)
    index = box.findText(text)
    assert index >= 0, [box.itemText(n) for n in range(box.count())]
    box.setCurrentIndex(index)
    box.activated.emit(index)
    QtWidgets.QApplication.processEvents()


def unfold(button) -> None:
    if button.collapsed:
        click(button._heading)


@pytest.fixture
def opened(slicer_module, scene, monkeypatch):
    """The module's window, opened on an empty scene with three slice views, and what it said in dialogs."""
    widgets.start()
    sliceview.add_views()
    said = []
    answers = [True]
    monkeypatch.setattr(slicer.util, "errorDisplay", lambda text, **_: said.append(text))
    monkeypatch.setattr(
        slicer.util, "confirmYesNoDisplay", lambda text, **_: said.append(text) or answers.pop(0), raising=True
    )
    widget = slicer_module.LightweightRegistrationWidget()
    widget.parent.resize(460, 1500)
    QtWidgets.QApplication.processEvents()
    worker = types.SimpleNamespace(said=said, widget=widget, ui=widget.ui, panel=widget.panel, answers=answers)
    yield worker
    widget.setParameterNode(None)
    widget.removeObservers()
    widget.panel.close()
    widget.ui.LightweightRegistration.setMRMLScene(None)
    widget.parent.close()
    widget.parent.deleteLater()
    QtWidgets.QApplication.processEvents()


@pytest.fixture
def chosen(opened):
    """The window with two small volumes chosen."""
    opened.fixed, opened.moving = blobs()
    choose(opened.ui.fixedSelector, "blob 0")
    choose(opened.ui.movingSelector, "blob 1")
    opened.p = opened.widget._parameterNode
    opened.p.cascades = 1
    return opened


def run(opened, until=lambda: False, seconds: float = 120.0) -> None:
    """Let the window's own timer work until the job is done, or something holds."""
    end = time.monotonic() + seconds
    while opened.panel.job is not None and not until():
        QtWidgets.QApplication.processEvents()
        time.sleep(0.005)
        assert time.monotonic() < end, opened.ui.statusLabel.text
    QtWidgets.QApplication.processEvents()


def composite():
    return slicer.util.getNodesByClass("vtkMRMLSliceCompositeNode")[0]


# opening


def test_an_empty_panel_says_what_to_do_and_does_nothing_heavy(opened):
    ui = opened.ui
    assert ui.applyButton.text == "Choose a fixed and a moving volume"
    assert not ui.applyButton.enabled
    assert ui.tryItButton.isVisible()
    assert not ui.progressBar.isVisible()
    assert ui.resultsLabel.text == "No result yet."
    assert opened.panel.logic._worker is None
    assert ui.modelComboBox.currentText == "brain-t1"
    assert ui.modelCardLabel.text.startswith("T1-weighted MRI of the adult head")
    assert ui.cascadesSlider.maximum == 3
    assert ui.advancedCollapsibleButton.collapsed
    assert opened.said == []


def test_every_parameter_has_a_widget_and_every_widget_a_parameter(slicer_module):
    from LightweightRegistrationLib.parameters import LightweightRegistrationParameterNode

    found = [
        element.find("string").text
        for element in ET.parse(UI).iter("property")
        if element.get("name") == "SlicerParameterName"
    ]
    assert sorted([*found, "model"]) == sorted(LightweightRegistrationParameterNode.allParameters)
    assert len(found) == len(set(found))


def test_the_ui_file_hands_the_scene_to_every_selector():
    tree = ET.parse(UI)
    selectors = {w.get("name") for w in tree.iter("widget") if w.get("class") == "qMRMLNodeComboBox"}
    connected = {c.find("receiver").text for c in tree.iter("connection")}
    assert selectors == connected
    for connection in tree.iter("connection"):
        assert connection.find("signal").text == "mrmlSceneChanged(vtkMRMLScene*)"
        assert connection.find("slot").text == "setMRMLScene(vtkMRMLScene*)"


def test_the_panel_uses_only_widgets_of_the_ui_file():
    names = {w.get("name") for w in ET.parse(UI).iter("widget")}
    source = (application.MODULE / "LightweightRegistrationLib" / "panel.py").read_text()
    used = set(re.findall(r"\bui\.(\w+)", source))
    assert used
    assert used <= names


# try it, apply, results


def test_try_it_then_apply_shows_warped_volume_results_and_an_early_view(opened):
    ui, scene = opened.ui, slicer.mrmlScene
    click(ui.tryItButton)
    p = opened.widget._parameterNode
    assert (p.fixedVolume.GetName(), p.movingVolume.GetName()) == ("Brain A", "Brain B")
    assert not ui.tryItButton.isVisible()
    assert ui.applyButton.text == "Apply"
    assert composite().GetBackgroundVolumeID() == p.fixedVolume.GetID()
    ui.cascadesSlider.value = 1
    assert p.cascades == 1
    moving = p.movingVolume.GetMTime()
    click(ui.applyButton)
    assert ui.applyButton.text == "Cancel"
    assert ui.progressBar.isVisible()
    run(opened, until=lambda: opened.panel._early is not None)
    early = opened.panel._early
    assert early is not None, "the early view comes before the outputs"
    assert composite().GetForegroundVolumeID() == early.volume.GetID()
    assert early.volume.GetImageData() is p.movingVolume.GetImageData()  # shared, not copied
    assert p.warpedVolume is None
    run(opened)
    assert opened.said == []
    assert ui.applyButton.text == "Apply"
    assert not ui.progressBar.isVisible()
    assert re.fullmatch(r"Done in \d+\.\d s\.", ui.statusLabel.text)
    assert p.warpedVolume.GetName() == "Brain B warped to Brain A"
    assert p.transform.GetName() == "Brain B to Brain A"
    assert p.jacobianMap.GetName() == "Jacobian of Brain B to Brain A"
    assert composite().GetForegroundVolumeID() == p.warpedVolume.GetID()
    assert composite().GetForegroundOpacity() == pytest.approx(0.5)
    assert p.movingVolume.GetMTime() == moving
    names = [scene.GetNthNode(n).GetName() or "" for n in range(scene.GetNumberOfNodes())]
    assert not [name for name in names if "early" in name.lower()]
    for word in ("Similarity", "Folding", "Jacobian", "Time", "CPU", "brain-t1, 1 cascade<"):
        assert word in ui.resultsLabel.text
    click(ui.copyButton)
    text = QtWidgets.QApplication.clipboard().text()
    assert re.match(
        r"Similarity before\t0\.\d+ \(correlation\)\nSimilarity after\t0\.\d+ \(affine alone 0\.\d+\)\n", text
    )


def test_apply_says_what_is_missing(opened):
    ui = opened.ui
    blobs()
    choose(ui.fixedSelector, "blob 0")
    assert ui.applyButton.text == "Choose a moving volume"
    choose(ui.movingSelector, "blob 0")
    assert ui.applyButton.text == "Choose two different volumes"
    choose(ui.movingSelector, "blob 1")
    assert ui.applyButton.text == "Apply"
    for box in (ui.wantWarpedCheckBox, ui.wantTransformCheckBox, ui.wantJacobianCheckBox):
        click(box)
    assert ui.applyButton.text == "Choose at least one output"
    assert not ui.applyButton.enabled
    assert not ui.transformSelector.enabled
    unfold(ui.advancedCollapsibleButton)
    click(ui.keepInverseCheckBox)
    assert ui.applyButton.text == "Apply"


def test_cancel_leaves_the_scene_and_the_views_as_they_were(chosen):
    from LightweightRegistrationLib import views

    views.show(chosen.fixed, chosen.moving, 0.3)
    before = {k: v for k, v in snapshot().items() if "ScriptedModule" not in k and "Slice" not in k}
    click(chosen.ui.applyButton)
    run(chosen, until=lambda: chosen.panel.job.fraction > 0.1)
    click(chosen.ui.applyButton)
    assert chosen.panel.job is None
    assert chosen.ui.applyButton.text == "Apply"
    assert chosen.ui.statusLabel.text == "Cancelled; nothing was changed."
    assert {k: v for k, v in snapshot().items() if "ScriptedModule" not in k and "Slice" not in k} == before
    assert composite().GetForegroundVolumeID() == chosen.moving.GetID()
    assert composite().GetForegroundOpacity() == pytest.approx(0.3)


def test_a_refusal_is_one_sentence_in_a_dialog_and_the_panel_works_on(chosen):
    add_volume("flat", np.full((8, 8, 8), 3, np.int16))
    choose(chosen.ui.movingSelector, "flat")
    before = {k: v for k, v in snapshot().items() if "ScriptedModule" not in k}
    click(chosen.ui.applyButton)
    run(chosen)
    assert chosen.said == ["The moving volume must show something, got 'flat', where every voxel is 3."]
    assert chosen.ui.statusLabel.text == chosen.said[0]
    assert {k: v for k, v in snapshot().items() if "ScriptedModule" not in k} == before
    choose(chosen.ui.movingSelector, "blob 1")
    click(chosen.ui.applyButton)
    run(chosen)
    assert chosen.p.warpedVolume is not None


def test_lack_of_memory_offers_fewer_cascades(chosen):
    chosen.p.cascades = 2
    click(chosen.ui.applyButton)
    chosen.panel.logic.worker._process.kill()  # as Linux does when memory runs out
    run(chosen)
    (text,) = chosen.said
    assert re.match(r"Registering these volumes needs about \d\.\d GB of memory, more than could be had here: ", text)
    assert text.endswith("Try again with 1 cascade?")
    assert chosen.p.cascades == 1  # yes was answered, and it ran again
    assert chosen.p.warpedVolume is not None


def test_a_scene_closed_during_the_run_is_survived(chosen):
    click(chosen.ui.applyButton)
    run(chosen, until=lambda: chosen.panel.job.fraction > 0.1)
    application.clear()
    QtWidgets.QApplication.processEvents()
    assert chosen.panel.job is None
    assert chosen.said == []
    assert chosen.ui.applyButton.text == "Choose a fixed and a moving volume"
    assert chosen.ui.tryItButton.isVisible()
    blobs()
    choose(chosen.ui.fixedSelector, "blob 0")
    choose(chosen.ui.movingSelector, "blob 1")
    chosen.widget._parameterNode.cascades = 1
    click(chosen.ui.applyButton)
    run(chosen)
    assert chosen.widget._parameterNode.warpedVolume is not None


def test_choices_come_back_from_a_saved_scene(chosen, tmp_path):
    from LightweightRegistrationLib.parameters import Device, Overlay, Prealignment

    ui = chosen.ui
    unfold(ui.advancedCollapsibleButton)
    choose(ui.prealignmentComboBox, "Affine from where they are")
    choose(ui.deviceComboBox, "CPU")
    choose(ui.overlayComboBox, "Jacobian map (colours)")
    ui.refinementSpinBox.value = 25
    ui.gridSpacingSlider.value = 7
    click(ui.keepInverseCheckBox)
    click(ui.wantJacobianCheckBox)
    bundle = str(tmp_path / "scene.mrb")
    assert slicer.mrmlScene.WriteToMRB(bundle)
    application.clear()
    QtWidgets.QApplication.processEvents()
    assert ui.refinementSpinBox.value == 0
    assert slicer.mrmlScene.ReadFromMRB(bundle)
    QtWidgets.QApplication.processEvents()
    p = chosen.widget._parameterNode
    assert (p.prealignment, p.device, p.overlay) == (Prealignment.affine, Device.cpu, Overlay.jacobian)
    assert (p.refinementSteps, p.gridSpacing, p.keepInverse, p.wantJacobian) == (25, 7.0, True, False)
    assert p.movingVolume.GetName() == "blob 1"
    assert ui.movingSelector.currentNode() is p.movingVolume
    assert ui.refinementSpinBox.value == 25
    assert ui.overlayComboBox.currentText == "Jacobian map (colours)"
    assert ui.keepInverseCheckBox.checked
    assert ui.applyButton.text == "Apply"


def test_results_and_outputs_come_back_from_a_saved_scene(chosen, tmp_path):
    click(chosen.ui.applyButton)
    run(chosen)
    shown, report = chosen.ui.resultsLabel.text, array(chosen.p.warpedVolume)
    bundle = str(tmp_path / "scene.mrb")
    assert slicer.mrmlScene.WriteToMRB(bundle)
    application.clear()
    assert chosen.ui.resultsLabel.text == "No result yet."
    assert slicer.mrmlScene.ReadFromMRB(bundle)
    QtWidgets.QApplication.processEvents()
    p = chosen.widget._parameterNode
    assert chosen.ui.resultsLabel.text == shown
    assert np.array_equal(array(p.warpedVolume), report)
    assert p.transform.GetName() == "blob 1 to blob 0"
    choose(chosen.ui.overlayComboBox, "Jacobian map (colours)")  # and the panel works on with them
    assert p.jacobianMap.GetDisplayNode().GetColorNode().GetName().startswith("Jacobian")


# outputs


def test_a_second_apply_fills_the_same_nodes_and_another_pair_gets_new_ones(chosen):
    p = chosen.p
    click(chosen.ui.applyButton)
    run(chosen)
    first = (p.warpedVolume, p.transform, p.jacobianMap)
    click(chosen.ui.applyButton)
    run(chosen)
    assert (p.warpedVolume, p.transform, p.jacobianMap) == first
    assert chosen.said == []
    kept = array(first[0])
    other = add_volume("blob 2", slicer.util.arrayFromVolume(chosen.moving)[::-1], local(chosen.moving))
    choose(chosen.ui.movingSelector, "blob 2")
    assert (p.warpedVolume, p.transform, p.jacobianMap) == (None, None, None)
    assert chosen.ui.warpedVolumeSelector.noneDisplay == "New: blob 2 warped to blob 0"
    click(chosen.ui.applyButton)
    run(chosen)
    assert p.warpedVolume is not first[0]
    assert p.movingVolume is other
    assert np.array_equal(array(first[0]), kept)


def test_without_a_warped_volume_the_moving_one_is_shown_under_the_transform_and_can_be_run_again(chosen):
    click(chosen.ui.wantWarpedCheckBox)
    click(chosen.ui.wantJacobianCheckBox)
    click(chosen.ui.applyButton)
    run(chosen)
    assert chosen.p.warpedVolume is None
    assert chosen.moving.GetParentTransformNode() is chosen.p.transform
    assert composite().GetForegroundVolumeID() == chosen.moving.GetID()
    click(chosen.ui.applyButton)
    run(chosen)
    assert chosen.said == []
    assert chosen.moving.GetParentTransformNode() is chosen.p.transform


def test_create_new_in_a_selector_gives_a_speaking_name(chosen):
    node = chosen.ui.warpedVolumeSelector.addNode()
    assert node.GetName() == "blob 1 warped to blob 0"
    assert chosen.p.warpedVolume is node
    click(chosen.ui.applyButton)
    run(chosen)
    assert chosen.p.warpedVolume is node
    assert array(node).max() > 0


# display


@pytest.fixture
def done(chosen):
    """The window after a registration."""
    click(chosen.ui.applyButton)
    run(chosen)
    return chosen


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
    choose(ui.overlayComboBox, "Nothing")
    assert composite().GetForegroundVolumeID() is None
    assert not ui.flickerButton.enabled


def test_the_jacobian_has_colours_and_a_legend(done):
    ui, p = done.ui, done.p
    choose(ui.overlayComboBox, "Jacobian map (colours)")
    assert composite().GetForegroundVolumeID() == p.jacobianMap.GetID()
    ui.jacobianRangeSlider.value = 0.25
    display = p.jacobianMap.GetDisplayNode()
    assert (display.GetWindowLevelMin(), display.GetWindowLevelMax()) == pytest.approx((0.75, 1.25))
    function = display.GetColorNode().GetColorTransferFunction()
    low, middle, high = ([0.0] * 3 for _ in range(3))
    for value, colour in ((0.75, low), (1.0, middle), (1.25, high)):
        function.GetColor(value, colour)
    assert low[2] > low[0] + 0.3  # blue
    assert min(middle) > 0.9  # white
    assert high[0] > high[2] + 0.3  # red
    legend = slicer.vtkSlicerColorLogic.GetColorLegendDisplayNode(p.jacobianMap)
    assert legend.GetVisibility()
    choose(ui.overlayComboBox, "Warped volume")
    assert not legend.GetVisibility()


def test_folding_is_outlined_where_there_is_any(done):
    ui, p = done.ui, done.p
    click(ui.showFoldingCheckBox)
    assert ui.statusLabel.text == "Nothing folds: there is no voxel to outline."
    click(ui.showFoldingCheckBox)
    slicer.util.arrayFromVolume(p.jacobianMap)[10:13, 8:12, 9:14] = -0.2
    slicer.util.arrayFromVolumeModified(p.jacobianMap)
    click(ui.showFoldingCheckBox)
    node = p.jacobianMap.GetNodeReference("LightweightRegistrationFolding")
    segment = slicer.vtkOrientedImageData()
    node.GetBinaryLabelmapRepresentation(node.GetSegmentation().GetNthSegmentID(0), segment)
    import vtk.util.numpy_support

    assert vtk.util.numpy_support.vtk_to_numpy(segment.GetPointData().GetScalars()).sum() == 3 * 4 * 5
    assert node.GetDisplayNode().GetVisibility()
    click(ui.showFoldingCheckBox)
    assert not node.GetDisplayNode().GetVisibility()
    # a run without folding takes the old outline away
    click(ui.showFoldingCheckBox)
    click(ui.applyButton)
    run(done)
    assert slicer.mrmlScene.GetFirstNodeByName(f"{p.jacobianMap.GetName()} folding") is None


def test_flicker_alternates_and_gives_the_fade_back(done):
    ui = done.ui
    ui.fadeSlider.value = 0.4
    click(ui.flickerButton)
    seen = set()
    for _ in range(3):
        done.panel.onFlickerTick()
        seen.add(composite().GetForegroundOpacity())
    assert seen == {0.0, 1.0}
    assert done.panel._flicker.isActive()
    click(ui.flickerButton)
    assert not done.panel._flicker.isActive()
    assert composite().GetForegroundOpacity() == pytest.approx(0.4)


def test_the_checkerboard_is_a_hidden_node_that_goes_away(done):
    ui = done.ui
    choose(ui.overlayComboBox, "Checkerboard of fixed and warped")
    node = done.panel._checkerboard
    assert composite().GetForegroundVolumeID() == node.GetID()
    assert composite().GetForegroundOpacity() == 1.0
    assert node.GetHideFromEditors()
    assert not node.GetSaveWithScene()
    from LightweightRegistrationLib import views

    fixed, warped = (views._grey(v) for v in (done.p.fixedVolume, done.p.warpedVolume))
    values = slicer.util.arrayFromVolume(node)
    assert np.array_equal(values[:8, :8, :8], fixed[:8, :8, :8])  # the first cube of 25 mm
    assert np.array_equal(values[:8, :8, 9:16], warped[:8, :8, 9:16])
    choose(ui.overlayComboBox, "Warped volume")
    assert not slicer.mrmlScene.IsNodePresent(node)


def test_opening_the_panel_does_not_touch_the_views(done):
    from LightweightRegistrationLib import views

    views.show(done.moving, None, 0.1)
    done.widget.exit()
    done.widget.enter()
    done.panel.update()
    assert composite().GetBackgroundVolumeID() == done.moving.GetID()


# others


def test_apply_also_to_brings_points_and_volumes_along(done):
    ui, p = done.ui, done.p
    import vtk

    points = slicer.mrmlScene.AddNewNodeByClass("vtkMRMLMarkupsFiducialNode", "landmarks")
    points.AddControlPoint(vtk.vtkVector3d(5, 5, 5))
    unfold(ui.othersCollapsibleButton)
    assert not ui.otherButton.enabled
    choose(ui.otherSelector, "landmarks")
    choose(ui.directionComboBox, "belongs to the fixed scan: bring it to the moving one")
    click(ui.otherButton)
    run(done)
    assert ui.statusLabel.text == "Created “landmarks on blob 1”."
    new = slicer.mrmlScene.GetFirstNodeByName("landmarks on blob 1")
    there = p.transform.GetTransformFromParent().TransformPoint((5.0, 5.0, 5.0))
    assert new.GetNthControlPointPosition(0) == pytest.approx(there, abs=1e-3)
    choose(ui.otherSelector, "blob 1")
    choose(ui.directionComboBox, "belongs to the moving scan: bring it to the fixed one")
    click(ui.otherButton)
    run(done)
    brought = slicer.mrmlScene.GetFirstNodeByName("blob 1 on blob 0")
    assert np.abs(array(brought) - array(p.warpedVolume)).max() <= 1
    assert done.said == []


def test_a_sequence_runs_from_the_panel_and_can_be_cancelled(chosen):
    from Testing.integration.test_slicer_others import frames

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


def test_cleanup_ends_the_process(done):
    worker = done.panel.logic.worker
    assert worker.exit_code() is None
    done.widget.cleanup()
    assert worker._process is None
    assert done.widget.Observations == []
