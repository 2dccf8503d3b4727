"""What `register` computes does not depend on the caller's torch modes and defaults, nor spoils it for a later call."""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import SimpleITK as sitk
import torch

import LDRCore
from LDRCore import sampling
from LDRCore.cpu import convolution, layout
from LDRCore.models import weights
from LDRCore.pipeline import model as model_file
from LDRCore.refinement.optimiser import Settings, optimise
from LDRCore.refinement.similarity import LocalCorrelation
from LDRCore.torch_context import own_torch_context
from LDRCore.transforms import inversion, separable, spatial

ROOT = Path(__file__).parents[2]
OPTIONS = {"cascades": 2, "inverse": True}


@contextlib.contextmanager
def default_dtype(dtype: torch.dtype):
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


@contextlib.contextmanager
def default_device(device: str):
    torch.set_default_device(device)
    try:
        yield
    finally:
        torch.set_default_device(None)


@contextlib.contextmanager
def everything():
    with torch.inference_mode(), torch.autocast("cpu", torch.bfloat16), default_dtype(torch.float64):
        torch.set_default_device("meta")
        try:
            yield
        finally:
            torch.set_default_device(None)


CONTEXTS = {
    "inference_mode": torch.inference_mode,
    "no_grad": torch.no_grad,
    "enable_grad": torch.enable_grad,
    "autocast": lambda: torch.autocast("cpu", torch.bfloat16),
    "float64": lambda: default_dtype(torch.float64),
    "float16": lambda: default_dtype(torch.float16),
    "meta": lambda: default_device("meta"),
    "cpu": lambda: default_device("cpu"),
    "torch.device": lambda: torch.device("meta"),
    "all of them": everything,
}


@pytest.fixture(params=CONTEXTS.values(), ids=CONTEXTS)
def context(request):
    return request.param


@pytest.fixture(params=["inference_mode", "autocast", "all of them"])
def strong_context(request):
    """Of those that a registration could notice most: for what takes long."""
    return CONTEXTS[request.param]


@pytest.fixture(scope="module")
def pair() -> tuple[sitk.Image, sitk.Image]:
    """Two irregular ellipsoids, one moved and stretched against the other, on grids of their own."""
    images = []
    for number, (shape, centre, radii) in enumerate(
        [((44, 48, 40), (21, 24, 19), (14, 17, 12)), ((40, 50, 46), (20, 23, 24), (13, 18, 14))]
    ):
        k, j, i = np.meshgrid(*[np.arange(n) for n in shape], indexing="ij")
        inside = sum(((x - c) / r) ** 2 for x, c, r in zip((k, j, i), centre, radii, strict=True)) < 1
        z, y, x = ((n - c) / r for n, c, r in zip((k, j, i), centre, radii, strict=True))
        values = np.where(inside, 400 + 60 * np.sin(5 * z) * np.cos(4 * y) + 80 * x, 0)
        image = sitk.GetImageFromArray(values.astype(np.int16))
        image.SetSpacing((3.0, 2.8 + 0.2 * number, 3.0))
        image.SetOrigin((5.0 * number, -40.0, 20.0))
        images.append(image)
    return images[0], images[1]


def forget_everything() -> None:
    """As in a fresh process: nothing is kept between calls."""
    for cached in (model_file._load, convolution._onednn, separable._box_average):
        cached.cache_clear()


def register(pair, **options) -> LDRCore.RegistrationResult:
    return LDRCore.register(*pair, **{**OPTIONS, **options})


def numbers(result: LDRCore.RegistrationResult) -> dict[str, np.ndarray]:
    """Everything that was computed."""
    report = {k: v for k, v in result.report.items() if k not in ("times_s", "versions")}
    return {
        "warped": sitk.GetArrayFromImage(result.warped),
        "field": sitk.GetArrayFromImage(result.displacement_field),
        "jacobian": sitk.GetArrayFromImage(result.jacobian_determinant),
        "affine": np.array(result.affine.GetParameters()),
        "inverse": sitk.GetArrayFromImage(
            LDRCore.geometry.displacement_field_image(result.inverse_transform, result.warped)
        ),
        "report": np.array(str(report)),
    }


