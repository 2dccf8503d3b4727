"""The main thread is never busy for long: images are written, read and shown in steps, one or some a turn."""

from __future__ import annotations

import numpy as np
import pytest

from Testing.slicer_scene import add_volume, array, blobs, count_steps, frames, local, result_of, snapshot, wait_until
from Testing.slicer_window import choose, settle

slicer = pytest.importorskip("slicer", reason="needs slicer-core (make test installs it)")


@pytest.fixture
def one_step_a_turn(slicer_module, monkeypatch):
    """Every turn of the event loop does one step, and a step moves a thousand bytes or one row."""
    from LightweightRegistrationLib import background

    monkeypatch.setattr(background, "CHUNK_BYTES", 1000)
    monkeypatch.setattr(background, "TURN_S", 0.0)


def test_arrays_go_to_the_process_and_back_in_steps(logic, scene, one_step_a_turn, monkeypatch):
    from LightweightRegistrationLib import background

    fixed, moving = blobs()
    with monkeypatch.context() as at_once:
        at_once.undo()
        expected = logic.register(fixed, moving, 1, refine="none", inverse=True)
    steps = []
    take = background.take_turn

    def count(work):
        steps.append(work)
        return take(work)

    for module in ("background", "jobs"):
        monkeypatch.setattr(f"LightweightRegistrationLib.{module}.take_turn", count)
    made = logic.register(fixed, moving, 1, refine="none", inverse=True)
    rows = [24, 26, 24, 24]  # slices of the two volumes, and of the two maps; transforms come on top
    assert len(steps) > sum(rows)
    for name in ("warped", "jacobian"):
        assert np.array_equal(array(getattr(made, name)), array(getattr(expected, name)))
    for name in ("transform", "inverse"):
        points = [
            getattr(each, name).GetTransformFromParent().TransformPoint((5.0, 3.0, 2.0)) for each in (made, expected)
        ]
        assert points[0] == pytest.approx(points[1], abs=1e-5)


def test_cancelled_while_outputs_are_being_made_leaves_nothing(logic, scene, one_step_a_turn):
    fixed, moving = blobs()
    before = snapshot()
    job = logic.startRegistration(fixed, moving, 1)
    wait_until(lambda: job.poll() or len(snapshot()) > len(before), lambda: job.message)
    assert not job.finished
    job.cancel()
    assert job.outputs is None
    assert snapshot() == before


def test_an_output_has_its_window_before_its_voxels(logic, scene, monkeypatch):
    """Slicer otherwise computes an automatic one from all of them, for seconds, twice."""
    from LightweightRegistrationLib import outputs

    fixed, moving = blobs()
    fill, filled = outputs.fill_volume, []

    def fill_and_look(node, *arguments):
        filled.append(node.GetDisplayNode().GetAutoWindowLevel())
        return fill(node, *arguments)

    monkeypatch.setattr(outputs, "fill_volume", fill_and_look)
    made = logic.register(fixed, moving, 1)
    assert filled == [0, 0]
    display = made.warped.GetDisplayNode()
    assert (display.GetWindow(), display.GetLevel()) == (
        moving.GetDisplayNode().GetWindow(),
        moving.GetDisplayNode().GetLevel(),
    )


def test_the_checkerboard_is_drawn_in_steps(done, one_step_a_turn):
    choose(done.ui.overlayComboBox, "Checkerboard of fixed and warped")
    assert done.panel.display.busy
    wait_until(lambda: settle() or not done.panel.display.busy, lambda: "still drawing")
    assert array(done.panel.display.computed).max() > 100
    choose(done.ui.overlayComboBox, "Warped volume")
    choose(done.ui.overlayComboBox, "Checkerboard of fixed and warped")
    choose(done.ui.overlayComboBox, "Warped volume")  # in the middle of it
    settle()
    assert not done.panel.display.busy
    assert done.panel.display.computed is None


def test_other_colours_do_not_begin_the_drawing_anew(done, one_step_a_turn):
    display = done.panel.display
    choose(done.ui.overlayComboBox, "Jacobian map (colours)")
    node, drawing = display.computed, display._drawing
    assert display.busy
    done.ui.jacobianFactorSlider.value = 4
    assert display.computed is node
    assert display._drawing is drawing
    wait_until(lambda: settle() or not display.busy, lambda: "still drawing")
    assert np.isfinite(array(node)[12, 13, 14])
    assert node.GetDisplayNode().GetWindowLevelMax() == pytest.approx(4.0)


