"""Both backends of sampling give what torch's sampler of volumes gives in double precision, wherever the points lie."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from sampling_cases import BACKENDS, TO_FIELD, exact, scattered, smooth, turned, use_backend

from LDRCore import sampling
from LDRCore.sampling import torch_cpu, torch_points
from LDRCore.transforms import spatial

TOLERANCE = 1e-3  # images here change by less than 0.2 a voxel, coordinates are rounded by some 1e-3 voxel
BAD = [float("nan"), float("inf"), -float("inf"), 1e30]


@pytest.fixture(params=BACKENDS, autouse=True)
def backend(request):
    yield from use_backend(request.param)


@pytest.fixture(params=[1, 2, 3])
def threads(request):
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield request.param
    torch.set_num_threads(before)


def set_slab_points(monkeypatch, points: int) -> None:
    """Have both backends work in small slabs."""
    monkeypatch.setattr(torch_cpu, "SLAB_POINTS", points)
    if sampling.backend_name() == "numba":
        from LDRCore.sampling import numba_loops

        monkeypatch.setattr(numba_loops, "SLAB_POINTS", points)


@pytest.mark.parametrize("padding", ["zeros", "border"])
@pytest.mark.parametrize("shape", [(23, 31, 42), (40, 7, 9), (1, 30, 20), (20, 1, 30), (20, 30, 1), (2, 2, 2)])
def test_points_anywhere(shape, padding, threads, monkeypatch):
    set_slab_points(monkeypatch, 1000)  # several slabs, the last one short
    image = smooth(2, *shape)
    points = scattered(shape, 4321)
    values = sampling.at_points(image, points, padding)
    assert values.shape == (2, 4321)
    assert float((values - exact(image, points, padding)).abs().max()) < TOLERANCE


def test_values_keep_the_shape_of_the_coordinates():
    image = smooth(2, 9, 8, 7)
    points = scattered((9, 8, 7), 60)
    values = sampling.at_points(image, points.view(3, 3, 4, 5))
    assert torch.equal(values, sampling.at_points(image, points).view(2, 3, 4, 5))


def test_half_padding_is_itks_boundary_condition():
    points = torch.tensor([[-0.6, 2, 2], [-0.4, 2, 2], [5.4, 2, 2], [5.6, 2, 2], [2, 6.6, 2], [2, 2, 7.4], [2, 2, 7.6]])
    values = sampling.at_points(torch.full((1, 6, 7, 8), 3.0), points.T.contiguous(), "half")
    assert values[0].tolist() == [0, 3, 3, 0, 0, 3, 0]


def test_half_padding_on_a_lattice_has_a_fill_value():
    matrix = np.diag([1, 1, 0.1, 1])
    matrix[2, 3] = -0.75
    slabs = sampling.slabs_on_lattice(torch.full((6, 7, 8), 3.0), (1, 1, 5), matrix, padding="half", fill=-7.0)
    assert [values[0, 0].tolist() for _, values in slabs] == [[-7, -7, -7, 3, 3]]


def test_large_values_and_fill_values_are_kept_exactly():
    slabs = sampling.slabs_on_lattice(
        torch.full((4, 4, 4), 16_000_001.0), (1, 1, 3), np.diag([1, 1, 3.0, 1]), padding="half", fill=-16_000_001.0
    )
    assert [values[0, 0].tolist() for _, values in slabs] == [[16_000_001.0, 16_000_001.0, -16_000_001.0]]


@pytest.mark.parametrize("padding", ["zeros", "border"])
def test_a_displacement_on_the_images_own_grid(padding, threads):
    image = smooth(2, 40, 35, 33)[None]
    displacement = 20 * (smooth(3, 40, 35, 33, seed=1) - 0.5)[None]
    expected = spatial.warp(image.double(), displacement.double(), padding=padding)
    assert float((spatial.warp(image, displacement, padding=padding) - expected).abs().max()) < TOLERANCE


def test_composing(threads):
    first, second = (20 * (smooth(3, 40, 35, 33, seed=n) - 0.5)[None] for n in (1, 2))
    expected = spatial.compose(first.double(), second.double())
    assert float((spatial.compose(first, second) - expected).abs().max()) < 8 * TOLERANCE  # steeper than the images


@pytest.mark.parametrize(
    "call",
    [
        lambda: sampling.at_points(torch.zeros(1, 2, 2, 2), torch.zeros(3, 5), "mirror"),
        lambda: sampling.displaced(torch.zeros(1, 2, 2, 2), torch.zeros(3, 2, 2, 2), "mirror"),
        lambda: list(sampling.slabs_on_lattice(torch.zeros(2, 2, 2), (2, 2, 2), np.eye(4), padding="mirror")),
    ],
)
def test_unknown_padding(call):
    with pytest.raises(ValueError, match=r"padding must be one of .*, got 'mirror'"):
        call()


def test_unknown_backend():
    with (
        pytest.raises(ValueError, match=r"backend must be one of .*, got 'jax'"),
        sampling.forced("jax"),
    ):
        pass


@pytest.mark.parametrize("padding", sampling.PADDINGS)
@pytest.mark.parametrize("bad", BAD)
@pytest.mark.parametrize("axis", [0, 1, 2])
def test_no_coordinate_reads_outside_of_the_image(padding, bad, axis):
    points = torch.full((3, 1000), 2.0)
    points[axis, ::2] = bad
    values = sampling.at_points(torch.ones(1, 5, 6, 7), points, padding)
    outside = 1.0 if padding == "border" else 0.0
    assert values[0, ::2] == pytest.approx(outside, abs=1e-5)
    assert values[0, 1::2] == pytest.approx(1.0, abs=1e-5)


@pytest.mark.parametrize("bad", BAD)
@pytest.mark.parametrize("axis", [0, 1, 2])
def test_no_displacement_reads_outside_of_the_other(bad, axis):
    first = torch.arange(3.0).view(3, 1, 1, 1).expand(3, 5, 6, 7).contiguous()
    second = torch.zeros(3, 5, 6, 7)
    second[axis, 1:3] = bad
    composed = sampling.composed(first, second)
    others = [c for c in range(3) if c != axis]
    assert composed[others] == pytest.approx(first[others], abs=1e-5)


@pytest.mark.parametrize("to_field", TO_FIELD.values(), ids=TO_FIELD)
@pytest.mark.parametrize("bad", BAD)
def test_no_lattice_reads_outside_of_the_image(bad, to_field):
    field = torch.zeros(3, 10, 11, 13)
    field[1, 4:6, 5, 6] = bad
    values = sampling.on_lattice(torch.ones(40, 35, 33), (20, 21, 22), np.eye(4), field, to_field)
    assert values.shape == (20, 21, 22)
    finite = values[~values.isnan()]
    assert bool(((finite >= 0) & (finite <= 1)).all())  # other memory would hold other numbers
    assert int((values > 0.99).sum()) > values.numel() / 4  # products with zeros may spread what is not a number


@pytest.mark.parametrize("to_field", TO_FIELD.values(), ids=TO_FIELD)
def test_a_lattice_through_a_coarse_field(to_field, threads, monkeypatch):
    set_slab_points(monkeypatch, 2000)
    shape = (25, 31, 36)
    image = smooth(1, 40, 35, 33)
    field = 6 * (smooth(3, 10, 11, 13, seed=1) - 0.5)
    matrix = turned(7) @ np.diag([1.3, 0.9, 0.8, 1])
    index = spatial.identity_grid(shape, dtype=torch.float64)[0].flatten(1)
    ones = torch.cat((index, torch.ones(1, index.shape[1], dtype=torch.float64)))
    at_field, at_image = (torch.from_numpy(m[:3]) @ ones for m in (to_field, matrix))
    expected = exact(image, at_image + exact(field, at_field, "border"), "zeros").view(shape)
    values = sampling.on_lattice(image[0], shape, matrix, field, to_field)
    assert float((values - expected).abs().max()) < TOLERANCE


def test_a_row_of_the_lattice_may_be_finer_or_coarser_than_the_fields():
    torch.manual_seed(0)
    for width, field_width in ((60, 30), (60, 60), (60, 150), (7, 3), (33, 2), (40, 1)):
        image = smooth(1, 9, 10, width)
        field = 6 * (smooth(3, 5, 6, field_width, seed=width) - 0.5)
        to_field = np.diag([0.5, 0.5, (field_width - 1) / (width - 1) or 1.0, 1.0])
        index = spatial.identity_grid((9, 10, width), dtype=torch.float64)[0].flatten(1)
        at_field = torch.from_numpy(to_field[:3, :3]) @ index
        expected = exact(image, index + exact(field, at_field, "border"), "zeros").view(9, 10, width)
        values = sampling.on_lattice(image[0], (9, 10, width), np.eye(4), field, to_field)
        assert float((values - expected).abs().max()) < 4 * TOLERANCE  # an image of few voxels is steeper


def test_points_on_a_lattice_are_those_that_are_sampled():
    shape = (25, 31, 36)
    field = 6 * (smooth(3, 10, 11, 13, seed=1) - 0.5)
    matrix = turned(7) @ np.diag([1.3, 0.9, 0.8, 1])
    ramps = spatial.identity_grid((60, 60, 60))[0]  # whose value at a point is the point
    inside = np.eye(4)
    inside[:3, 3] = 15
    for to_field in TO_FIELD.values():
        points = torch.empty(3, *shape)
        for start, stop, part in sampling.points_on_lattice(shape, inside @ matrix, field, to_field):
            points[:, start:stop] = part
        for component, ramp in zip(points, ramps, strict=True):
            values = sampling.on_lattice(ramp, shape, inside @ matrix, field, to_field)
            within = ((points > 0) & (points < 59)).all(0)
            assert int(within.sum()) > 0.5 * within.numel()
            assert float((values - component)[within].abs().max()) < 2e-3


def test_a_halo_adds_the_slices_about_a_slab(monkeypatch):
    monkeypatch.setattr(torch_cpu, "SLAB_POINTS", 4 * 9 * 8)
    field = smooth(3, 5, 6, 7)
    arguments = (10, 9, 8), np.eye(4), field, np.diag([0.4, 0.5, 0.6, 1])
    ((_, _, whole),) = sampling.points_on_lattice(*arguments, halo=5)
    sizes = []
    for start, stop, part in sampling.points_on_lattice(*arguments, halo=1):
        low, high = max(start - 1, 0), min(stop + 1, 10)
        assert torch.allclose(part, whole[:, low:high], atol=1e-5)
        sizes.append((start, stop))
    assert sizes == [(0, 4), (4, 8), (8, 10)]


@pytest.mark.parametrize("to_field", [None, *TO_FIELD.values()], ids=["no displacement", *TO_FIELD])
def test_the_points_of_a_block_lie_between_the_bounds(to_field):
    shape, matrix = (25, 31, 36), turned(7) @ np.diag([1.3, -0.9, 0.8, 1])
    field = None if to_field is None else 6 * (smooth(3, 10, 11, 13, seed=1) - 0.5)
    points = torch_points.points_of_lattice(matrix, field, to_field, shape, torch.device("cpu"))
    reach = 0 if field is None else float((field.amax((1, 2, 3)) - field.amin((1, 2, 3))).max())
    for block in (np.s_[0:25, 0:31, 0:36], np.s_[7:8, 3:20, 5:6], np.s_[20:25, 30:31, 0:36]):
        coordinates = torch.empty(3, *(part.stop - part.start for part in block))
        points.write(block, coordinates)
        low, high = torch.tensor(points.bounds(block)).T
        lowest, highest = coordinates.flatten(1).aminmax(dim=1)
        assert bool(((low <= lowest) & (highest <= high)).all())
        assert bool(((lowest - low < reach + 0.01) & (high - highest < reach + 0.01)).all())


def test_slabs_follow_one_another_and_cover_the_lattice(monkeypatch):
    set_slab_points(monkeypatch, 3 * 9 * 8)
    slabs = list(sampling.slabs_on_lattice(smooth(1, 5, 6, 7)[0], (10, 9, 8), np.eye(4)))
    assert [(block[0].start, block[0].stop) for block, _ in slabs] == [(0, 3), (3, 6), (6, 9), (9, 10)]
    assert all((block[1], block[2]) == (slice(0, 9), slice(0, 8)) for block, _ in slabs)
    assert [tuple(values.shape) for _, values in slabs] == [(3, 9, 8)] * 3 + [(1, 9, 8)]


def test_warping_by_a_coarse_field_is_warping_by_the_upsampled_one():
    image = smooth(2, 48, 40, 44)[:, None]
    field = 3 * (smooth(6, 24, 20, 22, seed=3) - 0.5).view(2, 3, 24, 20, 22)
    expected = spatial.warp(image.double(), spatial.upsample(field, (48, 40, 44)).double())
    assert float((spatial.warp_by_coarse(image, field) - expected).abs().max()) < TOLERANCE


def test_a_voxel_that_is_not_a_number_stays_one():
    image = torch.ones(1, 1, 48, 40, 44)
    image[0, 0, 3, 4, 5] = float("nan")
    warped = spatial.warp_by_coarse(image, torch.zeros(1, 3, 24, 20, 22))[0, 0]
    assert bool(warped[3, 4, 5].isnan())
    assert float(warped[30, 30, 30]) == pytest.approx(1, abs=1e-5)


def test_gradients_still_flow():
    image = smooth(1, 48, 40, 44)[None]
    field = torch.zeros(1, 3, 24, 20, 22, requires_grad=True)
    spatial.warp_by_coarse(image, field).sum().backward()
    assert float(field.grad.abs().max()) > 0
    with torch.no_grad():
        assert spatial.warp_by_coarse(image, field).shape == image.shape


@pytest.mark.parametrize("call", [spatial.compose, spatial.warp_by_coarse, spatial.warp, spatial.sample])
def test_what_requires_a_gradient_is_sampled_by_torchs_own_sampler(call, monkeypatch):
    for name in ("at_points", "displaced", "composed", "slabs_on_lattice"):
        monkeypatch.setattr(sampling, name, None)  # a call of it would fail
    field = torch.zeros(1, 3, 40, 40, 40, requires_grad=True)
    image = torch.rand(1, 3 if call is spatial.compose else 1, 40, 40, 40)
    assert call(image, field).requires_grad


def test_the_reference_is_torchs_own_sampler_everywhere(monkeypatch):
    image, field = smooth(1, 48, 40, 44)[None], torch.full((1, 3, 48, 40, 44), 0.3)
    fast = spatial.warp(image, field)
    with sampling.forced("reference"):
        assert sampling.backend_name() == "reference"
        for name in ("at_points", "displaced", "composed", "slabs_on_lattice"):
            monkeypatch.setattr(sampling, name, None)
        assert float((spatial.warp(image, field) - fast).abs().max()) < TOLERANCE
    assert sampling.backend_name() != "reference"


@pytest.mark.parametrize("name", ["torch", "numba"])
@pytest.mark.parametrize("to_field", TO_FIELD.values(), ids=TO_FIELD)
def test_determinants_are_those_of_the_differences_of_the_points(name, to_field, monkeypatch):
    if name == "numba" and sampling.backend_name() != "numba":
        pytest.skip("needs the package numba (pip install 'LDRCore[fast]')")
    monkeypatch.setattr(torch_cpu, "SLAB_POINTS", 4 * 31 * 36)  # several slabs
    shape, matrix = (25, 31, 36), turned(7) @ np.diag([1.3, -0.9, 0.8, 1])
    field = 6 * (smooth(3, 40, 42, 44, seed=1) - 0.5)
    ((_, _, points),) = sampling.points_on_lattice(shape, matrix, field, to_field, halo=25)
    columns = [np.stack(np.gradient(component.numpy())) for component in points]
    expected = np.linalg.det(np.moveaxis(np.stack(columns), (0, 1), (-2, -1)))
    with sampling.forced(name):
        found = np.empty(shape)
        for start, stop, determinant in sampling.determinants_on_lattice(shape, matrix, field, to_field):
            found[start:stop] = determinant
    assert expected.std() > 0.05
    assert np.abs(found - expected).max() < 1e-4
