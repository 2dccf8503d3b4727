"""One .npz that holds splits of a data set as they are trained on: compact, read scan by scan, needs only numpy.

Members: `about` (JSON: for every split its names, spacing, pairs ...) and SPLIT/INDEX/image, labels, points, to_lps.
"""

from __future__ import annotations

import json
import os
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from Training.data.scan_set import DataError, Scan, ScanSet, file_stamp

FORMAT = "scans 1"
ARRAYS = ("image", "labels", "points", "to_lps")


def write(path: Path, splits: Mapping[str, ScanSet], key: str = "") -> None:
    """Write splits to one file, under a temporary name first.

    Args:
        path: ends in .npz.
        splits: what to write, by name of the split.
        key: kept in the file, see `key_of`.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f"{path.name}.{os.getpid()}.part")
    about: dict[str, Any] = {"format": FORMAT, "key": key, "splits": {}}
    try:
        with zipfile.ZipFile(part, "w", zipfile.ZIP_DEFLATED, compresslevel=4) as archive:

            def put(name: str, array: np.ndarray) -> None:
                with archive.open(f"{name}.npy", "w", force_zip64=True) as stream:
                    np.lib.format.write_array(stream, array, allow_pickle=False)

            for split, scans in splits.items():
                top = 0
                for index in tqdm(range(len(scans)), desc=f"prepare {split}", mininterval=2, disable=len(scans) < 20):
                    scan = scans.read(index)
                    for what in ARRAYS:
                        array = getattr(scan, what)
                        if array is not None:
                            put(f"{split}/{index}/{what}", array)
                    top = max(top, 0 if scan.labels is None else int(scan.labels.max()) + 1)
                about["splits"][split] = {
                    "names": scans.names,
                    "spacing_mm": scans.spacing_mm,
                    "n_labels": top,
                    "pairs": scans.pairs,
                    "groups": scans.groups,
                    "identity": scans.identity,
                }
            put("about", np.array(json.dumps(about)))
        part.replace(path)
    finally:
        part.unlink(missing_ok=True)


def about(path: Path) -> dict[str, Any]:
    """What a prepared file says of itself.

    Raises:
        DataError: not a prepared file.
    """
    try:
        with np.load(path) as stored:
            found = json.loads(stored["about"].item())
            if found["format"] != FORMAT:
                raise ValueError
            return found
    except (OSError, KeyError, ValueError, TypeError, zipfile.BadZipFile):
        raise DataError(f"an .npz source must be made by Training.prepare_data, got {path}") from None


class Prepared:
    """One split of a prepared file. The file is opened anew for every scan, so that processes may share this object."""

    kind = "prepared"

    def __init__(self, path: Path, split: str, spacing_mm: float | None) -> None:
        """Read what the file says of a split.

        Raises:
            DataError: not a prepared file, not of this split, or of another spacing.
        """
        splits = about(path)["splits"]
        if split not in splits:
            raise DataError(f"the split must be one of {', '.join(splits)}, got {split!r} for {path}")
        facts = splits[split]
        if spacing_mm is not None and abs(spacing_mm - facts["spacing_mm"]) > 1e-6:
            raise DataError(f"{path} was prepared at {facts['spacing_mm']:g} mm, got spacing_mm {spacing_mm:g}")
        self.path, self.split = path, split
        self.names, self.spacing_mm, self.identity = facts["names"], facts["spacing_mm"], facts["identity"]
        self._n_labels = facts["n_labels"]
        self.pairs = None if facts["pairs"] is None else [(f, m) for f, m in facts["pairs"]]
        self.groups = None if facts["groups"] is None else [(share, members) for share, members in facts["groups"]]

    def read(self, index: int) -> Scan:
        """One scan."""
        try:
            with np.load(self.path) as stored:
                arrays = {what: stored.get(f"{self.split}/{index}/{what}") for what in ARRAYS}
        except (OSError, ValueError, zipfile.BadZipFile):
            raise DataError(f"a prepared file must be readable, got damaged data in {self.path}") from None
        return Scan(self.names[index], spacing_mm=self.spacing_mm, **arrays)

    def count_labels(self) -> int:
        """One more than the largest label value, 0 without labels."""
        return self._n_labels

    def stamp(self) -> list[Any]:
        """What changes when the source does."""
        return [file_stamp(self.path), self.split]
