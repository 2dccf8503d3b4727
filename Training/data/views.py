"""Random views of a subject: pose, field of view, skull on or off, intensity; sampled onto any working grid.

A view is what a scanner and a reader might have delivered of this subject. Geometry is kept exactly (a 4x4 matrix
from grid millimetres to subject voxels), so labels and label centroids follow without resampling the subject first.
Everything is in tensor-axis order (S, P, L).
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F

from LDRCore import preprocess, spatial


def rotation(angles_deg: np.ndarray) -> np.ndarray:
    """3x3 rotation by angles about the three tensor axes, applied in turn."""
    out = np.eye(3)
    for axis, angle in enumerate(np.deg2rad(angles_deg)):
        i, j = [a for a in range(3) if a != axis]
        r = np.eye(3)
        r[i, i] = r[j, j] = np.cos(angle)
        r[i, j], r[j, i] = -np.sin(angle), np.sin(angle)
        out = r @ out
    return out


def _uniform(rng: np.random.Generator, bound: float, n: int) -> np.ndarray:
    return rng.uniform(-bound, bound, n)


def random_pose(
    rng: np.random.Generator, angle_deg: float, shift_mm: float, scale: float, shear: float = 0.0
) -> np.ndarray:
    """4x4 pose (mm -> mm about a centre): rotation, per-axis scale around a common one, shear, shift."""
    pose = np.eye(4)
    common = 1 + rng.uniform(-scale, scale)
    stretch = np.diag(common * (1 + _uniform(rng, scale / 3, 3)))
    skew = np.eye(3) + np.triu(_uniform(rng, shear, 9).reshape(3, 3), 1)
    pose[:3, :3] = rotation(_uniform(rng, angle_deg, 3)) @ stretch @ skew
    pose[:3, 3] = _uniform(rng, shift_mm, 3)
    return pose


@dataclass
class Subject:
    """What a view is made from.

    Attributes:
        image: (D, H, W) float32, any scale.
        brain: (D, H, W) bool, label > 0.
        grown: `brain` grown by one voxel, as a generous skull-stripping tool would leave it.
        labels: (D, H, W) int32, or None where only the image is needed.
        spacing_mm: voxel edge.
    """

    image: torch.Tensor
    brain: torch.Tensor
    grown: torch.Tensor
    labels: torch.Tensor | None
    spacing_mm: float


@dataclass
class View:
    """One subject as delivered.

    Attributes:
        volume: (1, 1, D, H, W) float32 in 0..1, after field-of-view cut, skull strip and normalisation.
        subject: what it was made from (its labels are never cut).
        to_subject: (4, 4) float64, millimetres about the view's foreground centre -> subject voxels.
    """

    volume: torch.Tensor
    subject: Subject
    to_subject: np.ndarray


def make_subjects(images: np.ndarray, labels: np.ndarray, spacing_mm: float = 2.0, pool: int = 1) -> list[Subject]:
    """Subjects of a split, averaged `pool`-fold (the affine stem needs no more than 4 mm)."""
    subjects = []
    for image_u8, label_u8 in zip(images, labels, strict=True):
        image = torch.from_numpy(image_u8)[None, None].float()
        brain = torch.from_numpy(label_u8 > 0)[None, None].float()
        if pool > 1:
            image, brain = F.avg_pool3d(image, pool), (F.avg_pool3d(brain, pool) > 0.5).float()
        grown = brain
        for axis in range(2, 5):
            grown = grown.maximum(grown.roll(1, axis)).maximum(grown.roll(-1, axis))
        kept = torch.from_numpy(label_u8).int() if pool == 1 else None
        subjects.append(Subject(image[0, 0], brain[0, 0].bool(), grown[0, 0].bool(), kept, spacing_mm * pool))
    return subjects


def make_view(subject: Subject, pose: np.ndarray, rng: np.random.Generator, *, stripped: bool, cut: bool) -> View:
    """Deliver a subject under a pose (4x4, mm -> mm about the foreground centre of what is delivered)."""
    volume = subject.image
    if stripped:
        volume = volume * (subject.grown if rng.random() < 0.5 else subject.brain)
    if cut:  # a shorter field of view: slices below the brain are missing
        bottom = int(subject.brain.flatten(1).any(1).int().argmax())
        volume = volume.clone()
        volume[: rng.integers(0, max(bottom, 1))] = 0
    low, high = preprocess.intensity_range(volume)
    volume = preprocess.normalise(volume, low, high)
    centre = preprocess.foreground_index(volume).mean(axis=0)
    to_subject = np.eye(4)
    to_subject[:3, :3] = pose[:3, :3] / subject.spacing_mm
    to_subject[:3, 3] = pose[:3, 3] / subject.spacing_mm + centre
    return View(volume[None, None], subject, to_subject)


def grid_matrix(shape: tuple[int, ...], spacing_mm: float, centre_mm: np.ndarray | None = None) -> np.ndarray:
    """(4, 4): voxel of a working grid -> mm, the grid's middle at `centre_mm`."""
    out = np.eye(4)
    out[:3, :3] *= spacing_mm
    out[:3, 3] = -(np.asarray(shape) - 1) / 2 * spacing_mm + (0 if centre_mm is None else centre_mm)
    return out


def sample_image(view: View, grid_to_mm: np.ndarray, shape: tuple[int, ...]) -> torch.Tensor:
    """The view on a working grid, (1, 1, *shape); coarse grids are averaged, not picked."""
    matrix = view.to_subject @ grid_to_mm
    volume = view.volume
    if grid_to_mm[0, 0] >= 2 * view.subject.spacing_mm:
        volume = F.avg_pool3d(volume, 2)
        matrix = matrix.copy()
        matrix[:3] = matrix[:3] / 2
        matrix[:3, 3] -= 0.25
    coordinates = spatial.affine_coordinates(torch.from_numpy(matrix[:3]).float(), shape)
    return spatial.sample(volume, coordinates)


def augment_intensity(image: torch.Tensor, rng: np.random.Generator) -> torch.Tensor:
    """Gamma, gain, smooth bias field and noise, as between scanners. (1, 1, D, H, W) in 0..1, background kept 0."""
    image = image.pow(float(np.exp(rng.normal(0, 0.2)))) * float(rng.uniform(0.8, 1.1))
    if rng.random() < 0.7:
        knots = torch.from_numpy(rng.normal(0, 0.12, (1, 1, 4, 4, 4)).astype(np.float32))
        image = image * F.interpolate(knots, size=image.shape[2:], mode="trilinear", align_corners=True).exp()
    if rng.random() < 0.7:
        noise = torch.randn(image.shape, generator=torch.Generator().manual_seed(int(rng.integers(2**62))))
        image = torch.where(image > 0, image + noise * float(rng.uniform(0, 0.04)), image)
    return image.clamp(0, 1)
