"""Sampling that leaves out what cannot meet an image's content gives the same values."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from sampling_cases import BACKENDS, smooth, use_backend

from LDRCore import sampling
from LDRCore.sampling import lattice

IMAGE, FIELD, LATTICE = (30, 28, 32), (8, 9, 7), (21, 26, 24)
FILL = -2.5
TOLERANCE = (
    2e-3  # blocks of another size round coordinates differently, by 1e-3 voxel; the image changes by 1.1 a voxel
)


@pytest.fixture(params=BACKENDS)
def backend(request):
    yield from use_backend(request.param)


@pytest.fixture
def rng():
    return np.random.default_rng(0)


def random_rotation(rng: np.random.Generator) -> np.ndarray:
    q, r = np.linalg.qr(rng.normal(size=(3, 3)))
    return q * np.sign(np.diag(r))


def random_matrix(rng: np.random.Generator, kind: str) -> np.ndarray:
    """A map of the lattice's middle to about the image's middle: 4x4."""
    matrix = np.eye(4)
    if kind == "oblique":
        matrix[:3, :3] = random_rotation(rng)
    elif kind == "permuted and flipped":
        matrix[:3, :3] = np.eye(3)[rng.permutation(3)] * rng.choice([-1, 1], 3)
    elif kind == "singular":
        matrix[:3, :3] = random_rotation(rng)
        matrix[:3, rng.integers(3)] = 0
    matrix[:3, :3] *= rng.uniform(0.5, 2, 3)
    middle = (np.array(LATTICE) - 1) / 2
    matrix[:3, 3] = (np.array(IMAGE) - 1) / 2 - matrix[:3, :3] @ middle + rng.uniform(-8, 8, 3)
    return matrix


def image_with_content(rng: np.random.Generator, fill: float) -> torch.Tensor:
    """Smooth values in a random box, `fill` about it; the box may be one voxel thick or touch the image's faces."""
    low = rng.integers(0, np.array(IMAGE))
    high = np.minimum(low + rng.integers(0, 20, 3), np.array(IMAGE) - 1)
    box = tuple(slice(a, b + 1) for a, b in zip(low, high, strict=True))
    image = torch.full(IMAGE, fill)
    image[box] = fill + 0.1 + smooth(1, *IMAGE, seed=int(rng.integers(1000)))[0][box]
    return image


def sampled(image, matrix, field, to_field, padding, fill, content) -> torch.Tensor:
    values = torch.full(LATTICE, fill)
    slabs = sampling.slabs_on_lattice(
        image, LATTICE, matrix, field, to_field, padding=padding, fill=fill, content=content
    )
    for block, part in slabs:
        values[block] = part
    return values


@pytest.mark.parametrize("padding", ["zeros", "half"])
@pytest.mark.parametrize("kind", ["oblique", "permuted and flipped", "singular"])
@pytest.mark.parametrize("displaced", [None, "parallel", "oblique"])
def test_a_content_box_changes_nothing(kind, padding, displaced, backend, rng, monkeypatch):
    monkeypatch.setattr(sampling.torch_cpu, "SLAB_POINTS", 2 * LATTICE[1] * LATTICE[2])  # several blocks
    fill = 0.0 if padding == "zeros" else FILL
    left_out, sampled_anything = 0, 0
    for _ in range(25):
        image, matrix = image_with_content(rng, fill), random_matrix(rng, kind)
        field = to_field = None
        if displaced is not None:
            field = torch.from_numpy(rng.uniform(0, 3) * rng.uniform(-1, 1, (3, *FIELD))).float()
            to_field = np.diag([0.35, 0.3, 0.28, 1.0])
            if displaced == "oblique":
                to_field[:3, :3] = to_field[:3, :3] @ random_rotation(rng)
        content = sampling.content_box(image, fill)
        expected = sampled(image, matrix, field, to_field, padding, fill, None)
        values = sampled(image, matrix, field, to_field, padding, fill, content)
        # at a jump of half padding a coordinate that rounds differently picks the other side
        off = (values - expected).abs() > TOLERANCE
        assert int(off.sum()) <= (2 if padding == "half" else 0)
        left_out += int((values == fill).sum())
        sampled_anything += int((values != fill).sum())
    assert left_out > 10_000
    assert sampled_anything > 3_000


def test_a_content_that_no_point_comes_near_gives_the_fill_value_only(backend):
    image = torch.zeros(IMAGE)
    image[3:5, 3:5, 3:5] = 1
    far = np.eye(4)
    far[:3, 3] = 10
    assert not sampling.on_lattice(image, (9, 9, 9), far, content=sampling.content_box(image, 0.0)).any()


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_a_displacement_that_is_not_finite_leaves_nothing_out(bad, backend):
    image = torch.zeros(IMAGE)
    image[10:20, 10:20, 10:20] = 1
    field = torch.zeros(3, *FIELD)
    field[0, 0, 0, 0] = bad
    matrix = np.eye(4)
    matrix[:3, 3] = 5
    arguments = image, LATTICE, matrix, field, np.diag([0.35, 0.3, 0.28, 1.0])
    expected = sampling.on_lattice(*arguments)
    values = sampling.on_lattice(*arguments, content=sampling.content_box(image, 0.0))
    number = ~expected.isnan()  # torch's products with zeros spread what is not a number
    assert torch.allclose(values[number], expected[number], atol=TOLERANCE)
    assert int((expected > 0.99).sum()) > 100


