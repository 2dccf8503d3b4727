"""The networks: sizes against the paper's table, shapes, the recursion, and what is refused."""

from __future__ import annotations

import pytest
import torch

from LDRCore.models import registry
from LDRCore.models.affine import AffineLDR
from LDRCore.models.base import DenseNetwork
from LDRCore.models.cascade import Cascade
from LDRCore.models.ldr import LDR
from LDRCore.transforms import separable, spatial

SHAPE = (32, 48, 32)


class Shift(DenseNetwork):
    """A network that always predicts one translation, in voxels of its field grid."""

    multiple = 16

    def __init__(self, vector: tuple[float, float, float], stride: int = 1) -> None:
        super().__init__()
        self.vector, self.field_stride = vector, stride
        self.seen: list[torch.Tensor] = []

    def predict(self, moving, fixed):
        self.seen.append(moving)
        shape = [n // self.field_stride for n in fixed.shape[2:]]
        return torch.tensor(self.vector).view(1, 3, 1, 1, 1).expand(fixed.shape[0], 3, *shape)


@pytest.mark.parametrize(
    ("name", "options", "parameters"),
    [
        ("ldr", {}, 1_548_643),
        ("ldr", {"head": "half"}, 1_545_091),
        ("ldr", {"head": "half", "channels": (8, 32, 32, 32), "up": (16, 16, 4)}, 243_803),
        ("ldr-gradient", {}, 1_024_677),
        ("ldr-gradient", {"hidden": 16}, 1_036_789),
        ("ldr-release", {}, 280_659),  # paper, Table I: 0.28 M a network
        ("vtn", {}, 28_252_717),  # paper, Table III: 28.25 M
        ("voxelmorph", {}, 300_547),
        ("unet", {}, 28_082_947),  # paper: 28.28 M, layout unknown
        ("unetpp", {}, 24_523_683),  # paper: 29.31 M, layout unknown
        ("mobilenet", {}, 1_246_755),  # paper: 1.25 M
    ],
)
def test_parameter_counts(name, options, parameters):
    assert registry.cost(registry.build_network(name, **options)).parameters == parameters


def test_table_one_counts_stem_and_networks():
    """0.56 / 0.84 / 1.12 M for 1 / 2 / 3 cascades: n + 1 networks of about 0.28 M each."""
    one = registry.cost(registry.build_network("ldr-release")).parameters
    for n, published in ((1, 0.56e6), (2, 0.84e6), (3, 1.12e6)):
        assert (n + 1) * one == pytest.approx(published, rel=0.01)


@pytest.mark.parametrize(
    ("name", "n", "published", "tolerance"),
    [
        ("rcn", 1, 42.41e6, 5e-4),
        ("rcn", 2, 70.67e6, 5e-4),
        ("rcn", 3, 98.89e6, 5e-4),
        ("rcn-voxelmorph", 1, 14.47e6, 5e-4),
        ("ldr-release", 1, 0.56e6, 0.1),  # the paper counts the stem as one more network of 0.28 M; it has 0.33 M
        ("ldr-release", 2, 0.84e6, 0.07),
        ("ldr-release", 3, 1.12e6, 0.06),
    ],
)
def test_table_one_counts_of_systems(name, n, published, tolerance):
    cascade = registry.build_cascade(registry.system(name, n))
    assert sum(p.numel() for p in cascade.parameters()) == pytest.approx(published, rel=tolerance)


def test_systems_are_refused_by_one_sentence():
    assert registry.system("unet", 2) == {"stem": "affine-ldr", "network": "unet", "cascades": 2}
    with pytest.raises(ValueError, match=r"system must be one of .*'rcn'.*, got 'rnc'"):
        registry.system("rnc", 1)
    with pytest.raises(ValueError, match="cascades must be at least 1, got 0"):
        registry.system("rcn", 0)


def test_multiply_adds_of_one_layer_by_hand():
    """The first convolution of `ldr`: 64^3 outputs x 16 channels x (2 x 4^3)."""
    network = LDR()
    full = registry.cost(network).multiply_adds
    network.encoder[0] = torch.nn.Conv3d(2, 16, kernel_size=2, stride=2)
    assert full - registry.cost(network).multiply_adds == 64**3 * 16 * 2 * (4**3 - 2**3)


def test_the_release_costs_more_arithmetic_with_fewer_parameters():
    text, release = (registry.cost(registry.build_network(n)) for n in ("ldr", "ldr-release"))
    assert release.parameters < text.parameters
    assert release.multiply_adds > 5 * text.multiply_adds


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("ldr", {}),
        ("ldr", {"head": "half"}),
        ("ldr", {"head": "half", "up": (16, 16, 4)}),
        ("ldr-release", {}),
        ("vtn", {}),
        ("voxelmorph", {}),
        ("unet", {}),
        ("unetpp", {}),
        ("mobilenet", {}),
    ],
)
def test_untrained_networks_predict_almost_nothing(name, options):
    network = registry.build_network(name, **options)
    shape = (64, 64, 128) if network.multiple > 16 else SHAPE
    displacement = network(torch.rand(1, 1, *shape), torch.rand(1, 1, *shape))
    assert displacement.shape == (1, 3, *shape)
    assert displacement.abs().max() < 0.05