def assert_same(a: dict[str, np.ndarray], b: dict[str, np.ndarray]) -> None:
    assert [name for name in a if not np.array_equal(a[name], b[name])] == []


@pytest.fixture(scope="module")
def expected(pair) -> dict[str, dict[str, np.ndarray]]:
    """By backend, in torch's default state."""
    values = {}
    for name in ("torch", "numba"):
        with sampling.forced(name):
            values[name] = numbers(register(pair))
    return values


def test_the_pair_needs_a_deformation(expected):
    assert np.abs(expected["torch"]["field"]).max() > 3
    assert expected["torch"]["jacobian"].std() > 0.01


def test_the_first_registration_and_a_later_one_give_the_same(pair, expected, context, backend):
    forget_everything()
    with context():
        first = register(pair)
        jacobian = sitk.GetArrayFromImage(first.jacobian_determinant)  # computed when first asked for: here
    assert_same(numbers(first), expected[backend])
    assert np.array_equal(jacobian, expected[backend]["jacobian"])
    assert_same(numbers(register(pair)), expected[backend])


def test_what_is_asked_of_a_result_later_gives_the_same(pair, expected, strong_context, backend):
    result = register(pair)
    with strong_context():
        values = numbers(result)
    assert_same(values, expected[backend])


def test_refining_gives_the_same(pair, strong_context):
    forget_everything()
    plain = numbers(register(pair, refine_steps=2))
    forget_everything()
    with strong_context():
        within = numbers(register(pair, refine_steps=2))
    assert_same(within, plain)
    assert not np.array_equal(plain["field"], numbers(register(pair))["field"])


def test_a_nonlinear_initial_transform_gives_the_same(pair, strong_context):
    initial = register(pair).transform
    plain = numbers(register(pair, initial=initial, cascades=1))
    forget_everything()
    with strong_context():
        within = numbers(register(pair, initial=initial, cascades=1))
    assert_same(within, plain)


def test_inverting_gives_the_same(pair, strong_context):
    transform = register(pair).transform
    sampled = sitk.CompositeTransform([sitk.TranslationTransform(3, (1.0, 2.0, 3.0)), transform])

    def inverses() -> list[np.ndarray]:
        measured = [inversion.invert_transform(t, pair[0]) for t in (transform, sampled)]
        fields = [LDRCore.geometry.displacement_field_image(inverse, pair[0]) for inverse, _ in measured]
        return [*(sitk.GetArrayFromImage(f) for f in fields), *(np.array(c.max) for _, c in measured)]

    plain = inverses()
    with strong_context():
        within = inverses()
    assert all(np.array_equal(a, b) for a, b in zip(within, plain, strict=True))


def test_a_loaded_model_is_not_spoilt(context):
    forget_everything()
    with context():
        model = LDRCore.load_model("brain-t1-small")
    again = LDRCore.load_model("brain-t1-small")
    assert again is model
    network = model.cascade.networks[0]
    assert isinstance(network, layout.LDROnCPU)
    for layer in network._decoder:
        assert (layer.weight.is_inference(), layer.weight.device.type) == (False, "cpu")
        assert layer.weight.dtype == network.precision


@pytest.mark.parametrize("name", [n for n in CONTEXTS if n != "no_grad"])
def test_a_loaded_cascade_can_be_trained(name):
    with CONTEXTS[name]():
        cascade = weights.load_cascade("brain-t1-small")
    assert {p.dtype for p in cascade.parameters()} == {torch.float32}
    assert {p.device.type for p in cascade.parameters()} == {"cpu"}
    moving = torch.rand(1, 1, 32, 32, 32, generator=torch.Generator().manual_seed(0))
    cascade.dense(moving, moving.flip(2)).displacement.square().sum().backward()
    assert all(p.grad is not None for network in cascade.networks for p in network.parameters())