def test_the_folding_outline_is_computed_once_for_a_map(scene, slicer_module, monkeypatch):
    """Other display choices, such as the grid's spacing, show it again."""
    from LightweightRegistrationLib import overlays

    values = np.ones((20, 20, 20), np.float32)
    values[5:8, 6:9, 7:9] = -0.1
    jacobian = add_volume("map", values)
    fills = []
    outline = overlays._outline_folding
    monkeypatch.setattr(overlays, "_outline_folding", lambda *nodes: fills.append(nodes) or outline(*nodes))
    node = overlays.folding_contours(jacobian, True)
    bounds = [0.0] * 6
    node.GetRASBounds(bounds)
    assert bounds == [6.5, 8.5, 5.5, 8.5, 4.5, 7.5]  # x, y, z
    assert overlays.folding_contours(jacobian, False) is node
    assert not node.GetDisplayNode().GetVisibility()
    assert overlays.folding_contours(jacobian, True) is node
    assert node.GetDisplayNode().GetVisibility()
    assert len(fills) == 1
    slicer.util.arrayFromVolume(jacobian)[...] = 1
    slicer.util.arrayFromVolumeModified(jacobian)
    assert overlays.folding_contours(jacobian, True) is None
    assert len(fills) == 2


def test_a_mask_is_read_a_slab_at_a_time(scene, monkeypatch):
    from LightweightRegistrationLib import volume_nodes

    fixed, _moving = blobs()
    labels = add_volume("labels", (array(fixed) > 350).astype(np.uint8), local(fixed), "LabelMap")
    segmentation = scene.AddNewNodeByClass("vtkMRMLSegmentationNode", "segments")
    slicer.vtkSlicerSegmentationsModuleLogic.ImportLabelmapToSegmentationNode(labels, segmentation)
    image = volume_nodes.read_volume(fixed, "fixed volume")
    at_once, whole = count_steps(volume_nodes.mask(segmentation, fixed, image, "fixed mask"))
    assert at_once == 1
    assert np.array_equal(whole, array(labels))
    monkeypatch.setattr(volume_nodes, "MASK_VOXELS_A_STEP", 5 * 26 * 28)
    steps, by_slabs = count_steps(volume_nodes.mask(segmentation, fixed, image, "fixed mask"))
    assert steps == 5  # 24 slices
    assert np.array_equal(by_slabs, whole)


def test_a_transform_of_any_kind_is_read_some_points_at_a_time(scene, monkeypatch):
    import vtk
    from LightweightRegistrationLib import transform_nodes, volume_nodes

    fixed, _moving = blobs()
    image = volume_nodes.read_volume(fixed, "fixed volume")
    spline = vtk.vtkThinPlateSplineTransform()
    spline.SetBasisToR()
    source, target = vtk.vtkPoints(), vtk.vtkPoints()
    for n, point in enumerate(((-40, -40, -40), (40, -40, -40), (-40, 40, -40), (-40, -40, 40), (10, 10, 10))):
        source.InsertNextPoint(*point)
        target.InsertNextPoint(point[0] + n, point[1] - n, point[2] + 2)
    spline.SetSourceLandmarks(source)
    spline.SetTargetLandmarks(target)
    node = scene.AddNewNodeByClass("vtkMRMLTransformNode", "thin plate")
    node.SetAndObserveTransformFromParent(spline)
    monkeypatch.setattr(transform_nodes, "POINTS_A_STEP", 300)
    steps, field = count_steps(transform_nodes.read_transform(node, image))
    assert steps == 24 * 3  # 26 x 28 points a slice
    for k, j, i in ((0, 0, 0), (23, 25, 27), (7, 12, 20)):
        point = image.to_world[:3] @ (i, j, k, 1)
        there = spline.TransformPoint(point.tolist())
        assert field.vectors[k, j, i] == pytest.approx((there - point) * (-1, -1, 1), abs=1e-4)
    again = scene.AddNewNodeByClass("vtkMRMLTransformNode", "grid")
    transform_nodes.write_field(again, field)
    assert np.array_equal(result_of(transform_nodes.read_transform(again, image)).vectors, field.vectors)


def test_frames_of_a_sequence_hold_what_was_read_without_a_copy(logic, scene, monkeypatch):
    """A copy of a large field takes more than half a second, and as much memory as the field."""
    from LightweightRegistrationLib import jobs

    read: list = []
    make_image, make_grid = jobs.new_image, jobs.new_grid
    monkeypatch.setattr(jobs, "new_image", lambda *shape: read.append(make_image(*shape)) or read[-1])
    monkeypatch.setattr(jobs, "new_grid", lambda *grid: read.append(make_grid(*grid)) or read[-1])
    made = logic.registerSequence(*frames(scene, 2), 1, refine="none")
    held = []
    for n in range(2):
        held.append(made["warped"].GetNthDataNode(n).GetImageData())
        held.append(made["transforms"].GetNthDataNode(n).GetTransformFromParent())
    assert all(there is one for there, (one, _) in zip(held, read, strict=True))


def test_a_sequence_that_is_cancelled_while_it_is_being_made_leaves_nothing(logic, scene, one_step_a_turn):
    fixed, sequence = frames(scene, 1)
    before = snapshot()
    job = logic.startSequence(fixed, sequence, 1, refine="none")
    wait_until(lambda: job.poll() or len(snapshot()) > len(before) + 2, lambda: job.message)
    assert not job.finished  # both sequences and the volume that shows them are there
    job.cancel()
    assert snapshot() == before
