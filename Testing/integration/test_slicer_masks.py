"""Masks and the initial transform: where they lie, and that they are the library's."""

from __future__ import annotations

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
    field_image,
    image_of,
    linear,
    local,
    result_of,
    turned,
)

slicer = pytest.importorskip("slicer", reason="needs slicer-core (make test installs it)")


def test_masks_as_labelmap_and_as_segmentation_are_the_librarys(logic, scene):
    fixed, moving = blobs()
    inside = [(slicer.util.arrayFromVolume(node) > 100).astype(np.uint8) for node in (fixed, moving)]
    labels = [
        add_volume(f"labels {n}", mask * 7, local(node), "LabelMap")
        for n, (mask, node) in enumerate(zip(inside, (fixed, moving), strict=True))
    ]
    segmentation = scene.AddNewNodeByClass("vtkMRMLSegmentationNode", "segmentation")
    slicer.vtkSlicerSegmentationsModuleLogic.ImportLabelmapToSegmentationNode(labels[0], segmentation)
    images = [image_of(node) for node in (fixed, moving)]
    masks = [image_of(node) > 0 for node in labels]
    expected = LDRCore.register(*images, cascades=1, fixed_mask=masks[0], moving_mask=masks[1])
    for fixed_mask in (labels[0], segmentation):
        outputs = logic.register(
            fixed, moving, 1, fixedMask=fixed_mask, movingMask=labels[1], refine="none", jacobian=False
        )
        theirs = sitk.GetArrayFromImage(expected.warped).astype(float)
        assert_same_volume(array(outputs.warped), theirs)
        assert outputs.report["masks"] == {"fixed": True, "moving": True}


def test_a_segmentation_of_another_grid_under_a_parent_becomes_a_mask_on_the_volumes_grid(scene):
    from LightweightRegistrationLib import volume_nodes

    fixed, _ = blobs()
    fixed.SetAndObserveTransformNodeID(linear("P", turned(20, (5, 6, 7))).GetID())
    image = volume_nodes.read_volume(fixed, "fixed volume")
    centre = (image.to_world @ [14, 13, 12, 1])[:3]
    fine = np.eye(4)
    fine[:3, 3] = centre - 10
    cube = add_volume("cube", np.ones((21, 21, 21), np.uint8), fine, "LabelMap")  # 21 mm about the centre, world axes
    segmentation = scene.AddNewNodeByClass("vtkMRMLSegmentationNode", "cube")
    slicer.vtkSlicerSegmentationsModuleLogic.ImportLabelmapToSegmentationNode(cube, segmentation)
    mask = result_of(volume_nodes.mask(segmentation, fixed, image, "fixed mask"))
    k, j, i = np.nonzero(mask)
    world = (np.stack([i, j, k, np.ones_like(i)], 1) @ image.to_world.T)[:, :3]
    assert np.abs(world - centre).max() <= 10.5 + 1e-3
    assert mask.sum() == pytest.approx(21**3 / 27, rel=0.1)


@pytest.mark.parametrize("volume_parent", [None, turned(-15, (4, 9, -6), axis=0)], ids=["none", "another"])
def test_a_mask_segmentation_lies_where_its_own_parent_puts_it(scene, volume_parent):
    """A cube of 21 mm under a parent of its own; the volume has none, or a different one."""
    from LightweightRegistrationLib import volume_nodes

    fixed, _ = blobs()
    if volume_parent is not None:
        fixed.SetAndObserveTransformNodeID(linear("P", volume_parent).GetID())
    world_from_cube = turned(20, (6, -5, 8))
    image = volume_nodes.read_volume(fixed, "fixed volume")
    world = np.moveaxis(np.indices(image.values.shape)[::-1], 0, -1) @ image.to_world[:3, :3].T
    world += image.to_world[:3, 3]
    cube_from_world = np.linalg.inv(world_from_cube)
    points = world @ cube_from_world[:3, :3].T + cube_from_world[:3, 3]  # of voxels, in the segmentation's own frame
    centre = points[12, 13, 14]
    to_local = np.eye(4)
    to_local[:3, 3] = centre - 10
    cube = add_volume("cube", np.ones((21, 21, 21), np.uint8), to_local, "LabelMap")
    segmentation = scene.AddNewNodeByClass("vtkMRMLSegmentationNode", "cube")
    slicer.vtkSlicerSegmentationsModuleLogic.ImportLabelmapToSegmentationNode(cube, segmentation)
    segmentation.SetAndObserveTransformNodeID(linear("Q", world_from_cube).GetID())
    mask = result_of(volume_nodes.mask(segmentation, fixed, image, "fixed mask")).astype(bool)
    distance = np.abs(points - centre).max(-1)  # the faces lie at 10.5 mm
    assert mask[distance < 10].all()
    assert not mask[distance > 11].any()
    assert mask.sum() == pytest.approx(21**3 / 27, rel=0.1)


def cube_segmentation(scene, fixed, half_mm=10.0):
    """A cube about the middle of the volume, as a segmentation with a binary labelmap."""
    from LightweightRegistrationLib import volume_nodes

    image = volume_nodes.read_volume(fixed, "fixed volume")
    to_local = np.eye(4)
    to_local[:3, 3] = (image.to_world @ [14, 13, 12, 1])[:3] - half_mm
    size = round(2 * half_mm) + 1
    cube = add_volume("cube", np.ones((size, size, size), np.uint8), to_local, "LabelMap")
    segmentation = scene.AddNewNodeByClass("vtkMRMLSegmentationNode", "cube")
    slicer.vtkSlicerSegmentationsModuleLogic.ImportLabelmapToSegmentationNode(cube, segmentation)
    return segmentation, image


