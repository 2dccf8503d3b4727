"""The loss that is minimised and its gradient, worked out by hand."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from LDRCore.models.base import DenseNetwork
from LDRCore.models.cascade import Cascade, CascadeOutput
from Training import checkpoints, objectives, train_stem, train_student, train_teacher
from Training.samples import LabelPair, Sample

N = 8
AXES = torch.arange(float(N)) - (N - 1) / 2  # voxels about the centre


def along(axis: int) -> torch.Tensor:
    """(1, 1, N, N, N): the coordinate along a tensor axis, from the centre."""
    form = [1, 1, 1, 1, 1]
    form[2 + axis] = N
    return AXES.view(form).expand(1, 1, N, N, N).clone()


def linear(component: int, axis: int, slope: float) -> torch.Tensor:
    """(1, 3, N, N, N): a displacement with one component, `slope` times the coordinate along an axis."""
    field = torch.zeros(1, 3, N, N, N)
    field[:, component] = slope * along(axis)[:, 0]
    return field


# --- the total


@pytest.fixture
def batch() -> Sample:
    """The moving image grows along x, the fixed one falls; no label agrees."""
    moving, fixed = along(2), -along(2)
    ones = torch.ones(N, N, N, dtype=torch.int64)
    labels = LabelPair(ones, ones.reshape(-1), 2 * torch.ones(N, N, N, dtype=torch.uint8), np.eye(4), None)
    return Sample(fixed, moving, fixed, moving, [labels], None, ["a|b"])


@pytest.fixture
def output() -> CascadeOutput:
    """The first cascade leaves the image as it is; the second mirrors it, which makes it the fixed one.

    The networks' own displacements are others (only their smoothness is asked for), and the stem doubles all lengths.
    """
    composed = [torch.zeros(1, 3, N, N, N), linear(2, 2, -2.0)]
    increments = [linear(0, 0, 0.3), linear(1, 2, 0.6)]
    affine = (2 * torch.eye(3)[None], torch.zeros(1, 3))
    return CascadeOutput(composed[-1], composed, increments, affine)


# A component with slope a along one axis: a^2 is one of nine mean squares, and smoothness is half their mean.
SMOOTH = {"first increment": 0.3**2 / 18, "second increment": 0.6**2 / 18, "composed": 2.0**2 / 18}
CORRELATION = {"first": 2.0, "second": 0.0}  # 1 - (-1) and 1 - 1
FOLD = 1.1  # mirrored: determinant -1, and the margin is 0.1
DICE = 1.0  # moving labels are 2 where the fixed ones are 1
DETERMINANT = (8 - 1) ** 2 / 2
ORTHOGONALITY = 3 * (4 + 1 / 4) - 6  # A^T A is 4 I


@pytest.mark.parametrize("every_cascade", [False, True])
def test_the_total_is_the_weighted_sum_of_every_term(batch, output, every_cascade):
    settings = objectives.ModelSettings(
        every_cascade=every_cascade, smooth=0.7, smooth_each=3.0, fold=0.4, dice=1.5, determinant=0.2, orthogonality=0.3
    )
    total, terms = objectives.reconstruction(settings, output, batch, np.random.default_rng(0), n_labels=3)
    last = CORRELATION["second"] + 0.7 * SMOOTH["composed"] + 0.4 * FOLD + 1.5 * DICE
    affine = 0.2 * DETERMINANT + 0.3 * ORTHOGONALITY
    if every_cascade:  # all but the last cascade count half, their increments' smoothness as well
        first = CORRELATION["first"] + 1.5 * DICE
        each = 0.5 * SMOOTH["first increment"] + SMOOTH["second increment"]
        expected = 0.5 * first + last + 3.0 * each + affine
    else:
        expected = last + 3.0 * (SMOOTH["first increment"] + SMOOTH["second increment"]) + affine
    assert float(total) == pytest.approx(expected, abs=2e-4)  # the stem's losses add 1e-5 to every eigenvalue
    wanted = {
        "correlation": CORRELATION["second"], "smooth": SMOOTH["composed"], "fold": FOLD, "overlap": DICE,
        "smooth_each": SMOOTH["second increment"], "determinant": DETERMINANT, "orthogonality": ORTHOGONALITY,
    }  # fmt: skip
    assert terms == pytest.approx(wanted, abs=1e-4)


def test_terms_without_weight_are_neither_counted_nor_reported(batch, output):
    output.affine = None
    settings = objectives.ModelSettings(smooth_each=0.0)
    total, terms = objectives.reconstruction(settings, output, batch, np.random.default_rng(0), n_labels=3)
    assert float(total) == pytest.approx(CORRELATION["second"], abs=1e-5)
    assert set(terms) == {"correlation", "smooth_each"}


# --- detached images


class Stretch(DenseNetwork):
    """Displaces along x in proportion to x: u(x) = w x, whatever the images show."""

    field_stride, multiple = 1, 1

    def __init__(self, w: float) -> None:
        super().__init__()
        self.w = torch.nn.Parameter(torch.tensor(w))

    def predict(self, moving: torch.Tensor, fixed: torch.Tensor) -> torch.Tensor:
        return self.w * linear(2, 2, 1.0)


class Brightness(DenseNetwork):
    """Displaces along x by w times what the moving image shows."""

    field_stride, multiple = 1, 1

    def __init__(self, w: float) -> None:
        super().__init__()
        self.w = torch.nn.Parameter(torch.tensor(w))

    def predict(self, moving: torch.Tensor, fixed: torch.Tensor) -> torch.Tensor:
        return torch.cat([torch.zeros_like(moving), torch.zeros_like(moving), self.w * moving], dim=1)


FIRST, SECOND = -0.25, 0.1
X = 1.5  # the voxel that is looked at, from the centre


def last_displacement(detach: bool) -> tuple[float, float]:
    """The last cascade's displacement along x at X, and its derivative by the first network's weight.

    The moving image shows x.
    """
    first = Stretch(FIRST)
    cascade = Cascade([first, Brightness(SECOND)], multiplier=1.0, detach_images=detach)
    outcome = cascade(along(2), along(2)).displacement[0, 2, 3, 3, int(X + (N - 1) / 2)]
    (gradient,) = torch.autograd.grad(outcome, first.w)
    return float(outcome.detach()), float(gradient)


# The second network sees the image at x + w1 x, so u2(x) = w2 (1 + w1) x; composed: u2(x) + w1 (x + u2(x)).
U2 = SECOND * (1 + FIRST) * X
BY_COMPOSITION = X + U2  # d/dw1 with u2 held
BY_IMAGE = (1 + FIRST) * SECOND * X  # what u2 itself changes


@pytest.mark.parametrize("detach", [False, True])
def test_detached_images_leave_the_gradient_of_the_composition_alone(detach):
    value, gradient = last_displacement(detach)
    assert value == pytest.approx(U2 + FIRST * (X + U2), rel=1e-5)
    assert gradient == pytest.approx(BY_COMPOSITION + (0 if detach else BY_IMAGE), rel=1e-5)


@pytest.mark.parametrize("detach", [False, True])
def test_the_key_detach_reaches_the_cascade(tmp_path, detach):
    settings = train_student.StudentSettings(data=tmp_path, detach=detach, cascades=2)
    assert objectives.build(settings, settings, (32, 32, 32)).detach_images is detach


# --- clipped gradients

CLIP = 1e-4
TINY = {"shape": (32, 32, 32), "initial": "centred", "cache": None, "val_split": None, "device": "cpu", "steps": 1}


def first_moment(path: Path) -> float:
    """Norm of Adam's first moment over all weights: after one step a tenth of the gradient's, as beta1 is 0.9."""
    state = checkpoints.read_checkpoint(path)["optimizer"]["state"]
    return float(torch.stack([moments["exp_avg"].norm() for moments in state.values()]).norm())


@pytest.mark.parametrize(("clip", "clipped"), [(CLIP, True), (1e6, False)])
def test_a_teachers_gradient_is_clipped(tiny_brains, tmp_path, clip, clipped):
    settings = train_teacher.TeacherSettings(
        data=tiny_brains, out=tmp_path / "t.pt", network="voxelmorph", cascades=1, clip=clip, **TINY
    )
    train_teacher.train(settings)
    outcome = first_moment(settings.out)
    assert outcome == pytest.approx(0.1 * CLIP, rel=1e-3) if clipped else outcome > CLIP


@pytest.mark.parametrize(("clip", "clipped"), [(CLIP, True), (1e6, False)])
def test_a_students_gradient_is_clipped_without_a_teacher(tiny_brains, tmp_path, clip, clipped):
    settings = train_student.StudentSettings(
        data=tiny_brains, out=tmp_path / "s.pt", options=("head=half",), cascades=1, clip=clip, **TINY
    )
    train_student.train(settings)
    outcome = first_moment(settings.out)
    assert outcome == pytest.approx(0.1 * CLIP, rel=1e-3) if clipped else outcome > CLIP


@pytest.mark.parametrize("n_gen", [0, 1])
def test_a_students_gradient_is_clipped_under_a_teacher(tiny_brains, teacher_store, tmp_path, n_gen):
    """In an adversarial iteration (n_gen 0) and in one of the reconstruction alone."""
    settings = train_student.StudentSettings(
        data=tiny_brains, out=tmp_path / "s.pt", options=("head=half",), cascades=1, clip=CLIP, n_gen=n_gen,
        teacher=teacher_store, **TINY,
    )  # fmt: skip
    train_student.train(settings)
    assert first_moment(settings.out) == pytest.approx(0.1 * CLIP, rel=1e-3)


@pytest.fixture
def teacher_store(tiny_brains, tmp_path) -> Path:
    """Deformations of nothing between the training subjects."""
    from LDRCore.distillation.teacher_store import TeacherStoreWriter, pair_key

    meta = {"shape": [32, 32, 32], "spacing_mm": 2.0}
    with TeacherStoreWriter(tmp_path / "t.h5", (16, 16, 16), meta) as writer:
        writer.write(pair_key("s0", "s1"), np.zeros((3, 16, 16, 16)))
        return writer.finish()


def test_a_stems_gradient_is_clipped(tiny_brains, tmp_path):
    settings = train_stem.StemSettings(
        data=tiny_brains, out=tmp_path / "stem.pt", steps=1, batch=1, cache=None, device="cpu", clip=CLIP
    )
    train_stem.train(settings)
    assert first_moment(settings.out) == pytest.approx(0.1 * CLIP, rel=1e-3)