def test_the_content_of_an_image_by_hand():
    image = torch.full((5, 6, 7), -1.0)
    assert sampling.content_box(image, -1.0) is None
    image[1, 2, 3] = 0
    image[3, 2, 6] = 5
    low, high = sampling.content_box(image, -1.0)
    assert (low.tolist(), high.tolist()) == ([1, 2, 3], [3, 2, 6])


def test_spans_by_hand():
    """Index i of row (k, j) lies at (k, j, 2 i - 3); the box holds k 1, j 0 to 1, and 0 to 4 along the row."""
    matrix = np.diag([1.0, 1, 2, 1])
    matrix[2, 3] = -3
    box = np.array([1.0, 0, 0]), np.array([1.0, 1, 4])
    spans = lattice.spans_within(matrix, (3, 3, 10), box)
    assert (spans.first < spans.stop).tolist() == [[False] * 3, [True, True, False], [False] * 3]
    assert (spans.first[1, :2].tolist(), spans.stop[1, :2].tolist()) == ([2, 2], [4, 4])  # i = 2 and 3
    assert spans.window(0, 3) == (slice(0, 2), slice(2, 4))
    assert spans.window(2, 3) == (slice(0, 0), slice(0, 0))
    moved = lattice.spans_within(matrix, (3, 3, 10), box, (np.array([0.0, 0, -2]), np.array([1.0, 0, 0])))
    assert (moved.first < moved.stop)[:, 0].tolist() == [True, True, False]  # u moves k = 0 to 1 at most
    assert (moved.first[1, 0], moved.stop[1, 0]) == (2, 5)  # 2 i - 3 up to 6


def test_spans_hold_every_point_of_the_box(rng):
    for _ in range(200):
        kind = rng.choice(["oblique", "permuted and flipped", "singular"])
        matrix = random_matrix(rng, kind)
        low = rng.uniform(-5, 25, 3)
        box = low, low + rng.uniform(-1, 20, 3)  # also boxes that hold nothing
        spans = lattice.spans_within(matrix, LATTICE, box)
        index = np.stack(np.meshgrid(*[np.arange(n) for n in LATTICE], indexing="ij"), -1)
        points = index @ matrix[:3, :3].T + matrix[:3, 3]
        inside = ((points >= box[0]) & (points <= box[1])).all(-1)
        i = np.arange(LATTICE[2])
        spanned = (spans.first[..., None] <= i) & (i < spans.stop[..., None])
        assert not (inside & ~spanned).any()
        nearly = ((points >= box[0] - 0.01) & (points <= box[1] + 0.01)).all(-1)
        assert not (spanned & ~nearly).any()
        assert (spans.first >= 0).all() or (spans.first >= spans.stop)[spans.first < 0].all()
        assert (spans.stop <= LATTICE[2]).all()


def test_a_line_of_a_matrix_by_hand():
    """Lattice index n lies at 0.5 n - 0.5 of a field of three voxels."""
    to_field = np.diag([0.5, 1, 1, 1])
    to_field[0, 3] = -0.5
    line = lattice.interpolation_lines((3, 4, 5), to_field, (7, 4, 5), [0, 1, 2])[0]
    assert line.low.tolist() == [0, 0, 0, 1, 1, 1, 1]
    assert line.weight.tolist() == [0, 0, 0.5, 0, 0.5, 1, 1]
    assert line.excess.tolist() == [-1, 0, 0, 0, 0, 0, 1]
    assert line.matrix(3).tolist()[2:5] == [[0.5, 0.5, 0], [0, 1, 0], [0, 0.5, 0.5]]


def test_which_axes_are_parallel():
    turned = np.array([[0, 2.0, 0, 1], [0, 0, -3.0, 0], [0.5, 0, 0, 0], [0, 0, 0, 1]])
    assert lattice.parallel_axes(turned, (10, 10, 10)) == [2, 0, 1]
    turned[0, 0] = 1e-6
    assert lattice.parallel_axes(turned, (10, 10, 10)) == [2, 0, 1]
    turned[0, 0] = 1e-4
    assert lattice.parallel_axes(turned, (10, 10, 10)) is None
    assert lattice.parallel_axes(np.diag([1.0, 0, 1, 1]), (10, 10, 10)) is None


def test_which_lines_are_the_identity():
    def line(rate: float, offset: float, n: int, size: int) -> lattice.Line:
        to_field = np.diag([rate, 1.0, 1.0, 1.0])
        to_field[0, 3] = offset
        return lattice.interpolation_lines((size, 4, 4), to_field, (n, 4, 4), [0, 1, 2])[0]

    assert line(1.0, 0.0, 9, 9).is_identity(9)
    assert not line(1.0, 0.5, 9, 9).is_identity(9)
    assert not line(0.5, 0.0, 9, 5).is_identity(5)
    assert not line(1.0, 1.0, 8, 9).is_identity(9)
    assert not line(-1.0, 8.0, 9, 9).is_identity(9)
