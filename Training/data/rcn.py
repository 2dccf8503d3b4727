"""The layout of Recursive Cascaded Networks, which the authors of LDR share: a .json and the HDF5 files that it names.

Facts of the layout (Zhao et al., ICCV 2019, and its published code and files):

- `files`: {name: {path}}; an entry "lpba/S02" is group "S02" of file "lpba", and an entry whose first part is no file's
  name is a group of the file named "/". A group holds `volume` (uint8, 0..255), and may hold `segmentation` and `point`
  (6 x 3 voxel positions in array order, negative where absent).
- `subsets`: {name: [entries]}; `schemes`: {name: {subset: share of a batch}}. Scheme "1" is for training, "2" for
  validation; others have names.
- `atlas`, where given, is the fixed scan of every pair. Otherwise any two scans of one subset are a pair.
- `segmentation_class_value`: {structure: value}. Without it a segmentation is one structure, voxels above 128.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from LDRCore import geometry
from Training.data import scan_files
from Training.data.scan_set import DataError, Scan, file_stamp

SCHEME_OF_SPLIT = {"train": "1", "val": "2"}
PAIRED = ":paired"


def _h5py() -> Any:
    try:
        import h5py
    except ImportError:
        raise DataError("an RCN .json needs the package h5py, which is not installed (pip install h5py)") from None
    return h5py


class Rcn:
    """The scans of one scheme. Files are opened anew for every scan, so that processes may share this object."""

    kind = "rcn"

    def __init__(
        self, path: Path, content: dict[str, Any], split: str, scheme: str | None, spacing_mm: float | None
    ) -> None:
        """Check everything that the .json says against the files.

        Args:
            path: of the .json. A relative path in `files` is looked for from its folder, from the folder above (as the
                published files have it), and by its name beside the .json.
            content: of the .json.
            split: "train" is scheme "1", "val" is scheme "2", anything else the name of a scheme or subset.
            scheme: name of a scheme or subset, instead of the split's. With ":paired" behind it (the published
                evaluation on LSPIG) each two entries in a row are a pair, both ways.
            spacing_mm: the volumes' voxel edge, which the layout does not say: 1 unless given.

        Raises:
            DataError: keys, files, groups or shapes that do not fit, or no such scheme.
        """
        self.path, self.spacing_mm = path, float(spacing_mm or 1.0)
        for key in ("files", "subsets", "schemes"):
            if not isinstance(content.get(key), dict):
                raise DataError(f"an RCN .json must have an object {key!r}, got none in {path}")
        self.values = content.get("segmentation_class_value")
        self.shape = tuple(content.get("image_size", (128, 128, 128)))
        self.files = {name: self._locate(name, entry) for name, entry in content["files"].items()}
        wanted = scheme or SCHEME_OF_SPLIT.get(split, split)
        wanted, paired = wanted.removesuffix(PAIRED), wanted.endswith(PAIRED)
        shares = content["schemes"].get(wanted) or ({wanted: 1.0} if wanted in content["subsets"] else None)
        if not shares:
            raise DataError(
                f"scheme must be one of {', '.join(content['schemes'])} or "
                f"a subset of {', '.join(content['subsets'])}, got {wanted!r} for {path}"
            )
        self.names: list[str] = []
        self.groups: list[tuple[float, list[int]]] | None = []
        self.pairs: list[tuple[int, int]] | None = None
        for subset, share in shares.items():
            entries = content["subsets"].get(subset)
            if not entries:
                raise DataError(f"a scheme must name subsets with scans, got {subset!r} in scheme {wanted!r} of {path}")
            self.groups.append((float(share), list(range(len(self.names), len(self.names) + len(entries)))))
            self.names += entries
        self.atlas = content.get("atlas")
        if len(set(self.names)) < len(self.names):
            raise DataError(f"a scheme must list an entry once, got repeats in {wanted!r} of {path}")
        if paired:
            self._pair_neighbours()
        elif self.atlas is not None:
            self._pair_with_atlas()
        self._check_groups()

    def _pair_neighbours(self) -> None:
        assert self.groups is not None
        self.pairs = []
        for _, members in self.groups:
            if len(members) % 2:
                raise DataError(f"{PAIRED} needs an even number of scans, got {len(members)} in {self.path}")
            for a, b in zip(members[::2], members[1::2], strict=True):
                self.pairs += [(a, b), (b, a)]
        self.groups = None

    def _pair_with_atlas(self) -> None:
        """The atlas is fixed, every other scan moves; a share is kept by drawing the moving scan's subset first."""
        assert self.groups is not None
        if self.atlas not in self.names:
            self.names.append(self.atlas)
        atlas = self.names.index(self.atlas)
        moving = [(share, [m for m in members if m != atlas]) for share, members in self.groups]
        self.groups = [(share, members) for share, members in moving if members]
        self.pairs = [(atlas, m) for _, members in self.groups for m in members]

    def _locate(self, name: str, entry: Any) -> Path:
        if not isinstance(entry, dict) or not isinstance(entry.get("path"), str):
            raise DataError(f"every entry of 'files' must give a path, got {entry!r} for {name!r} in {self.path}")
        given, folder = Path(entry["path"]), self.path.resolve().parent
        tried = [folder / given, folder.parent / given, folder / given.name]
        return next((p for p in tried if p.is_file()), tried[0])

    def _group(self, name: str) -> tuple[Path, str]:
        file, _, group = name.partition("/")
        if group and file in self.files:
            return self.files[file], group
        if "/" in self.files:
            return self.files["/"], name
        raise DataError(f"every entry must name one of the files {', '.join(self.files)}, got {name!r} in {self.path}")

    def _check_groups(self) -> None:
        wanted: dict[Path, list[str]] = {}
        for name in self.names:
            file, group = self._group(name)
            wanted.setdefault(file, []).append(group)
        for file, groups in wanted.items():
            if not file.is_file():
                raise DataError(f"every file of an RCN .json must exist, got {file} (not found)")
            try:
                stored = _h5py().File(file, "r")
            except OSError:
                raise DataError(f"every file of an RCN .json must be readable HDF5, got {file}") from None
            with stored:
                for group in groups:
                    if not isinstance(stored.get(group), _h5py().Group) or "volume" not in stored[group]:
                        raise DataError(f"every entry must be a group with a volume, got none for {group!r} in {file}")
                    for key in ("volume", "segmentation"):
                        if key in stored[group] and stored[group][key].shape != self.shape:
                            raise DataError(
                                f"every {key} must have the image_size {self.shape}, "
                                f"got {stored[group][key].shape} for {group!r} in {file}"
                            )

    def read(self, index: int) -> Scan:
        """One scan; its axes are taken as they are stored."""
        file, group = self._group(self.names[index])
        try:
            with _h5py().File(file, "r") as stored:
                arrays = {key: dataset[()] for key, dataset in stored[group].items() if key != "id"}
        except OSError:
            raise DataError(f"every volume must be readable, got a damaged {group!r} in {file}") from None
        image = arrays["volume"]
        labels = points = None
        if "segmentation" in arrays:
            labels = self._labels(arrays["segmentation"])
        if "point" in arrays:
            points = arrays["point"].astype(float).reshape(-1, 3)
            points[(points < 0).any(axis=1)] = np.nan
        if image.dtype != np.uint8:
            image = scan_files.to_uint8(image)
        to_lps = geometry.Grid((0.0, 0.0, 0.0), (self.spacing_mm,) * 3, image.shape).to_lps
        return Scan(self.names[index], image, labels, points, self.spacing_mm, to_lps)

    def _labels(self, segmentation: np.ndarray) -> np.ndarray:
        if self.values is None:
            return (segmentation > 128).astype(np.uint8)
        listed = [int(v) for v in self.values.values()]
        rounded = np.rint(segmentation).astype(np.int16)
        kept = np.where(np.isin(rounded, listed), rounded, 0)
        return kept.astype(np.uint8 if max(listed) < 256 else np.int16)

    def count_labels(self) -> int:
        """One more than the largest label value, 0 where the first scan has no segmentation."""
        if self.read(0).labels is None:
            return 0
        return 2 if self.values is None else max(int(v) for v in self.values.values()) + 1

    def stamp(self) -> list[Any]:
        """What changes when the source does."""
        return [file_stamp(path) for path in sorted({self._group(name)[0] for name in self.names})]
