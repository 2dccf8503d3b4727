"""The panel on PySide6 with stand-ins for Slicer's own widgets: real mouse clicks on the real .ui file."""

from __future__ import annotations

import re
import xml.etree.ElementTree as ET
import zipfile
from pathlib import Path

import numpy as np
import pytest

from Testing import slicer_window
from Testing.slicer_scene import add_volume, array, blobs, pause, snapshot
from Testing.slicer_window import choose, click, composite, run, settle, unfold

slicer = pytest.importorskip("slicer", reason="needs slicer-core (make test installs it)")

from Testing.standin import application

UI = Path(application.MODULE / "Resources" / "UI" / "LightweightRegistration.ui")


# opening


def test_an_empty_panel_says_what_to_do_and_does_nothing_heavy(opened):
    ui = opened.ui
    assert ui.applyButton.text == "Choose a fixed and a moving volume"
    assert not ui.applyButton.enabled
    assert ui.tryItButton.isVisible()
    assert not ui.progressBar.isVisible()
    assert ui.resultsLabel.text == "No result yet."
    assert opened.panel.logic._worker is None
    from LDRCore.models import weights

    assert ui.modelComboBox.currentText == "T1 head"
    shown = [ui.modelComboBox.itemText(n) for n in range(ui.modelComboBox.count())]
    assert shown == list(weights.model_titles().values())
    assert shown[0].startswith("Any images")
    assert shown[-1] == "Any anatomy (no network)"
    assert ui.modelCardLabel.text.startswith("T1-weighted MRI of the adult head")
    assert ui.cascadesSlider.maximum == 9
    assert ui.qualityComboBox.currentText == "Accurate"
    assert ui.advancedCollapsibleButton.collapsed
    assert opened.said == []


def test_every_parameter_has_a_widget_and_every_widget_a_parameter(slicer_module):
    from LightweightRegistrationLib.parameters import LightweightRegistrationParameterNode

    texts = [
        element.find("string").text
        for element in ET.parse(UI).iter("property")
        if element.get("name") == "SlicerParameterName"
    ]
    assert sorted([*texts, "model"]) == sorted(LightweightRegistrationParameterNode.allParameters)
    assert len(texts) == len(set(texts))


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
    for file in ("panel.py", "panel_display.py", "panel_files.py", "job_runner.py"):
        source = (application.MODULE / "LightweightRegistrationLib" / file).read_text(encoding="utf-8")
        used = set(re.findall(r"\bui\.(\w+)", source))
        assert used
        assert used <= names


# try it, apply, results


def test_try_it_then_apply_shows_warped_volume_results_and_an_early_view(opened, monkeypatch):
    ui, scene = opened.ui, slicer.mrmlScene
    click(ui.tryItButton)
    p = opened.widget._parameterNode
    assert (p.fixedVolume.GetName(), p.movingVolume.GetName()) == ("Brain A", "Brain B")
    assert not ui.tryItButton.isVisible()
    assert ui.applyButton.text == "Apply"
    assert composite().GetBackgroundVolumeID() == p.fixedVolume.GetID()
    ui.cascadesSlider.value = 1
    assert p.cascades == 1
    assert not p.wantJacobian
    click(ui.wantJacobianCheckBox)
    moving = p.movingVolume.GetMTime()
    show, shown = opened.panel.display.showEarlyView, []

    def show_and_look(*arguments):
        show(*arguments)
        early = opened.panel.display.earlyView
        assert composite().GetForegroundVolumeID() == early.volume.GetID()
        assert early.volume.GetImageData() is p.movingVolume.GetImageData()  # shared, not copied
        assert p.warpedVolume is None
        shown.append(early)

    monkeypatch.setattr(opened.panel.display, "showEarlyView", show_and_look)
    click(ui.applyButton)
    assert ui.applyButton.text == "Cancel"
    assert ui.progressBar.isVisible()
    run(opened)
    assert len(shown) == 1, "the early view comes before the outputs"
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
    for word in (
        "Similarity",
        "Folding",
        "Jacobian",
        "CPU",
        "T1 head (brain-t1-gradient), 1 cascade: it was asked for<",
    ):
        assert word in ui.resultsLabel.text
    click(ui.copyButton)
    from PySide6 import QtWidgets

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
    for box in (ui.wantWarpedCheckBox, ui.wantTransformCheckBox):
        click(box)
    assert ui.applyButton.text == "Choose at least one output"
    assert not ui.applyButton.enabled
    assert not ui.transformSelector.enabled
    unfold(ui.advancedCollapsibleButton)
    click(ui.keepInverseCheckBox)
    assert ui.applyButton.text == "Apply"


