r"""Train the dense cascades on brain pairs behind an affine map as imperfect as the stem's.

The two runs behind the shipped weights:

    python -m Training.train_student --data DIR --cascades 1 --steps 2200 --lr 5e-4 --dice 1.5 --out runs/one.pt
    python -m Training.train_student --data DIR --cascades 3 --steps 4000 --lr 4e-4 --dice 1.5 --init runs/one.pt \
        --out runs/three.pt

The affine map is a least-squares fit of label centroids, disturbed at random by up to 4 degrees, 4 mm and 4 %.
Loss at half resolution after every cascade: local NCC, soft Dice of the training labels, smoothness, folding.
Every cascade is supervised, so the model is usable with fewer cascades than it was trained with. Checkpoints hold
everything that is needed to go on; a run that is started again with the same arguments continues.
"""

from __future__ import annotations

import argparse
import math
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import torch

from LDRCore import geometry, losses, metrics, spatial
from LDRCore.models.cascade import Cascade
from LDRCore.models.ldr import LDR
from Training import train_stem
from Training.data import augment, views
from Training.data.scans import open_scans

SHAPE, SPACING_MM = (80, 96, 80), 2.0
HALF = tuple(n // 2 for n in SHAPE)


class Pair:
    """A fixed view on its window and a moving view behind the stem's affine map.

    Attributes:
        fixed, moving: (1, 1, *SHAPE) images on the fixed window; fixed_half, moving_half: (1, 1, *HALF).
        half_to_moving: (4, 4) voxel of the half-resolution window -> voxel of the moving subject.
        full_to_moving: the same for the full window.
        fixed_labels_half, fixed_labels_full: labels of the fixed subject at the window's points.
        moving_labels: label volume of the moving subject.
    """

    def __init__(self, fixed: views.View, moving: views.View, affine: np.ndarray, centre_mm: np.ndarray) -> None:
        grid = views.grid_matrix(SHAPE, SPACING_MM, centre_mm)
        half_to_full = np.diag([(n - 1) / (h - 1) for n, h in zip(SHAPE, HALF, strict=True)] + [1.0])
        self.fixed = views.sample_image(fixed, grid, SHAPE)
        self.moving = views.sample_image(moving, affine @ grid, SHAPE)
        self.fixed_half = views.sample_image(fixed, grid @ half_to_full, HALF)
        self.moving_half = views.sample_image(moving, affine @ grid @ half_to_full, HALF)
        self.full_to_moving = moving.to_subject @ affine @ grid
        self.half_to_moving = self.full_to_moving @ half_to_full
        fixed_full = fixed.to_subject @ grid
        assert fixed.subject.labels is not None
        assert moving.subject.labels is not None
        self.fixed_labels_full = nearest(fixed.subject.labels, fixed_full, SHAPE)
        self.fixed_labels_half = nearest(fixed.subject.labels, fixed_full @ half_to_full, HALF)
        self.moving_labels = moving.subject.labels

    def dice(self, displacement: torch.Tensor | None) -> float:
        """Mean Dice over the fixed labels in the window, the moving ones pulled by a full-size displacement."""
        pulled = nearest(self.moving_labels, self.full_to_moving, SHAPE, displacement)
        return metrics.mean_dice(pulled.numpy(), self.fixed_labels_full.numpy())


def positions(matrix: np.ndarray, shape: tuple[int, ...], displacement: torch.Tensor | None = None) -> torch.Tensor:
    """(3, N): where a window's points, moved by a displacement in the window's voxels, lie in a subject (voxels)."""
    m = torch.from_numpy(matrix[:3]).float()
    where = spatial.identity_grid(shape)
    if displacement is not None:
        where = where + displacement
    return m[:, :3] @ where.reshape(3, -1) + m[:, 3:]


def nearest(labels: torch.Tensor, matrix: np.ndarray, shape, displacement: torch.Tensor | None = None) -> torch.Tensor:
    """(N,) int64 labels at a window's points, 0 outside the volume."""
    where = positions(matrix, shape, displacement).round().long()
    size = torch.tensor(labels.shape).view(3, 1)
    inside = ((where >= 0) & (where < size)).all(0)
    where = where.clamp_min(0).minimum(size - 1)
    found = labels[where[0], where[1], where[2]].long()
    return torch.where(inside, found, 0)


def centroid_affine(fixed: views.View, moving: views.View, known_fixed, known_moving) -> np.ndarray:
    """4x4, mm of the fixed view -> mm of the moving view: least squares over the centroids of common labels."""
    both = (known_fixed[1] > 0) & (known_moving[1] > 0)
    x = train_stem.points_mm(fixed, known_fixed[0][both])
    y = train_stem.points_mm(moving, known_moving[0][both])
    weight = np.minimum(known_fixed[1], known_moving[1])[both] ** 0.25
    return geometry.fit_affine(x, y, weight)


def training_pair(subjects: list[views.Subject], known: list, rng: np.random.Generator) -> Pair:
    """A random pair of training subjects behind an imperfect affine map, its window about the brain."""
    i, j, fixed, moving = train_stem.random_pair(subjects, rng)
    affine = centroid_affine(fixed, moving, known[i], known[j]) @ views.random_pose(rng, 4, 4, 0.04, 0.02)
    centre = train_stem.points_mm(fixed, known[i][0][known[i][1] > 0]).mean(0)
    return Pair(fixed, moving, affine, centre + rng.uniform(-10, 10, 3) * (4 if rng.random() < 0.1 else 1))


def validate(model: Cascade, pairs: list[Pair]) -> tuple[list[float], float]:
    """Mean Dice of affine and of every number of cascades (nearest labels, 2 mm), and the folding fraction."""
    rows, folds = [], []
    for pair in pairs:
        with torch.no_grad():
            output = model(pair.moving, pair.fixed)
        row = [pair.dice(None)]
        for composed in output.composed:
            row.append(pair.dice(spatial.upsample(composed, SHAPE)))
        rows.append(row)
        folds.append(spatial.folding_fraction(output.displacement))
    return [round(float(x), 4) for x in np.mean(rows, 0)], float(np.mean(folds))


def loss_of(model: Cascade, pair: Pair, rng: np.random.Generator, weights: dict[str, float], n_labels: int):
    """Total loss of one pair and its terms, summed over the cascades with growing weight."""
    fixed, moving = (augment.intensity(x, rng) for x in (pair.fixed, pair.moving))
    output = model(moving, fixed)
    count = len(output.composed)
    shares = [1.0] if count == 1 else [0.5] * (count - 1) + [1.0]
    terms = dict.fromkeys(("ncc", "dice", "smooth", "fold"), 0.0)
    total = torch.zeros(())
    stride = int(rng.integers(1, 3))  # labels at full and at half resolution in turn: precise, and far-reaching
    for share, composed, increment in zip(shares, output.composed, output.increments, strict=True):
        ncc = losses.local_ncc(spatial.warp(pair.moving_half, composed), pair.fixed_half)
        where = positions(pair.half_to_moving, HALF, composed)
        overlap = losses.label_overlap(where, pair.moving_labels, pair.fixed_labels_half, stride, n_labels=n_labels)
        smooth = losses.smoothness(composed) + 0.5 * losses.smoothness(increment)
        fold = losses.folding_penalty(composed)
        parts = {"ncc": ncc, "dice": overlap, "smooth": smooth, "fold": fold}
        total = total + share * sum(weights[k] * v for k, v in parts.items())
        terms = {k: v.item() for k, v in parts.items()}
    return total, terms


def train(args: argparse.Namespace) -> None:
    """Run or resume."""
    torch.manual_seed(args.seed)
    data, val = (open_scans(args.data, split, cache=args.cache) for split in ("train", "val"))
    subjects, val_subjects = (views.make_subjects(d) for d in (data, val))
    known, val_known = ([train_stem.centroids(scan.labels, d.n_labels) for scan in d] for d in (data, val))
    model = Cascade([LDR(head="half") for _ in range(args.cascades)], multiplier=1.0, detach_images=True)
    if args.init:
        state = torch.load(args.init, weights_only=True)["model"]
        last = max(int(k.split(".")[1]) for k in state)
        for k, network in enumerate(model.networks):  # later cascades start from the last one trained
            prefix = f"networks.{min(k, last)}."
            network.load_state_dict({n[len(prefix) :]: v for n, v in state.items() if n.startswith(prefix)})
    model = model.to(memory_format=torch.channels_last_3d)
    optimizer = torch.optim.Adam(model.parameters(), lr=args.lr)
    start, seconds = 0, 0.0
    if args.out.exists():
        state = torch.load(args.out, weights_only=True)
        model.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
        start, seconds = state["step"], state["seconds"]
    val_rng = np.random.default_rng(7)
    val_pairs = [training_pair(val_subjects, val_known, val_rng) for _ in range(args.val_pairs)]
    weights = {"ncc": 1.0, "dice": args.dice, "smooth": args.smooth, "fold": args.fold}
    running: list[list[float]] = []

    def prepare(step: int) -> Pair:
        return training_pair(subjects, known, np.random.default_rng((args.seed, step, 0)))

    background = ThreadPoolExecutor(1)  # the next pair is made while this one is learned from
    upcoming = background.submit(prepare, start)
    began = time.time()
    for step in range(start, args.steps):
        rng = np.random.default_rng((args.seed, step, 1))
        for group in optimizer.param_groups:
            ramp = min(1, (step + 1) / 200)
            group["lr"] = args.lr * ramp * max(0.01, 0.5 * (1 + math.cos(math.pi * step / args.steps)))
        pair = upcoming.result()
        upcoming = background.submit(prepare, step + 1)
        loss, terms = loss_of(model, pair, rng, weights, data.n_labels)
        if not torch.isfinite(loss):
            raise FloatingPointError(f"the loss became {loss.item()} at step {step}; terms {terms}")
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 5.0)
        optimizer.step()
        running.append(list(terms.values()))
        last_step = step + 1 == args.steps
        if (step + 1) % 100 == 0 or last_step:
            now = seconds + time.time() - began
            mean = dict(zip(terms, np.mean(running, 0).round(4).tolist(), strict=True))
            print(f"step {step + 1}/{args.steps}  {now:.0f} s  {mean}", flush=True)
            running.clear()
            state = {"model": model.state_dict(), "optimizer": optimizer.state_dict()}
            torch.save(state | {"step": step + 1, "seconds": now}, args.out.with_suffix(".part"))
            args.out.with_suffix(".part").replace(args.out)
        if (step + 1) % args.val_every == 0 or last_step:
            scores, folds = validate(model, val_pairs)
            print(f"  val Dice affine, 1.. cascades: {scores}  folding {100 * folds:.3f} %", flush=True)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="folder with manifest.csv")
    parser.add_argument("--cache", type=Path, default=Path(".cache"))
    parser.add_argument("--init", type=Path, help="checkpoint to start from, with as many or fewer cascades")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--cascades", type=int, default=3)
    parser.add_argument("--steps", type=int, default=8000)
    parser.add_argument("--lr", type=float, default=4e-4)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--dice", type=float, default=1.0, help="weight of the label overlap")
    parser.add_argument("--smooth", type=float, default=1.0, help="weight of the smoothness")
    parser.add_argument("--fold", type=float, default=10.0, help="weight of the folding penalty")
    parser.add_argument("--val-every", type=int, default=1000)
    parser.add_argument("--val-pairs", type=int, default=8)
    arguments = parser.parse_args()
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    train(arguments)
