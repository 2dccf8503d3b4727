"""Lists of scans: a folder with manifest.csv, a folder of label maps, one's own CSV, a Learn2Reg dataset.json.

Each reader returns a `Table` and checks everything that can be checked without reading voxels. `Files` makes scans of
a table's items.
"""

from __future__ import annotations

import csv
import difflib
import json
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from Training.data import scan_files
from Training.data.scan_files import Item
from Training.data.scan_set import DataError, Scan, file_stamp

VOLUME_SUFFIXES = (".nii", ".nii.gz", ".mha", ".mhd", ".nrrd", ".npz")
IMAGE_COLUMNS = ("image", "labels", "landmarks", "split")
PAIR_COLUMNS = ("fixed", "moving", *(f"{s}_{c}" for s in ("fixed", "moving") for c in ("labels", "landmarks")), "split")


@dataclass
class Table:
    """The scans of one split as a source lists them.

    Attributes:
        kind: of source.
        items: the scans.
        pairs: (fixed, moving) that the source prescribes, None where any two are a pair.
    """

    kind: str
    items: list[Item] = field(default_factory=list)
    pairs: list[tuple[int, int]] | None = None


class Files:
    """The scans of a table, read one at a time from their files."""

    groups = None

    def __init__(self, table: Table, spacing_mm: float | None) -> None:
        """Check every header.

        Args:
            table: what to read.
            spacing_mm: of the grid; None for the smallest voxel edge, which all scans must then share within 1 %.

        Raises:
            DataError: a file is missing, unreadable or not 3D, or labels lie on another grid than their image.
        """
        self.kind, self.items, self.pairs = table.kind, table.items, table.pairs
        self.names = [item.name for item in self.items]
        edges = []
        for item in self.items:
            headers = [scan_files.read_header(path) for path in item.files()]
            if not headers[0].same_grid(headers[-1]):
                raise DataError(
                    f"labels must lie on the grid of their image ({headers[0]}), got {headers[-1]} in {item.labels}"
                )
            edges.append(min(headers[0].spacing_mm))
        if spacing_mm is None:
            if max(edges) > min(edges) * (1 + scan_files.FITS):
                raise DataError(
                    "a spacing must be given where scans differ in theirs, got smallest voxel edges of "
                    f"{min(edges):.3g} to {max(edges):.3g} mm"
                )
            spacing_mm = round(edges[0], 3)
        self.spacing_mm = float(spacing_mm)

    def read(self, index: int) -> Scan:
        """One scan."""
        return scan_files.load(self.items[index], self.spacing_mm)

    def count_labels(self) -> int:
        """One more than the largest label value, 0 without labels. Reads every label map."""
        tops = [
            int(scan_files.label_array(scan_files.read_volume(item.labels, "labels"), item.labels).max())
            for item in self.items
            if item.labels is not None
        ]
        return max(tops) + 1 if tops else 0

    def stamp(self) -> list[Any]:
        """What changes when the source does."""
        return [
            [item.name, None if item.points is None else item.points.tolist()] + [file_stamp(p) for p in item.files()]
            for item in self.items
        ]


def read_rows(path: Path) -> tuple[list[str], list[dict[str, str]]]:
    """Column names and rows of a CSV; empty fields are ''."""
    try:
        with path.open(newline="", encoding="utf-8-sig") as stream:
            reader = csv.DictReader(stream)
            rows = [{k: (v or "").strip() for k, v in row.items() if k is not None} for row in reader]
            return list(reader.fieldnames or []), rows
    except (UnicodeDecodeError, csv.Error):
        raise DataError(f"a table must be a CSV in UTF-8, got {path}") from None


def _check_columns(path: Path, columns: Iterable[str], known: tuple[str, ...]) -> None:
    for name in columns:
        near = difflib.get_close_matches(name, known, 1, cutoff=0.8)
        if name not in known and near:
            raise DataError(f"columns must be named as documented, got {name!r} in {path} (did you mean {near[0]!r}?)")


def _of_split(path: Path, columns: list[str], rows: list[dict[str, str]], split: str) -> list[dict[str, str]]:
    if "split" not in columns:
        if split != "train":
            raise DataError(f"a table without column split holds only split 'train', got {split!r} for {path}")
        return rows
    found = [row for row in rows if row["split"] == split]
    if not found:
        known = sorted({row["split"] for row in rows})
        raise DataError(f"the split must hold a scan, got {split!r} in {path} (it has {', '.join(known) or 'none'})")
    return found


