"""Where the labels of a map lie."""

from __future__ import annotations

import numpy as np


def label_centroids(labels: np.ndarray, n_labels: int) -> tuple[np.ndarray, np.ndarray]:
    """(n_labels, 3) centroid voxel and (n_labels,) size of every label of a map; size 0 where absent."""
    flat = labels.reshape(-1)
    size = np.bincount(flat, minlength=n_labels).astype(float)
    lines = np.ix_(*[np.arange(n) for n in labels.shape])
    sums = [
        np.bincount(flat, weights=np.broadcast_to(line, labels.shape).reshape(-1), minlength=n_labels) for line in lines
    ]
    size[0] = 0
    return np.stack(sums, 1) / np.maximum(size, 1)[:, None], size
