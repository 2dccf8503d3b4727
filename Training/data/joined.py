"""Two data sets trained on together: a pair is drawn within one of them."""

from __future__ import annotations

import hashlib
from typing import Any

from Training.data.scan_set import DataError, Scan, ScanSet


class Joined:
    """The scans of two sets, one after the other."""

    kind = "joined"
    pairs = None

    def __init__(self, first: ScanSet, second: ScanSet, share: float) -> None:
        """Join two sets.

        Args:
            first, second: of one voxel edge, without prescribed pairs.
            share: of the pairs that come from the second.

        Raises:
            DataError: their voxel edges differ, or one prescribes pairs.
        """
        if abs(first.spacing_mm - second.spacing_mm) > 1e-6:
            raise DataError(
                f"two data sets must be read at one spacing (scan_spacing_mm), got {first.spacing_mm:g} and "
                f"{second.spacing_mm:g} mm"
            )
        if any(scans.pairs is not None or scans.groups is not None for scans in (first, second)):
            raise DataError("two data sets can only be joined where any two scans are a pair, got one that lists pairs")
        self._sets = first, second
        self.names = [f"{k}/{name}" for k, scans in enumerate(self._sets) for name in scans.names]
        self.spacing_mm = first.spacing_mm
        members = list(range(len(self.names)))
        self.groups = [(1 - share, members[: len(first)]), (share, members[len(first) :])]
        facts = repr((first.identity, second.identity, share))
        self.identity = hashlib.sha256(facts.encode()).hexdigest()

    def read(self, index: int) -> Scan:
        """One scan."""
        first, second = self._sets
        return first.read(index) if index < len(first) else second.read(index - len(first))

    def count_labels(self) -> int:
        """One more than the largest label value of both."""
        return max(scans.n_labels for scans in self._sets)

    def stamp(self) -> list[Any]:
        """What changes when the source does."""
        return [scans.source.stamp() for scans in self._sets]
