"""LDR's compiled layers give what torch's give, at every size that they take, and nothing else takes them."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from LDRCore import sampling
from LDRCore.models import cpu_layout

layers = pytest.importorskip(
    "LDRCore.models.compiled_layers", reason="needs the package numba (pip install 'LDRCore[fast]')"
)
SHORTEST = 2 * layers.LANES


@pytest.fixture(autouse=True)
def without_gradients():
    with torch.no_grad():
        yield


@pytest.mark.parametrize("width", [SHORTEST, SHORTEST + 2, SHORTEST + 16, 2 * SHORTEST, 128])
@pytest.mark.parametrize(("channels", "kernel"), [(8, 4), (16, 4), (16, 3)])
@pytest.mark.parametrize("relu", [True, False])
def test_the_first_layer_is_a_convolution(width, channels, kernel, relu):
    torch.manual_seed(0)
    layer = torch.nn.Conv3d(2, channels, kernel, stride=2, padding=1)
    moving, fixed = torch.rand(2, 1, 6, 10, width) - 0.3, torch.rand(2, 1, 6, 10, width)
    pair = cpu_layout.ImagePair(fixed, torch.float32)
    assert not pair.takes_turns()
    pair.moving.copy_(moving)
    expected = layer(torch.cat((moving, fixed), 1))
    expected = expected.relu() if relu else expected
    found = cpu_layout.convolve_pair(layer, pair.moving, pair.fixed, relu=relu)
    assert found.shape == expected.shape
    assert float((found - expected).abs().max()) < 1e-5
    with torch.autocast("cpu", torch.bfloat16):
        half = cpu_layout.convolve_pair(layer, pair.moving, pair.fixed, relu=relu)
    assert half.dtype == torch.bfloat16
    assert torch.allclose(half.float(), expected, rtol=2**-8, atol=1e-5)  # rounded once, at the end
    if relu:
        assert float(half.min()) == 0


@pytest.mark.parametrize(("channels", "width"), [(6, SHORTEST), (8, SHORTEST - 4)])
def test_other_layers_and_short_rows_are_left_to_torch(channels, width, monkeypatch):
    monkeypatch.setattr(layers, "first_layer", lambda *_, **__: pytest.fail("was taken"))
    layer = torch.nn.Conv3d(2, channels, 4, stride=2, padding=1)
    moving, fixed = torch.rand(1, 1, 8, 8, width), torch.rand(1, 1, 8, 8, width)
    expected = layer(torch.cat((moving, fixed), 1))
    assert torch.allclose(cpu_layout.convolve_pair(layer, moving, fixed), expected, atol=1e-5)


def test_weights_that_change_are_arranged_anew():
    layer = torch.nn.Conv3d(2, 8, 4, stride=2, padding=1)
    pair = cpu_layout.ImagePair(torch.rand(1, 1, 8, 8, SHORTEST), torch.float32)
    pair.moving.zero_()
    before = cpu_layout.convolve_pair(layer, pair.moving, pair.fixed)
    layer.weight.mul_(2)
    layer.bias.mul_(2)
    assert torch.allclose(cpu_layout.convolve_pair(layer, pair.moving, pair.fixed), 2 * before, atol=1e-5)


def test_blocks_become_voxels():
    torch.manual_seed(0)
    first, second = (torch.randn(3, 4, 5, 32).bfloat16() for _ in range(2))
    found = layers.from_blocks(first, second)
    total = (first.float() + second.float())[..., :24].view(3, 4, 5, 2, 2, 2, 3)
    assert torch.equal(found, total.permute(6, 0, 3, 1, 4, 2, 5).reshape(3, 6, 8, 10))


def test_a_flow_layer_by_blocks_is_a_convolution():
    torch.manual_seed(0)
    layer = torch.nn.Conv3d(4 + 8, 3, 3, padding=1)
    features, skip = torch.rand(1, 4, 8, 12, 16), torch.rand(1, 8, 8, 12, 16)
    gaps = F.pad(features, (1,) * 6).unfold(2, 2, 2).unfold(3, 2, 2).unfold(4, 2, 2)
    gaps = gaps.flip(5, 6, 7).permute(0, 5, 6, 7, 1, 2, 3, 4).flatten(1, 4)  # parity 1 lies before parity 0
    assert torch.equal(cpu_layout.from_gaps(gaps), features)
    expected = layer(torch.cat((features, skip), 1))
    with torch.autocast("cpu", torch.bfloat16):
        found = cpu_layout.convolve_gaps(layer, gaps, skip)
    assert found.dtype == torch.float32
    assert float((found - expected).abs().max()) < 0.02


def test_without_compiled_loops_there_are_none(monkeypatch):
    assert cpu_layout.compiled_layers() is layers
    monkeypatch.setattr(sampling, "COMPILED", False)
    assert cpu_layout.compiled_layers() is None
    assert cpu_layout.ImagePair(torch.rand(1, 1, 8, 8, 128), torch.float32).takes_turns()


def test_float16_is_left_to_torch(monkeypatch):
    monkeypatch.setattr(layers, "first_layer", lambda *_, **__: pytest.fail("was taken"))
    layer = torch.nn.Conv3d(2, 8, 4, stride=2, padding=1)
    moving, fixed = torch.rand(1, 1, 8, 8, SHORTEST), torch.rand(1, 1, 8, 8, SHORTEST)
    expected = layer(torch.cat((moving, fixed), 1))
    with torch.autocast("cpu", torch.float16):
        found = cpu_layout.convolve_pair(layer, moving, fixed)
    assert torch.allclose(found.float(), expected, atol=5e-3)
