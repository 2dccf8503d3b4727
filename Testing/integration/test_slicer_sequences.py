"""Every frame of a sequence registered to one fixed volume."""

from __future__ import annotations

import numpy as np
import pytest
import SimpleITK as sitk

import LDRCore
from Testing.slicer_scene import (
    LPS,
    array,
    assert_same_volume,
    frames,
    image_of,
    moved,
    snapshot,
    spin,
)

slicer = pytest.importorskip("slicer", reason="needs slicer-core (make test installs it)")

from Testing.standin import application


def test_every_frame_of_a_sequence_is_registered(logic, scene, tmp_path):
    fixed, sequence = frames(scene)
    messages = []
    made = logic.registerSequence(
        fixed, sequence, 1, refine="none", progress=lambda fraction, message: messages.append((fraction, message))
    )
    warped, transforms, browser = made["warped"], made["transforms"], made["browser"]
    assert warped.GetName() == "breathing on blob 0"
    assert warped.GetNumberOfDataNodes() == transforms.GetNumberOfDataNodes() == 3
    assert (warped.GetIndexName(), warped.GetIndexUnit(), warped.GetNthIndexValue(1)) == ("time", "s", "0.5")
    assert browser.GetMasterSequenceNode() is warped
    assert browser.IsSynchronizedSequenceNode(transforms)
    for n in range(3):
        frame = image_of(sequence.GetNthDataNode(n))
        expected = LDRCore.register(image_of(fixed), frame, cascades=1)
        theirs = sitk.GetArrayFromImage(expected.warped).astype(float)
        assert_same_volume(array(warped.GetNthDataNode(n)), theirs)
        point = (3.0, -4.0, 5.0)
        through = LPS[:3, :3] @ expected.transform.TransformPoint((LPS[:3, :3] @ point).tolist())
        assert moved(transforms.GetNthDataNode(n), point) == pytest.approx(through, abs=0.05)
    assert [fraction for fraction, _ in messages] == sorted(fraction for fraction, _ in messages)
    assert any(message.startswith("frame 3 of 3: ") for _, message in messages)
    bundle = tmp_path / "scene.mrb"
    assert scene.WriteToMRB(str(bundle))
    application.clear()
    assert scene.ReadFromMRB(str(bundle))
    again = scene.GetFirstNodeByName("breathing transforms")
    assert moved(again.GetNthDataNode(2), point) == pytest.approx(through, abs=0.05)


def test_a_cancelled_sequence_leaves_nothing(logic, scene):
    fixed, sequence = frames(scene)
    before = snapshot()
    job = logic.startSequence(fixed, sequence, 1)
    spin(job, until=lambda: job.fraction > 0.3)
    assert "frame 2 of 3" in job.message
    job.cancel()
    assert snapshot() == before


def test_a_sequence_that_cannot_be_registered_is_refused(logic, scene):
    from LightweightRegistrationLib.module_errors import InputError

    fixed, sequence = frames(scene, 1)
    empty = scene.AddNewNodeByClass("vtkMRMLSequenceNode", "empty")
    transforms = scene.AddNewNodeByClass("vtkMRMLSequenceNode", "poses")
    transforms.SetDataNodeAtValue(slicer.vtkMRMLLinearTransformNode(), "0")
    flat = slicer.vtkMRMLScalarVolumeNode()
    slicer.util.updateVolumeFromArray(flat, np.zeros((6, 6, 6)))
    sequence.SetDataNodeAtValue(flat, "9")
    before = snapshot()
    for node, message in (
        (None, "a sequence must be chosen, got none"),
        (empty, "the sequence must hold frames, got 'empty', which is empty"),
        (transforms, "the sequence must hold volumes, got 'poses' with something else"),
        (sequence, "the frame 2 of the sequence must show something, got '.*', where every voxel is 0"),
    ):
        with pytest.raises(InputError, match=message):
            logic.registerSequence(fixed, node, 1)
    assert snapshot() == before
