"""Reader of the IXI T1 brains with DLMUSE labels (manifest.csv with subject, split, image, labels).

Scans are turned to LPS axes (tensor axes S, P, L), kept at their 2 mm grid and cached as uint8 in one .npz, which is
what training scripts read. Split by subject: never mix the lists.
"""

from __future__ import annotations

import csv
import hashlib
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import SimpleITK as sitk

N_LABELS = 208  # DLMUSE values run to 207


@dataclass(frozen=True)
class Subjects:
    """One split in memory. `images` and `labels` are (N, D, H, W) uint8 with axes S, P, L at 2 mm."""

    names: list[str]
    images: np.ndarray
    labels: np.ndarray


def split_hash(root: Path) -> str:
    """sha256 of the manifest's (subject, split) pairs, so that a model card can name the split it used."""
    rows = sorted((r["subject"], r["split"]) for r in csv.DictReader((root / "manifest.csv").open()))
    return hashlib.sha256(repr(rows).encode()).hexdigest()


def load(root: str | Path, split: str, cache: str | Path | None = None) -> Subjects:
    """Read one split, through a cache file when `cache` (a folder) is given.

    Raises:
        FileNotFoundError: no manifest.csv in `root`.
        ValueError: the split has no subject.
    """
    root = Path(root)
    target = Path(cache) / f"ixi-{split}.npz" if cache else None
    if target and target.exists():
        with np.load(target) as stored:
            return Subjects(list(stored["names"]), stored["images"], stored["labels"])
    rows = [r for r in csv.DictReader((root / "manifest.csv").open()) if r["split"] == split]
    if not rows:
        raise ValueError(f"no subject of split {split!r} in {root / 'manifest.csv'}")
    images, labels = [], []
    for row in rows:
        image = sitk.GetArrayFromImage(sitk.DICOMOrient(sitk.ReadImage(str(root / row["image"])), "LPS"))
        label = sitk.GetArrayFromImage(sitk.DICOMOrient(sitk.ReadImage(str(root / row["labels"])), "LPS"))
        top = np.percentile(image, 99.95)
        images.append(np.clip(image * (255.0 / top), 0, 255).round().astype(np.uint8))
        labels.append(label.astype(np.uint8))
    subjects = Subjects([r["subject"] for r in rows], np.stack(images), np.stack(labels))
    if target:
        target.parent.mkdir(parents=True, exist_ok=True)
        temporary = target.with_suffix(".part.npz")
        np.savez_compressed(temporary, names=subjects.names, images=subjects.images, labels=subjects.labels)
        temporary.replace(target)
    return subjects
