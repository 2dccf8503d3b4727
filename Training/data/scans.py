"""Scans to train on, from any source, in one form: uint8 images with axes S, P, L at one isotropic spacing.

`open_scans` looks at what the source is and picks the reader. Split by subject: never mix the lists of two splits.
"""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Protocol

import numpy as np

from Training.data import prepared, tables
from Training.data.rcn import Rcn
from Training.data.volumes import DataError as DataError
from Training.data.volumes import Scan as Scan

KEEP_BYTES = 4 << 30  # decoded scans that a set keeps in memory; what goes beyond is read again


class Source(Protocol):
    """What a reader offers."""

    kind: str
    names: list[str]
    spacing_mm: float
    pairs: list[tuple[int, int]] | None
    groups: list[tuple[float, list[int]]] | None

    def read(self, index: int) -> Scan: ...  # noqa: D102

    def count_labels(self) -> int: ...  # noqa: D102


class ScanSet:
    """One split of a data set, cheap to index many times.

    Attributes:
        names: of the scans.
        spacing_mm: voxel edge of every scan.
        pairs: (fixed, moving) that the source prescribes; None where any two different scans are a pair.
        groups: (share, members) where pairs are drawn within groups, or None; beside `pairs` these are moving scans.
        identity: sha256 over source kind, split and sorted names, equal on every machine, for the model card.
    """

    def __init__(self, source: Source, split: str) -> None:
        self._source = source
        self.names, self.spacing_mm = source.names, source.spacing_mm
        self.pairs, self.groups = source.pairs, source.groups
        facts = repr((source.kind, split, sorted(source.names)))
        self.identity: str = getattr(source, "identity", None) or hashlib.sha256(facts.encode()).hexdigest()
        self._kept: dict[int, Scan] = {}
        self._kept_bytes = 0
        self._n_labels: int | None = None

    @property
    def n_labels(self) -> int:
        """Larger than every label value, 0 if there are no labels. Read once, on first use."""
        if self._n_labels is None:
            self._n_labels = self._source.count_labels()
        return self._n_labels

    def __len__(self) -> int:
        return len(self.names)

    def __getitem__(self, index: int) -> Scan:
        index = range(len(self))[index]
        if index not in self._kept:
            scan = self.read(index)
            size = sum(a.nbytes for a in (scan.image, scan.labels) if a is not None)
            if self._kept_bytes + size > KEEP_BYTES:
                return scan
            self._kept[index] = scan
            self._kept_bytes += size
        return self._kept[index]

    def read(self, index: int) -> Scan:
        """One scan from its source, without keeping it."""
        return self._source.read(index)

    def draw_pair(self, rng: np.random.Generator) -> tuple[int, int]:
        """(fixed, moving): one of `pairs`, or two different scans (of one group, where there are groups)."""
        if self.groups is not None:
            share = np.array([s for s, _ in self.groups])
            members = self.groups[int(rng.choice(len(share), p=share / share.sum()))][1]
            if self.pairs is not None:
                return self.pairs[0][0], members[int(rng.integers(len(members)))]
            fixed, moving = rng.choice(members, 2, replace=False)
            return int(fixed), int(moving)
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
