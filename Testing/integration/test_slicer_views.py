"""What a user sees in the slice views, rendered off screen with Slicer's own displayable managers."""

from __future__ import annotations

import numpy as np
import pytest

from Testing.slicer_scene import LPS, add_volume, array, local

slicer = pytest.importorskip("slicer", reason="needs slicer-core (make test installs it)")

from Testing.standin import sliceview

pytestmark = pytest.mark.skipif(
    bool(sliceview.can_render()), reason=f"{sliceview.can_render()} (README, 'In 3D Slicer', names the packages)"
)
GRID, FOLDING = (255, 217, 51), (255, 0, 255)


@pytest.fixture
def view(scene):
    """The axial view, 300 x 300."""
    sliceview.add_views()
    made = sliceview.SliceView("Red", 300, 300)
    yield made
    made.close()


@pytest.fixture
def shifted(scene):
    """Two discs of which the second lies 12 mm to the right, and the transform that brings it back, made by hand."""
    from LightweightRegistrationLib import outputs, transform_nodes

    _, j, i = np.meshgrid(*[np.arange(n) for n in (12, 60, 60)], indexing="ij")
    to_local = np.diag([2.0, 2.0, 4.0, 1.0])
    to_local[:3, 3] = (-59, -59, -22)
    fixed, moving = (
        add_volume(name, ((i - at) ** 2 + (j - 30) ** 2 < 15**2).astype(np.float32) * (100 + 2 * j), to_local)
        for name, at in (("fixed", 30), ("moving", 36))
    )
    for node in (fixed, moving):
        node.GetDisplayNode().SetAutoWindowLevel(False)
        node.GetDisplayNode().SetWindowLevelMinMax(0, 250)
    # the second disc lies at greater x in RAS, which is smaller x in LPS
    field = transform_nodes.Field(np.broadcast_to([-12.0, 0.0, 0.0], (12, 60, 60, 3)), LPS @ local(fixed))
    transform = scene.AddNewNodeByClass("vtkMRMLTransformNode", "back")
    transform_nodes.write_field(transform, field)
    outputs.record_roles(transform, fixed, moving)
    return fixed, moving, transform, field


def count(picture: np.ndarray, colour: tuple[int, int, int], reach: int = 30) -> int:
    return int((np.abs(picture.astype(int) - colour).max(-1) < reach).sum())


def difference(a: np.ndarray, b: np.ndarray) -> float:
    return float(np.abs(a.astype(int) - b).mean())


