"""Losses against values worked out by hand, and their gradients."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from LDRCore import losses, sampling

GENERATOR = torch.Generator().manual_seed(0)


def test_correlation_is_numpys():
    a, b = torch.rand(2, 1, 4, 5, 6, generator=GENERATOR), torch.rand(2, 1, 4, 5, 6, generator=GENERATOR)
    expected = np.mean([1 - np.corrcoef(x.flatten(), y.flatten())[0, 1] for x, y in zip(a, b, strict=True)])
    assert float(losses.correlation(a, b)) == pytest.approx(expected, abs=1e-5)
    assert float(losses.correlation(a, 3 * a + 1)) == pytest.approx(0, abs=1e-5)
    assert float(losses.correlation(a, -a)) == pytest.approx(2, abs=1e-5)


def test_correlation_with_a_constant_image_is_one_and_has_no_gradient():
    constant = torch.full((1, 1, 3, 3, 3), 0.5, requires_grad=True)
    loss = losses.correlation(constant, torch.rand(1, 1, 3, 3, 3, generator=GENERATOR))
    loss.backward()
    assert loss.item() == 1
    assert torch.equal(constant.grad, torch.zeros_like(constant))


def test_local_ncc_ignores_local_gain():
    a = torch.rand(1, 1, 12, 12, 12, generator=GENERATOR)
    assert float(losses.local_ncc(a, 0.5 * a, epsilon=1e-6)) == pytest.approx(0, abs=1e-3)
    assert float(losses.local_ncc(a, -a, epsilon=1e-6)) == pytest.approx(0, abs=1e-3)  # contrast may be inverted
    other = torch.rand(1, 1, 12, 12, 12, generator=GENERATOR)
    assert float(losses.local_ncc(a, other)) > 0.5


def test_local_ncc_equals_a_loop_over_boxes():
    """With zeros outside; numpy's covariances are over the 27 voxels of a box."""
    a, b = torch.rand(2, 1, 5, 6, 7, generator=GENERATOR), torch.rand(2, 1, 5, 6, 7, generator=GENERATOR)
    padded = [np.pad(t[:, 0].double().numpy(), ((0, 0), (1, 1), (1, 1), (1, 1))) for t in (a, b)]
    squared = []
    for n, z, y, x in np.ndindex(2, 5, 6, 7):
        box = (n, slice(z, z + 3), slice(y, y + 3), slice(x, x + 3))
        ((p, c), (_, q)) = np.cov(*(t[box].ravel() for t in padded), bias=True)
        squared.append(c**2 / ((p + 0.01) * (q + 0.01)))
    assert float(losses.local_ncc(a, b, window=3, epsilon=0.01)) == pytest.approx(1 - np.mean(squared), abs=1e-5)


def test_local_ncc_of_constant_images_is_one_and_has_no_gradient():
    constant = torch.full((1, 1, 8, 8, 8), 0.5, requires_grad=True)
    loss = losses.local_ncc(constant[..., 2:-2], torch.zeros(1, 1, 8, 8, 4), window=3)
    loss.backward()
    assert loss.item() == 1
    assert torch.equal(constant.grad, torch.zeros_like(constant))


def test_compiled_losses_have_the_values_and_gradients_of_the_plain_ones():
    if sampling.backend_name() != "numba":
        pytest.skip("numba is not installed")
    images = torch.rand(2, 1, 9, 10, 11, generator=GENERATOR)
    points = torch.rand(3, 400, generator=GENERATOR) * 12 - 2  # some outside
    moving = torch.randint(0, 5, (8, 9, 7), generator=GENERATOR, dtype=torch.int16)
    moving[:, :4] = 2  # where all corners of a point have one label
    fixed = torch.randint(0, 6, (400,), generator=GENERATOR)
    calls = {
        "local_ncc": (lambda u: losses.local_ncc(u, images, window=5), torch.rand(images.shape, generator=GENERATOR)),
        "label_overlap": (lambda u: losses.label_overlap(u, moving, fixed, n_labels=8), points),
        "label_overlap at stride 2": (lambda u: losses.label_overlap(u, moving, fixed, 2, n_labels=8), points),
    }
    for name, (loss, values) in calls.items():
        found = []
        for backend in ("numba", "torch"):
            with sampling.forced(backend):
                variable = values.clone().requires_grad_()
                value = loss(variable)
                value.backward()
                found.append((value.detach(), variable.grad))
        assert float(found[1][1].abs().max()) > 1e-4, name
        for compiled, plain in zip(*found, strict=True):
            assert torch.allclose(compiled, plain, rtol=1e-4, atol=1e-7), name


def test_smoothness_of_a_ramp():
    displacement = torch.zeros(1, 3, 5, 5, 5)
    displacement[:, 0] = 2 * torch.arange(5.0).view(1, 5, 1, 1)
    # forward difference 2 along one axis in one of three components: mean of squares 4/3, over 3 axes, halved
    assert float(losses.smoothness(displacement)) == pytest.approx(4 / 3 / 3 / 2)