def test_cancel_leaves_the_scene_and_the_views_as_they_were(chosen):
    from LightweightRegistrationLib import slice_display

    chosen.p.refinementSteps = 500  # it will not finish before it is cancelled
    slice_display.show_layers(chosen.fixed, chosen.moving, 0.3)
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


def test_the_process_is_started_when_both_volumes_are_chosen_not_when_apply_is_pressed(opened):
    blobs()
    choose(opened.ui.fixedSelector, "blob 0")
    assert opened.panel.logic._worker is None
    choose(opened.ui.movingSelector, "blob 1")
    worker = opened.panel.logic.worker
    process = worker.process
    assert process.poll() is None
    choose(opened.ui.movingSelector, "blob 0")  # nothing to register
    choose(opened.ui.movingSelector, "blob 1")
    opened.widget._parameterNode.cascades = 1
    click(opened.ui.applyButton)
    run(opened)
    assert opened.widget._parameterNode.warpedVolume is not None
    assert worker.process is process
    assert "Traceback" not in worker.log()  # warming up went well
    pause(process)
    click(opened.ui.applyButton)
    click(opened.ui.applyButton)  # cancel ends the process; the next one gets ready
    assert process.poll() is not None
    assert worker.process is not process
    assert worker.exit_code() is None


@pytest.mark.parametrize(("gigabytes", "early"), [(4, False), (16, True)])
def test_the_process_is_not_started_early_where_memory_is_small_or_the_user_does_not_want_it(
    slicer_module, scene, monkeypatch, gigabytes, early
):
    from LightweightRegistrationLib import panel

    qt = pytest.importorskip("PySide6.QtCore")
    monkeypatch.setattr(panel, "memory_bytes", lambda: gigabytes * 1e9)
    opened = slicer_window.open_window(slicer_module, monkeypatch)
    try:
        box = opened.ui.prepareCheckBox
        assert box.checked == early
        unfold(opened.ui.advancedCollapsibleButton)
        click(box)
        assert qt.QSettings().value(panel.PREPARE_SETTING, type=bool) == (not early)
        warmed = []
        monkeypatch.setattr(opened.panel.logic, "warmUp", lambda *options: warmed.append(options))
        blobs()
        choose(opened.ui.fixedSelector, "blob 0")
        choose(opened.ui.movingSelector, "blob 1")
        assert bool(warmed) == (not early)
    finally:
        qt.QSettings().remove(panel.PREPARE_SETTING)
        slicer_window.close_window(opened)


def test_on_an_intel_mac_the_panel_says_beforehand_that_it_cannot_work(slicer_module, scene, monkeypatch):
    from LightweightRegistrationLib import machine, torch_setup

    monkeypatch.setattr(machine.sys, "platform", "darwin")
    monkeypatch.setattr(machine.platform, "machine", lambda: "x86_64")
    monkeypatch.setattr(torch_setup, "torch_version", lambda: None)
    opened = slicer_window.open_window(slicer_module, monkeypatch)
    try:
        assert opened.ui.applyButton.text == "This computer cannot run it"
        assert not opened.ui.applyButton.enabled
        assert opened.ui.statusLabel.text.startswith("Slicer for Intel Macs has no torch")
        with pytest.raises(torch_setup.InputError, match="Intel Macs"):
            torch_setup.ensure_torch()
    finally:
        slicer_window.close_window(opened)


def test_lack_of_memory_offers_fewer_cascades(chosen):
    chosen.p.cascades = 2
    pause(chosen.panel.logic.worker.process)
    click(chosen.ui.applyButton)
    chosen.panel.logic.worker.process.kill()  # as Linux does when memory runs out
    run(chosen)
    (text,) = chosen.said
    assert re.match(r"Registering these volumes needs about \d\.\d GB of memory, more than could be had here: ", text)
    assert text.endswith("Try again with 1 cascade?")
    assert chosen.p.cascades == 1  # yes was answered, and it ran again
    assert chosen.p.warpedVolume is not None