@pytest.mark.parametrize("name", ["affine-ldr", "affine-vtn"])
def test_untrained_stem_is_almost_the_identity(name):
    pair = torch.rand(2, 2, 1, 64, 64, 64)
    matrix, translation = registry.build_stem(name).predict(*pair)
    assert torch.allclose(matrix, torch.eye(3).expand(2, 3, 3), atol=1e-2)
    assert translation.abs().max() < 0.5


@pytest.mark.parametrize("stride", [1, 2])
def test_the_recursion_composes_and_samples_the_original_once(stride):
    """Each network sees the original moved by the composition so far, never a warped image again."""
    first, second = Shift((1.0, 0, 0), stride), Shift((0, 2.0, 0), stride)
    moving, fixed = torch.rand(1, 1, *SHAPE), torch.rand(1, 1, *SHAPE)
    output = Cascade([first, second], multiplier=1.0)(moving, fixed)
    assert output.displacement[0, :, 3, 3, 3].tolist() == pytest.approx([1.0, 2.0, 0])
    expected = spatial.warp(moving, spatial.upsample(output.composed[0], SHAPE))
    assert torch.equal(first.seen[0], moving)
    assert torch.allclose(second.seen[0], expected, atol=1e-3)  # noise, at coordinates rounded in another way


def test_multiplier_is_one_over_n_unless_given():
    output = Cascade([Shift((3.0, 0, 0)) for _ in range(3)])(torch.rand(1, 1, *SHAPE), torch.rand(1, 1, *SHAPE))
    assert output.displacement[0, 0, 5, 5, 5] == pytest.approx(3.0)
    assert output.increments[0][0, 0, 5, 5, 5] == pytest.approx(1.0)


def test_fewer_cascades_are_the_first_ones():
    cascade = Cascade([Shift((1.0, 0, 0)), Shift((0, 5.0, 0))], multiplier=1.0)
    output = cascade(torch.rand(1, 1, *SHAPE), torch.rand(1, 1, *SHAPE), n_cascades=1)
    assert output.displacement[0, :, 3, 3, 3].tolist() == [1.0, 0, 0]


def test_the_stem_comes_first():
    stem = AffineLDR()
    torch.nn.init.constant_(stem.translation.bias, 1 / 16)  # in half longest axes (48 / 2): 1.5 voxels
    torch.nn.init.zeros_(stem.translation.weight)
    torch.nn.init.zeros_(stem.matrix.weight)
    output = Cascade([Shift((1.0, 0, 0))], stem)(torch.rand(1, 1, *SHAPE), torch.rand(1, 1, *SHAPE))
    assert output.displacement[0, :, 9, 9, 9].tolist() == pytest.approx([2.5, 1.5, 1.5], abs=1e-4)


