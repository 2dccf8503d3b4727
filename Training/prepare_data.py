r"""Read a data set once and keep it in one compact file, to train from it here or on another machine.

    python -m Training.prepare_data --source DIR --split train val --spacing 2 --out prepared.npz

The file holds uint8 images (and labels, landmarks) on one isotropic grid spacing; `--data prepared.npz` then takes the
place of the source in every training script. Sources: docs/training.md, "Data sets".
"""

from __future__ import annotations

import argparse
from pathlib import Path

from Training.data import prepared
from Training.data.scan_set import DataError
from Training.data.scans import open_scans


def prepare(
    source: Path, splits: list[str], out: Path, spacing_mm: float | None = None, scheme: str | None = None
) -> str:
    """Write the file and say in one line what it holds.

    Raises:
        DataError: see `open_scans`; splits of different spacing; or a file that is not named .npz.
    """
    if out.suffix != ".npz":
        raise DataError(f"out must end in .npz, got {out}")
    found = {split: open_scans(source, split, spacing_mm=spacing_mm, scheme=scheme) for split in splits}
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
    parser.add_argument("--out", type=Path, required=True, help="file to write, .npz")
    a = parser.parse_args()
    try:
        print(prepare(a.source, a.split, a.out, a.spacing, a.scheme))
    except DataError as error:
        parser.error(str(error))


if __name__ == "__main__":
    main()