def test_a_scene_closed_during_the_run_is_survived(chosen):
    chosen.p.refinementSteps = 500  # it will not finish before the scene is closed
    click(chosen.ui.applyButton)
    run(chosen, until=lambda: chosen.panel.job.fraction > 0.1)
    application.clear()
    settle()
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
    from LightweightRegistrationLib.parameters import Device, Overlay, Prealignment, Quality, Similarity

    ui = chosen.ui
    unfold(ui.advancedCollapsibleButton)
    choose(ui.prealignmentComboBox, "From where they are")
    choose(ui.deviceComboBox, "CPU")
    choose(ui.overlayComboBox, "Jacobian map (colours)")
    ui.refinementSpinBox.value = 25
    ui.gridSpacingSlider.value = 7
    choose(ui.qualityComboBox, "Best: slowest")
    choose(ui.similarityComboBox, "Self-similarity, MIND (unlike contrasts)")
    click(ui.keepInverseCheckBox)
    click(ui.wantJacobianCheckBox)
    bundle = str(tmp_path / "scene.mrb")
    assert slicer.mrmlScene.WriteToMRB(bundle)
    application.clear()
    settle()
    assert ui.refinementSpinBox.value == 0
    assert slicer.mrmlScene.ReadFromMRB(bundle)
    settle()
    p = chosen.widget._parameterNode
    assert (p.prealignment, p.device, p.overlay) == (Prealignment.affine, Device.cpu, Overlay.jacobian)
    assert (p.refinementSteps, p.gridSpacing, p.keepInverse, p.wantJacobian) == (25, 7.0, True, False)
    assert (p.quality, p.similarity) == (Quality.best, Similarity.mind)
    assert p.movingVolume.GetName() == "blob 1"
    assert ui.movingSelector.currentNode() is p.movingVolume
    assert ui.refinementSpinBox.value == 25
    assert ui.overlayComboBox.currentText == "Jacobian map (colours)"
    assert ui.keepInverseCheckBox.checked
    assert ui.applyButton.text == "Apply"


def test_a_scene_of_an_earlier_version_gets_the_defaults_of_newer_parameters(chosen, tmp_path):
    ui = chosen.ui
    choose(ui.qualityComboBox, "Best: slowest")
    chosen.p.refinementSteps = 25
    for name in ("quality", "similarity"):
        chosen.p.parameterNode.UnsetParameter(name)
    bundle = str(tmp_path / "scene.mrb")
    assert slicer.mrmlScene.WriteToMRB(bundle)
    text = zipfile.ZipFile(bundle).read(next(n for n in zipfile.ZipFile(bundle).namelist() if n.endswith(".mrml")))
    text = re.sub(rb"(quality|similarity) [^;&\"]*;?", b"", text)  # what the panel had filled in before it was saved
    assert b"refinementSteps" in text
    application.clear()
    settle()
    (tmp_path / "old.mrml").write_bytes(text)
    slicer.mrmlScene.SetURL(str(tmp_path / "old.mrml"))
    slicer.mrmlScene.Import()
    settle()
    p = chosen.widget._parameterNode
    assert (p.refinementSteps, p.quality.name, p.similarity.name) == (25, "accurate", "auto")
    assert ui.qualityComboBox.currentText == "Accurate"
    assert chosen.said == []


@pytest.mark.parametrize(("label", "refine"), [("Fast", "none"), ("Accurate", "fast"), ("Best: slowest", "best")])
def test_quality_is_how_the_displacement_is_refined(chosen, label, refine):
    choose(chosen.ui.qualityComboBox, label)
    click(chosen.ui.applyButton)
    run(chosen)
    assert f'"refine": "{refine}"' in chosen.p.transform.GetAttribute("LightweightRegistration.Report")
    shown = re.search(r"<b>Refinement</b></td><td[^>]*>([^<]*)", chosen.ui.resultsLabel.text)
    if refine == "none":
        assert shown is None
    else:
        name = label.split(":")[0]
        pattern = rf"{name}: \d+ iterations? at \d\.\d mm, \d+ iterations? at \d\.\d mm; local similarity -?0\.\d+ to "
        assert re.match(pattern, shown[1]), shown[1]


def test_results_and_outputs_come_back_from_a_saved_scene(chosen, tmp_path):
    click(chosen.ui.applyButton)
    run(chosen)
    shown, report = chosen.ui.resultsLabel.text, array(chosen.p.warpedVolume)
    bundle = str(tmp_path / "scene.mrb")
    assert slicer.mrmlScene.WriteToMRB(bundle)
    application.clear()
    assert chosen.ui.resultsLabel.text == "No result yet."
    assert slicer.mrmlScene.ReadFromMRB(bundle)
    settle()
    p = chosen.widget._parameterNode
    assert chosen.ui.resultsLabel.text == shown
    assert np.array_equal(array(p.warpedVolume), report)
    assert p.transform.GetName() == "blob 1 to blob 0"
    choose(chosen.ui.overlayComboBox, "Jacobian map (colours)")  # and the panel works on with them
    assert p.jacobianMap.GetDisplayNode().GetColorNode().GetName().startswith("Jacobian")
