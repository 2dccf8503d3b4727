"""Threads that register different images at once, with shared models and caches, get what one thread gets."""

from __future__ import annotations

import sys
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import SimpleITK as sitk
import torch

import LDRCore
from LDRCore import sampling
from LDRCore.cpu import convolution
from LDRCore.pipeline import model as model_file
from LDRCore.sampling import numba_check
from LDRCore.transforms import separable, spatial


@pytest.fixture(autouse=True)
def one_torch_thread_and_many_switches():
    """Python changes from thread to thread after nearly every instruction."""
    interval, threads = sys.getswitchinterval(), torch.get_num_threads()
    torch.set_num_threads(1)
    sys.setswitchinterval(1e-6)
    yield
    sys.setswitchinterval(interval)
    torch.set_num_threads(threads)


def assert_same_in_threads(tasks: list[Callable[[], list]], threads: int, repeats: int, torch_threads: int = 1) -> None:
    """Run the tasks in turn in several threads at once; each time the result must be that of one thread alone."""
    expected = [task() for task in tasks]
    together = threading.Barrier(threads)

    def work(first: int) -> list[str]:
        torch.set_num_threads(torch_threads)
        together.wait()
        wrong = []
        for n in range(first, first + repeats):
            values = tasks[n % len(tasks)]()
            for a, b in zip(values, expected[n % len(tasks)], strict=True):
                if not np.array_equal(np.asarray(a), np.asarray(b), equal_nan=True):
                    wrong.append(f"task {n % len(tasks)} in repeat {n - first} of thread {first}")
        return wrong

    with ThreadPoolExecutor(threads) as pool:
        wrong = [text for found in pool.map(work, range(threads)) for text in found]
    assert wrong == []


def images(*shape: int) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(sum(shape))
    return torch.rand(1, 1, *shape, generator=generator), torch.rand(1, 1, *shape, generator=generator)


@pytest.mark.parametrize("threads", [2, 4])
def test_one_model_at_two_sizes(threads, backend):
    cascade = LDRCore.load_model("brain-t1-small").cascade

    def run(moving: torch.Tensor, fixed: torch.Tensor) -> list:
        with torch.no_grad():
            output = cascade.dense(moving, fixed)
        return [output.displacement, *output.composed]

    pairs = [images(48, 48, 32), images(32, 64, 48)]
    assert_same_in_threads([lambda pair=pair: run(*pair) for pair in pairs], threads, 8)


@pytest.mark.parametrize("threads", [2, 4])
def test_networks_in_their_layout(threads):
    cascade = LDRCore.load_model("brain-t1-small").cascade
    pairs = [images(32, 32, 16), images(16, 32, 48)]

    def run(moving: torch.Tensor, fixed: torch.Tensor) -> list:
        with torch.no_grad():
            displacements = [network.predict(moving, fixed).float() for network in cascade.networks]
            return [*cascade.stem.predict(moving, fixed), *displacements]

    assert_same_in_threads([lambda pair=pair: run(*pair) for pair in pairs], threads, 30)


def sample_everything(shape: tuple[int, int, int]) -> list:
    generator = torch.Generator().manual_seed(1)
    image = torch.rand(*shape, generator=generator)
    image[:3] = 0
    field = torch.rand(3, *shape, generator=generator)
    coarse = 3 * torch.rand(3, 6, 7, 8, generator=generator)
    to_field = np.diag([*(4 / n for n in shape), 1])
    oblique = to_field.copy()
    oblique[0, 1] = 0.05
    content = sampling.content_box(image, 0.0)
    return [
        sampling.at_points(image[None], 2 * field + 3),
        sampling.displaced(image[None], field),
        sampling.composed(field, field),
        sampling.on_lattice(image, shape, np.eye(4), coarse, to_field, content=content),
        sampling.on_lattice(image, shape, np.eye(4), coarse, oblique),
        separable.shrink(image[None, None], [n // 2 for n in shape]),
        spatial.invert(0.3 * field[None])[0],
    ]


SAMPLINGS = [lambda shape=shape: sample_everything(shape) for shape in ((20, 21, 22), (24, 18, 26), (16, 30, 14))]


@pytest.mark.parametrize("threads", [2, 4])
def test_sampling(threads, backend):
    assert_same_in_threads(SAMPLINGS, threads, 12)


@pytest.mark.parametrize("backend", ["numba"], indirect=True)
@pytest.mark.parametrize("torch_threads", [2, 3])
def test_compiled_loops_that_share_threads(torch_threads, backend):
    loops = [lambda task=task: task()[:5] for task in SAMPLINGS]  # not matrix products, which round by threads
    assert_same_in_threads(loops, 4, 12, torch_threads)


def ellipsoid(size: int, centre: tuple[int, int, int], radii: tuple[int, int, int]) -> sitk.Image:
    k, j, i = np.meshgrid(*[np.arange(size)] * 3, indexing="ij")
    inside = sum(((x - c) / r) ** 2 for x, c, r in zip((k, j, i), centre, radii, strict=True)) < 1
    image = sitk.GetImageFromArray(np.where(inside, 400 + 60 * np.sin(k / 3) + 5 * i, 0).astype(np.int16))
    image.SetSpacing((3.0, 3.0, 3.0))
    return image


def registrations() -> list[Callable[[], list]]:
    """Of two pairs of different sizes."""
    small = ellipsoid(36, (17, 18, 19), (10, 13, 11)), ellipsoid(36, (18, 16, 17), (11, 11, 10))
    large = ellipsoid(48, (23, 24, 25), (14, 17, 15)), ellipsoid(44, (22, 20, 21), (15, 15, 14))

    def run(fixed: sitk.Image, moving: sitk.Image) -> list:
        result = LDRCore.register(fixed, moving, cascades=2, inverse=True)
        pictures = result.warped, result.displacement_field, result.jacobian_determinant
        return [*map(sitk.GetArrayFromImage, pictures), result.report["similarity"]["after"]]

    return [lambda: run(*small), lambda: run(*large)]


@pytest.mark.parametrize("threads", [2, 4])
def test_registrations(threads, backend):
    assert_same_in_threads(registrations(), threads, 2)


@pytest.mark.parametrize("threads", [2, 4])
def test_registrations_that_are_the_first_of_a_process(threads):
    """Nothing is kept yet: models, what is known of oneDNN and numba, matrices."""
    tasks = registrations()
    forget = (model_file._load, convolution._onednn, separable._box_average, numba_check.load)
    expected = [task() for task in tasks]
    together = threading.Barrier(threads, action=lambda: [cached.cache_clear() for cached in forget])

    def work(n: int) -> bool:
        torch.set_num_threads(1)
        together.wait()
        values = tasks[n % 2]()
        return all(np.array_equal(a, b) for a, b in zip(values, expected[n % 2], strict=True))

    with ThreadPoolExecutor(threads) as pool:
        assert all(pool.map(work, range(threads)))
