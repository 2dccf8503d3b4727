"""What goes along with a registration: other volumes, segmentations, markups, sequences, sample data, torch set-up."""

from __future__ import annotations

import re
import types

import numpy as np
import pytest
import SimpleITK as sitk

import LDRCore
from Testing.slicer_scene import (
    LPS,
    add_volume,
    array,
    assert_same_volume,
    blobs,
    frames,
    image_of,
    linear,
    local,
    moved,
    snapshot,
    spin,
    turned,
)

slicer = pytest.importorskip("slicer", reason="needs slicer-core (make test installs it)")
import vtk

from Testing.standin import application


@pytest.fixture
def bent(scene):
    """A fixed and a moving volume and a smooth, invertible transform between them, made by hand: no registration."""
    from LightweightRegistrationLib import outputs, transforms, volumes

    fixed, moving = blobs()
    picture = volumes.picture(fixed, "fixed volume")
    k, j, i = np.meshgrid(*[np.arange(n) for n in picture.values.shape], indexing="ij")
    points = np.stack([i, j, k, np.ones_like(i)], -1) @ picture.to_world.T
    x, y, z = (points[..., n] for n in range(3))
    vectors = np.stack([4 + 2 * np.sin(y / 12), -3 + 2 * np.cos(z / 10), 1.5 * np.sin(x / 15)], -1)
    node = scene.AddNewNodeByClass("vtkMRMLTransformNode", "bent")
    transforms.write_field(node, transforms.Field(vectors, LPS @ picture.to_world))
    outputs.record_roles(node, fixed, moving)
    return types.SimpleNamespace(fixed=fixed, moving=moving, transform=node)


def sitk_transform(node) -> sitk.Transform:
    from LightweightRegistrationLib import transforms

    field = transforms.own_grid(node)
    spacing = np.linalg.norm(field.to_lps[:3, :3], axis=0)
    image = sitk.GetImageFromArray(np.ascontiguousarray(field.vectors), isVector=True)
    image.SetSpacing(spacing.tolist())
    image.SetDirection((field.to_lps[:3, :3] / spacing).ravel().tolist())
    image.SetOrigin(field.to_lps[:3, 3].tolist())
    return sitk.DisplacementFieldTransform(image)


