"""The module's logic on the real MRML scene of slicer-core, against LDRCore and SimpleITK."""

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
    image_of,
    linear,
    local,
    moved,
    turned,
)

slicer = pytest.importorskip("slicer", reason="needs slicer-core (make test installs it)")
import vtk

from Testing.standin import application


def resliced(node, source_transform, reference) -> np.ndarray:
    """A volume sampled linearly on the reference's grid the way Slicer reslices: through the nodes' transforms."""
    from LightweightRegistrationLib import volume_nodes

    to_reference = vtk.vtkGeneralTransform()
    slicer.vtkMRMLTransformNode.GetTransformBetweenNodes(
        reference.GetParentTransformNode(), source_transform, to_reference
    )
    whole = vtk.vtkGeneralTransform()
    whole.PostMultiply()
    whole.Concatenate(volume_nodes.matrix_of(volume_nodes.voxel_to_local(reference)))
    whole.Concatenate(to_reference)
    whole.Concatenate(volume_nodes.matrix_of(np.linalg.inv(volume_nodes.voxel_to_local(node))))
    reslice = vtk.vtkImageReslice()
    reslice.SetInputData(node.GetImageData())
    reslice.SetResliceTransform(whole)
    reslice.SetInterpolationModeToLinear()
    reslice.SetOutputSpacing(1, 1, 1)
    reslice.SetOutputOrigin(0, 0, 0)
    reslice.SetOutputExtent(reference.GetImageData().GetExtent())
    reslice.Update()
    out = reslice.GetOutput()
    return vtk.util.numpy_support.vtk_to_numpy(out.GetPointData().GetScalars()).reshape(out.GetDimensions()[::-1])


# the same as the library


def test_the_result_is_the_librarys(logic, pair):
    told = []
    expected = LDRCore.register(image_of(pair["fixed"]), image_of(pair["moving"]), cascades=1, refine="fast")
    outputs = logic.register(pair["fixed"], pair["moving"], 1, progress=lambda fraction, message: told.append(message))
    assert_same_volume(array(outputs.warped), sitk.GetArrayFromImage(expected.warped))
    theirs = sitk.GetArrayFromImage(expected.jacobian_determinant)
    assert np.abs(array(outputs.jacobian) - theirs).max() < 1e-3
    for node in (outputs.warped, outputs.jacobian):
        assert node.GetImageData().GetDimensions() == pair["fixed"].GetImageData().GetDimensions()
        assert np.allclose(LPS @ local(node), LPS @ local(pair["fixed"]))
    assert outputs.inverse is None
    assert outputs.report["similarity"] == pytest.approx(expected.report["similarity"], abs=1e-3)
    assert "affine alignment" in told


@pytest.mark.parametrize(
    ("options", "iterations"), [({"refine": "none"}, []), ({}, [10, 10]), ({"refinementSteps": 2}, [2, 2])]
)
def test_refinement_is_the_one_asked_for(logic, scene, options, iterations):
    report = logic.register(*blobs(), 1, similarity="mind", jacobian=False, **options).report
    assert (report["refine"], report["similarity_refined"]) == (options.get("refine", "fast"), "mind")
    levels = [level["iterations"] for level in report.get("refinement", [])]
    assert len(levels) == len(iterations)
    assert all(0 < n <= most for n, most in zip(levels, iterations, strict=True))  # fewer where it stalls


def test_names_roles_and_the_report_say_what_was_done(logic, scene):
    from LightweightRegistrationLib import outputs as made

    fixed, moving = blobs()
    outputs = logic.register(fixed, moving, 1, inverse=True)
    assert outputs.warped.GetName() == "blob 1 warped to blob 0"
    assert outputs.transform.GetName() == "blob 1 to blob 0"
    assert outputs.transform.GetClassName() == "vtkMRMLTransformNode"
    for transform, ends in ((outputs.transform, (fixed, moving)), (outputs.inverse, (moving, fixed))):
        assert transform.GetNodeReference(transform.GetFixedNodeReferenceRole()) is ends[0]
        assert transform.GetNodeReference(transform.GetMovingNodeReferenceRole()) is ends[1]
    assert made.read_report(None, outputs.warped)["cascades"] == 1
    again = logic.register(fixed, moving, 1, jacobian=False)
    assert again.warped is not outputs.warped
    assert again.warped.GetName() != outputs.warped.GetName()
    assert again.jacobian is None


def test_given_nodes_are_filled(logic, scene):
    fixed, moving = blobs()
    warped = scene.AddNewNodeByClass("vtkMRMLScalarVolumeNode", "mine")
    transform = scene.AddNewNodeByClass("vtkMRMLTransformNode", "my transform")
    count = scene.GetNumberOfNodesByClass("vtkMRMLScalarVolumeNode")
    outputs = logic.register(fixed, moving, 1, warped=warped, transform=transform, jacobian=False)
    assert outputs.warped is warped
    assert outputs.transform is transform
    assert array(warped).max() > 0
    assert scene.GetNumberOfNodesByClass("vtkMRMLScalarVolumeNode") == count


