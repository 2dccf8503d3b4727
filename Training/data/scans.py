"""Open a data set of any kind as scans of one form: uint8 images with axes S, P, L at one isotropic spacing.

`open_scans` looks at what the source is and picks the reader. Split by subject: never mix the lists of two splits.
"""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

from Training.data import prepared, tables
from Training.data.rcn import Rcn
from Training.data.scan_set import DataError, ScanSet, Source


def open_scans(
    source: str | Path,
    split: str,
    *,
    spacing_mm: float | None = None,
    cache: str | Path | None = None,
    scheme: str | None = None,
) -> ScanSet:
    """Open one split of a data set. Everything that can be wrong without reading voxels is found here.

    Args:
        source: a folder with manifest.csv or of label maps, a Learn2Reg dataset.json, a .json of Recursive Cascaded
            Networks, a .csv of images or pairs (see `tables` and `rcn`), or an .npz made by `Training.prepare_data`.
        split: "train", "val", "test", or what the source calls it.
        spacing_mm: isotropic voxel edge. By default the smallest voxel edge, which all scans of the split must share.
        cache: folder to keep the read split in, one file that is made anew when the source changes. HDF5 and .npz
            sources are compact already and are read where they lie.
        scheme: of a .json of Recursive Cascaded Networks, instead of the split's.

    Raises:
        DataError: one sentence that names the rule and what came instead.
    """
    path = Path(source)
    if spacing_mm is not None and not spacing_mm > 0:
        raise DataError(f"spacing_mm must be above 0, got {spacing_mm}")
    reader = _reader(path, split, spacing_mm, scheme)
    pairs_possible = reader.pairs if reader.pairs is not None else [0] * (len(reader.names) - 1)
    if reader.groups is not None and reader.pairs is None:
        pairs_possible = [0] * (min(len(members) for _, members in reader.groups) - 1)
    if not pairs_possible:
        raise DataError(f"a split must hold a pair of scans, got {len(reader.names)} scan in {split!r} of {path}")
    found = ScanSet(reader, split)
    if cache is None or not isinstance(reader, tables.Files):
        return found
    facts = json.dumps([reader.kind, split, scheme, reader.spacing_mm, reader.pairs, reader.stamp()])
    key = hashlib.sha256(facts.encode()).hexdigest()
    where = hashlib.sha256(str(path.resolve()).encode()).hexdigest()[:6]
    name = "-".join([path.stem, split, *([scheme.replace("/", "_")] if scheme else [])])
    target = Path(cache) / f"{name}-{reader.spacing_mm:g}mm-{where}.npz"
    if not target.exists() or _key_of(target) != key:
        prepared.write(target, {split: found}, key)
    return ScanSet(prepared.Prepared(target, split, None), split)


def _key_of(target: Path) -> str | None:
    try:
        return prepared.about(target)["key"]
    except DataError:
        return None


def _reader(path: Path, split: str, spacing_mm: float | None, scheme: str | None) -> Source:
    if not path.exists():
        raise DataError(f"a data set must be an existing folder or file, got {path} (not found)")
    if path.suffix == ".json":
        found = tables.from_json(
            path,
            {
                "subsets": lambda content: Rcn(path, content, split, scheme, spacing_mm),
                "training": lambda content: tables.from_learn2reg(path, content, split),
                "registration_val": lambda content: tables.from_learn2reg(path, content, split),
            },
        )
        if isinstance(found, Rcn):
            return found
    elif scheme is not None:
        raise DataError(f"a scheme needs a .json of Recursive Cascaded Networks, got {scheme!r} for {path}")
    elif path.suffix == ".npz":
        return prepared.Prepared(path, split, spacing_mm)
    elif path.suffix == ".csv":
        found = tables.from_csv(path, split)
    elif path.is_dir():
        reader = tables.from_folder if (path / "manifest.csv").is_file() else tables.from_label_maps
        found = reader(path, split)
    else:
        raise DataError(f"a data set must be a folder, or a file that ends in .json, .csv or .npz, got {path}")
    if scheme is not None:
        raise DataError(f"a scheme needs a .json of Recursive Cascaded Networks, got {scheme!r} for {path}")
    return tables.Files(found, spacing_mm)
