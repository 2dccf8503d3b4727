"""A network in its layout for a CPU computes what the plain network computes, whatever oneDNN offers."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F

from LDRCore.cpu import convolution, layout
from LDRCore.models.affine import AffineLDR
from LDRCore.models.cascade import Cascade
from LDRCore.models.ldr import LDR
from LDRCore.models.unet import UNet

OPTIONS = [{"head": "half"}, {"head": "deconv"}, {"head": "half", "channels": (8, 32, 32, 32), "up": (16, 16, 4)}]
BFLOAT16_TOLERANCE = 0.02  # of the largest value: bfloat16 keeps 8 bits, over five layers


@pytest.fixture(autouse=True)
def fresh_onednn():
    """Clear the cached facts about oneDNN before each test."""
    convolution._onednn.cache_clear()
    yield
    convolution._onednn.cache_clear()


def network_of_noise(**options) -> LDR:
    torch.manual_seed(0)
    network = LDR(**options)
    torch.nn.init.normal_(network.flow.weight, 0, 0.1)
    torch.nn.init.normal_(network.flow.bias)
    return network


def stem_of_noise() -> AffineLDR:
    torch.manual_seed(0)
    stem = AffineLDR()
    for head in (stem.matrix, stem.translation):
        torch.nn.init.normal_(head.weight, 0, 0.1)
        torch.nn.init.normal_(head.bias)
    return stem


def images(*shape: int) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    return torch.rand(*shape, generator=generator), torch.rand(*shape, generator=generator)


@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("shape", [(1, 1, 32, 48, 16), (3, 1, 16, 32, 48)])
def test_ldr_is_the_same_network(options, shape):
    network = network_of_noise(**options)
    moving, fixed = images(*shape)
    with torch.no_grad():
        plain = network.predict(moving, fixed)
        arranged = layout.LDROnCPU(network, torch.float32).predict(moving, fixed)
    assert float(plain.abs().max()) > 0.1
    assert arranged.shape == plain.shape
    assert torch.allclose(arranged, plain, atol=1e-5)


@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("shape", [(1, 1, 32, 48, 16), (2, 1, 16, 32, 48)])
def test_ldr_in_bfloat16_is_nearly_the_same_network(options, shape):
    network = network_of_noise(**options)
    moving, fixed = images(*shape)
    with torch.no_grad():
        plain = network.predict(moving, fixed)
        with torch.autocast("cpu", torch.bfloat16):  # as a cascade does
            arranged = layout.LDROnCPU(network, torch.bfloat16).predict(moving, fixed)
    assert arranged.dtype == torch.bfloat16
    assert not torch.allclose(arranged.float(), plain, atol=1e-5)
    assert float((arranged.float() - plain).abs().max()) < BFLOAT16_TOLERANCE * float(plain.abs().max())


@pytest.mark.parametrize("shape", [(1, 1, 48, 32, 64), (3, 1, 32, 48, 48)])
@pytest.mark.parametrize("autocast", [False, True])
def test_the_stem_is_the_same_network_in_float32_always(shape, autocast):
    stem = stem_of_noise()
    moving, fixed = images(*shape)
    with torch.no_grad():
        plain = stem.predict(moving, fixed)
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            arranged = layout.AffineLDROnCPU(stem).predict(moving, fixed)
    assert not torch.allclose(plain[0], torch.eye(3), atol=1e-3)
    for a, b in zip(plain, arranged, strict=True):
        assert b.dtype == torch.float32
        assert torch.allclose(a, b, atol=1e-4)


def test_the_layout_is_a_copy():
    """Training on, or moving, the plain network changes nothing; the plain network is left as it was."""
    network, stem = network_of_noise(), stem_of_noise()
    before = copy.deepcopy(network.state_dict())
    cascade = layout.arrange(Cascade([network], stem), torch.float32)
    assert all(torch.equal(value, before[name]) for name, value in network.state_dict().items())
    assert network.training
    assert all(p.requires_grad and p.grad is None for p in network.parameters())
    moving, fixed = images(1, 1, 32, 32, 32)
    with torch.no_grad():
        first = cascade(moving, fixed).displacement
        for parameter in [*network.parameters(), *stem.parameters()]:
            parameter.zero_()
        assert torch.equal(cascade(moving, fixed).displacement, first)


def test_other_networks_run_as_they_are():
    network = UNet()
    assert layout.arrange_network(network, torch.bfloat16) is network
    arranged = layout.arrange(Cascade([network], image_strides=[1], multiplier=0.5, stem_stride=2), torch.bfloat16)
    assert (arranged.networks[0], arranged.multiplier, arranged.stem_stride) == (network, 0.5, 2)
    assert arranged.precision == torch.bfloat16


class MyLDR(LDR):
    """A network of another class, which may compute something else."""


def test_a_subclass_runs_as_it_is():
    network = MyLDR()
    assert layout.arrange_network(network, torch.float32) is network


def test_an_arranged_network_refuses_what_the_plain_one_refuses():
    arranged = layout.LDROnCPU(LDR(), torch.float32)
    with pytest.raises(ValueError, match="multiple of 16"):
        arranged.predict(*images(1, 1, 30, 32, 32))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("relu", [False, True])
def test_rows_of_one_voxel_hold_what_was_computed(dtype, relu):
    """With the matrix unit and bfloat16 oneDNN reads memory there that nobody has written."""
    torch.manual_seed(0)
    layer = torch.nn.Conv3d(16, 32, 4, stride=2, padding=1).requires_grad_(False)
    features = torch.rand(1, 16, 4, 6, 2)
    expected = F.conv3d(features, layer.weight, layer.bias, 2, 1)
    expected = expected.relu() if relu else expected
    convolution = layout.Convolution.of(layer.weight, layer.bias, dtype, stride=(2, 2, 2), padding=(1, 1, 1), relu=relu)
    for _ in range(3):
        for size in (1 << 10, 1 << 14, 1 << 17):
            torch.full((size,), 1e38)  # leaves large numbers in freed memory
        result = convolution(features)
        assert result.dtype == dtype
        assert torch.allclose(result.float(), expected, atol=1e-5 if dtype == torch.float32 else 0.02)


def missing(monkeypatch):
    monkeypatch.delattr(torch, "mkldnn_convolution")
    monkeypatch.setattr(torch.ops, "mkldnn", object())


def raising(monkeypatch):
    def refuse(*arguments, **options):
        raise RuntimeError("could not create a primitive descriptor")

    replace_both(monkeypatch, refuse)


def not_implemented(monkeypatch):
    def refuse(*arguments, **options):
        raise NotImplementedError("no kernel of this name")

    replace_both(monkeypatch, refuse)


def of_another_signature(monkeypatch):
    replace_both(monkeypatch, lambda image, weight: image)


def wrong(monkeypatch):
    def double(image, weight, bias, padding, stride, dilation, groups, *more):
        return 2 * F.conv3d(image, weight, bias, stride, padding)

    replace_both(monkeypatch, double)


def of_another_shape(monkeypatch):
    replace_both(monkeypatch, lambda image, *more: image[:, :3])


def not_a_tensor(monkeypatch):
    replace_both(monkeypatch, lambda *more: None)


def without_onednn(monkeypatch):
    monkeypatch.setattr(torch.backends.mkldnn, "is_available", lambda: False)


def replace_both(monkeypatch, function):
    monkeypatch.setattr(torch, "mkldnn_convolution", function)
    monkeypatch.setattr(torch.ops.mkldnn, "_convolution_pointwise", function)


@pytest.mark.parametrize(
    "spoil",
    [missing, raising, not_implemented, of_another_signature, wrong, of_another_shape, not_a_tensor, without_onednn],
)
@pytest.mark.parametrize("precision", [torch.float32, torch.bfloat16])
def test_without_onednn_the_numbers_are_the_same(spoil, precision, monkeypatch):
    network, stem = network_of_noise(), stem_of_noise()
    moving, fixed = images(2, 1, 32, 32, 32)

    def displacements() -> list[torch.Tensor]:
        convolution._onednn.cache_clear()
        with torch.no_grad():
            output = layout.arrange(Cascade([network], stem), precision)(moving, fixed)
        return [output.displacement, *output.affine]

    expected = displacements()
    spoil(monkeypatch)
    for a, b in zip(displacements(), expected, strict=True):
        tolerance = 1e-4 if precision == torch.float32 else BFLOAT16_TOLERANCE
        assert float((a - b).abs().max()) < tolerance * max(1, float(b.abs().max()))
    assert convolution._onednn(precision) == (None, None)


def test_one_of_the_two_functions_is_enough(monkeypatch):
    monkeypatch.setattr(torch.ops, "mkldnn", object())
    plain, fused = convolution._onednn(torch.float32)
    assert fused is None
    assert (plain is not None) == torch.backends.mkldnn.is_available()


def test_a_processor_whose_onednn_refuses_bfloat16_still_uses_it_in_float32(monkeypatch):
    original = torch.mkldnn_convolution

    def refuse_bfloat16(image, *more):
        if image.dtype == torch.bfloat16:
            raise RuntimeError("mkldnn_convolution: bf16 path needs the cpu support avx512bw, avx512vl and avx512dq")
        return original(image, *more)

    monkeypatch.setattr(torch, "mkldnn_convolution", refuse_bfloat16)
    assert convolution._onednn(torch.bfloat16)[0] is None
    assert convolution._onednn(torch.float32)[0] is refuse_bfloat16


@pytest.mark.parametrize(
    "context", [torch.inference_mode, torch.no_grad, lambda: torch.autocast("cpu", torch.bfloat16)]
)
def test_what_is_known_of_onednn_does_not_depend_on_who_asked_first(context):
    with context():
        asked_within = convolution._onednn(torch.float32)
    convolution._onednn.cache_clear()
    assert asked_within == convolution._onednn(torch.float32)
    assert (asked_within[0] is not None) == torch.backends.mkldnn.is_available()
