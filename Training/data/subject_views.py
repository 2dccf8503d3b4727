"""Random views of a subject: pose, field of view, skull on or off, intensity; sampled onto any working grid.

A view is what a scanner and a reader might have delivered of this subject. Geometry is kept exactly (a 4x4 matrix
from grid millimetres to subject voxels), so labels and label centroids follow without resampling the subject first.
Everything is in tensor-axis order (S, P, L).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable
from functools import cached_property

import numpy as np
import torch
import torch.nn.functional as F

from LDRCore.pipeline import preprocess
from LDRCore.transforms import spatial
from Training.data import synthesis
from Training.data.scan_set import Scan


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


def grow(mask: torch.Tensor) -> torch.Tensor:
    """A mask (D, H, W) grown by one voxel along every axis in turn; what leaves at one border enters at the other."""
    for axis in range(3):
        mask = mask | mask.roll(1, axis) | mask.roll(-1, axis)
    return mask


@dataclasses.dataclass
class Subject:
    """What a view is made from; its tensors live on one device.

    Attributes:
        image: (D, H, W), any scale; None for a label map without image, see `synthetic`.
        brain: (D, H, W) bool, where the labels are; None without labels.
        labels: (D, H, W) uint8 or int16; None without labels, or where only the image is needed.
        tissues: (D, H, W), the map that an image can be synthesised from: `labels`, and in a label map without image
            also the tissues outside of the brain.
        spacing_mm: voxel edge.
    """

    image: torch.Tensor | None
    brain: torch.Tensor | None
    labels: torch.Tensor | None
    tissues: torch.Tensor | None
    spacing_mm: float

    @cached_property
    def grown(self) -> torch.Tensor:
        """`brain` grown by one voxel, as a generous skull-stripping tool would leave it."""
        if self.brain is None:
            raise ValueError("a skull can only be removed where there are labels, got a scan without")
        return grow(self.brain)


@dataclasses.dataclass
class View:
    """One subject as delivered.

    Attributes:
        image: (1, 1, D, H, W) float32 in 0..1, after field-of-view cut, skull strip and normalisation.
        subject: what it was made from (its labels are never cut).
        to_subject: (4, 4) float64, millimetres about the view's foreground centre -> subject voxels.
    """

    image: torch.Tensor
    subject: Subject
    to_subject: np.ndarray


def make_subject(scan: Scan, *, pool: int = 1, device: torch.device | str = "cpu") -> Subject:
    """A scan on a device, averaged `pool`-fold (the affine stem needs no more than 4 mm; labels are then left out)."""
    image = None if scan.image is None else torch.from_numpy(scan.image).to(device)
    tissues = None if scan.labels is None else torch.from_numpy(scan.labels).to(device)
    labels = tissues
    if image is None and tissues is not None and tissues.dtype != torch.uint8:
        labels = torch.where(tissues < synthesis.FIRST_OUTSIDE, tissues, 0).to(torch.uint8)
    brain = None if labels is None else labels > 0
    if pool > 1:
        image = None if image is None else F.avg_pool3d(image[None, None].float(), pool)[0, 0]
        brain = None if brain is None else F.avg_pool3d(brain[None, None].float(), pool)[0, 0] > 0.5
        labels = tissues = None
    return Subject(image, brain, labels, tissues, scan.spacing_mm * pool)


def make_subjects(scans: Iterable[Scan], *, pool: int = 1, device: torch.device | str = "cpu") -> list[Subject]:
    """All subjects of a split, see `make_subject`."""
    return [make_subject(scan, pool=pool, device=device) for scan in scans]


def synthetic(
    subject: Subject, rng: np.random.Generator, *, stripped: bool = False, n_labels: int | None = None
) -> Subject:
    """The subject with an image of random contrast made from its labels; two calls give two contrasts.

    With `n_labels` generators of one seed give one contrast, see `synthesis.synthesise`.
    """
    if subject.tissues is None:
        raise ValueError("an image can only be synthesised where there are labels, got a scan without")
    image = synthesis.synthesise(rng, subject.tissues, stripped=stripped, n_labels=n_labels)
    return dataclasses.replace(subject, image=image[0, 0])


def foreground_centre(normalised: torch.Tensor) -> np.ndarray:
    """(3,) mean voxel of what is not air in a normalised (D, H, W) volume, of all voxels if all is air.

    The mean of `preprocess.foreground_index`, without carrying every index to the host.
    """
    mask = normalised > preprocess.FOREGROUND_LEVEL
    lines = mask.sum(dim=2)
    counts = [c.cpu().numpy() for c in (lines.sum(dim=1), lines.sum(dim=0), mask.sum(dim=(0, 1)))]
    if not counts[0].any():
        return (np.array(normalised.shape) - 1) / 2
    return np.array([(np.arange(len(c)) * c).sum() / c.sum() for c in counts])


def make_view(subject: Subject, pose: np.ndarray, rng: np.random.Generator, *, stripped: bool, cut: bool) -> View:
    """Deliver a subject under a pose (4x4, mm -> mm about the foreground centre of what is delivered).

    Raises:
        ValueError: no image, or a skull strip or cut without labels.
    """
    image, brain = subject.image, subject.brain
    if image is None:
        raise ValueError("a view needs an image, got a label map without one (see views.synthetic)")
    if brain is None and (stripped or cut):
        raise ValueError("a skull strip or a cut below the brain needs labels, got a scan without")
    if stripped:
        image = image * (subject.grown if rng.random() < 0.5 else brain)
    if cut:  # a shorter field of view: slices below the brain are missing
        bottom = int(brain.flatten(1).any(1).int().argmax())
        image = image.clone()
        image[: rng.integers(0, max(bottom, 1))] = 0
    low, high = preprocess.intensity_range(image)
    image = preprocess.normalise(image, low, high)
    to_subject = np.eye(4)
    to_subject[:3, :3] = pose[:3, :3] / subject.spacing_mm
    to_subject[:3, 3] = pose[:3, 3] / subject.spacing_mm + foreground_centre(image)
    return View(image[None, None], subject, to_subject)


def grid_matrix(shape: tuple[int, ...], spacing_mm: float, centre_mm: np.ndarray | None = None) -> np.ndarray:
    """(4, 4): voxel of a working grid -> mm, the grid's middle at `centre_mm`."""
    out = np.eye(4)
    out[:3, :3] *= spacing_mm
    out[:3, 3] = -(np.asarray(shape) - 1) / 2 * spacing_mm + (0 if centre_mm is None else centre_mm)
    return out


def sample_image(
    view: View, grid_to_mm: np.ndarray, shape: tuple[int, ...], free_form: torch.Tensor | None = None
) -> torch.Tensor:
    """The view on a working grid, (1, 1, *shape); coarse grids are averaged, not picked.

    Args:
        view: what to sample.
        grid_to_mm: (4, 4), voxel of the grid -> mm of the view.
        shape: of the grid.
        free_form: (1, 3, *shape) displacement u in the grid's voxels: the grid's point x shows what lies at x + u(x).
            Labels and points sampled through the same u see the same deformation.
    """
    matrix = view.to_subject @ grid_to_mm
    image = view.image
    if grid_to_mm[0, 0] >= 2 * view.subject.spacing_mm:
        image = F.avg_pool3d(image, 2)
        matrix = matrix.copy()
        matrix[:3] = matrix[:3] / 2
        matrix[:3, 3] -= 0.25
    tensor = torch.from_numpy(matrix[:3]).float().to(image.device)
    coordinates = spatial.affine_coordinates(tensor, shape)
    if free_form is not None:
        coordinates = coordinates + torch.einsum("ij,bjdhw->bidhw", tensor[:, :3], free_form)
    return spatial.sample(image, coordinates)
