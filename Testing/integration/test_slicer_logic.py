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
    field_image,
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
    messages = []
    expected = LDRCore.register(image_of(pair["fixed"]), image_of(pair["moving"]), cascades=1, refine="fast")
    outputs = logic.register(
        pair["fixed"], pair["moving"], 1, progress=lambda fraction, message: messages.append(message)
    )
    assert_same_volume(array(outputs.warped), sitk.GetArrayFromImage(expected.warped))
    theirs = sitk.GetArrayFromImage(expected.jacobian_determinant)
    assert np.abs(array(outputs.jacobian) - theirs).max() < 1e-3
    for node in (outputs.warped, outputs.jacobian):
        assert node.GetImageData().GetDimensions() == pair["fixed"].GetImageData().GetDimensions()
        assert np.allclose(LPS @ local(node), LPS @ local(pair["fixed"]))
    assert outputs.inverse is None
    assert outputs.report["similarity"] == pytest.approx(expected.report["similarity"], abs=1e-3)
    assert "affine alignment" in messages


@pytest.mark.parametrize(
    ("options", "iterations"), [({"refine": "none"}, []), ({}, [10, 10]), ({"refinementSteps": 2}, [2, 2])]
)
def test_refinement_is_the_one_asked_for(logic, scene, options, iterations):
    report = logic.register(*blobs(), 1, similarity="mind", jacobian=False, **options).report
    assert report["refine"] == options.get("refine", "fast")
    assert report.get("similarity_chosen", {"name": "mind"})["name"] == "mind"
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
    transform = sitk.DisplacementFieldTransform(sitk.Cast(field_image(outputs.transform), sitk.sitkVectorFloat64))
    pair["moving"].SetAndObserveTransformNodeID(outputs.transform.GetID())
    pair["moving"].HardenTransform()
    assert pair["moving"].GetParentTransformNode() is None
    hardened = image_of(pair["moving"])
    reference = field_image(outputs.transform)
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


@pytest.mark.parametrize("output", ["transform", "inverse"])
def test_an_output_transform_is_taken_out_of_a_parent_where_it_would_be_wrong(logic, scene, output):
    fixed, moving = blobs()
    given = scene.AddNewNodeByClass("vtkMRMLTransformNode", "mine")
    parent = linear("P", turned(25, (30, -20, 10)))
    given.SetAndObserveTransformNodeID(parent.GetID())
    outputs = logic.register(fixed, moving, 1, jacobian=False, **{output: given})
    assert getattr(outputs, output).GetParentTransformNode() is None
    assert outputs.report["warnings"][-1] == f"'mine' was taken out of 'P': under it the {output} would be wrong"


@pytest.mark.parametrize("output", ["warped", "jacobian"])
def test_an_output_volume_is_put_where_the_fixed_volume_is(logic, scene, output):
    fixed, moving = blobs()
    given = add_volume("mine", np.ones((4, 4, 4), np.int16))
    given.SetAndObserveTransformNodeID(linear("P", turned(25, (30, -20, 10))).GetID())
    outputs = logic.register(fixed, moving, 1, **{output: given})
    assert getattr(outputs, output).GetParentTransformNode() is None


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


def test_without_a_number_every_network_of_the_model_runs_and_no_model_needs_none(logic, scene):
    from LightweightRegistrationLib.jobs import Settings

    from LDRCore.models import weights

    made = logic.register(*blobs(), model="none", refine=None, warped=False, jacobian=False)
    assert (made.report["cascades"], made.report["refine"]) == (0, "fast")
    for model, networks in (("any", 9), ("brain-t1-small", 3), ("none", 0)):
        card = weights.model_info(model)
        assert Settings(model).networks(card) == networks
        assert Settings(model, kind="rigid").networks(card) == 0
        assert Settings(model, refine=None).refines(card) == (model in ("any", "none"))
        assert not Settings(model, kind="rigid", refine=None).refines(card)
