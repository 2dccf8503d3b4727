"""Train the affine stem on label centroids: two views of two subjects in, the affine map between them out.

    python -m Training.train_stem --data DIR --out runs/stem.pt

Supervision: the centroids of the labels that both subjects share (train split only). The stem sees 4 mm images on a
64^3 grid about the fixed image's foreground centre; it is trained to be applied twice, the second time on what the
first left over.
"""

from __future__ import annotations

import argparse
import math
import time
from pathlib import Path

import numpy as np
import torch

from LDRCore.models.affine import AffineLDR
from Training.data import augment, views
from Training.data.scans import ScanSet, open_scans

SHAPE, SPACING_MM = (64, 64, 64), 4.0


def centroids(labels: np.ndarray, n_labels: int) -> tuple[np.ndarray, np.ndarray]:
    """(n_labels, 3) centroid voxel and (n_labels,) size of every label; size 0 where absent."""
    flat = labels.reshape(-1)
    size = np.bincount(flat, minlength=n_labels).astype(float)
    lines = np.ix_(*[np.arange(n) for n in labels.shape])
    sums = [
        np.bincount(flat, weights=np.broadcast_to(line, labels.shape).reshape(-1), minlength=n_labels) for line in lines
    ]
    size[0] = 0
    return np.stack(sums, 1) / np.maximum(size, 1)[:, None], size


def random_pair(subjects: list[views.Subject], rng: np.random.Generator) -> tuple[int, int, views.View, views.View]:
    """Two views of two different subjects with realistic combinations of skull, field of view and pose."""
    fixed, moving = (int(n) for n in rng.choice(len(subjects), 2, replace=False))
    strip = bool(rng.random() < 0.5)
    strip_moving = strip if rng.random() < 0.9 else not strip
    hard = rng.random() < 0.7
    fixed_pose = views.random_pose(rng, 12, 4, 0.05)
    moving_pose = views.random_pose(rng, 18 if hard else 6, 24 if hard else 8, 0.1, 0.05)
    fixed_view = views.make_view(subjects[fixed], fixed_pose, rng, stripped=strip, cut=rng.random() < 0.5)
    moving_view = views.make_view(subjects[moving], moving_pose, rng, stripped=strip_moving, cut=rng.random() < 0.5)
    return fixed, moving, fixed_view, moving_view


def points_mm(view: views.View, voxels: np.ndarray) -> np.ndarray:
    """Subject voxels (N, 3) -> mm of the view."""
    inverse = np.linalg.inv(view.to_subject)
    return voxels @ inverse[:3, :3].T + inverse[:3, 3]


def train(data: ScanSet, out: Path, steps: int, batch: int, seed: int, lr: float) -> None:
    """Run or resume; the checkpoint holds everything that is needed to go on."""
    torch.manual_seed(seed)
    stem = AffineLDR().to(memory_format=torch.channels_last_3d)
    optimizer = torch.optim.Adam(stem.parameters(), lr=lr)
    start, seconds = 0, 0.0
    if out.exists():
        state = torch.load(out, weights_only=True)
        stem.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
        start, seconds = state["step"], state["seconds"]
    known = []  # centroids in voxels of the 4 mm subject
    for scan in data:
        where, size = centroids(scan.labels, data.n_labels)
        known.append(((where - 0.5) / 2, size))
    subjects = views.make_subjects(data, pool=2)
    grid = views.grid_matrix(SHAPE, SPACING_MM)
    running: list[list[float]] = []
    began = time.time()
    for step in range(start, steps):
        rng = np.random.default_rng((seed, step))
        for group in optimizer.param_groups:
            group["lr"] = lr * min(1, (step + 1) / 100) * 0.5 * (1 + math.cos(math.pi * step / steps))
        pairs = [random_pair(subjects, rng) for _ in range(batch)]
        fixed = torch.cat([augment.intensity(views.sample_image(f, grid, SHAPE), rng) for _, _, f, _ in pairs])
        mats = [np.eye(4) for _ in pairs]
        terms = []
        for _ in range(2):  # second round: what the first left over
            moving = torch.cat(
                [
                    augment.intensity(views.sample_image(m, t @ grid, SHAPE), rng)
                    for (_, _, _, m), t in zip(pairs, mats, strict=True)
                ]
            )
            matrix, translation = stem.predict(moving, fixed)
            error = []
            for k, (i, j, f, m) in enumerate(pairs):
                both = (known[i][1] > 0) & (known[j][1] > 0)
                weight = torch.from_numpy(np.sqrt(np.minimum(known[i][1], known[j][1])[both])).float()
                x = torch.from_numpy(points_mm(f, known[i][0][both])).float()
                y = points_mm(m, known[j][0][both])
                inverse = np.linalg.inv(mats[k])
                y = torch.from_numpy(y @ inverse[:3, :3].T + inverse[:3, 3]).float()
                predicted = x @ matrix[k].T + translation[k] * SPACING_MM
                error.append(((predicted - y).norm(dim=1) * weight).sum() / weight.sum())
                step_matrix = np.eye(4)
                step_matrix[:3, :3] = matrix[k].detach().numpy()
                step_matrix[:3, 3] = translation[k].detach().numpy() * SPACING_MM
                mats[k] = mats[k] @ step_matrix
            terms.append(torch.stack(error).mean())
        loss = sum(terms)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(stem.parameters(), 20.0)
        optimizer.step()
        running.append([t.item() for t in terms])
        if (step + 1) % 100 == 0 or step + 1 == steps:
            now = seconds + time.time() - began
            mean = np.mean(running, 0).round(2)
            print(f"step {step + 1}/{steps}  {now:.0f} s  centroid error mm, pass 1 and 2: {mean}", flush=True)
            running.clear()
            state = {"model": stem.state_dict(), "optimizer": optimizer.state_dict(), "step": step + 1, "seconds": now}
            torch.save(state, out.with_suffix(".part"))
            out.with_suffix(".part").replace(out)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="folder with manifest.csv")
    parser.add_argument("--cache", type=Path, default=Path(".cache"))
    parser.add_argument("--out", type=Path, default=Path("runs/stem.pt"))
    parser.add_argument("--steps", type=int, default=3000)
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--lr", type=float, default=1e-3)
    parser.add_argument("--seed", type=int, default=1)
    args = parser.parse_args()
    args.out.parent.mkdir(parents=True, exist_ok=True)
    train(open_scans(args.data, "train", cache=args.cache), args.out, args.steps, args.batch, args.seed, args.lr)
