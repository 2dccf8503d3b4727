r"""Train the affine stem on label centroids: two views of two subjects in, the affine map between them out.

    python -m Training.train_stem --data DIR --out runs/stem.pt

Supervision: the centroids of the labels that both subjects share (training split only). The stem sees 4 mm images on
a 64^3 grid about the fixed image's foreground centre; it is trained to be applied twice, the second time on what the
first left over. A stem that is trained along with dense networks, without labels, is `affine` of `train_teacher`.
"""

from __future__ import annotations

import dataclasses
import sys
from pathlib import Path

import numpy as np
import torch

from LDRCore.models.affine import AffineLDR
from Training import config, engine
from Training.config import option
from Training.data import augment, views
from Training.data.scans import open_scans
from Training.pairs import centroids

SHAPE, SPACING_MM = (64, 64, 64), 4.0
WORKING_GRID = {"stem_spacing_mm": SPACING_MM, "stem_shape": list(SHAPE), "stem_passes": 3}
Centroids = list[tuple[np.ndarray, np.ndarray]]
PosedPair = tuple[int, int, views.View, views.View]


@dataclasses.dataclass(frozen=True, kw_only=True)
class StemSettings(engine.RunSettings):
    """Everything a stem's run is determined by."""

    data: Path = option(help="data set with labels (folder with manifest.csv, dataset.json, .json, .csv, .npz), 2 mm")
    split: str = option("train", "split to train on")
    cache: Path | None = option(Path(".cache"), "folder for what is read once and kept")
    out: Path = option(Path("runs/stem.pt"), "checkpoint to write and to continue from")
    steps: int = option(3000, "optimizer steps of the whole run")
    batch: int = option(4, "pairs a step")
    lr: float = option(1e-3, "largest learning rate")
    clip: float = option(20.0, "largest norm of the gradient")


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


def centroid_error(scans: Centroids, pair: PosedPair, matrix, translation, total: np.ndarray) -> torch.Tensor:
    """Mean distance in mm of the common labels' centroids after `total` and a predicted affine step."""
    i, j, fixed, moving = pair
    both = (scans[i][1] > 0) & (scans[j][1] > 0)
    weight = torch.from_numpy(np.sqrt(np.minimum(scans[i][1], scans[j][1])[both])).to(matrix)
    x = torch.from_numpy(points_mm(fixed, scans[i][0][both])).to(matrix)
    inverse = np.linalg.inv(total)
    y = points_mm(moving, scans[j][0][both]) @ inverse[:3, :3].T + inverse[:3, 3]
    predicted = x @ matrix.T + translation * SPACING_MM
    return ((predicted - torch.from_numpy(y).to(matrix)).norm(dim=1) * weight).sum() / weight.sum()


def train(s: StemSettings) -> None:
    """Run, or continue."""
    device = engine.pick_device(s.device, engine.Rank())
    torch.manual_seed(s.seed)
    stem = AffineLDR().to(device, memory_format=torch.channels_last_3d)
    optimizer = engine.adam(stem.parameters(), s.lr)
    scans = open_scans(s.data, s.split, cache=s.cache)
    if scans[0].labels is None or scans[0].image is None:
        raise config.ConfigError(f"the stem is trained on label centroids, got no labels or no image for {scans.names[0]}")
    known = []  # centroids in voxels of the subject, which is averaged to half its resolution
    for k in range(len(scans)):
        where, size = centroids(scans[k].labels, scans.n_labels)
        known.append(((where - 0.5) / 2, size))
    subjects = [views.make_subject(scans[k], device=device, pool=2) for k in range(len(scans))]
    grid = views.grid_matrix(SHAPE, SPACING_MM)
    with engine.Run(s, {"model": stem, "optimizer": optimizer}) as run:
        run.facts = {"stem": "affine-ldr", "working_grid": WORKING_GRID, "data_identity": scans.identity}
        for step in run:
            run.set_learning_rate(step, optimizer)
            rng = np.random.default_rng((s.seed, step))
            pairs = [random_pair(subjects, rng) for _ in range(s.batch)]
            fixed = torch.cat([augment.intensity(views.sample_image(f, grid, SHAPE), rng) for _, _, f, _ in pairs])
            totals = [np.eye(4) for _ in pairs]
            passes = []
            for _ in range(2):  # second round: what the first left over
                views_of = [views.sample_image(m, t @ grid, SHAPE) for (_, _, _, m), t in zip(pairs, totals, strict=True)]
                matrix, translation = stem.predict(torch.cat([augment.intensity(v, rng) for v in views_of]), fixed)
                errors = []
                for k, pair in enumerate(pairs):
                    errors.append(centroid_error(known, pair, matrix[k], translation[k], totals[k]))
                    found = np.eye(4)
                    found[:3, :3] = matrix[k].detach().cpu().numpy()
                    found[:3, 3] = translation[k].detach().cpu().numpy() * SPACING_MM
                    totals[k] = totals[k] @ found
                passes.append(torch.stack(errors).mean())
            run.log(step, {"pass 1, mm": passes[0].item(), "pass 2, mm": passes[1].item()})
            optimizer.zero_grad(set_to_none=True)
            (passes[0] + passes[1]).backward()
            torch.nn.utils.clip_grad_norm_(stem.parameters(), s.clip)
            optimizer.step()


def main() -> None:
    """Read the configuration and train."""
    train(config.load(StemSettings, sys.argv[1:], __doc__))


if __name__ == "__main__":
    engine.run_script(main)
