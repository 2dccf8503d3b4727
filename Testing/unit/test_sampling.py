"""Fast sampling gives what torch's sampler of volumes gives in double precision, wherever the points lie."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from LDRCore import sampling
from LDRCore.cpu import layout
from LDRCore.models.affine import AffineLDR
from LDRCore.models.ldr import LDR
from LDRCore.transforms import spatial

TOLERANCE = 2e-4  # images here change by less than 0.2 a voxel: some 1e-3 voxel


def smooth(*shape: int, seed: int = 0) -> torch.Tensor:
    """Noise (C, D, H, W) of low frequency, 0 to 1."""
    generator = torch.Generator().manual_seed(seed)
    coarse = torch.rand(1, shape[0], *(max(1, n // 6) for n in shape[1:]), generator=generator)
    return F.interpolate(coarse, size=shape[1:], mode="trilinear", align_corners=True)[0]


def exact(image: torch.Tensor, coordinates: torch.Tensor, padding: str) -> torch.Tensor:
    """torch's own, in float64: image (C, D, H, W), coordinates (3, n).

    Along an axis of one voxel torch ignores the coordinate, so there the zeros about the image are made by hand.
    """
    if padding == "zeros" and 1 in image.shape:
        return exact(F.pad(image, (1,) * 6), coordinates + 1, "border")
    size = torch.tensor(image.shape[1:], dtype=torch.float64)[:, None]
    normalised = (2 * coordinates.double() / (size - 1).clamp_min(1) - 1).flip(0).T[None, None, None]
    found = F.grid_sample(image[None].double(), normalised, padding_mode=padding, align_corners=True)
    return found[0].flatten(1)


def scattered(shape: tuple[int, ...], count: int, seed: int = 0) -> torch.Tensor:
    """Points inside, on the faces, just outside and far away, (3, count)."""
    generator = torch.Generator().manual_seed(seed)
    size = torch.tensor(shape)[:, None]
    points = (torch.rand(3, count, generator=generator) * 1.4 - 0.2) * size
    points[:, : count // 4] = points[:, : count // 4].round()
    points[:, 0], points[:, 1], points[:, 2] = -1e4, 1e4, size[:, 0] - 1
    return points


@pytest.fixture(params=["torch alone", "numba"], autouse=True)
def loops(request, monkeypatch):
    if request.param == "numba":
        if sampling.compiled() is None:
            pytest.skip("needs the package numba (pip install 'LDRCore[fast]')")
    else:
        monkeypatch.setattr(sampling, "COMPILED", False)
    return request.param


@pytest.fixture(params=[1, 2, 3])
def threads(request):
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield request.param
    torch.set_num_threads(before)


@pytest.mark.parametrize("padding", ["zeros", "border"])
@pytest.mark.parametrize("shape", [(23, 31, 42), (40, 7, 9), (1, 30, 20), (20, 1, 30), (20, 30, 1), (2, 2, 2)])
def test_points_anywhere(shape, padding, threads, monkeypatch):
    monkeypatch.setattr(sampling, "SLAB_POINTS", 1000)  # several slabs, the last one short
    image = smooth(2, *shape)
    points = scattered(shape, 4321)
    found = sampling.at_points(image, points, padding)
    assert found.shape == (2, 4321)
    assert float((found - exact(image, points, padding)).abs().max()) < 5 * TOLERANCE


def test_itks_edge_rule():
    image = torch.full((1, 6, 7, 8), 3.0)
    where = torch.tensor([[-0.6, 2, 2], [-0.4, 2, 2], [5.4, 2, 2], [5.6, 2, 2], [2, 6.6, 2], [2, 2, 7.4], [2, 2, 7.6]])
    sampler = sampling.Sampler(image, "half", -7.0)
    sampler.points(7)[:] = where.T.flip(0)
    assert sampler.look_up(7)[0].tolist() == [-7, 3, 3, -7, -7, 3, -7]


def test_itks_edge_rule_on_a_lattice():
    image = torch.full((6, 7, 8), 3.0)
    matrix = np.diag([1, 1, 0.1, 1])
    matrix[2, 3] = -0.75
    ((_, _, values),) = sampling.slabs_on_lattice(image, (1, 1, 5), matrix, padding="half", outside=-7.0)
    assert values[0, 0].tolist() == [-7, -7, -7, 3, 3]


@pytest.mark.parametrize("padding", ["zeros", "border"])
def test_a_displacement_on_the_images_own_grid(padding, threads):
    image = smooth(2, 40, 35, 33)[None]
    displacement = 20 * (smooth(3, 40, 35, 33, seed=1) - 0.5)[None]
    expected = spatial.warp(image.double(), displacement.double(), padding=padding)
    assert float((spatial.warp(image, displacement, padding=padding) - expected).abs().max()) < 5 * TOLERANCE


def test_composing(threads):
    first, second = (20 * (smooth(3, 40, 35, 33, seed=n) - 0.5)[None] for n in (1, 2))
    expected = spatial.compose(first.double(), second.double())
    assert float((spatial.compose(first, second) - expected).abs().max()) < 40 * TOLERANCE


def test_unknown_padding():
    with pytest.raises(ValueError, match="padding must be one of"):
        sampling.Sampler(torch.zeros(1, 2, 2, 2), "mirror")


def turned(degrees: float) -> np.ndarray:
    a = np.deg2rad(degrees)
    matrix = np.eye(4)
    matrix[:2, :2] = [[np.cos(a), -np.sin(a)], [np.sin(a), np.cos(a)]]
    return matrix


FLIPPED_AND_PERMUTED = np.array([[0, 0, 0.3, 1.0], [-0.4, 0, 0, 9.0], [0, 0.35, 0, 0.5], [0, 0, 0, 1]])
PARALLEL = np.array([[0.4, 0, 0, -1.5], [0, 0.3, 0, 0.7], [0, 0, 0.5, -2.0], [0, 0, 0, 1]])


@pytest.mark.parametrize(
    "to_field",
    [PARALLEL, FLIPPED_AND_PERMUTED, turned(20) @ PARALLEL],
    ids=["parallel, field smaller than the lattice", "flipped and permuted", "oblique"],
)
def test_a_lattice_through_a_coarse_field(to_field, threads, monkeypatch):
    monkeypatch.setattr(sampling, "SLAB_POINTS", 2000)
    shape = (25, 31, 36)
    image = smooth(1, 40, 35, 33)
    field = 6 * (smooth(3, 10, 11, 13, seed=1) - 0.5)
    matrix = turned(7) @ np.diag([1.3, 0.9, 0.8, 1])
    index = spatial.identity_grid(shape, dtype=torch.float64)[0].flatten(1)
    ones = torch.cat((index, torch.ones(1, index.shape[1])))
    at_field, at_image = (torch.from_numpy(m[:3]) @ ones for m in (to_field, matrix))
    expected = exact(image, at_image + exact(field, at_field, "border"), "zeros").view(shape)
    found = sampling.on_lattice(image[0], shape, matrix, field, to_field)
    assert float((found - expected).abs().max()) < 5 * TOLERANCE


@pytest.mark.parametrize("to_field", [None, PARALLEL, FLIPPED_AND_PERMUTED, turned(20) @ PARALLEL], ids=str)
def test_the_points_of_a_slab_lie_between_the_ends_that_are_told(to_field):
    shape, matrix = (25, 31, 36), turned(7) @ np.diag([1.3, -0.9, 0.8, 1])
    field = None if to_field is None else 6 * (smooth(3, 10, 11, 13, seed=1) - 0.5)
    points = sampling._points(matrix, field, to_field, shape, torch.device("cpu"))
    for start, stop in ((0, 25), (7, 8), (20, 25)):
        where = torch.empty(3, stop - start, *shape[1:])
        points.write(start, stop, where)
        low, high = torch.tensor(points.ends(start, stop)).T
        reach = 0 if field is None else float((field.amax((1, 2, 3)) - field.amin((1, 2, 3))).max())
        found_low, found_high = where.flatten(1).aminmax(dim=1)
        assert bool(((low <= found_low) & (found_high <= high)).all())
        assert bool(((found_low - low < reach + 0.01) & (high - found_high < reach + 0.01)).all())


def test_slabs_follow_one_another_and_cover_the_lattice(monkeypatch):
    for name in ("SLAB_POINTS", "COMPILED_SLAB_POINTS"):
        monkeypatch.setattr(sampling, name, 3 * 9 * 8)
    seen = [
        (a, b, tuple(v.shape)) for a, b, v in sampling.slabs_on_lattice(smooth(1, 5, 6, 7)[0], (10, 9, 8), np.eye(4))
    ]
    assert seen == [(0, 3, (3, 9, 8)), (3, 6, (3, 9, 8)), (6, 9, (3, 9, 8)), (9, 10, (1, 9, 8))]


def test_warping_by_a_coarse_field_is_warping_by_the_upsampled_one():
    image = smooth(2, 48, 40, 44)[:, None]
    field = 3 * (smooth(6, 24, 20, 22, seed=3) - 0.5).view(2, 3, 24, 20, 22)
    expected = spatial.warp(image.double(), spatial.upsample(field, (48, 40, 44)).double())
    assert float((spatial.warp_by_coarse(image, field) - expected).abs().max()) < 5 * TOLERANCE


@pytest.mark.parametrize(("low", "high"), [(0.0, 1.0), (-3.0, 5.0), (2.0, 4.0)])
def test_an_image_pulled_for_networks_in_bfloat16_is_as_precise_as_they_are(low, high, threads):
    image = low + (high - low) * smooth(1, 48, 40, 44)[0]
    field = 3 * (smooth(3, 24, 20, 22, seed=3) - 0.5)
    field[:, :3] -= 40  # from outside
    expected = spatial.warp(image[None, None].double(), spatial.upsample(field[None], image.shape).double())[0, 0]
    room = torch.full((48, 40, 46, 2), 9.0, dtype=torch.bfloat16)  # rows that other voxels lie between
    puller = sampling.Puller(image, torch.bfloat16)
    for displacement in (torch.zeros_like(field), field):  # one after the other into the same room
        puller.write(displacement, room[:, :, 1:-1, 0])
    assert set(room[..., 1].unique().tolist()) == set(room[:, :, [0, -1]].unique().tolist()) == {9.0}
    error = room[:, :, 1:-1, 0].double() - expected
    assert int((expected == 0).sum()) > 1000
    span = high - min(low, 0)
    assert float(error[expected == 0].abs().max()) < 1e-3 * span  # outside lies zero
    assert bool((error.abs() < expected.abs() / 500 + span * (1 / 500 + 2e-3)).all())


def test_a_value_that_is_no_number_stays_one():
    image = torch.ones(48, 40, 44)
    image[3, 4, 5] = float("nan")
    out = torch.empty(48, 40, 44, dtype=torch.bfloat16)
    sampling.Puller(image, out.dtype).write(torch.zeros(3, 24, 20, 22), out)
    assert bool(out[3, 4, 5].isnan())
    assert float(out[30, 30, 30]) == 1


def test_gradients_still_flow():
    image = smooth(1, 48, 40, 44)[None]
    field = torch.zeros(1, 3, 24, 20, 22, requires_grad=True)
    spatial.warp_by_coarse(image, field).sum().backward()
    assert float(field.grad.abs().max()) > 0
    with torch.no_grad():  # the same call where nobody wants them
        assert spatial.warp_by_coarse(image, field).shape == image.shape


@pytest.mark.parametrize(
    "options",
    [{"head": "half"}, {"head": "deconv"}, {"head": "half", "channels": (8, 32, 32, 32), "up": (16, 16, 4)}],
    ids=str,
)
def test_ldr_rearranged_for_a_cpu_is_the_same_network(options):
    torch.manual_seed(0)
    network = LDR(**options).to(memory_format=torch.channels_last_3d)
    torch.nn.init.normal_(network.flow.weight, 0, 0.1)
    torch.nn.init.normal_(network.flow.bias)
    moving, fixed = torch.rand(2, 1, 32, 48, 16), torch.rand(2, 1, 32, 48, 16)
    plain = network.predict(moving, fixed)
    assert plain.requires_grad
    with torch.no_grad():
        assert layout.can_take(moving)
        rearranged = network.predict(moving, fixed)
    assert not torch.equal(plain, torch.zeros_like(plain))
    assert plain.shape == rearranged.shape
    assert torch.allclose(plain, rearranged, atol=1e-5)


@pytest.mark.parametrize("precision", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("compiled", [True, False])
def test_a_pair_is_what_its_network_reads(precision, compiled, monkeypatch):
    monkeypatch.setattr(sampling, "COMPILED", compiled)
    torch.manual_seed(0)
    network = LDR().to(memory_format=torch.channels_last_3d).requires_grad_(False)
    torch.nn.init.normal_(network.flow.weight, 0, 0.1)
    moving, fixed = smooth(2, 48, 64, 80)[:, None], smooth(2, 48, 64, 80, seed=1)[:, None]
    field = 3 * (smooth(6, 24, 32, 40, seed=3) - 0.5).view(2, 3, 24, 32, 40)
    warped = spatial.warp_by_coarse(moving, field)
    in_precision = torch.autocast("cpu", precision, enabled=precision != torch.float32)
    with torch.no_grad():
        pair = network.image_pair(fixed, precision)
        pair.put(moving)
        with in_precision:
            assert torch.equal(network.predict_pair(pair), network.predict(moving, fixed))
        pair.pull([sampling.Puller(image, precision) for image in moving[:, 0]], field)
        with in_precision:
            found, expected = network.predict_pair(pair), network.predict(warped, fixed)
    scale = float(expected.abs().max())
    assert float((found - expected).abs().max()) < scale * (1e-4 if precision == torch.float32 else 0.02)


def test_the_stem_rearranged_for_a_cpu_is_the_same_network():
    torch.manual_seed(0)
    stem = AffineLDR().to(memory_format=torch.channels_last_3d)
    for head in (stem.matrix, stem.translation):
        torch.nn.init.normal_(head.weight, 0, 0.1)
    moving, fixed = torch.rand(2, 1, 48, 32, 64), torch.rand(2, 1, 48, 32, 64)
    plain = stem.predict(moving, fixed)
    with torch.no_grad():
        rearranged = stem.predict(moving, fixed)
    assert not torch.allclose(plain[0], torch.eye(3), atol=1e-3)
    for a, b in zip(plain, rearranged, strict=True):
        assert torch.allclose(a, b, atol=1e-4)
