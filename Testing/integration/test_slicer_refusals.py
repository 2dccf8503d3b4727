"""What the module refuses, in one sentence each: the scene is as before."""

from __future__ import annotations

import numpy as np
import pytest

from Testing.slicer_scene import add_volume, array, blobs, linear, local, snapshot

slicer = pytest.importorskip("slicer", reason="needs slicer-core (make test installs it)")


def _vector(name):
    node = slicer.mrmlScene.AddNewNodeByClass("vtkMRMLVectorVolumeNode", name)
    slicer.util.updateVolumeFromArray(node, np.ones((5, 6, 7, 3), np.uint8))
    return node


def _under(name, node):
    node.SetAndObserveTransformNodeID(linear(name, np.eye(4)).GetID())
    return node


def _given(name):
    return {"transform": slicer.mrmlScene.GetFirstNodeByName(name)}


BAD = {
    "none": (lambda f, m: (None, m, {}), "a fixed volume must be chosen, got none"),
    "twice": (lambda f, m: (f, f, {}), "fixed and moving must be two different volumes, got 'blob 0' twice"),
    "vector": (
        lambda f, m: (f, _vector("colour"), {}),
        "the moving volume must hold one value a voxel, got 'colour' with 3 (colour, vectors or a 4D series): pick one "
        "component, or load a series as a sequence and use the section Sequence",
    ),
    "empty": (
        lambda f, m: (slicer.mrmlScene.AddNewNodeByClass("vtkMRMLScalarVolumeNode", "nothing"), m, {}),
        "the fixed volume must hold voxels, got 'nothing', which is empty",
    ),
    "constant": (
        lambda f, m: (f, add_volume("flat", np.full((8, 8, 8), 3, np.int16)), {}),
        "the moving volume must show something, got 'flat', where every voxel is 3",
    ),
    "thin": (
        lambda f, m: (f, add_volume("slice", np.arange(200.0).reshape(2, 10, 10)), {}),
        "the moving volume must have at least 4 voxels along every axis, got 'slice' with 10 x 10 x 2",
    ),
    "nan": (
        lambda f, m: (
            f,
            add_volume("holes", np.where(np.eye(8)[None] * np.ones((8, 1, 1)), np.nan, np.arange(8.0))),
            {},
        ),
        "moving image must hold only finite values, got 64 voxels that are NaN or infinite",
    ),
    "mask of another grid": (
        lambda f, m: (f, m, {"fixedMask": add_volume("small", np.ones((4, 4, 4), np.uint8), None, "LabelMap")}),
        "the fixed mask must lie on the grid of 'blob 0' (28 x 26 x 24 voxels), got 'small' (4 x 4 x 4 voxels): use a "
        "segmentation, which is resampled, or resample the labelmap",
    ),
    "empty mask": (
        lambda f, m: (
            f,
            m,
            {"movingMask": add_volume("void", np.zeros((26, 26, 28), np.uint8), local(m), "LabelMap")},
        ),
        "the moving mask must cover some of 'blob 1', got 'void', which is empty there",
    ),
    "mask without segments": (
        lambda f, m: (f, m, {"fixedMask": slicer.mrmlScene.AddNewNodeByClass("vtkMRMLSegmentationNode", "bare")}),
        "the fixed mask must hold a segment, got 'bare' without any",
    ),
    "no output": (
        lambda f, m: (f, m, {"warped": False, "transform": False, "jacobian": False}),
        "at least one output must be asked for, got none",
    ),
    "output is input": (
        lambda f, m: (f, m, {"warped": m}),
        "the output 'warped' must not be one of the inputs, got 'blob 1': choose another one, or New",
    ),
    "output is a mask's parent": (
        lambda f, m: (
            f,
            m,
            {
                "fixedMask": _under("P", add_volume("m", (array(f) > 0).astype(np.uint8), local(f), "LabelMap")),
                **_given("P"),
            },
        ),
        "the output 'transform' must not be one of the inputs, got 'P': choose another one, or New",
    ),
    "two outputs in one node": (
        lambda f, m: (f, m, dict.fromkeys(("warped", "jacobian"), add_volume("one", np.ones((4, 4, 4), np.uint8)))),
        "every output must be a node of its own, got 'one', 'one'",
    ),
    "cascades": (lambda f, m: (f, m, {"cascades": 99}), "cascades must be 0 to 9 for model brain-t1-gradient, got 99"),
    "refine": (
        lambda f, m: (f, m, {"refine": "magic"}),
        "refine must be one of ('none', 'fast', 'best'), got 'magic'",
    ),
    "negative steps": (
        lambda f, m: (f, m, {"refinementSteps": -1}),
        "refine_steps must be a whole number, 0 or more, got -1",
    ),
    "device": (
        lambda f, m: (f, m, {"device": "abacus"}),
        "device must be \"auto\" or one that torch can use here, got 'abacus'",
    ),
    "prealignment": (
        lambda f, m: (f, m, {"prealignment": "magic"}),
        "prealignment must be one of ('centre', 'affine', 'none'), got 'magic'",
    ),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input_is_refused_in_one_sentence_and_the_scene_is_unchanged(logic, scene, case):
    from LightweightRegistrationLib.module_errors import InputError

    fixed, moving = blobs()
    build, message = BAD[case]
    fixed, moving, options = build(fixed, moving)
    before = snapshot()
    with pytest.raises(InputError) as caught:
        logic.register(fixed, moving, **{"cascades": 1, **options})
    assert str(caught.value) == message
    assert snapshot() == before


def test_volumes_apart_are_refused_only_where_nothing_centres_them(logic, scene):
    from LightweightRegistrationLib import volume_nodes
    from LightweightRegistrationLib.module_errors import InputError

    fixed, moving = blobs()
    far = local(moving).copy()
    far[0, 3] += 400
    moving.SetIJKToRASMatrix(volume_nodes.matrix_of(far))
    before = snapshot()
    with pytest.raises(InputError, match=r"must overlap when they are not centred first, got a gap of 3\d\d mm"):
        logic.register(fixed, moving, 1, prealignment="affine")
    assert snapshot() == before
    assert array(logic.register(fixed, moving, 1, jacobian=False).warped).max() > 200


def test_a_volume_under_a_non_linear_transform_is_refused(logic, scene):
    from LightweightRegistrationLib import transform_nodes
    from LightweightRegistrationLib.module_errors import InputError

    fixed, moving = blobs()
    bent = scene.AddNewNodeByClass("vtkMRMLTransformNode", "bent")
    transform_nodes.write_field(bent, transform_nodes.Field(np.ones((4, 4, 4, 3)), np.eye(4)))
    fixed.SetAndObserveTransformNodeID(bent.GetID())
    before = snapshot()
    with pytest.raises(InputError, match="must not be under a non-linear transform, got 'blob 0' under 'bent'"):
        logic.register(fixed, moving, 1)
    assert snapshot() == before


def test_a_second_run_into_the_transform_that_the_moving_volume_is_under_starts_from_the_volume_itself(logic, scene):
    fixed, moving = blobs()
    first = logic.register(fixed, moving, 1, jacobian=False)
    once = array(first.warped)
    moving.SetAndObserveTransformNodeID(first.transform.GetID())
    second = logic.register(fixed, moving, 1, transform=first.transform, jacobian=False)
    assert np.array_equal(array(second.warped), once)