def test_stages_that_look_at_smaller_images_share_the_field_grid():
    """Half-size images with a full-size head, and full-size images with a half-size head."""
    coarse, fine = Shift((1.0, 0, 0)), Shift((0, 2.0, 0), stride=2)
    moving, fixed = torch.rand(1, 1, *SHAPE), torch.rand(1, 1, *SHAPE)
    output = Cascade([coarse, fine], image_strides=[2, 1], multiplier=1.0)(moving, fixed)
    half = tuple(n // 2 for n in SHAPE)
    assert output.displacement.shape[2:] == half
    assert output.displacement[0, :, 3, 3, 3].tolist() == pytest.approx([1.0, 2.0, 0])
    # 24 is no multiple of 16: the network sees the image continued by zeros, and its field is cut again
    assert coarse.seen[0].shape[2:] == (16, 32, 16)
    assert torch.equal(coarse.seen[0][0, 0, :, :24], separable.shrink(moving, half)[0, 0])
    assert not coarse.seen[0][0, 0, :, 24:].any()
    expected = spatial.warp(moving, spatial.upsample(output.composed[0], SHAPE))
    assert torch.allclose(fine.seen[0], expected, atol=1e-3)


def test_a_stem_that_looks_at_smaller_images_gives_the_map_on_the_input_grid():
    stem = AffineLDR()
    torch.nn.init.zeros_(stem.translation.weight)
    torch.nn.init.constant_(stem.translation.bias, 1 / 8)  # of half the longest axis, 32 / 2: 2 voxels of 16 x 32 x 16
    torch.nn.init.zeros_(stem.matrix.weight)
    shape = (32, 64, 32)
    cascade = Cascade([Shift((0.0, 0, 0))], stem, stem_stride=2)
    output = cascade(torch.rand(1, 1, *shape), torch.rand(1, 1, *shape))
    ratio = [(n - 1) / (n / 2 - 1) for n in shape]
    assert output.affine[1][0].tolist() == pytest.approx([2 * r for r in ratio], rel=1e-5)
    assert output.displacement[0, :, 9, 9, 9].tolist() == pytest.approx([2 * r for r in ratio], rel=1e-4)


def test_an_architecture_may_name_every_network():
    coarse, fine = {"name": "ldr", "image_stride": 2}, {"name": "ldr", "head": "half"}
    architecture = {"stem": {"name": "affine-ldr", "image_stride": 2}, "network": [coarse, fine], "cascades": 2}
    cascade = registry.build_cascade(architecture)
    assert (cascade.image_strides, cascade.stem_stride, cascade.field_stride) == ((2, 1), 2, 2)
    assert len(registry.build_cascade({**architecture, "cascades": 1})) == 1
    with pytest.raises(ValueError, match=r"one for each of 3 cascades \(repeat counted\), got 2"):
        registry.build_cascade({**architecture, "cascades": 3})


def test_gradients_reach_every_parameter():
    networks = [LDR("half"), LDR("half")]
    for network in networks:
        torch.nn.init.normal_(network.flow.weight, 0, 0.01)
    cascade = Cascade(networks, AffineLDR())
    output = cascade(torch.rand(1, 1, *SHAPE), torch.rand(1, 1, *SHAPE))
    output.displacement.square().mean().backward()
    assert all(p.grad is not None and torch.isfinite(p.grad).all() for p in cascade.parameters())


@pytest.mark.parametrize("size", [64, 128])  # the lowest level is one voxel wide, and two
def test_gradients_in_bfloat16_are_made_of_what_was_computed(size):
    """Of images of 2 x 2 x 2 voxels oneDNN's weight gradients hold what was in memory before."""
    entry = {"name": "vtn", "width": 0.0625}
    model = registry.build_cascade({"network": entry, "stem": {"name": "affine-vtn", "width": 0.0625}, "cascades": 1})
    for parameter in model.parameters():  # of untrained networks many gradients are nearly zero
        torch.nn.init.normal_(parameter, std=0.1, generator=torch.Generator().manual_seed(parameter.numel()))
    model.to(memory_format=torch.channels_last_3d)
    model.precision = torch.bfloat16
    images = torch.rand((2, 1, 1, size, size, size), generator=torch.Generator().manual_seed(0))

    def gradients(left_in_memory):
        model.zero_grad()
        loss = model(*images).displacement.mean()
        for power in range(4, 20):
            torch.full((2**power,), left_in_memory)
        loss.backward()
        return {name: parameter.grad for name, parameter in model.named_parameters()}

    first, second = gradients(0.0), gradients(1e20)
    for name, gradient in first.items():
        assert torch.allclose(second[name], gradient, rtol=1e-3, atol=1e-3 * float(gradient.abs().max())), name


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: registry.build_network("resnet"), "must be one of.*got 'resnet'"),
        (lambda: registry.build_stem("rigid"), "must be one of.*got 'rigid'"),
        (lambda: LDR("quarter"), "head must be one of .*'half'.*, got 'quarter'"),
        (lambda: LDR()(torch.rand(1, 1, 30, 32, 32), torch.rand(1, 1, 30, 32, 32)), "multiple of 16, got"),
        (lambda: LDR()(torch.rand(1, 1, 32, 32, 32), torch.rand(1, 2, 32, 32, 32)), r"\(B, 1, D, H, W\)"),
        (lambda: Cascade([]), "at least one"),
        (lambda: Cascade([LDR()], image_strides=[1, 1]), r"1 numbers from 1, got \(1, 1\)"),
        (lambda: Cascade([Shift((0, 0, 0), 2), Shift((0, 0, 0), 3)]), r"multiple of the smallest, got \[2, 3\]"),
        (lambda: Cascade([LDR()], repeats=[0]), r"repeats must be 1 numbers from 1, got \(0,\)"),
        (
            lambda: Cascade([Shift((0, 0, 0))])(torch.rand(1, 1, *SHAPE), torch.rand(1, 1, *SHAPE), n_cascades=2),
            "1 to 1, got 2",
        ),
    ],
)
def test_what_is_refused(call, message):
    with pytest.raises(ValueError, match=message):
        call()
