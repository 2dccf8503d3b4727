"""LDR's compiled layers give what torch's give, at every size that they take, and nothing else takes them."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
import torch.nn.functional as F

from LDRCore import sampling
from LDRCore.models import cpu_layout
from LDRCore.models.ldr import LDR

layers = pytest.importorskip(
    "LDRCore.models.compiled_layers", reason="needs the package numba (pip install 'LDRCore[fast]')"
)
loops = pytest.importorskip("LDRCore.models.layer_loops")
# how to multiply, and how far the result may be from float32's, relative to numbers about 1
WAYS = {"float32": (torch.float32, 1e-5), "vectors of pairs": (torch.bfloat16, 0.02), "tiles": (torch.bfloat16, 0.02)}
SMALL = {"head": "half", "channels": (8, 32, 32, 32), "up": (16, 16, 4)}


@pytest.fixture(autouse=True)
def without_gradients():
    with torch.no_grad():
        yield


@pytest.fixture(params=WAYS, ids=str)
def way(request, monkeypatch):
    """(precision, tolerance) of a way to multiply that this processor has."""
    precision, tolerance = WAYS[request.param]
    if request.param == "tiles" and not loops.has_tiles():
        pytest.skip("needs a processor with a matrix unit for bfloat16 (AMX)")
    if request.param == "vectors of pairs":
        monkeypatch.setattr(loops, "has_tiles", lambda: False)
    if not layers.takes(precision):
        pytest.skip(f"needs a processor that multiplies {request.param}")
    return precision, tolerance


def features_of(image, precision):
    """(C, D, H, W) as a program takes it: values, and what tells the program of them."""
    channels, *shape = image.shape
    values = F.pad(image.permute(1, 2, 3, 0), (0, 0, 1, 1)).to(precision)
    return F.pad(values.flatten(), (0, loops.BEHIND)), lambda program: program.given(shape, channels)


def blocks_of(moving, fixed, precision):
    pair = cpu_layout.ImagePair(fixed, precision, blocks=True)
    pair.put(moving)
    return pair.values[0], lambda program: program.images(moving.shape[2:])


def compute(precision, write, *given):
    """What a program gives whose layers `write` calls."""
    program = layers.Program(precision)
    write(program, *(tell(program) for _, tell in given))
    program.finish()
    return program.run(*(values[None] for values, _ in given))[0]


def assert_ends_are_zero(found):
    rows = found.permute(1, 2, 3, 0)
    depth, height, width, channels = rows.shape
    whole = rows.as_strided((depth, height, width + 2, channels), rows.stride(), rows.storage_offset() - channels)
    assert float(whole[:, :, 0].abs().max()) == float(whole[:, :, -1].abs().max()) == 0


@pytest.mark.parametrize("shape", [(16, 16, 16), (4, 8, 4), (6, 10, 36), (8, 4, 128), (4, 6, 84), (4, 30, 12)], ids=str)
@pytest.mark.parametrize("channels", [8, 16, 24])
def test_the_first_layer_is_a_convolution_of_two_images(shape, channels, way):
    precision, tolerance = way
    torch.manual_seed(0)
    layer = torch.nn.Conv3d(2, channels, 4, stride=2, padding=1)
    moving, fixed = torch.rand(2, 1, 1, *shape) - 0.3
    expected = F.relu(layer(torch.cat((moving, fixed), 1))[0])
    blocks = blocks_of(moving, fixed, precision)
    found = compute(precision, lambda program, images: program.first(layer, images), blocks)
    assert found.dtype == precision
    assert found.shape == expected.shape
    assert float((found - expected).abs().max()) < tolerance
    assert_ends_are_zero(found)


@pytest.mark.parametrize("shape", [(2, 2, 2), (6, 4, 10), (4, 6, 34), (4, 2, 64), (2, 4, 70), (4, 26, 6)], ids=str)
@pytest.mark.parametrize(("inputs", "outputs"), [(8, 32), (16, 16), (48, 64)])
def test_further_layers_are_convolutions(shape, inputs, outputs, way):
    precision, tolerance = way
    torch.manual_seed(0)
    layer = torch.nn.Conv3d(inputs, outputs, 4, stride=2, padding=1)
    image = torch.rand(inputs, *shape) - 0.3
    expected = F.relu(layer(image[None])[0])
    found = compute(precision, lambda program, one: program.down(layer, one), features_of(image, precision))
    assert float((found - expected).abs().max()) < tolerance
    assert_ends_are_zero(found)


@pytest.mark.parametrize("shape", [(1, 1, 1), (2, 3, 5), (3, 2, 16), (1, 3, 33), (2, 11, 4)], ids=str)
@pytest.mark.parametrize("outputs", [4, 8, 16, 48])
def test_transposed_convolutions_of_several_inputs(shape, outputs, way):
    precision, tolerance = way
    torch.manual_seed(0)
    layer = torch.nn.ConvTranspose3d(48, outputs, 4, stride=2, padding=1)
    image = torch.rand(48, *shape) - 0.3
    expected = F.relu(layer(image[None]))
    parts = [features_of(part, precision) for part in image.split((16, 32))]
    found = compute(precision, lambda program, *inputs: program.up(layer, inputs), *parts)
    if len(found) == outputs:
        assert_ends_are_zero(found)
        tensor = found[None]
    else:
        assert outputs in (4, 8)  # fewer than fill a vector
        tensor = cpu_layout.from_gaps(found[None])
        assert torch.equal(gaps_of(tensor[0]), found.permute(1, 2, 3, 0).float())
    assert float((tensor - expected).abs().max()) < tolerance


def gaps_of(image):
    """(C, D, H, W) by gaps, (D / 2 + 1, H / 2 + 1, W / 2 + 1, 8 C), by definition."""
    parts = F.pad(image, (1,) * 6).unfold(1, 2, 2).unfold(2, 2, 2).unfold(3, 2, 2).flip(4, 5, 6)
    return parts.permute(1, 2, 3, 4, 5, 6, 0).flatten(3).float()  # parity 1 lies before parity 0


@pytest.mark.parametrize("shape", [(2, 2, 2), (4, 6, 10), (6, 4, 68), (2, 22, 36)], ids=str)
@pytest.mark.parametrize(("first", "in_gaps"), [(4, True), (4, False), (16, False)])
def test_a_flow_layer_at_half_size_is_a_convolution(shape, first, in_gaps, way):
    precision, tolerance = way
    if not in_gaps and precision == torch.bfloat16 and loops.has_tiles():
        first = max(first, 8)  # fewer come by gaps
    torch.manual_seed(0)
    layer = torch.nn.Conv3d(first + 8, 3, 3, padding=1)
    image = torch.rand(first + 8, *shape) - 0.3
    expected = layer(image[None])[0]
    one = features_of(image[:first], precision)
    if in_gaps:
        gaps = gaps_of(image[:first]).to(precision)
        one = gaps, lambda program: program.given(gaps.shape[:3], gaps.shape[3], 0)
    parts = one, features_of(image[first:], precision)
    found = compute(precision, lambda program, *inputs: program.flow(layer, inputs), *parts)
    assert found.dtype == torch.float32
    assert float((found - expected).abs().max()) < tolerance


@pytest.mark.parametrize("shape", [(1, 1, 1), (2, 3, 5), (3, 2, 34), (1, 13, 6)], ids=str)
def test_a_flow_layer_at_full_size_is_a_transposed_convolution(shape, way):
    precision, tolerance = way
    torch.manual_seed(0)
    layer = torch.nn.ConvTranspose3d(32, 3, 4, stride=2, padding=1)
    image = torch.rand(32, *shape) - 0.3
    parts = [features_of(part, precision) for part in image.split((16, 16))]
    found = compute(precision, lambda program, *inputs: program.flow(layer, inputs), *parts)
    assert float((found - layer(image[None])[0]).abs().max()) < tolerance


@pytest.mark.parametrize("threads", [1, 3])
@pytest.mark.parametrize("options", [{}, {"head": "half"}, SMALL], ids=str)
def test_a_whole_network(options, way, threads):
    precision, tolerance = way
    torch.manual_seed(0)
    network = LDR(**options).requires_grad_(False)
    torch.nn.init.normal_(network.flow.weight, 0, 0.1)
    moving, fixed = torch.rand(2, 2, 1, 32, 48, 80)
    with torch.enable_grad():  # torch's own layers
        expected = network.predict(moving, fixed)
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        pair = network.image_pair(fixed, precision)
        pair.put(moving)
        assert pair.blocks
        layers._spare[:] = [torch.full((1 << 24,), 255, dtype=torch.uint8)]  # what a run before left: no numbers
        found = network.predict_pair(pair)
        assert layers._spare
    finally:
        torch.set_num_threads(before)
    assert float((found - expected).abs().max()) < tolerance * float(expected.abs().max())


def test_the_matrix_unit_is_left_as_it_was():
    """OneDNN remembers what it told the unit, and does not tell it again."""
    if not layers.takes(torch.bfloat16):
        pytest.skip("needs a processor that multiplies bfloat16")
    torch.manual_seed(0)
    layer = torch.nn.Conv3d(32, 32, 3, padding=1)
    narrow = torch.nn.Conv3d(16, 16, 4, stride=2, padding=1)
    image, small = torch.rand(1, 32, 12, 12, 12), torch.rand(16, 4, 4, 8)
    given = features_of(small, torch.bfloat16)
    with torch.autocast("cpu", torch.bfloat16):
        expected = layer(image)
        for _ in range(5):
            compute(torch.bfloat16, lambda program, one: program.down(narrow, one), given)
            assert torch.equal(layer(image), expected)


def test_weights_that_change_are_arranged_anew():
    network = LDR().requires_grad_(False)
    torch.nn.init.normal_(network.flow.weight, 0, 0.1)
    pair = network.image_pair(torch.rand(1, 1, 16, 16, 32), torch.float32)
    pair.put(torch.zeros(1, 1, 16, 16, 32))
    before = network.predict_pair(pair)
    assert torch.equal(network.predict_pair(pair), before)
    network.flow.weight.mul_(2)
    network.flow.bias.mul_(2)
    assert torch.allclose(network.predict_pair(pair), 2 * before, atol=1e-5)


def test_images_of_another_size_get_a_program_of_their_own():
    network = LDR(head="half").requires_grad_(False)
    for size in (32, 48, 32):
        moving, fixed = torch.rand(2, 1, 1, 16, 32, size)
        pair = network.image_pair(fixed, torch.float32)
        pair.put(moving)
        with torch.enable_grad():
            expected = network.predict(moving, fixed)
        assert torch.allclose(network.predict_pair(pair), expected, atol=1e-5)


def test_one_network_on_several_threads():
    network = LDR(**SMALL).requires_grad_(False)
    torch.nn.init.normal_(network.flow.weight, 0, 0.1)
    pairs = []
    for _ in range(6):
        pairs.append(network.image_pair(torch.rand(1, 1, 32, 32, 32), torch.float32))
        pairs[-1].put(torch.rand(1, 1, 32, 32, 32))
    expected = [network.predict_pair(pair) for pair in pairs]

    def predict(pair):
        with torch.no_grad():
            return network.predict_pair(pair)

    with ThreadPoolExecutor(3) as pool:
        for one, other in zip(expected, pool.map(predict, pairs), strict=True):
            assert torch.equal(one, other)


@pytest.mark.parametrize("channels", [(12, 32, 64, 128), (16, 24, 64, 128)])
def test_networks_whose_channels_do_not_fit_are_left_to_torch(channels):
    network = LDR(channels=channels)
    pair = network.image_pair(torch.rand(1, 1, 16, 16, 32), torch.float32)
    assert not pair.blocks
    pair.put(torch.rand(1, 1, 16, 16, 32))
    assert network.predict_pair(pair).shape == (1, 3, 16, 16, 32)


def test_without_compiled_loops_there_are_none(monkeypatch):
    assert cpu_layout.compiled_layers(torch.float32) is (layers if loops.USABLE else None)
    monkeypatch.setattr(sampling, "COMPILED", False)
    assert cpu_layout.compiled_layers(torch.float32) is None
    assert not LDR().image_pair(torch.rand(1, 1, 16, 16, 32), torch.float32).blocks


def test_float16_is_left_to_torch():
    assert not layers.takes(torch.float16)
    assert not LDR().image_pair(torch.rand(1, 1, 16, 16, 32), torch.float16).blocks
