"""Rigid and affine alignment: linear transform nodes that equal the library's, and what the panel says of them."""

from __future__ import annotations

import re

import numpy as np
import pytest
import SimpleITK as sitk

import LDRCore
from LDRCore import geometry
from Testing.slicer_scene import LPS, array, assert_same_volume, blobs, image_of, moved
from Testing.slicer_window import choose, click, run

slicer = pytest.importorskip("slicer", reason="needs slicer-core (make test installs it)")
import vtk


def matrix_from_parent(node) -> np.ndarray:
    """4x4 in RAS mm."""
    matrix = vtk.vtkMatrix4x4()
    assert node.GetMatrixTransformFromParent(matrix)
    return np.array([[matrix.GetElement(r, c) for c in range(4)] for r in range(4)])


def resampled(moving, fixed, matrix: np.ndarray) -> np.ndarray:
    """By SimpleITK, fixed -> moving by a 4x4 in LPS mm, rounded."""
    source = sitk.Cast(image_of(moving), sitk.sitkFloat32)
    transform = geometry.affine_transform(matrix)
    return np.rint(sitk.GetArrayFromImage(sitk.Resample(source, image_of(fixed), transform, sitk.sitkLinear, 0.0)))


@pytest.mark.parametrize("kind", ["rigid", "affine"])
def test_the_transform_is_the_librarys_matrix(logic, scene, kind, tmp_path):
    fixed, moving = blobs()
    made = logic.register(fixed, moving, kind=kind, refine="best", refinementSteps=7, inverse=True)
    expected = LDRCore.register(image_of(fixed), image_of(moving), kind=kind)
    assert made.report["kind"] == kind
    assert made.transform.IsLinear()
    got = LPS @ matrix_from_parent(made.transform) @ LPS
    assert np.abs(got - geometry.linear_matrix(expected.transform)).max() < 0.02  # threads may differ
    if kind == "rigid":
        linear = got[:3, :3]
        assert np.abs(linear.T @ linear - np.eye(3)).max() < 1e-12
        assert np.linalg.det(linear) == pytest.approx(1.0, abs=1e-12)
        assert made.report["jacobian_determinant"] == {"min": 1.0, "max": 1.0}
    assert np.abs(matrix_from_parent(made.inverse) @ matrix_from_parent(made.transform) - np.eye(4)).max() < 1e-9
    determinant = np.linalg.det(got[:3, :3])
    assert np.abs(array(made.jacobian) - determinant).max() < 1e-5
    assert_same_volume(array(made.warped), resampled(moving, fixed, got))
    path = tmp_path / "transform.h5"
    storage = made.transform.CreateDefaultStorageNode()
    storage.SetFileName(str(path))
    assert storage.WriteData(made.transform)
    assert np.abs(geometry.linear_matrix(LDRCore.io.transforms.read_transform(str(path))) - got).max() < 1e-9


@pytest.mark.parametrize("direction", ["to fixed", "to moving"])
def test_points_and_volumes_are_brought_along_by_a_rigid_transform(logic, scene, direction):
    fixed, moving = blobs()
    transform = logic.register(fixed, moving, kind="rigid", warped=False, jacobian=False).transform
    points = scene.AddNewNodeByClass("vtkMRMLMarkupsFiducialNode", "points")
    points.AddControlPoint(vtk.vtkVector3d(4, 5, 6))
    brought = logic.bringAlong(points, transform, direction)
    there = np.array(brought.GetNthControlPointPosition(0))
    if direction == "to moving":
        assert there == pytest.approx(moved(transform, (4.0, 5.0, 6.0)), abs=1e-6)
    else:
        assert moved(transform, there) == pytest.approx((4.0, 5.0, 6.0), abs=1e-6)
    volumes = (moving, fixed) if direction == "to fixed" else (fixed, moving)
    volume = logic.bringAlong(volumes[0], transform, direction)
    matrix = LPS @ matrix_from_parent(transform) @ LPS
    expected = resampled(*volumes, matrix if direction == "to fixed" else np.linalg.inv(matrix))
    assert_same_volume(array(volume), expected)


def test_a_rigid_alignment_of_nothing_is_refused(logic, scene):
    from LightweightRegistrationLib.module_errors import InputError

    with pytest.raises(InputError, match="rigid registration must align something, got the pre-alignment 'none'"):
        logic.register(*blobs(), kind="rigid", prealignment="none")


def test_the_panel_runs_the_kind_that_is_chosen_and_says_what_it_is(chosen):
    ui, p = chosen.ui, chosen.p
    assert ui.kindComboBox.currentText == "Deformable"
    deforming = (ui.qualityComboBox, ui.cascadesSlider, ui.refinementSpinBox, ui.similarityComboBox)
    assert all(widget.isEnabled() for widget in deforming)
    choose(ui.kindComboBox, "Rigid: turn and shift")
    assert not any(widget.isEnabled() for widget in deforming)
    click(ui.applyButton)
    run(chosen)
    assert chosen.said == []
    assert p.transform.IsLinear()
    text = ui.resultsLabel.text
    assert re.search(r"<b>Transform</b></td><td[^>]*>rigid, 6 parameters: turned by \d+\.\d°, no volume change<", text)
    assert re.search(r"<b>Left over</b></td><td[^>]*>local similarity 0\.\d\d of 1; ", text)
    for word in ("Folding", "affine alone", "cascade"):
        assert word not in text
    choose(ui.kindComboBox, "Deformable")
    assert all(widget.isEnabled() for widget in deforming)
    click(ui.applyButton)
    run(chosen)
    assert not p.transform.IsLinear()  # the same node holds the deformable transform now
    assert "affine alone" in ui.resultsLabel.text


def test_every_frame_of_a_sequence_is_aligned_rigidly(logic, scene):
    from Testing.slicer_scene import frames

    fixed, sequence = frames(scene, 2)
    made = logic.registerSequence(fixed, sequence, kind="rigid")
    for n in range(2):
        assert made["transforms"].GetNthDataNode(n).IsLinear()
        assert made["reports"][n]["kind"] == "rigid"
