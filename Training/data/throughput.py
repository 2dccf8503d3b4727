r"""How long making a sample takes, beside learning from it: augmentation must not starve the network.

    python -m Training.data.throughput                       # a made-up head, 120 x 120 x 90 voxels of 2 mm
    python -m Training.data.throughput --data DIR --device cuda

One run on one device prints milliseconds, and the share of one forward and backward pass of one LDR network on the
same window (a training step with three cascades takes three of them, and its losses). A pair that takes less than a
step costs nothing where it is made while the previous one is learned from, as the training scripts do.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch

from LDRCore import geometry
from LDRCore.models.ldr import LDR
from LDRCore.transforms import spatial
from Training.data import augmentation, synthesis
from Training.data.scan_set import Scan
from Training.data.scans import open_scans
from Training.data.subject_views import (
    Subject,
    grid_matrix,
    make_subject,
    make_view,
    random_pose,
    sample_image,
    synthetic,
)

SHAPE, SPACING_MM = (80, 96, 80), 2.0


def made_up_scan(name: str, shape: tuple[int, int, int] = (120, 120, 90), n_labels: int = 140) -> Scan:
    """An ellipsoid of `n_labels` cells within a head, as heavy to process as a real one."""
    rng = np.random.default_rng(len(name))
    grid = np.stack(np.meshgrid(*[np.linspace(-1, 1, n) for n in shape], indexing="ij"), -1).astype(np.float32)
    radius = np.linalg.norm(grid, axis=-1)
    seeds = rng.uniform(-0.6, 0.6, (n_labels, 3)).astype(np.float32)
    cell = np.argmax(2 * grid.reshape(-1, 3) @ seeds.T - (seeds**2).sum(1), axis=1).reshape(shape) + 1
    labels = np.where(radius < 0.65, cell, 0).astype(np.uint8)
    image = np.where(radius < 0.85, 60 + cell, 0) + rng.integers(0, 20, shape)
    to_lps = geometry.Grid((0.0, 0.0, 0.0), (SPACING_MM,) * 3, shape).to_lps
    return Scan(name, image.astype(np.uint8), labels, None, SPACING_MM, to_lps)


def milliseconds(work: Callable[[], object], device: torch.device, repeats: int) -> float:
    """Median time of a call, the device's queue emptied before and after."""
    times = []
    for _ in range(repeats + 1):
        _finish(device)
        began = time.perf_counter()
        work()
        _finish(device)
        times.append(1000 * (time.perf_counter() - began))
    return float(np.median(times[1:]))


def _finish(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def measure(
    fixed: Scan, moving: Scan, device: torch.device, repeats: int = 10, shape: tuple[int, int, int] = SHAPE
) -> dict[str, float]:
    """Milliseconds of every step of a sample, of whole pairs, and of one network ("LDR forward + backward")."""
    rng = np.random.default_rng(0)
    grid = grid_matrix(shape, SPACING_MM)
    pose = random_pose(rng, 12, 4, 0.05)
    subjects = [make_subject(scan, device=device) for scan in (fixed, moving)]
    view = make_view(subjects[1], pose, rng, stripped=False, cut=True)
    field = augmentation.free_form(rng, shape, device=device)
    window = sample_image(view, grid, shape)
    tissues = subjects[1].tissues

    def side(subject: Subject, free_form: torch.Tensor | None) -> torch.Tensor:
        seen = make_view(subject, pose, rng, stripped=subject.brain is not None, cut=subject.brain is not None)
        return augmentation.intensity(sample_image(seen, grid, shape, free_form), rng)

    def pair() -> object:
        return side(subjects[0], None), side(subjects[1], augmentation.free_form(rng, shape, device=device))

    def pair_from_labels() -> object:
        made = [synthetic(subject, rng) for subject in subjects]
        return side(made[0], None), side(made[1], augmentation.free_form(rng, shape, device=device))

    network = LDR(head="half").to(device=device, memory_format=torch.channels_last_3d)

    def learn() -> None:
        network.zero_grad()
        displacement = spatial.upsample(network(window, window), shape)
        (spatial.warp(window, displacement) - window).square().mean().backward()

    steps: dict[str, Callable[[], object]] = {
        "scan to device": lambda: make_subject(moving, device=device),
        "pose": lambda: random_pose(rng, 12, 4, 0.05),
        "view (strip, cut, normalise)": lambda: make_view(subjects[1], pose, rng, stripped=True, cut=True),
        "sample the window": lambda: sample_image(view, grid, shape),
        "free-form field": lambda: augmentation.free_form(rng, shape, device=device),
        "sample through the field": lambda: sample_image(view, grid, shape, field),
        "gamma, gain, bias, blur, noise": lambda: augmentation.intensity(window, rng),
        "blur alone": lambda: augmentation.blur(window, (1.0, 1.0, 1.0)),
        "bias field alone": lambda: augmentation.bias_field(rng, shape, 0.1, device),
        "noise alone": lambda: augmentation.noise(rng, window.shape, device),
        "a whole pair": pair,
    }
    if tissues is not None:
        steps["synthesise one image"] = lambda: synthesis.synthesise(rng, tissues)
        steps["a whole synthesised pair"] = pair_from_labels
    steps["LDR forward + backward"] = learn
    return {name: milliseconds(work, device, repeats) for name, work in steps.items()}


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, help="any data set (default: made-up scans)")
    parser.add_argument("--split", default="train")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--repeats", type=int, default=10)
    a = parser.parse_args()
    torch.set_num_threads(a.threads)
    if a.data:
        scans = open_scans(a.data, a.split)
        fixed, moving = scans[0], scans[1]
    else:
        fixed, moving = made_up_scan("one"), made_up_scan("other")
    found = measure(fixed, moving, torch.device(a.device), a.repeats)
    step = found["LDR forward + backward"]
    print(f"scan {moving.shape}, window {SHAPE}, {a.device}, {a.threads} threads")
    print("| work | ms | share of LDR forward + backward |\n|---|---|---|")
    for name, ms in found.items():
        print(f"| {name} | {ms:.2f} | {ms / step:.3f} |")


if __name__ == "__main__":
    main()