def test_kept_tensors_of_functions_can_be_trained_through(context):
    """`shrink` keeps nothing that a mode of its first caller could spoil."""
    image = torch.rand(1, 1, 12, 12, 12, generator=torch.Generator().manual_seed(0))
    for dtype in (torch.float32, torch.float64):
        forget_everything()
        expected = separable.shrink(image.to(dtype), (6, 6, 6))
        forget_everything()
        with context(), torch.autocast("cpu", enabled=False):
            assert torch.equal(separable.shrink(image.to(dtype), (6, 6, 6)), expected)
        trainable = image.to(dtype, copy=True).requires_grad_()
        separable.shrink(trainable, (6, 6, 6)).sum().backward()
        assert trainable.grad.shape == image.shape


@pytest.mark.parametrize("name", ["float64", "meta", "cpu", "torch.device", "float16"])
def test_refine_alone_makes_its_tensors_on_the_images_device(name):
    generator = torch.Generator().manual_seed(0)
    moving, fixed = torch.rand(2, 16, 16, 16, generator=generator)
    start = torch.zeros(3, 16, 16, 16)

    def refined() -> torch.Tensor:
        similarity = LocalCorrelation(lambda u: spatial.warp(moving[None, None], u[None])[0, 0], fixed)
        return optimise(start, similarity, Settings(2)).displacement

    plain = refined()
    with CONTEXTS[name]():
        within = refined()
    assert torch.equal(plain, within)
    assert not torch.equal(plain, start)


def test_the_own_context_holds_in_any_other_and_leaves_it_again(context):
    def state() -> tuple:
        return (
            torch.is_inference_mode_enabled(),
            torch.is_grad_enabled(),
            torch.is_autocast_enabled("cpu"),
            torch.get_default_dtype(),
            torch.get_default_device(),
        )

    outside = state()
    with context():
        within = state()
        with own_torch_context():
            assert state()[:3] == (False, False, False)
        assert state() == within
    assert state() == outside


def test_importing_changes_neither_the_environment_nor_torch():
    code = """
import os
before = dict(os.environ)
import LDRCore, LDRCore.registration, LDRCore.pipeline.model, LDRCore.sampling, LDRCore.cpu.layout, LDRCore.cli.main
import torch
assert dict(os.environ) == before, set(os.environ.items()) ^ set(before.items())
import SimpleITK as sitk
import LDRCore.pipeline.dense, LDRCore.report
threads = torch.get_num_threads()
assert LDRCore.sampling.backend_name() in ("torch", "numba")
image = sitk.Image(32, 32, 32, sitk.sitkInt16) + 1
image[16, 16, 16] = 7
LDRCore.register(image, image, cascades=1)
assert dict(os.environ) == before, set(os.environ.items()) ^ set(before.items())
state = (torch.is_grad_enabled(), torch.get_default_dtype(), str(torch.get_default_device()), torch.get_num_threads())
assert state == (True, torch.float32, "cpu", threads), state
"""
    unset = ("LDR_NUMBA", "GOMP_SPINCOUNT", "OMP_WAIT_POLICY")
    environment = {k: v for k, v in os.environ.items() if k not in unset}
    subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT, env=environment)


def test_the_program_sets_what_a_library_must_not():
    code = """
import os, sys
from LDRCore.cli.main import script
sys.argv = ["ldr", "models"]
assert script() == 0
print(os.environ["LDR_NUMBA"], os.environ["GOMP_SPINCOUNT"], file=sys.stderr)
"""
    environment = {k: v for k, v in os.environ.items() if k not in ("LDR_NUMBA", "GOMP_SPINCOUNT", "OMP_WAIT_POLICY")}
    done = subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT, env=environment, capture_output=True)
    assert done.stderr.split() == [b"0", b"3000"]
    kept = {**environment, "LDR_NUMBA": "1", "GOMP_SPINCOUNT": "5"}
    done = subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT, env=kept, capture_output=True)
    assert done.stderr.split() == [b"1", b"5"]