def test_a_segmentation_of_closed_surfaces_alone_is_a_mask(scene):
    from LightweightRegistrationLib import volume_nodes

    fixed, _ = blobs()
    segmentation, image = cube_segmentation(scene, fixed)
    expected = result_of(volume_nodes.mask(segmentation, fixed, image, "fixed mask"))
    segmentation.CreateClosedSurfaceRepresentation()
    segmentation.GetSegmentation().SetSourceRepresentationName("Closed surface")
    segmentation.GetSegmentation().RemoveRepresentation("Binary labelmap")
    mask = result_of(volume_nodes.mask(segmentation, fixed, image, "fixed mask"))
    assert (mask != expected).mean() < 0.01  # the surface is smoothed
    assert mask.sum() == pytest.approx(expected.sum(), rel=0.15)
    assert not segmentation.GetSegmentation().ContainsRepresentation("Binary labelmap")  # the node is as it was


@pytest.mark.parametrize("surfaces", [False, True])
def test_a_segmentation_under_a_non_linear_transform_is_a_mask_where_it_is_seen(scene, surfaces):
    from LightweightRegistrationLib import transform_nodes, volume_nodes

    fixed, _ = blobs()
    segmentation, image = cube_segmentation(scene, fixed)
    expected = result_of(volume_nodes.mask(segmentation, fixed, image, "fixed mask"))
    if surfaces:
        segmentation.CreateClosedSurfaceRepresentation()
        segmentation.GetSegmentation().SetSourceRepresentationName("Closed surface")
        segmentation.GetSegmentation().RemoveRepresentation("Binary labelmap")
    bent = scene.AddNewNodeByClass("vtkMRMLTransformNode", "bent")
    step = image.to_world[:3, 0] * 4  # the whole grid moves by four voxels along the volume's first axis
    wide = np.diag([40.0, 40.0, 40.0, 1.0])
    wide[:3, 3] = -200
    vectors = np.broadcast_to(-step * [-1, -1, 1], (11, 11, 11, 3))  # from parent, LPS
    transform_nodes.write_field(bent, transform_nodes.Field(vectors.copy(), wide))
    segmentation.SetAndObserveTransformNodeID(bent.GetID())
    mask = result_of(volume_nodes.mask(segmentation, fixed, image, "fixed mask"))
    moved_mask = np.roll(expected, 4, axis=2)
    assert (mask != moved_mask).sum() < 0.3 * expected.sum()
    assert (mask != expected).sum() > 0.6 * expected.sum()
    assert segmentation.GetParentTransformNode() is bent


def test_a_roi_is_a_mask_where_its_box_is(scene):
    """A turned box under a parent: its corners lie inside by hand, points a voxel further out do not."""
    from LightweightRegistrationLib import volume_nodes

    fixed, _ = blobs()
    image = volume_nodes.read_volume(fixed, "fixed volume")
    roi = scene.AddNewNodeByClass("vtkMRMLMarkupsROINode", "box")
    roi.SetSize(30, 24, 18)
    world_from_roi = turned(20, (5, -4, 3))
    roi.SetAndObserveTransformNodeID(linear("P", world_from_roi).GetID())
    mask = result_of(volume_nodes.mask(roi, fixed, image, "fixed mask")).astype(bool)
    index = np.moveaxis(np.indices(mask.shape)[::-1], 0, -1)
    world = index @ image.to_world[:3, :3].T + image.to_world[:3, 3]
    inverse = np.linalg.inv(world_from_roi)
    inside = (np.abs(world @ inverse[:3, :3].T + inverse[:3, 3]) <= [15, 12, 9]).all(-1)
    assert inside.sum() > 400
    assert np.array_equal(mask, inside)


@pytest.mark.parametrize("kind", ["linear", "grid"])
def test_an_initial_transform_is_where_it_starts(logic, scene, kind):
    fixed, moving = blobs()
    far = local(moving).copy()
    far[:3, 3] += [300.0, -100.0, 50.0]
    from LightweightRegistrationLib import transform_nodes, volume_nodes

    moving.SetIJKToRASMatrix(volume_nodes.matrix_of(far))
    back = np.eye(4)
    back[:3, 3] = [-300.0, 100.0, -50.0]
    initial = linear("initial", back)
    given = sitk.TranslationTransform(3, (-300.0, 100.0, 50.0))  # fixed -> moving, LPS
    if kind == "grid":
        to_lps = LPS @ volume_nodes.read_volume(fixed, "fixed volume").to_world
        field = transform_nodes.Field(np.broadcast_to([-300.0, 100.0, 50.0], (24, 26, 28, 3)), to_lps)
        initial = scene.AddNewNodeByClass("vtkMRMLTransformNode", "initial grid")
        transform_nodes.write_field(initial, field)
        given = sitk.DisplacementFieldTransform(sitk.Cast(field_image(initial), sitk.sitkVectorFloat64))
    outputs = logic.register(
        fixed, moving, 1, initialTransform=initial, prealignment="none", refine="none", jacobian=False
    )
    expected = LDRCore.register(image_of(fixed), image_of(moving), cascades=1, initial=given, affine=False)
    theirs = sitk.GetArrayFromImage(expected.warped).astype(float)
    assert theirs.max() > 200
    off = np.abs(array(outputs.warped) - theirs)
    assert (off > 1e-3 * np.ptp(theirs)).mean() < 1e-3
    assert outputs.report["initial"] == "transform"
