"""The panel's outputs: which nodes Apply fills, and which never."""

from __future__ import annotations

import numpy as np
import pytest
import vtk

from Testing.slicer_scene import add_volume, array, blobs, linear, local, turned
from Testing.slicer_window import choose, click, composite, run, settle

slicer = pytest.importorskip("slicer", reason="needs slicer-core (make test installs it)")


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
    assert chosen.ui.warpedVolumeSelector.baseName == "blob 2 warped to blob 0"
    click(chosen.ui.applyButton)
    run(chosen)
    assert p.warpedVolume is not first[0]
    assert p.movingVolume is other
    assert np.array_equal(array(first[0]), kept)


def test_results_and_display_are_of_the_last_run_where_it_makes_fewer_outputs(done):
    ui, p = done.ui, done.p
    first = (p.transform, p.jacobianMap)
    for box in (ui.wantTransformCheckBox, ui.wantJacobianCheckBox):
        click(box)
    choose(ui.kindComboBox, "Affine: also scale and shear")
    click(ui.applyButton)
    run(done)
    assert done.said == []
    assert "affine: turned by" in ui.resultsLabel.text
    assert (p.transform, p.jacobianMap) == (None, None)
    assert all(slicer.mrmlScene.IsNodePresent(node) for node in first)
    click(ui.wantTransformCheckBox)
    click(ui.applyButton)
    run(done)
    assert p.transform not in (None, *first)
    assert first[0].GetMatrixTransformToParent(vtk.vtkMatrix4x4()) == 0  # it deforms still


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


def test_where_the_moving_volume_has_a_parent_and_no_warped_volume_is_made_the_panel_says_how_to_see_it(chosen):
    parent = linear("frame", turned(5, (2.0, 0.0, 0.0)))
    chosen.moving.SetAndObserveTransformNodeID(parent.GetID())
    click(chosen.ui.wantWarpedCheckBox)
    click(chosen.ui.applyButton)
    run(chosen)
    assert chosen.moving.GetParentTransformNode() is parent
    assert chosen.ui.statusLabel.text.endswith("s. To see the result, put “frame” under “blob 1 to blob 0”.")
    assert parent.GetParentTransformNode() is None  # it may hold other nodes, too


def test_create_new_in_a_selector_gives_a_speaking_name(chosen):
    node = chosen.ui.warpedVolumeSelector.addNode()
    assert node.GetName() == "blob 1 warped to blob 0"
    assert chosen.p.warpedVolume is node
    click(chosen.ui.applyButton)
    run(chosen)
    assert chosen.p.warpedVolume is node
    assert array(node).max() > 0


def test_output_selectors_stay_on_new_and_no_volume_of_the_user_is_filled(opened):
    """Three volumes of the user in the scene before anything is chosen."""
    fixed, moving = blobs()
    third = add_volume("third", np.arange(1000.0).reshape(10, 10, 10))
    before = array(third)
    choose(opened.ui.fixedSelector, "blob 0")
    choose(opened.ui.movingSelector, "blob 1")
    p = opened.widget._parameterNode
    assert (p.warpedVolume, p.transform, p.jacobianMap) == (None, None, None)
    assert opened.ui.warpedVolumeSelector._box.currentText() == "New volume"
    click(opened.ui.applyButton)
    run(opened)
    assert opened.said == []
    assert np.array_equal(array(third), before)
    assert p.warpedVolume not in (None, fixed, moving, third)


def test_a_node_that_the_module_did_not_make_is_filled_only_after_a_question(chosen, monkeypatch):
    mine = add_volume("mine", np.arange(1000.0).reshape(10, 10, 10))
    before = array(mine)
    choose(chosen.ui.warpedVolumeSelector, "mine")
    asked = []
    monkeypatch.setattr(slicer.util, "confirmYesNoDisplay", lambda text, **_: bool(asked.append(text)))
    click(chosen.ui.applyButton)
    assert chosen.panel.job is None
    assert np.array_equal(array(mine), before)
    assert asked == ["Apply will replace what “mine” holds, which was not made here. Replace it?"]
    assert chosen.ui.statusLabel.text == "Choose other outputs, or “New”."
    monkeypatch.setattr(slicer.util, "confirmYesNoDisplay", lambda text, **_: asked.append(text) is None)
    click(chosen.ui.applyButton)
    run(chosen)
    assert len(asked) == 2
    assert chosen.p.warpedVolume is mine
    assert array(mine).shape == array(chosen.fixed).shape
    click(chosen.ui.applyButton)  # now it is a result of this module
    run(chosen)
    assert len(asked) == 2


def test_a_clone_of_a_result_belongs_to_the_user(done):
    clone = slicer.mrmlScene.AddNewNodeByClass("vtkMRMLScalarVolumeNode", "kept")
    clone.CopyContent(done.p.warpedVolume)
    for name in done.p.warpedVolume.GetAttributeNames():
        clone.SetAttribute(name, done.p.warpedVolume.GetAttribute(name))
    choose(done.ui.warpedVolumeSelector, "kept")
    click(done.ui.applyButton)
    run(done)
    assert [text for text in done.said if "kept" in text]


def test_a_selector_whose_node_is_deleted_goes_to_none_and_not_to_a_neighbour(done):
    """Slicer's selectors go to a neighbour of a node that is removed."""
    kept = [add_volume(name, np.arange(1000.0).reshape(10, 10, 10)) for name in ("first", "last")]
    before = [array(node) for node in kept]
    slicer.mrmlScene.RemoveNode(done.p.warpedVolume)
    settle()
    assert done.p.warpedVolume is None
    click(done.ui.applyButton)
    run(done)
    assert done.p.warpedVolume.GetName().startswith("blob 1 warped to blob 0")
    assert all(np.array_equal(array(node), values) for node, values in zip(kept, before, strict=True))
    slicer.mrmlScene.RemoveNode(done.moving)
    settle()
    assert done.ui.applyButton.text == "Choose a moving volume"
    assert done.said == []


def test_a_scene_that_is_read_beside_the_present_one_brings_its_own_outputs(done, tmp_path):
    p, results = done.p, done.ui.resultsLabel.text
    before = (p.fixedVolume, p.warpedVolume, p.transform)
    bundle = str(tmp_path / "scene.mrb")
    assert slicer.mrmlScene.WriteToMRB(bundle)
    assert slicer.mrmlScene.ReadFromMRB(bundle)  # without closing the present one
    settle()
    assert all(slicer.mrmlScene.IsNodePresent(node) for node in before)
    assert p.fixedVolume is not before[0]
    assert None not in (p.warpedVolume, p.transform)
    assert p.transform.GetNodeReference(p.transform.GetFixedNodeReferenceRole()) is p.fixedVolume
    assert done.ui.resultsLabel.text == results