def _no_subject_twice(path: Path, rows: list[dict[str, str]], column: str) -> None:
    seen: dict[str, str] = {}
    for row in rows:
        name, split = row[column], row.get("split", "train")
        if name in seen:
            raise DataError(f"{column} must be listed once, got {name!r} in {seen[name]} and {split} of {path}")
        seen[name] = split


def from_folder(root: Path, split: str) -> Table:
    """A folder with manifest.csv: columns subject or patient, split, image or file, and optionally labels.

    A file that ends in .npz holds its labels itself (arrays ct, labels and spacing as in the OpenKBP data); a column
    spacing_mm must then agree.

    Raises:
        DataError: wrong columns, a subject listed twice, or no scan of the split.
    """
    path = root / "manifest.csv"
    columns, rows = read_rows(path)
    subject = next((c for c in ("subject", "patient") if c in columns), None)
    image = next((c for c in ("image", "file") if c in columns), None)
    if subject is None or image is None or "split" not in columns:
        raise DataError(f"manifest.csv must have columns subject, split and image, got {columns} in {path}")
    _check_columns(path, columns, (subject, image, "labels", "split"))
    _no_subject_twice(path, rows, subject)
    items = []
    for row in _of_split(path, columns, rows, split):
        if not row[image]:
            raise DataError(f"every row must name its {image}, got none for {row[subject]!r} in {path}")
        file = root / row[image]
        packed = file.suffix == ".npz"
        labels = file if packed else root / row["labels"] if row.get("labels") else None
        if packed and row.get("spacing_mm"):
            x, p, i = scan_files.read_header(file).spacing_mm
            try:
                agrees = np.allclose([float(s) for s in row["spacing_mm"].split()], (p, x, i), rtol=1e-3)
            except ValueError:
                agrees = False
            if not agrees:
                raise DataError(
                    f"spacing_mm of {row[subject]!r} must be that of its file ({p:g} {x:g} {i:g}), "
                    f"got {row['spacing_mm']!r} in {path}"
                )
        items.append(Item(row[subject], file, labels))
    return Table("manifest", items)


def from_label_maps(root: Path, split: str) -> Table:
    """A folder of label maps without images, to synthesise images from; all of them are of split "train".

    Values from 256 on are taken for tissue outside of the brain, as in SynthSeg's maps of the whole head.
    """
    files = sorted(p for p in root.iterdir() if p.is_file() and p.name.endswith(VOLUME_SUFFIXES) and p.suffix != ".npz")
    if not files:
        raise DataError(f"a folder must hold manifest.csv or label maps, got {root} with neither")
    if split != "train":
        raise DataError(f"a folder of label maps holds only split 'train', got {split!r} for {root}")
    return Table("label maps", [Item(p.name, None, p) for p in files])


class _Collected:
    """Items without repeats, and their index."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.items: list[Item] = []
        self._index: dict[tuple[str, str, str], int] = {}

    def add(self, image: str, labels: str, landmarks: str) -> int:
        """The scan's index. The same image with other labels or landmarks is another scan."""
        key = (image, labels, landmarks)
        if key not in self._index:
            used = sum(known[0] == image for known in self._index)
            points = scan_files.read_landmarks(self.root / landmarks) if landmarks else None
            name = image if not used else f"{image} ({used + 1})"
            self._index[key] = len(self.items)
            self.items.append(Item(name, self.root / image, self.root / labels if labels else None, points))
        return self._index[key]


def from_csv(path: Path, split: str) -> Table:
    """One's own CSV: column image (and labels, landmarks, split), or fixed and moving (and fixed_labels ...).

    Paths are relative to the CSV; landmarks are CSV files with columns x, y, z in LPS mm. Without column split every
    row is of split "train". Other columns are left alone.

    Raises:
        DataError: wrong columns, an empty field, an image in two splits, or landmarks of a pair that differ in number.
    """
    columns, rows = read_rows(path)
    collected = _Collected(path.parent)
    if "image" in columns:
        _check_columns(path, columns, IMAGE_COLUMNS)
        _no_subject_twice(path, rows, "image")
        for row in _of_split(path, columns, rows, split):
            if not row["image"]:
                raise DataError(f"every row must name its image, got an empty field in {path}")
            collected.add(row["image"], row.get("labels", ""), row.get("landmarks", ""))
        return Table("csv", collected.items)
    if not {"fixed", "moving"} <= set(columns):
        raise DataError(f"a CSV must have column image, or columns fixed and moving, got {columns} in {path}")
    _check_columns(path, columns, PAIR_COLUMNS)
    pairs = []
    for row in _of_split(path, columns, rows, split):
        if not row["fixed"] or not row["moving"]:
            raise DataError(f"every row must name fixed and moving, got an empty field in {path}")
        fixed, moving = (
            collected.add(row[s], row.get(f"{s}_labels", ""), row.get(f"{s}_landmarks", ""))
            for s in ("fixed", "moving")
        )
        if fixed == moving:
            raise DataError(f"a pair must be two scans, got {row['fixed']} twice in {path}")
        a, b = collected.items[fixed].points, collected.items[moving].points
        if a is not None and b is not None and len(a) != len(b):
            raise DataError(f"a pair must have equally many landmarks, got {len(a)} and {len(b)} for {row['fixed']}")
        pairs.append((fixed, moving))
    return Table("csv pairs", collected.items, pairs)


