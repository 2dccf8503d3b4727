"""What a data set is made of, whatever it was read from: scans, and the set of scans of one split.

Split by subject: never mix the lists of two splits.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np

KEEP_BYTES = 4 << 30  # decoded scans that a set keeps in memory; what goes beyond is read again


class DataError(ValueError):
    """Data that cannot be trained on. The message is one sentence: the rule, and what came instead."""


@dataclass(frozen=True)
class Scan:
    """One scan on an isotropic grid whose tensor axes point to S, P and L.

    Attributes:
        name: of the subject or file, unique in its set.
        image: (D, H, W) uint8; None for a label map without image, from which one is to be synthesised.
        labels: (D, H, W) uint8 or int16, 0 is background; None where the source has none.
        points: (N, 3) float64 voxel positions in tensor-axis order, NaN where a landmark is absent; None where none.
        spacing_mm: voxel edge.
        to_lps: 4x4, voxel of this grid -> LPS mm of the file (voxels times spacing where a source has no geometry).
    """

    name: str
    image: np.ndarray | None
    labels: np.ndarray | None
    points: np.ndarray | None
    spacing_mm: float
    to_lps: np.ndarray

    @property
    def shape(self) -> tuple[int, ...]:
        """(D, H, W)."""
        known = self.labels if self.image is None else self.image
        assert known is not None
        return known.shape


class Source(Protocol):
    """What a reader offers."""

    kind: str
    names: list[str]
    spacing_mm: float
    pairs: list[tuple[int, int]] | None
    groups: list[tuple[float, list[int]]] | None

    def read(self, index: int) -> Scan: ...  # noqa: D102

    def count_labels(self) -> int: ...  # noqa: D102

    def stamp(self) -> list[Any]: ...  # noqa: D102


def file_stamp(path: Path) -> tuple[str, int, int]:
    """What changes when a file does: where it lies, its size, and when it was last written."""
    facts = path.stat()
    return str(path.resolve()), facts.st_size, facts.st_mtime_ns


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
        self.source = source
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
            self._n_labels = self.source.count_labels()
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
        return self.source.read(index)

    def count_pairs(self) -> int:
        """Of how many different pairs `draw_pair` takes one."""
        if self.pairs is not None:
            return len(self.pairs)
        groups = self.groups or [(1.0, list(range(len(self))))]
        return sum(len(members) * (len(members) - 1) for share, members in groups if share)

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