def test_folding_penalty_counts_only_what_folds():
    displacement = torch.zeros(1, 3, 5, 5, 5)
    assert float(losses.folding_penalty(displacement)) == 0
    displacement[:, 0] = -2 * torch.arange(5.0).view(1, 5, 1, 1)
    assert float(losses.folding_penalty(displacement, margin=0.1)) == pytest.approx(1.1)


def test_affine_terms_vanish_for_rotations_and_match_numpy():
    angle = torch.tensor(0.4)
    turn = torch.tensor([[angle.cos(), -angle.sin(), 0], [angle.sin(), angle.cos(), 0], [0, 0, 1]])[None]
    assert float(losses.affine_determinant(turn)) == pytest.approx(0, abs=1e-6)
    assert float(losses.affine_orthogonality(turn)) == pytest.approx(0, abs=1e-4)
    matrix = torch.eye(3)[None] + 0.2 * torch.rand(1, 3, 3, generator=GENERATOR)
    eigenvalues = np.linalg.eigvalsh(matrix[0].T.numpy() @ matrix[0].numpy()) + 1e-5
    assert float(losses.affine_orthogonality(matrix)) == pytest.approx(
        (eigenvalues + 1 / eigenvalues).sum() - 6, rel=1e-3
    )
    assert float(losses.affine_determinant(matrix)) == pytest.approx((np.linalg.det(matrix[0]) - 1) ** 2 / 2, rel=1e-3)


def test_distillation_of_a_constant_offset_and_of_a_ramp():
    teacher = torch.rand(1, 3, 4, 4, 4, generator=GENERATOR)
    assert float(losses.distillation(teacher + 0.5, teacher)) == pytest.approx(0.25, rel=1e-4)  # no gradient part
    ramp = torch.zeros(1, 3, 4, 4, 4)
    ramp[:, 0] = torch.arange(4.0).view(1, 4, 1, 1)
    values, slopes = (0 + 1 + 4 + 9) / 4 / 3, 1 / 3 / 3
    assert float(losses.distillation(ramp, torch.zeros_like(ramp), 2.0)) == pytest.approx(values + 2 * slopes)


def test_label_overlap_is_one_minus_mean_dice():
    moving = torch.zeros(6, 6, 6, dtype=torch.int32)
    moving[1:3] = 1
    moving[3:5] = 7
    index = torch.stack(torch.meshgrid(*[torch.arange(6.0)] * 3, indexing="ij")).reshape(3, -1)
    fixed = torch.zeros(6, 6, 6, dtype=torch.int64)
    fixed[2:4] = 1
    fixed[4:5] = 7
    # label 1: overlap 1 plane of 2 and 2 -> 0.5; label 7: 1 plane of 1 and 2 -> 2/3
    loss = losses.label_overlap(index, moving, fixed.flatten(), n_labels=8)
    assert float(loss) == pytest.approx(1 - (0.5 + 2 / 3) / 2, abs=1e-5)
    assert float(losses.label_overlap(index, fixed.int(), fixed.flatten(), n_labels=8)) == pytest.approx(0, abs=1e-6)


def test_label_overlap_interpolates():
    moving = torch.zeros(4, 4, 4, dtype=torch.int32)
    moving[2] = 3
    point = torch.tensor([[1.25], [1.0], [1.0]])  # a quarter of the way into the label
    loss = losses.label_overlap(point, moving, torch.tensor([3]), n_labels=4)
    assert float(loss) == pytest.approx(1 - 2 * 0.25 / (1 + 0.25), abs=1e-5)


@pytest.mark.parametrize(
    "function",
    [
        lambda u: losses.smoothness(u),
        lambda u: losses.folding_penalty(u - 2, margin=2.0),
        lambda u: losses.local_ncc(u[:, :1], u[:, 1:2], window=3),
        lambda u: losses.correlation(u[:, :1], u[:, 1:2]),
        lambda u: losses.affine_determinant(u[0, :, 0, :3, 0][None]),
        lambda u: losses.affine_orthogonality(u[0, :, 0, :3, 0][None] + torch.eye(3, dtype=u.dtype)),
        lambda u: losses.distillation(u, torch.full_like(u, 0.1)),
        lambda u: losses.label_overlap(
            u[0].reshape(3, -1) + 1.2, torch.arange(125).reshape(5, 5, 5).int() % 3, torch.arange(64) % 3, n_labels=3
        ),
    ],
    ids=["smoothness", "folding", "local_ncc", "correlation", "det", "orthogonality", "distillation", "label_overlap"],
)
def test_gradients(function):
    u = torch.rand(1, 3, 4, 4, 4, dtype=torch.float64, generator=GENERATOR) * 0.5 + 0.1
    assert torch.autograd.gradcheck(function, (u.requires_grad_(),), eps=1e-6, atol=1e-4)