# the transform node


def test_the_moving_volume_under_the_transform_is_the_warped_volume(logic, pair):
    outputs = logic.register(pair["fixed"], pair["moving"], 1, jacobian=False)
    pair["moving"].SetAndObserveTransformNodeID(outputs.transform.GetID())
    shown = resliced(pair["moving"], outputs.transform, pair["fixed"]).astype(float)
    off = np.abs(shown - array(outputs.warped))
    span = np.ptp(array(outputs.warped))
    # at the edge of the moving volume SimpleITK keeps half a voxel more than VTK does
    assert (off > 1 + 1e-3 * span).mean() < 1e-3
    assert np.percentile(off, 99) <= 1 + 1e-3 * span  # both round to whole numbers


def test_the_hardened_volume_is_the_transformed_one(logic, pair):
    outputs = logic.register(pair["fixed"], pair["moving"], 1, jacobian=False)
    moving = image_of(pair["moving"])
    transform = sitk.DisplacementFieldTransform(sitk.Cast(_field_image(outputs.transform), sitk.sitkVectorFloat64))
    pair["moving"].SetAndObserveTransformNodeID(outputs.transform.GetID())
    pair["moving"].HardenTransform()
    assert pair["moving"].GetParentTransformNode() is None
    hardened = image_of(pair["moving"])
    reference = _field_image(outputs.transform)
    ones = sitk.Image(reference.GetSize(), sitk.sitkUInt8) + 1
    ones.CopyInformation(reference)
    inside = sitk.GetArrayFromImage(sitk.Resample(ones, hardened)) > 0
    theirs = sitk.GetArrayFromImage(sitk.Resample(moving, hardened, transform, sitk.sitkLinear, 0.0)).astype(float)
    off = np.abs(sitk.GetArrayFromImage(hardened) - theirs)[inside]
    span = np.ptp(theirs)
    assert inside.mean() > 0.3
    assert (off > 1 + 1e-3 * span).mean() < 2e-3
    # and it looks like the warped volume, up to being sampled twice
    twice = sitk.GetArrayFromImage(sitk.Resample(hardened, image_of(pair["fixed"]), sitk.Transform(), sitk.sitkLinear))
    assert np.corrcoef(twice.ravel(), array(outputs.warped).ravel())[0, 1] > 0.99


def _field_image(node) -> sitk.Image:
    """The grid that a transform node holds, read through VTK, as a SimpleITK image."""
    from LightweightRegistrationLib import transform_nodes

    field = transform_nodes.read_displacement_grid(node)
    spacing = np.linalg.norm(field.to_lps[:3, :3], axis=0)
    image = sitk.GetImageFromArray(field.vectors.astype(np.float32), isVector=True)
    image.SetSpacing(spacing.tolist())
    image.SetDirection((field.to_lps[:3, :3] / spacing).ravel().tolist())
    image.SetOrigin(field.to_lps[:3, 3].tolist())
    return image


@pytest.mark.parametrize("suffix", [".h5", ".nrrd", ".tfm"])
def test_the_transform_file_is_the_same_for_simpleitk_and_for_slicer(logic, scene, tmp_path, suffix):
    fixed, moving = blobs()
    outputs = logic.register(fixed, moving, 1, warped=False, jacobian=False)
    storage = slicer.vtkMRMLTransformStorageNode()
    storage.SetFileName(str(tmp_path / f"t{suffix}"))
    assert storage.WriteData(outputs.transform)
    if suffix == ".nrrd":
        field = sitk.ReadImage(str(tmp_path / "t.nrrd"), sitk.sitkVectorFloat64)
        read = sitk.DisplacementFieldTransform(field)
    else:
        read = sitk.ReadTransform(str(tmp_path / f"t{suffix}"))
    loaded = scene.AddNewNodeByClass("vtkMRMLTransformNode", "loaded")
    assert storage.ReadData(loaded)
    from LightweightRegistrationLib import volume_nodes

    image = volume_nodes.read_volume(fixed, "fixed volume")
    for voxel in ((3, 4, 5), (14, 13, 12), (20, 8, 16)):
        world = image.to_world @ [*voxel, 1]
        lps = (LPS @ world)[:3]
        through = moved(outputs.transform, world[:3])
        assert np.linalg.norm(np.subtract(through, world[:3])) > 0.5
        assert LPS[:3, :3] @ read.TransformPoint(lps.tolist()) == pytest.approx(through, abs=1e-3)
        assert moved(loaded, world[:3]) == pytest.approx(through, abs=1e-3)


