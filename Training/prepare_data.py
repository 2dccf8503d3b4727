r"""Read a data set once and keep it in one compact file, to train from it here or on another machine.

    python -m Training.prepare_data --source DIR --split train val --spacing 2 --out prepared.npz

The file holds uint8 images (and labels, landmarks) on one isotropic grid spacing; `--data prepared.npz` then takes the
place of the source in every training script. Sources: docs/training.md, "Data sets". With --stripped only what is
labelled is kept, cropped to its size, which takes a third of the space: for training with `stripped = 1.0`.
"""

from __future__ import annotations

import argparse
import dataclasses
from pathlib import Path

import numpy as np
import torch

from Training.data import prepared
from Training.data.scan_set import DataError, Scan, ScanSet
from Training.data.scans import open_scans
from Training.data.subject_views import grow

MARGIN = 3  # voxels of air about what is labelled, so that growing it by one reaches no border


def strip(scan: Scan) -> Scan:
    """Keep the labelled voxels and their neighbours, and crop; the rest becomes 0.

    Raises:
        DataError: no labels, or no image.
    """
    if scan.labels is None or scan.image is None or not scan.labels.any():
        raise DataError(f"stripping needs an image and labels, got none for {scan.name}")
    brain = np.pad(scan.labels > 0, MARGIN)
    kept = grow(torch.from_numpy(brain)).numpy()
    spans = [np.flatnonzero(brain.any(tuple(a for a in range(3) if a != axis)))[[0, -1]] for axis in range(3)]
    box = tuple(slice(low - MARGIN, high + 1 + MARGIN) for low, high in spans)
    first = np.array([part.start for part in box]) - MARGIN  # of the box, in voxels of the scan
    to_lps = scan.to_lps.copy()
    to_lps[:3, 3] += to_lps[:3, :3] @ first
    image = (np.pad(scan.image, MARGIN) * kept)[box]
    points = None if scan.points is None else scan.points - first
    return dataclasses.replace(scan, image=image, labels=np.pad(scan.labels, MARGIN)[box], points=points, to_lps=to_lps)


class Stripped(ScanSet):
    """A split whose scans are stripped as they are read."""

    def read(self, index: int) -> Scan:
        """One scan."""
        return strip(super().read(index))


def prepare(
    source: Path,
    splits: list[str],
    out: Path,
    spacing_mm: float | None = None,
    scheme: str | None = None,
    stripped: bool = False,
) -> str:
    """Write the file and say in one line what it holds.

    Raises:
        DataError: see `open_scans`; splits of different spacing; or a file that is not named .npz.
    """
    if out.suffix != ".npz":
        raise DataError(f"out must end in .npz, got {out}")
    found = {split: open_scans(source, split, spacing_mm=spacing_mm, scheme=scheme) for split in splits}
    if stripped:
        found = {split: Stripped(scans.source, split) for split, scans in found.items()}
    spacings = {scans.spacing_mm for scans in found.values()}
    if len(spacings) > 1:
        raise DataError(f"splits must share one spacing (give spacing), got {sorted(spacings)} mm")
    prepared.write(out, found)
    counts = ", ".join(f"{len(scans)} {split}" for split, scans in found.items())
    return f"{out}: {counts} scans at {spacings.pop():g} mm, {out.stat().st_size / 2**20:.1f} MiB"


def main() -> None:
    """Parse, prepare, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--source", type=Path, required=True, help="folder, dataset.json, RCN .json or .csv")
    parser.add_argument("--split", nargs="+", default=["train"], help="one or several")
    parser.add_argument("--spacing", type=float, help="isotropic voxel edge in mm (default: the scans' smallest)")
    parser.add_argument("--scheme", help="scheme or subset of an RCN .json, instead of the split's")
    parser.add_argument("--stripped", action="store_true", help="keep only what is labelled, cropped")
    parser.add_argument("--out", type=Path, required=True, help="file to write, .npz")
    a = parser.parse_args()
    try:
        print(prepare(a.source, a.split, a.out, a.spacing, a.scheme, a.stripped))
    except DataError as error:
        parser.error(str(error))


if __name__ == "__main__":
    main()