def from_learn2reg(path: Path, content: dict[str, Any], split: str) -> Table:
    """A dataset.json of the Learn2Reg challenge.

    Split "train" is `training` without the scans of the other lists, with `training_paired_images` as pairs where the
    data are paired; "val" is `registration_val`, "test" is `registration_test` or `test_paired_images`. Labels are the
    entry's `label`, points its `keypoints`. A list of pairs that differ in their keypoints (`keypoints01` ...), and
    `mask`, are not read.

    Raises:
        DataError: entries in another layout, or no such split.
    """
    known: dict[str, dict[str, str]] = {}
    for part in ("training", "test"):
        for entry in content.get(part) or []:
            entry = {"image": entry} if isinstance(entry, str) else entry
            if not isinstance(entry, dict) or not isinstance(entry.get("image"), str):
                raise DataError(f"every entry of {part!r} must be an image or name its image, got {entry!r} in {path}")
            known[_plain(entry["image"])] = entry if part == "training" else {**entry, "held_out": "yes"}
    validation = _pairs_of(path, content, "registration_val")
    test = _pairs_of(path, content, "registration_test") or _pairs_of(path, content, "test_paired_images")
    held_out = {name for pair in validation + test for name in pair}
    if split == "train":
        trained = [pair for pair in _pairs_of(path, content, "training_paired_images") if not held_out & set(pair)]
        pairs = None if content.get("pairings") == "unpaired" else trained or None
        names = [n for n, entry in known.items() if n not in held_out and "held_out" not in entry]
        names += [n for pair in pairs or [] for n in pair if n not in known]
    elif split in ("val", "test"):
        pairs = validation if split == "val" else test
        names = [name for pair in pairs for name in pair]
    else:
        raise DataError(f"a Learn2Reg split must be train, val or test, got {split!r}")
    names = list(dict.fromkeys(names))
    if not names:
        raise DataError(f"the split must hold a scan, got {split!r} in {path}")
    items = [_learn2reg_item(path.parent, name, known.get(name, {})) for name in names]
    where = {name: k for k, name in enumerate(names)}
    return Table("learn2reg", items, None if pairs is None else [(where[f], where[m]) for f, m in pairs])


def _plain(name: str) -> str:
    return name.removeprefix("./")


def _pairs_of(path: Path, content: dict[str, Any], part: str) -> list[tuple[str, str]]:
    found = []
    for entry in content.get(part) or []:
        if not isinstance(entry, dict) or not all(isinstance(entry.get(k), str) for k in ("fixed", "moving")):
            raise DataError(f"every entry of {part!r} must name fixed and moving, got {entry!r} in {path}")
        found.append((_plain(entry["fixed"]), _plain(entry["moving"])))
    return list(dict.fromkeys(found))


def _learn2reg_item(root: Path, name: str, entry: dict[str, str]) -> Item:
    points = None
    if entry.get("keypoints"):
        file = root / entry["keypoints"]
        if file.name.endswith(".nii.gz"):  # some releases list keypoints under the image's file name
            file = file.with_name(file.name.removesuffix(".nii.gz") + ".csv")
        points = scan_files.read_keypoints(file)
    return Item(name, root / name, root / entry["label"] if entry.get("label") else None, points, True)


def from_json(path: Path, readers: dict[str, Callable[[dict[str, Any]], Any]]) -> Any:
    """Whatever the reader makes of a JSON file, chosen by the first of its keys that the file has."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (UnicodeDecodeError, json.JSONDecodeError) as error:
        raise DataError(f"a .json source must be valid JSON, got {path} ({error})") from None
    for key, reader in readers.items():
        if isinstance(content, dict) and key in content:
            return reader(content)
    raise DataError(f"a .json source must have one of the keys {', '.join(readers)}, got {path} without")