def test_a_saved_scene_brings_everything_back(logic, scene, tmp_path):
    fixed, moving = blobs()
    parameters = logic.getParameterNode()
    parameters.fixedVolume, parameters.movingVolume, parameters.cascades = fixed, moving, 2
    outputs = logic.register(fixed, moving, 1, model="brain-t1", refine="none")  # the smoother field of the two
    parameters.transform = outputs.transform
    warped, report = array(outputs.warped), outputs.report["similarity"]["after"]
    world = (13.0, 5.0, -3.0)
    before = moved(outputs.transform, world)
    bundle = tmp_path / "scene.mrb"
    assert scene.WriteToMRB(str(bundle))
    application.clear()
    assert scene.ReadFromMRB(str(bundle))
    again = logic.getParameterNode()
    assert (again.fixedVolume.GetName(), again.movingVolume.GetName(), again.cascades) == ("blob 0", "blob 1", 2)
    transform = again.transform
    assert moved(transform, world) == pytest.approx(before, abs=0.05)  # Slicer interpolates a loaded grid with cubics
    assert transform.GetNodeReference(transform.GetFixedNodeReferenceRole()) is again.fixedVolume
    node = scene.GetFirstNodeByName("blob 1 warped to blob 0")
    assert np.array_equal(array(node), warped)
    from LightweightRegistrationLib import outputs as made

    assert made.read_report(transform)["similarity"]["after"] == report


def test_the_inverse_brings_points_back(logic, pair):
    outputs = logic.register(
        pair["fixed"], pair["moving"], 1, refine="none", warped=False, jacobian=False, inverse=True
    )
    from LightweightRegistrationLib import volume_nodes

    image = volume_nodes.read_volume(pair["fixed"], "fixed volume")
    inside = np.argwhere(image.values > 300)[::4000]
    errors = []
    for k, j, i in inside:
        world = (image.to_world @ [i, j, k, 1])[:3]
        back = moved(outputs.inverse, moved(outputs.transform, world))
        errors.append(np.linalg.norm(np.subtract(back, world)))
    assert len(errors) > 10
    assert np.median(errors) < 0.2
    assert max(errors) < 1.0


# parents


def test_parent_transforms_are_honoured(logic, pair):
    """Under parents, the result is that of volumes whose parents are hardened, and outputs follow the fixed parent."""
    plain = logic.register(pair["fixed"], pair["moving"], 1, refine="none", jacobian=False)
    reference = array(plain.warped)
    parent = linear("P", turned(25, (30, -20, 10)))
    other = linear("Q", turned(-15, (-12, 40, 7), axis=0))
    for node, move in ((pair["fixed"], parent), (pair["moving"], other)):
        node.SetAndObserveTransformNodeID(move.GetID())
    outputs = logic.register(pair["fixed"], pair["moving"], 1, refine="none", jacobian=True)
    assert outputs.warped.GetParentTransformNode() is parent
    assert outputs.jacobian.GetParentTransformNode() is parent
    assert outputs.transform.GetParentTransformNode() is None
    hardened = LDRCore.register(image_of(pair["fixed"]), image_of(pair["moving"]), cascades=1)
    theirs = sitk.GetArrayFromImage(hardened.warped).astype(float)
    assert_same_volume(array(outputs.warped), theirs)
    assert np.corrcoef(array(outputs.warped).ravel(), reference.ravel())[0, 1] > 0.97  # the same anatomy either way
    # in world coordinates: moving under (Q, then the registration) is the warped volume under P
    other.SetAndObserveTransformNodeID(outputs.transform.GetID())
    shown = resliced(pair["moving"], other, pair["fixed"]).astype(float)
    off = np.abs(shown - array(outputs.warped))
    assert np.percentile(off, 99) <= 1 + 1e-3 * np.ptp(theirs)


def test_a_sheared_parent_is_honoured(logic, scene):
    fixed, moving = blobs()
    shear = np.eye(4)
    shear[0, 1] = 0.2
    fixed.SetAndObserveTransformNodeID(linear("shear", shear).GetID())
    outputs = logic.register(fixed, moving, 1, jacobian=False)
    shown = resliced(moving, outputs.transform, fixed)  # no parent on moving: the transform alone
    assert np.percentile(np.abs(shown.astype(float) - array(outputs.warped)), 98) <= 2


# masks and initial transform


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
    mask = volume_nodes.mask(segmentation, fixed, image, "fixed mask")
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
    mask = volume_nodes.mask(segmentation, fixed, image, "fixed mask").astype(bool)
    distance = np.abs(points - centre).max(-1)  # the faces lie at 10.5 mm
    assert mask[distance < 10].all()
    assert not mask[distance > 11].any()
    assert mask.sum() == pytest.approx(21**3 / 27, rel=0.1)


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
        given = sitk.DisplacementFieldTransform(sitk.Cast(_field_image(initial), sitk.sitkVectorFloat64))
    outputs = logic.register(
        fixed, moving, 1, initialTransform=initial, prealignment="none", refine="none", jacobian=False
    )
    expected = LDRCore.register(image_of(fixed), image_of(moving), cascades=1, initial=given, affine=False)
    theirs = sitk.GetArrayFromImage(expected.warped).astype(float)
    assert theirs.max() > 200
    off = np.abs(array(outputs.warped) - theirs)
    assert (off > 1e-3 * np.ptp(theirs)).mean() < 1e-3
    assert outputs.report["initial"] == "transform"
