"""Other nodes warped through a registration: volumes, labelmaps, segmentations, markups."""

from __future__ import annotations

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
    image_of,
    linear,
    local,
    moved,
    result_of,
    snapshot,
    turned,
)

slicer = pytest.importorskip("slicer", reason="needs slicer-core (make test installs it)")
import vtk


@pytest.fixture
def bent(scene):
    """A fixed and a moving volume and a smooth, invertible transform between them, made by hand: no registration."""
    from LightweightRegistrationLib import outputs, transform_nodes, volume_nodes

    fixed, moving = blobs()
    image = volume_nodes.read_volume(fixed, "fixed volume")
    k, j, i = np.meshgrid(*[np.arange(n) for n in image.values.shape], indexing="ij")
    points = np.stack([i, j, k, np.ones_like(i)], -1) @ image.to_world.T
    x, y, z = (points[..., n] for n in range(3))
    vectors = np.stack([4 + 2 * np.sin(y / 12), -3 + 2 * np.cos(z / 10), 1.5 * np.sin(x / 15)], -1)
    node = scene.AddNewNodeByClass("vtkMRMLTransformNode", "bent")
    transform_nodes.write_field(node, transform_nodes.Field(vectors, LPS @ image.to_world))
    outputs.record_roles(node, fixed, moving)
    return types.SimpleNamespace(fixed=fixed, moving=moving, transform=node)


def sitk_transform(node) -> sitk.Transform:
    from LightweightRegistrationLib import transform_nodes

    field = result_of(transform_nodes.read_displacement_grid(node))
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
    from LightweightRegistrationLib import volume_nodes

    matrix = vtk.vtkMatrix4x4()
    labels.GetImageToWorldMatrix(matrix)
    offset = np.rint(
        np.linalg.inv(local(volume)) @ volume_nodes.array_of(matrix) @ [*labels.GetExtent()[::2], 1]
    ).astype(int)
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
    from LightweightRegistrationLib.module_errors import InputError

    node = make(bent)
    before = snapshot()
    with pytest.raises(InputError, match=message):
        logic.bringAlong(node, bent.transform, direction)
    assert snapshot() == before


def test_a_transform_whose_volumes_are_gone_is_refused(logic, bent, scene):
    from LightweightRegistrationLib.module_errors import InputError

    scene.RemoveNode(bent.fixed)
    with pytest.raises(
        InputError, match="must know its fixed volume, got 'bent', whose fixed volume is not in the scene"
    ):
        logic.bringAlong(bent.moving, bent.transform)


MARKUPS = ("Fiducial", "Line", "Angle", "Curve", "ClosedCurve")
EXTENSIONS = {"Markups": ".mrk.json", "Model": ".vtk", "Segmentation": ".seg.nrrd", "Volume": ".nrrd"}


def make(scene, kind, bent):
    """A node of a kind, at the moving scan."""
    if kind in MARKUPS:
        node = scene.AddNewNodeByClass(f"vtkMRMLMarkups{kind}Node", "mine")
        for point in ((5, -8, 3), (-10, 12, -6), (4, 4, 9))[: 2 if kind == "Line" else 3]:
            node.AddControlPoint(vtk.vtkVector3d(*point))
    elif kind == "Model":
        sphere = vtk.vtkSphereSource()
        sphere.Update()
        node = scene.AddNewNodeByClass("vtkMRMLModelNode", "mine")
        node.SetAndObserveMesh(sphere.GetOutput())
    else:
        node = add_volume("mine", (array(bent.moving) > 250).astype(np.uint8), local(bent.moving), "LabelMap")
        if kind == "Volume":
            return node
        labels, node = node, scene.AddNewNodeByClass("vtkMRMLSegmentationNode", "mine")
        slicer.vtkSlicerSegmentationsModuleLogic.ImportLabelmapToSegmentationNode(labels, node)
    node.CreateDefaultDisplayNodes()
    return node


def save(node, folder) -> None:
    """What Slicer's Save does: into the file that the node has, or into one of its own name."""
    if node.GetStorageNode() is None:
        node.AddDefaultStorageNode()
        kind = next(kind for kind in EXTENSIONS if kind in node.GetClassName())
        node.GetStorageNode().SetFileName(str(folder / f"{node.GetName()}{EXTENSIONS[kind]}"))
    assert node.GetStorageNode().WriteData(node)


@pytest.mark.parametrize("kind", [*MARKUPS, "Model", "Segmentation", "Volume"])
def test_what_is_brought_along_has_a_file_and_a_display_of_its_own(logic, bent, scene, tmp_path, kind):
    node = make(scene, kind, bent)
    node.GetDisplayNode().SetVisibility(False)
    if node.IsA("vtkMRMLModelNode"):
        node.GetDisplayNode().SetColor(0.1, 0.2, 0.3)
    node.SetAndObserveTransformNodeID(linear("P", turned(30, (7, -5, 2))).GetID())
    save(node, tmp_path)
    (file,) = tmp_path.iterdir()
    before = file.read_bytes()
    new = logic.bringAlong(node, bent.transform)
    for each in (node, new):
        save(each, tmp_path)
    assert len(list(tmp_path.iterdir())) == 2
    for theirs in ("GetStorageNode", "GetDisplayNode"):
        assert getattr(new, theirs)() is not getattr(node, theirs)()
    again = scene.AddNewNodeByClass(node.GetClassName(), "again")
    again.AddDefaultStorageNode()
    again.GetStorageNode().SetFileName(str(file))
    assert again.GetStorageNode().ReadData(again)
    bounds = [np.zeros(6) for _ in range(3)]
    for each, values in zip((node, again, new), bounds, strict=True):
        each.GetBounds(values)
    assert bounds[1] == pytest.approx(bounds[0], abs=1e-3)  # the original, read again
    assert np.abs(bounds[2] - bounds[0]).max() > 1
    if kind in (*MARKUPS, "Model"):
        assert not new.GetDisplayNode().GetVisibility()  # it looks as the original does
        if kind != "Model":
            assert new.GetNumberOfControlPoints() == node.GetNumberOfControlPoints()
            return
        assert new.GetDisplayNode().GetColor() == (0.1, 0.2, 0.3)
    assert file.read_bytes() == before or kind == "Segmentation"  # whose file holds random identifiers