def test_another_volume_and_a_labelmap_come_to_the_fixed_grid_as_the_library_warps_them(logic, bent):
    labels = add_volume("labels", (array(bent.moving) // 100).astype(np.uint8), local(bent.moving), "LabelMap")
    bent.fixed.SetAndObserveTransformNodeID(linear("P", turned(10, (1, 2, 3))).GetID())
    transform = sitk_transform(bent.transform)
    for node, how in ((bent.moving, "linear"), (labels, "nearest")):
        before = array(node), local(node), node.GetTransformNodeID()
        new = logic.bringAlong(node, bent.transform)
        expected = sitk.GetArrayFromImage(LDRCore.warp_image(image_of(node), transform, image_of(bent.fixed), how))
        assert expected.max() > 2
        assert_same_volume(array(new), expected)
        assert new.GetClassName() == node.GetClassName()
        assert new.GetName() == f"{node.GetName()} on blob 0"
        assert new.GetParentTransformNode() is bent.fixed.GetParentTransformNode()
        assert np.array_equal(array(node), before[0])
        assert np.array_equal(local(node), before[1])
        assert node.GetTransformNodeID() == before[2]


def test_what_belongs_to_the_fixed_scan_comes_to_the_moving_grid(logic, bent):
    back = logic.bringAlong(bent.fixed, bent.transform, "to moving")
    assert back.GetImageData().GetDimensions() == bent.moving.GetImageData().GetDimensions()
    forth, fixed, there = sitk_transform(bent.transform), image_of(bent.fixed), image_of(back)
    linear_fixed = sitk.Cast(fixed, sitk.sitkFloat64)
    for voxel in np.random.default_rng(0).integers(7, (19, 19, 14), (40, 3)).tolist():
        target = np.array(there.TransformIndexToPhysicalPoint(voxel))
        source = target.copy()
        for _ in range(60):  # T(source) = target, by fixed point
            source += target - forth.TransformPoint(source.tolist())
        expected = linear_fixed.EvaluateAtPhysicalPoint(source.tolist(), sitk.sitkLinear)
        assert there[voxel] == pytest.approx(expected, abs=6)  # of 460; the inverse is solved on a grid of 3 mm


def test_a_segmentation_keeps_its_overlapping_segments_names_and_colours(logic, bent, scene):
    values = array(bent.moving)
    inner, outer = (values > 350).astype(np.uint8), (values > 100).astype(np.uint8)
    node = scene.AddNewNodeByClass("vtkMRMLSegmentationNode", "organs")
    node.CreateDefaultDisplayNodes()
    node.SetReferenceImageGeometryParameterFromVolumeNode(bent.moving)
    for name, mask, colour in (("outer", outer, (1.0, 0.0, 0.0)), ("inner", inner, (0.0, 0.5, 1.0))):
        labels = add_volume(name, mask, local(bent.moving), "LabelMap")
        slicer.vtkSlicerSegmentationsModuleLogic.ImportLabelmapToSegmentationNode(labels, node)
        segment = node.GetSegmentation().GetNthSegment(node.GetSegmentation().GetNumberOfSegments() - 1)
        segment.SetName(name)
        segment.SetColor(*colour)
    assert node.GetSegmentation().GetNumberOfLayers() == 2
    new = logic.bringAlong(node, bent.transform)
    assert new.GetSegmentation().GetNumberOfSegments() == 2
    transform = sitk_transform(bent.transform)
    for n, (name, mask, colour) in enumerate((("outer", outer, (1.0, 0.0, 0.0)), ("inner", inner, (0.0, 0.5, 1.0)))):
        segment = new.GetSegmentation().GetNthSegment(n)
        assert (segment.GetName(), segment.GetColor()) == (name, colour)
        image = sitk.GetImageFromArray(mask)
        image.CopyInformation(image_of(bent.moving))
        expected = sitk.GetArrayFromImage(LDRCore.warp_image(image, transform, image_of(bent.fixed), "nearest"))
        assert expected.sum() > 100
        out = slicer.vtkOrientedImageData()
        new.GetBinaryLabelmapRepresentation(new.GetSegmentation().GetNthSegmentID(n), out)
        assert np.array_equal(_on(out, bent.fixed), expected)


def test_a_segmentation_is_brought_from_where_its_own_parent_puts_it(logic, bent, scene):
    """Under a parent of its own, while both volumes are under others: the moving volume's does not count for it."""
    labels = add_volume("labels", (array(bent.moving) > 250).astype(np.uint8), local(bent.moving), "LabelMap")
    node = scene.AddNewNodeByClass("vtkMRMLSegmentationNode", "organ")
    slicer.vtkSlicerSegmentationsModuleLogic.ImportLabelmapToSegmentationNode(labels, node)
    world_from_segmentation = turned(15, (6, -9, 4), axis=1)
    node.SetAndObserveTransformNodeID(linear("Q", world_from_segmentation).GetID())
    bent.moving.SetAndObserveTransformNodeID(linear("R", turned(-20, (-7, 3, 5))).GetID())
    bent.fixed.SetAndObserveTransformNodeID(linear("P", turned(10, (1, 2, 3))).GetID())
    image = image_of(labels, world_from_segmentation @ local(labels))
    reference = image_of(bent.fixed)
    expected = sitk.GetArrayFromImage(
        sitk.Resample(image, reference, sitk_transform(bent.transform), sitk.sitkNearestNeighbor)
    )
    assert expected.sum() > 100
    new = logic.bringAlong(node, bent.transform)
    assert new.GetParentTransformNode() is bent.fixed.GetParentTransformNode()
    out = slicer.vtkOrientedImageData()
    new.GetBinaryLabelmapRepresentation(new.GetSegmentation().GetNthSegmentID(0), out)
    assert np.array_equal(_on(out, bent.fixed), expected)


def _on(labels, volume) -> np.ndarray:
    """A segment's labelmap, which may be cropped, as 0 and 1 on a volume's whole grid."""
    from LightweightRegistrationLib import volumes

    matrix = vtk.vtkMatrix4x4()
    labels.GetImageToWorldMatrix(matrix)
    offset = np.rint(np.linalg.inv(local(volume)) @ volumes.array_of(matrix) @ [*labels.GetExtent()[::2], 1]).astype(
        int
    )
    values = vtk.util.numpy_support.vtk_to_numpy(labels.GetPointData().GetScalars())
    values = values.reshape(labels.GetDimensions()[::-1])
    out = np.zeros(volume.GetImageData().GetDimensions()[::-1], np.uint8)
    i, j, k = offset[:3]
    out[k : k + values.shape[0], j : j + values.shape[1], i : i + values.shape[2]] = values != 0
    return out


def test_points_go_against_the_images_and_both_ways(logic, bent, scene):
    parent = linear("P", turned(30, (7, -5, 2)))
    points = [(5.0, -8.0, 3.0), (-10.0, 12.0, -6.0)]
    markups = scene.AddNewNodeByClass("vtkMRMLMarkupsFiducialNode", "landmarks")
    for n, point in enumerate(points):
        markups.AddControlPoint(vtk.vtkVector3d(*point), f"point {n}")
    on_moving = logic.bringAlong(markups, bent.transform, "to moving")
    for n, point in enumerate(points):
        assert on_moving.GetNthControlPointPosition(n) == pytest.approx(moved(bent.transform, point), abs=1e-3)
        assert on_moving.GetNthControlPointLabel(n) == f"point {n}"
        assert markups.GetNthControlPointPosition(n) == pytest.approx(point)
    back = logic.bringAlong(on_moving, bent.transform, "to fixed")
    for n, point in enumerate(points):
        assert back.GetNthControlPointPosition(n) == pytest.approx(point, abs=0.02)
    markups.SetAndObserveTransformNodeID(parent.GetID())
    under = logic.bringAlong(markups, bent.transform, "to moving")
    assert under.GetParentTransformNode() is None
    world = (turned(30, (7, -5, 2)) @ [*points[0], 1])[:3]
    assert under.GetNthControlPointPosition(0) == pytest.approx(moved(bent.transform, world), abs=1e-3)
    assert markups.GetDisplayNode() is None or under.GetDisplayNode() is not markups.GetDisplayNode()


@pytest.mark.parametrize(
    ("make", "direction", "message"),
    [
        (lambda b: None, "to fixed", "something to bring along must be chosen, got none"),
        (lambda b: b.moving, "sideways", r"direction must be one of \('to fixed', 'to moving'\), got 'sideways'"),
        (
            lambda b: slicer.mrmlScene.AddNewNodeByClass("vtkMRMLTextNode", "note"),
            "to fixed",
            "only volumes, segmentations, markups of points and models can be brought along, got 'note'",
        ),
        (
            lambda b: slicer.mrmlScene.AddNewNodeByClass("vtkMRMLSegmentationNode", "bare"),
            "to fixed",
            "the segmentation must hold a segment, got 'bare' without any voxel",
        ),
    ],
)
def test_what_cannot_be_brought_along_is_refused(logic, bent, make, direction, message):
    from LightweightRegistrationLib.core import InputError

    node = make(bent)
    before = snapshot()
    with pytest.raises(InputError, match=message):
        logic.bringAlong(node, bent.transform, direction)
    assert snapshot() == before


def test_a_transform_whose_volumes_are_gone_is_refused(logic, bent, scene):
    from LightweightRegistrationLib.core import InputError

    scene.RemoveNode(bent.fixed)
    with pytest.raises(
        InputError, match="must know its fixed volume, got 'bent', whose fixed volume is not in the scene"
    ):
        logic.bringAlong(bent.moving, bent.transform)


# sequences


def test_every_frame_of_a_sequence_is_registered(logic, scene, tmp_path):
    fixed, sequence = frames(scene)
    told = []
    made = logic.registerSequence(
        fixed, sequence, 1, progress=lambda fraction, message: told.append((fraction, message))
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
    assert [fraction for fraction, _ in told] == sorted(fraction for fraction, _ in told)
    assert any(message.startswith("frame 3 of 3: ") for _, message in told)
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
    from LightweightRegistrationLib.core import InputError

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


def test_the_console_page_runs_as_it_is_written(slicer_module, scene, capsys):
    page = (application.ROOT / "docs" / "slicer-console.md").read_text(encoding="utf-8")
    blocks = re.findall(r"```python\n(.*?)```", page, re.DOTALL)
    assert len(blocks) == 5
    fixed, sequence = frames(scene, 2)
    moving = scene.GetFirstNodeByName("blob 1")
    add_volume("MRI a year later", slicer.util.arrayFromVolume(moving)[:, ::-1], local(moving))
    for node, name in ((fixed, "MRI before"), (moving, "MRI after"), (sequence, "Breathing")):
        node.SetName(name)
    for name, node in (("Brain", fixed), ("Tumour", moving)):
        labels = add_volume(f"{name} labels", (array(node) > 100).astype(np.uint8), local(node), "LabelMap")
        segmentation = scene.AddNewNodeByClass("vtkMRMLSegmentationNode", name)
        slicer.vtkSlicerSegmentationsModuleLogic.ImportLabelmapToSegmentationNode(labels, segmentation)
        scene.RemoveNode(labels)
    linear("Manual", turned(2, (1, 0, 0)))
    result = scene.AddNewNodeByClass("vtkMRMLTransformNode", "Result")
    scene.AddNewNodeByClass("vtkMRMLMarkupsFiducialNode", "F").AddControlPoint(vtk.vtkVector3d(1, 2, 3))
    names = {"slicer": slicer, "getNode": slicer.util.getNode}  # as Slicer's console has them
    for block in blocks:
        exec(compile(block, "slicer-console.md", "exec"), names, names)
    assert names["outputs"].report["similarity"]["after"] > 0.5
    assert names["made"]["warped"].GetNumberOfDataNodes() == 2
    assert result.GetNodeReference(result.GetFixedNodeReferenceRole()) is fixed
    assert "MRI after 0." in capsys.readouterr().out
