"""A teacher made better for one training pair: its displacement optimised on images and, where there are any, labels.

Labels of training subjects may be used here: a student that learns from the result never sees them when it registers.
"""

from __future__ import annotations

import torch

from LDRCore import losses
from LDRCore.pipeline.refine import PLANS
from LDRCore.refinement.optimiser import optimise
from LDRCore.refinement.similarity import LocalCorrelation, Similarity
from LDRCore.transforms import separable, spatial
from Training.samples import LabelPair, Sample


class WithOverlap:
    """Local correlation plus the soft Dice of both scans' labels: mean over voxels plus `weight` times mean Dice."""

    def __init__(self, similarity: Similarity, labels: LabelPair, weight: float, n_labels: int) -> None:
        """Prepare.

        Args:
            similarity: on the window's grid.
            labels: of the pair.
            weight: of the mean soft Dice.
            n_labels: larger than every label value.
        """
        self._similarity, self._labels, self._weight, self._n_labels = similarity, labels, weight, n_labels
        self._fixed = labels.fixed.reshape(-1)

    def gradient(self, displacement: torch.Tensor, out: torch.Tensor | None = None) -> tuple[torch.Tensor, float]:
        """See `Similarity`.

        A label of few voxels has a steep overlap. So that it does not set the step of all others, no vector of the
        overlap's gradient is longer than the longest of the images'.
        """
        gradient, value = self._similarity.gradient(displacement, out)
        with torch.enable_grad():
            u = displacement.detach().requires_grad_()
            where = self._labels.positions(u[None])
            loss = losses.label_overlap(where, self._labels.moving, self._fixed, 1, n_labels=self._n_labels)
            (slope,) = torch.autograd.grad(-self._weight * displacement[0].numel() * loss, u)
        # by a displacement composed before the given one: times the transposed Jacobian of x + u(x)
        slopes = torch.gradient(displacement, dim=(1, 2, 3))  # slopes[a][c] = d u_c / d x_a
        slope = slope + torch.stack([(d * slope).sum(0) for d in slopes])
        lengths, longest = (field.square().sum(0).sqrt_() for field in (slope, gradient))  # faster than torch's norm
        gradient += slope.mul_((longest.max() / lengths.clamp_min_(1e-12)).clamp_max_(1))
        return gradient, value + self._weight * (1 - float(loss.detach()))


@torch.no_grad()
def refine_displacement(
    displacement: torch.Tensor, sample: Sample, plan: str, overlap: float, n_labels: int
) -> torch.Tensor:
    """Optimise a displacement for one pair.

    Args:
        displacement: (1, 3, d, h, w), voxels of its grid, which has the window's corners.
        sample: of one pair, without augmentation.
        plan: a key of `pipeline.refine.PLANS`.
        overlap: weight of the labels' mean soft Dice; only at the finest level, and only where there are labels.
        n_labels: larger than every label value.

    Returns:
        (1, 3, D, H, W), voxels of the window.
    """
    window = sample.fixed.shape[2:]
    for level in PLANS[plan]:
        shape = tuple(n // level.stride for n in window)
        moving, fixed = (separable.shrink(image, shape) for image in (sample.moving, sample.fixed))

        def warp(u: torch.Tensor, moving: torch.Tensor = moving) -> torch.Tensor:
            return spatial.warp(moving, u[None])[0, 0]

        similarity: Similarity = LocalCorrelation(warp, fixed[0, 0])
        if level.stride == 1 and overlap and sample.labels[0] is not None:
            similarity = WithOverlap(similarity, sample.labels[0], overlap, n_labels)
        displacement = optimise(spatial.upsample(displacement, shape)[0], similarity, level.settings).displacement[None]
    return displacement


@torch.no_grad()
def measure(displacement: torch.Tensor, sample: Sample) -> dict[str, float]:
    """Measure a displacement on its pair: local correlation, and Dice where there are labels, before and after.

    Args:
        displacement: (1, 3, d, h, w), voxels of its grid, which has the window's corners.
        sample: of one pair, without augmentation.

    Returns:
        {"lncc_start", "lncc"}: mean squared correlation in windows of five voxels; {"dice_start", "dice"}; and
        {"folding_percent"} of the displacement.
    """
    warped = spatial.warp_by_coarse(sample.moving, displacement)
    figures = {
        "lncc_start": 1 - float(losses.local_ncc(sample.moving, sample.fixed, 5)),
        "lncc": 1 - float(losses.local_ncc(warped, sample.fixed, 5)),
    }
    if sample.labels[0] is not None:
        figures |= {"dice_start": sample.labels[0].dice(None), "dice": sample.labels[0].dice(displacement)}
    return figures | {"folding_percent": 100 * spatial.folding_fraction(displacement)}
