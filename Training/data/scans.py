"""Scans to train on, from any source, in one form: uint8 images with axes S, P, L at one isotropic spacing.

`open_scans` looks at what the source is and picks the reader. Split by subject: never mix the lists of two splits.
"""

from __future__ import annotations

import csv
import hashlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import SimpleITK as sitk


@dataclass(frozen=True)
class Scan:
    """One scan on an isotropic grid whose tensor axes point to S, P and L.

    Attributes:
        name: of the subject or file, unique in its set.
        image: (D, H, W) uint8.
        labels: (D, H, W) uint8 or int16, 0 is background; None where the source has none.
        points: (N, 3) float64 voxel positions in tensor-axis order, NaN where a landmark is absent; None where none.
        spacing_mm: voxel edge.
    """

    name: str
    image: np.ndarray
    labels: np.ndarray | None
    points: np.ndarray | None
    spacing_mm: float


class ScanSet:
    """One split of a data set, cheap to index many times.

    Attributes:
        names: of the scans.
        spacing_mm: voxel edge of every scan.
        n_labels: larger than every label value, 0 if there are no labels.
        pairs: (fixed, moving) that the source prescribes; None where any two different scans are a pair.
        identity: sha256 over source kind, split and sorted names, equal on every machine, for the model card.
    """

    def __init__(
        self,
        kind: str,
        split: str,
        names: list[str],
        read: Callable[[int], Scan],
        *,
        spacing_mm: float,
        n_labels: int,
        pairs: list[tuple[int, int]] | None = None,
    ) -> None:
        self.names, self.spacing_mm, self.n_labels, self.pairs = names, spacing_mm, n_labels, pairs
        self.identity = hashlib.sha256(repr((kind, split, sorted(names))).encode()).hexdigest()
        self._read = read

    def __len__(self) -> int:
        return len(self.names)

    def __getitem__(self, index: int) -> Scan:
        return self._read(range(len(self.names))[index])

    def draw_pair(self, rng: np.random.Generator) -> tuple[int, int]:
        """(fixed, moving): one of `pairs`, or two different scans."""
        if self.pairs is not None:
            return self.pairs[int(rng.integers(len(self.pairs)))]
        fixed, moving = rng.choice(len(self.names), 2, replace=False)
        return int(fixed), int(moving)


def open_scans(
    source: str | Path,
    split: str,
    *,
    spacing_mm: float | None = None,
    cache: str | Path | None = None,
    scheme: str | None = None,
) -> ScanSet:
    """Open one split of a data set. First version: a folder with manifest.csv (subject, split, image, labels).

    Raises:
        FileNotFoundError: no manifest.csv in `source`.
        ValueError: the split has no scan.
    """
    root = Path(source)
    spacing_mm = spacing_mm or 2.0
    target = Path(cache) / f"ixi-{split}.npz" if cache else None
    if target and target.exists():
        with np.load(target) as stored:
            names, images, labels = [str(n) for n in stored["names"]], stored["images"], stored["labels"]
    else:
        rows = [r for r in csv.DictReader((root / "manifest.csv").open()) if r["split"] == split]
        if not rows:
            raise ValueError(f"no scan of split {split!r} in {root / 'manifest.csv'}")
        names, images_, labels_ = [r["subject"] for r in rows], [], []
        for row in rows:
            image = sitk.GetArrayFromImage(sitk.DICOMOrient(sitk.ReadImage(str(root / row["image"])), "LPS"))
            label = sitk.GetArrayFromImage(sitk.DICOMOrient(sitk.ReadImage(str(root / row["labels"])), "LPS"))
            top = np.percentile(image, 99.95)
            images_.append(np.clip(image * (255.0 / top), 0, 255).round().astype(np.uint8))
            labels_.append(label.astype(np.uint8))
        images, labels = np.stack(images_), np.stack(labels_)

    def read(index: int) -> Scan:
        return Scan(names[index], images[index], labels[index], None, spacing_mm)

    return ScanSet("folder", split, names, read, spacing_mm=spacing_mm, n_labels=int(labels.max()) + 1)