def test_fading_goes_from_the_fixed_to_the_other_volume(view, shifted):
    from LightweightRegistrationLib import slice_display

    fixed, moving, _transform, _field = shifted
    slice_display.show_layers(fixed, moving, 0.0)
    only_fixed = view.picture()
    assert only_fixed.max() > 150
    assert np.ptp(only_fixed, axis=-1).max() == 0  # grey
    slice_display.set_opacity(1.0)
    only_moving = view.picture()
    slice_display.set_opacity(0.5)
    both = view.picture()
    assert difference(only_fixed, only_moving) > 5
    assert difference(both, (only_fixed.astype(int) + only_moving) // 2) < 2
    # +x in RAS is left in the picture: the second disc is further left
    columns = [np.nonzero(p[..., 0].max(0) > 50)[0].mean() for p in (only_fixed, only_moving)]
    assert columns[1] < columns[0] - 10


def test_a_view_that_shows_the_fixed_volume_stays_where_the_user_is_looking(view, shifted):
    from LightweightRegistrationLib import slice_display

    fixed, moving, _transform, _field = shifted
    slice_display.show_layers(fixed, moving, 0.5)
    view.logic.SetSliceOffset(6.0)
    offset, width = view.logic.GetSliceOffset(), view.node.GetFieldOfView()[0]
    view.node.SetFieldOfView(width / 2, width / 2, 4)
    slice_display.show_layers(fixed, None, 0.5)
    assert view.logic.GetSliceOffset() == offset
    assert view.node.GetFieldOfView()[0] == pytest.approx(width / 2)
    slice_display.show_layers(moving, None, 0.5)
    assert view.node.GetFieldOfView()[0] == pytest.approx(width)


def test_the_early_view_shows_the_moving_volume_where_the_transform_puts_it(view, shifted):
    from LightweightRegistrationLib import slice_display

    fixed, moving, _transform, field = shifted
    slice_display.show_layers(fixed, moving, 0.0)
    target = view.picture()
    slice_display.set_opacity(1.0)
    before = view.picture()
    early = slice_display.EarlyView(fixed, moving, field, 1.0)
    shown = view.picture()
    assert difference(before, target) > 5
    assert difference(shown, target) < 0.5
    early.remove()
    assert difference(view.picture(), before) == 0
    early.remove()  # twice does no harm
    assert moving.GetParentTransformNode() is None


def test_the_grid_is_drawn_bent_and_goes_away(view, shifted, scene):
    from LightweightRegistrationLib import slice_display, transform_nodes

    fixed, _moving, transform, field = shifted
    slice_display.show_layers(fixed, None, 0.0)
    assert count(view.picture(), GRID) == 0
    slice_display.show_grid(transform, fixed, True, 20.0)
    wide = count(view.picture(), GRID)
    assert wide > 500
    slice_display.show_grid(transform, fixed, True, 10.0)
    straight = view.picture()
    assert count(straight, GRID) > 1.5 * wide
    x = np.arange(60) * 2.0 - 59
    vectors = field.vectors.copy()
    vectors[..., 1] += 6 * np.sin(x / 9)[None, None, :]
    transform_nodes.write_field(transform, transform_nodes.Field(vectors, field.to_lps))
    bent = view.picture()
    assert count(bent, GRID) > 500
    rows = [(np.abs(p.astype(int) - GRID).max(-1) < 30).sum(1).max() for p in (straight, bent)]
    assert rows[1] < 0.7 * rows[0]  # the straight grid has rows full of yellow, the bent one has not
    slice_display.show_grid(transform, fixed, False, 10.0)
    assert count(view.picture(), GRID) == 0


def test_the_jacobian_is_blue_where_it_shrinks_and_red_where_it_grows_with_a_legend(view, shifted):
    from LightweightRegistrationLib import slice_display

    fixed, _moving, _transform, _field = shifted
    values = np.ones((12, 60, 60), np.float32)
    values[:, :, 40:], values[:, :, :20] = 0.5, 2.0  # greater x is left in the picture
    jacobian = add_volume("Jacobian", values, local(fixed))
    slice_display.color_jacobian(jacobian, 2.0)
    slice_display.show_layers(fixed, jacobian, 1.0)
    plain = view.picture()
    middle = plain[150]
    assert middle[50][2] > middle[50][0] + 60
    assert middle[150].min() > 220
    assert middle[250][0] > middle[250][2] + 60
    slice_display.show_legend(jacobian, True)
    legend = view.picture()
    changed = np.nonzero(np.abs(legend.astype(int) - plain).max(-1) > 40)
    assert len(changed[0]) > 300
    assert np.median(changed[1]) > 200  # on the right
    slice_display.show_legend(jacobian, False)
    assert difference(view.picture(), plain) == 0
    slice_display.color_jacobian(jacobian, 4.0)  # a wider range is paler
    assert view.picture()[150][50].astype(int).sum() > middle[50].astype(int).sum()


def test_outside_the_content_the_jacobian_is_transparent_and_the_legend_is_in_one_view(view, scene):
    from LightweightRegistrationLib import outputs, overlays, slice_display

    k, j, i = np.ogrid[-1:1:40j, -1:1:40j, -1:1:40j]
    radius = np.sqrt(k * k + j * j + i * i)
    fixed = add_volume("ball", np.where((radius < 0.7) & (radius > 0.3), 100, 0).astype(np.int16))
    slicer.util.arrayFromVolume(fixed)[1, 1, 1] = 100  # noise
    jacobian = add_volume("Jacobian", np.full((40, 40, 40), 0.5, np.float32))
    shown = outputs.new_temporary_node("vtkMRMLScalarVolumeNode", "colours")
    for _ in overlays.jacobian_within_content(fixed, jacobian, shown):
        pass
    values = slicer.util.arrayFromVolume(shown)
    assert np.isnan(values[1, 1, 1])
    assert (np.isfinite(values) == (radius < 0.7)).mean() > 0.999  # the hole in the middle is content
    slice_display.color_jacobian(shown, 2.0)
    slice_display.show_layers(fixed, shown, 1.0)
    view.fit()
    picture = view.picture().astype(int)
    size = len(picture)
    assert picture[size // 2, size // 2, 2] > picture[size // 2, size // 2, 0] + 60  # blue over the hole
    assert picture[5, 5].max() < 10  # black as the fixed volume
    slice_display.show_legend(shown, True)
    assert difference(view.picture(), picture) > 0
    for other in ("Yellow", "Green"):
        another = sliceview.SliceView(other, size, size)
        another.fit()
        plain = another.picture().astype(int)
        slice_display.show_legend(shown, False)
        assert difference(another.picture(), plain) == 0
        slice_display.show_legend(shown, True)
        another.close()


def test_folding_is_outlined_where_it_is(view, shifted):
    from LightweightRegistrationLib import overlays, slice_display

    fixed, _moving, _transform, _field = shifted
    values = np.ones((12, 60, 60), np.float32)
    jacobian = add_volume("Jacobian", values, local(fixed))
    slice_display.show_layers(fixed, jacobian, 0.0)
    assert overlays.folding_contours(jacobian, True) is None
    assert count(view.picture(), FOLDING, 60) == 0
    slicer.util.arrayFromVolume(jacobian)[:, 10:20, 10:20] = -0.1
    node = overlays.folding_contours(jacobian, True)
    picture = view.picture()
    assert count(picture, FOLDING, 60) > 50
    rows, columns = np.nonzero(np.abs(picture.astype(int) - FOLDING).max(-1) < 60)
    assert columns.min() > 150  # voxel 10 to 20 lies at small x, right in the picture
    assert rows.min() > 150  # and at small y, below
    inside = picture[int(rows.mean()), int(columns.mean())]
    assert np.abs(inside.astype(int) - FOLDING).max() > 60  # an outline, not an area
    overlays.folding_contours(jacobian, False)
    assert count(view.picture(), FOLDING, 60) == 0
    assert not node.GetDisplayNode().GetVisibility()


def test_the_checkerboard_shows_both(view, shifted, scene):
    from LightweightRegistrationLib import outputs, overlays, slice_display

    fixed, _moving, _transform, _field = shifted
    bright = add_volume("bright", np.full((12, 60, 60), 240, np.float32) + np.eye(60, dtype=np.float32), local(fixed))
    dark = add_volume("dark", np.full((12, 60, 60), 10, np.float32) + np.eye(60, dtype=np.float32), local(fixed))
    for node in (bright, dark):
        node.GetDisplayNode().SetAutoWindowLevel(False)
        node.GetDisplayNode().SetWindowLevelMinMax(0, 255)
    board = outputs.new_temporary_node("vtkMRMLScalarVolumeNode", "board")
    for _ in overlays.checkerboard(bright, dark, board):
        pass
    slice_display.show_layers(bright, board, 1.0)
    picture = view.picture()[..., 0]
    assert 0.3 < (picture > 200).mean() < 0.7
    assert (picture < 40).mean() > 0.3
    cube = picture.shape[1] * 25 / view.node.GetFieldOfView()[0]
    runs = np.diff(np.nonzero(np.diff((picture[150] > 128).astype(int)))[0])
    assert np.median(runs) == pytest.approx(cube, abs=5)
    assert array(board).shape == (12, 60, 60)
