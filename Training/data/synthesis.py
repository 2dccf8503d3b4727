"""Images synthesised from label maps: every structure gets a random brightness, so that a model learns shape alone.

After Hoffmann et al., SynthMorph (IEEE TMI 2022): a Gaussian for every label, blur, bias field, gamma. Two calls give
two contrasts; the two images of a pair want one each.
"""

from __future__ import annotations

import numpy as np
import torch

from Training.data import augmentation

FIRST_OUTSIDE = 256  # in a label map that comes without image, values from here on are tissue outside of the brain
CSF = 24  # FreeSurfer's value; in such maps it lies around the brain as well


def contrast(rng: np.random.Generator, n_labels: int, *, stripped: bool, zero_background: float) -> np.ndarray:
    """Mean and spread of every label's brightness.

    Label maps of the whole head (with values from 256 on): tissues outside of the brain are merged into a few classes
    in half of the cases, and each class is dropped to the background's brightness in one case of ten. Stripped, all of
    them are background, and so is the CSF in half of the cases.

    Args:
        rng: one numpy generator.
        n_labels: larger than every label value.
        stripped: whether only the brain shows; its background is 0.
        zero_background: share of the other images whose background is 0.

    Returns:
        (2, n_labels): means and standard deviations, 0..1.
    """
    table = np.stack([rng.uniform(0.1, 0.9, n_labels), rng.uniform(0.02, 0.1, n_labels)])
    if stripped or rng.random() < zero_background:
        table[:, 0] = 0
    outside = np.arange(FIRST_OUTSIDE, n_labels)
    if not len(outside):
        return table
    if stripped:
        table[:, outside] = table[:, :1]
        if rng.random() < 0.5:
            table[:, CSF] = table[:, 0]
        return table
    if rng.random() < 0.5:
        table[:, outside] = table[:, outside[rng.integers(0, min(4, len(outside)), len(outside))]]
    means = np.unique(table[0, outside])
    dropped = np.isin(table[0, outside], means[rng.random(len(means)) < 0.1])
    table[:, outside[dropped]] = table[:, :1]
    return table


def synthesise(
    rng: np.random.Generator,
    labels: torch.Tensor,
    *,
    stripped: bool = False,
    zero_background: float = 0.5,
    n_labels: int | None = None,
) -> torch.Tensor:
    """An image of random contrast, field and sharpness from a label map, on the label map's device.

    Args:
        rng: one numpy generator.
        labels: (D, H, W) integer, 0 is background.
        stripped: see `contrast`.
        zero_background: see `contrast`.
        n_labels: larger than every label value; given, the same generator makes one contrast from several label maps.

    Returns:
        (1, 1, D, H, W) float32 in 0..1.
    """
    shape, device = labels.shape, labels.device
    table = contrast(rng, n_labels or int(labels.max()) + 1, stripped=stripped, zero_background=zero_background)
    means, spreads = torch.from_numpy(table.astype(np.float32)).to(device)
    index = labels.reshape(-1).int()
    image = means.index_select(0, index) + spreads.index_select(0, index) * augmentation.noise(rng, index.shape, device)
    image = image.clamp_min(0).view(1, 1, *shape)
    sharpness = rng.uniform(0, 1, 3)
    if rng.random() < 0.3:  # thick slices
        sharpness[rng.integers(3)] *= 2.5
    image = augmentation.blur(image, sharpness)
    image = image * augmentation.bias_field(rng, shape, float(rng.uniform(0, 0.3)), device)
    image = (image / image.max().clamp_min(1e-6)).pow(float(np.exp(rng.normal(0, 0.25))))
    grain = augmentation.noise(rng, image.shape, device) * float(rng.uniform(0, 0.03))
    return torch.where(image > 0.01, image + grain, 0).clamp(0, 1)  # below: what blur left of an edge
