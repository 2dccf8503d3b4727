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
from typing import NamedTuple

import numpy as np
import torch

from LDRCore.models.affine import AffineLDR
from Training import config, engine, processes
from Training.config import option
from Training.data.augmentation import intensity
from Training.data.centroids import label_centroids
from Training.data.scans import open_scans
from Training.data.subject_views import Subject, View, grid_matrix, make_subject, make_view, random_pose, sample_image

SHAPE, SPACING_MM = (64, 64, 64), 4.0
WORKING_GRID = {"stem_spacing_mm": SPACING_MM, "stem_shape": list(SHAPE), "stem_passes": 3}
Centroids = list[tuple[np.ndarray, np.ndarray]]  # of every subject: positions (n, 3) in its voxels, and sizes (n,)


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


class PosedPair(NamedTuple):
    """Indexes of two subjects, and a view of each."""

    fixed: int
    moving: int
    fixed_view: View
    moving_view: View


def random_pair(subjects: list[Subject], rng: np.random.Generator) -> PosedPair:
    """Draw two views of two different subjects with realistic combinations of skull, field of view and pose."""
    fixed, moving = (int(n) for n in rng.choice(len(subjects), 2, replace=False))
    strip = bool(rng.random() < 0.5)
    strip_moving = strip if rng.random() < 0.9 else not strip
    hard = rng.random() < 0.7
    fixed_pose = random_pose(rng, 12, 4, 0.05)
    moving_pose = random_pose(rng, 18 if hard else 6, 24 if hard else 8, 0.1, 0.05)
    fixed_view = make_view(subjects[fixed], fixed_pose, rng, stripped=strip, cut=rng.random() < 0.5)
    moving_view = make_view(subjects[moving], moving_pose, rng, stripped=strip_moving, cut=rng.random() < 0.5)
    return PosedPair(fixed, moving, fixed_view, moving_view)


def points_mm(view: View, voxels: np.ndarray) -> np.ndarray:
    """Turn subject voxels (N, 3) into mm of the view."""
    inverse = np.linalg.inv(view.to_subject)
    return voxels @ inverse[:3, :3].T + inverse[:3, 3]


def centroid_error(
    centroids: Centroids, pair: PosedPair, affine_mm: np.ndarray, matrix: torch.Tensor, translation: torch.Tensor
) -> torch.Tensor:
    """Measure the mean distance in mm of the common labels' centroids after two affine maps, the second predicted.

    Args:
        centroids: of all subjects.
        pair: which subjects, and their views.
        affine_mm: 4x4, found before, fixed view -> moving view.
        matrix, translation: (3, 3) and (3,) voxels of the stem's grid, the step that is predicted on top.
    """
    (fixed_points, fixed_size), (moving_points, moving_size) = centroids[pair.fixed], centroids[pair.moving]
    both = (fixed_size > 0) & (moving_size > 0)
    weight = torch.from_numpy(np.sqrt(np.minimum(fixed_size, moving_size)[both])).to(matrix)
    fixed_mm = torch.from_numpy(points_mm(pair.fixed_view, fixed_points[both])).to(matrix)
    inverse = np.linalg.inv(affine_mm)
    wanted_mm = points_mm(pair.moving_view, moving_points[both]) @ inverse[:3, :3].T + inverse[:3, 3]
    predicted_mm = fixed_mm @ matrix.T + translation * SPACING_MM
    return ((predicted_mm - torch.from_numpy(wanted_mm).to(matrix)).norm(dim=1) * weight).sum() / weight.sum()


def as_matrix_mm(matrix: torch.Tensor, translation: torch.Tensor) -> np.ndarray:
    """Turn a prediction of the stem, (3, 3) and (3,) voxels of its grid, into a 4x4 in mm."""
    out = np.eye(4)
    out[:3, :3] = matrix.detach().cpu().numpy()
    out[:3, 3] = translation.detach().cpu().numpy() * SPACING_MM
    return out


def train(settings: StemSettings) -> None:
    """Run, or continue."""
    device = processes.pick_device(settings.device, processes.Rank())
    torch.manual_seed(settings.seed)
    stem = AffineLDR().to(device, memory_format=torch.channels_last_3d)
    optimizer = engine.adam(stem.parameters(), settings.lr)

    scans = open_scans(settings.data, settings.split, cache=settings.cache)
    if scans[0].labels is None or scans[0].image is None:
        raise config.ConfigError(
            f"the stem is trained on label centroids, got no labels or no image for {scans.names[0]}"
        )
    subjects = [make_subject(scans[k], device=device, pool=2) for k in range(len(scans))]
    centroids: Centroids = []  # in voxels of the subject, which is averaged to half its resolution
    for k in range(len(scans)):
        points, size = label_centroids(scans[k].labels, scans.n_labels)
        centroids.append(((points - 0.5) / 2, size))
    grid = grid_matrix(SHAPE, SPACING_MM)

    with engine.Run(settings, {"model": stem, "optimizer": optimizer}) as run:
        run.facts = {"stem": "affine-ldr", "working_grid": WORKING_GRID, "data_identity": scans.identity}
        for step in run:
            run.set_learning_rate(step, optimizer)
            rng = np.random.default_rng((settings.seed, step))
            pairs = [random_pair(subjects, rng) for _ in range(settings.batch)]
            fixed = torch.cat([intensity(sample_image(pair.fixed_view, grid, SHAPE), rng) for pair in pairs])

            affines_mm = [np.eye(4) for _ in pairs]
            passes = []
            for _ in range(2):  # the second pass sees what the first left over
                views = [
                    sample_image(pair.moving_view, affine_mm @ grid, SHAPE)
                    for pair, affine_mm in zip(pairs, affines_mm, strict=True)
                ]
                moving = torch.cat([intensity(view, rng) for view in views])
                predicted = list(zip(*stem.predict(moving, fixed), strict=True))
                both = list(zip(pairs, affines_mm, predicted, strict=True))
                errors = [centroid_error(centroids, pair, affine_mm, *one) for pair, affine_mm, one in both]
                affines_mm = [affine_mm @ as_matrix_mm(*one) for _, affine_mm, one in both]
                passes.append(torch.stack(errors).mean())
            loss = passes[0] + passes[1]
            run.log(step, {"pass 1, mm": passes[0].item(), "pass 2, mm": passes[1].item()})

            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            torch.nn.utils.clip_grad_norm_(stem.parameters(), settings.clip)
            optimizer.step()


def main() -> None:
    """Read the configuration and train."""
    train(config.load(StemSettings, sys.argv[1:], __doc__))


if __name__ == "__main__":
    engine.run_script(main)
