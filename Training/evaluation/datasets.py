"""Lists and reads pairs of the data sets on which systems are compared, with labels and landmarks in their geometry.

Listing pairs reads only indexes; `load` reads one pair. Layouts: a folder with manifest.csv (IXI), a CSV of files,
Learn2Reg's dataset.json (also LUMIR), and the JSON + HDF5 of the recursive cascade's authors (SLIVER, LiTS, LSPIG,
LPBA40), whose volumes carry no geometry; their voxels count as 1 mm.
"""

from __future__ import annotations

import csv
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import SimpleITK as sitk

from LDRCore.errors import RegistrationError
from LDRCore.evaluation import scoring
from LDRCore.io import images
from Training.data.rcn import PAIRED, Rcn
from Training.data.scan_set import DataError
from Training.data.subject_views import random_pose
from Training.evaluation.config import DataSet

POSE_ANGLE_DEG, POSE_SHIFT_MM = 15, 20
_LEARN2REG_PAIRS = ("registration_val", "validation", "registration_test", "eval_pairs")


@dataclass(frozen=True)
class Side:
    """Files of one image of a pair (kind "rcn": `image` is the entry's name)."""

    image: str
    labels: str = ""
    landmarks: str = ""


@dataclass(frozen=True)
class Pair:
    """One pair, not yet read.

    Attributes:
        name: unique in its data set.
        fixed, moving: their files.
        pose_seed: seed of the random pose written into the moving image's header, or None.
    """

    name: str
    fixed: Side
    moving: Side
    pose_seed: int | None = None


@dataclass(frozen=True)
class Loaded:
    """One pair in memory."""

    fixed: sitk.Image
    moving: sitk.Image
    truth: scoring.Truth


def list_pairs(data: DataSet) -> list[Pair]:
    """List all pairs of a data set, in a fixed order.

    Raises:
        RegistrationError: an index file is missing, cannot be read, or lists no pair.
    """
    try:
        pairs = {"ixi": _ixi, "csv": _csv, "learn2reg": _learn2reg, "rcn": _rcn}[data.kind](data)
    except DataError as error:
        raise RegistrationError(str(error)) from None
    if not pairs:
        raise RegistrationError(f"data set {data.name} must list at least one pair, got none in {data.root}")
    return pairs


def _existing(path: Path, what: str) -> Path:
    if not path.exists():
        raise RegistrationError(f"{what} must exist, got {path} (not found)")
    return path


def read_csv(path: Path, columns: tuple[str, ...]) -> list[dict[str, str]]:
    """Read the rows of a CSV that must have certain columns.

    Raises:
        RegistrationError: missing file or column.
    """
    with _existing(path, "the list of pairs").open(newline="", encoding="utf-8-sig") as stream:
        reader = csv.DictReader(stream)
        missing = [c for c in columns if c not in (reader.fieldnames or [])]
        if missing:
            raise RegistrationError(f"{path} must have a column {missing[0]!r}, got {reader.fieldnames}")
        return list(reader)


def _ixi(data: DataSet) -> list[Pair]:
    root = Path(data.root)
    subjects = {r["subject"]: r for r in read_csv(root / "manifest.csv", ("subject", "image", "labels"))}
    pairs = []
    for row in read_csv(Path(data.pairs), ("fixed", "moving", "pose_seed")):
        sides = []
        for subject in (row["fixed"], row["moving"]):
            if subject not in subjects:
                raise RegistrationError(f"every subject of {data.pairs} must be in the manifest, got {subject!r}")
            r = subjects[subject]
            sides.append(Side(str(root / r["image"]), str(root / r["labels"])))
        seed = int(row["pose_seed"]) if row["pose_seed"] else None
        pose = "" if seed is None else f" pose {seed}"
        pairs.append(Pair(f"{row['fixed']}<-{row['moving']}{pose}", *sides, pose_seed=seed))
    return pairs


def _csv(data: DataSet) -> list[Pair]:
    root = Path(data.root)
    pairs = []
    for row in read_csv(Path(data.pairs), ("fixed", "moving")):
        sides = [
            Side(*(str(root / row[c]) if row.get(c) else "" for c in (side, f"{side}_labels", f"{side}_landmarks")))
            for side in ("fixed", "moving")
        ]
        pairs.append(Pair(row.get("pair") or f"{row['fixed']}<-{row['moving']}", *sides))
    return pairs


def _read_json(path: Path) -> dict[str, Any]:
    text = _existing(path, "the data set's JSON").read_text(encoding="utf-8")
    try:
        return json.loads(text)
    except ValueError as error:
        raise RegistrationError(f"the data set's JSON must be readable, got {path} ({error})") from None


def _learn2reg(data: DataSet) -> list[Pair]:
    path = Path(data.root)
    if path.is_dir():
        candidates = sorted(path.glob("*dataset.json"))
        if len(candidates) != 1:
            raise RegistrationError(f"{path} must hold one *dataset.json, got {len(candidates)}")
        path = candidates[0]
    content = _read_json(path)
    keys = [data.pairs] if data.pairs else [k for k in _LEARN2REG_PAIRS if content.get(k)]
    listed = content.get(keys[0], []) if keys else []
    if not listed or not all(isinstance(p, dict) and {"fixed", "moving"} <= set(p) for p in listed):
        raise RegistrationError(
            f"{path.name} must list pairs with fixed and moving under {keys[0] if keys else list(_LEARN2REG_PAIRS)}, "
            f"got the keys {sorted(content)}"
        )

    def beside(image: str, names: tuple[str, ...], ending: str) -> str:
        """Return the label or landmark file of an image: the same name in a sibling folder, or ""."""
        for name in names:
            other = path.parent / image.replace("images", name)
            other = other.with_name(other.name.removesuffix(".nii.gz") + ending)
            if other.exists():
                return str(other)
        return ""

    def side(image: str) -> Side:
        return Side(
            str(path.parent / image),
            beside(image, ("labels",), ".nii.gz"),
            beside(image, ("landmarks", "keypoints"), ".csv"),
        )

    names = [tuple(Path(p[k]).name.removesuffix(".nii.gz") for k in ("fixed", "moving")) for p in listed]
    return [Pair(f"{f}<-{m}", side(p["fixed"]), side(p["moving"])) for p, (f, m) in zip(listed, names, strict=True)]


def _open_rcn(data: DataSet) -> Rcn:
    path = Path(data.root)
    return Rcn(path, _read_json(path), "", data.pairs + (PAIRED if data.intra_subject else ""), None)


def _rcn(data: DataSet) -> list[Pair]:
    """List pairs: the atlas with every other scan if there is an atlas, otherwise all ordered pairs within a subset."""
    source = _open_rcn(data)
    chosen = source.pairs or [(a, b) for _, m in source.groups or [] for a in m for b in m if a != b]
    return [
        Pair(f"{source.names[a]}<-{source.names[b]}", Side(source.names[a]), Side(source.names[b])) for a, b in chosen
    ]


def load(data: DataSet, pair: Pair) -> Loaded:
    """Read one pair.

    Raises:
        RegistrationError: a file is missing or unreadable, or labels or landmarks cannot be used.
    """
    if data.kind == "rcn":
        return _load_rcn(data, pair)
    (fixed, fixed_labels), (moving, moving_labels) = (_read_side(s, data.stripped) for s in (pair.fixed, pair.moving))
    if pair.pose_seed is not None:
        moving = posed(moving, pair.pose_seed)
        moving_labels = posed(moving_labels, pair.pose_seed) if moving_labels is not None else None
    points = [
        scoring.load_landmarks(side.landmarks, data.landmarks, image, name) if side.landmarks else None
        for side, image, name in ((pair.fixed, fixed, "fixed landmarks"), (pair.moving, moving, "moving landmarks"))
    ]
    return Loaded(fixed, moving, scoring.Truth(fixed, fixed_labels, moving_labels, *points))


def _read_side(side: Side, stripped: bool) -> tuple[sitk.Image, sitk.Image | None]:
    image = images.load(side.image, "image")
    labels = scoring.load_labels(side.labels, "labels") if side.labels else None
    if stripped:
        if labels is None:
            raise RegistrationError(f"stripping needs labels, got none for {side.image}")
        image = sitk.Mask(image, labels > 0)
    return image, labels


def posed(image: sitk.Image, seed: int) -> sitk.Image:
    """Write a random pose of up to 15 degrees and 20 mm into a copy's header, without resampling."""
    matrix = random_pose(np.random.default_rng(seed), POSE_ANGLE_DEG, POSE_SHIFT_MM, 0.0)
    out = sitk.Image(image)
    centre = np.array(image.TransformContinuousIndexToPhysicalPoint([(n - 1) / 2 for n in image.GetSize()]))
    direction = np.array(image.GetDirection()).reshape(3, 3)
    rotation = matrix[:3, :3]
    out.SetDirection((rotation @ direction).ravel().tolist())
    out.SetOrigin((rotation @ (np.array(image.GetOrigin()) - centre) + centre + matrix[:3, 3]).tolist())
    return out


def _load_rcn(data: DataSet, pair: Pair) -> Loaded:
    source = _open_rcn(data)
    volumes, labels, points = [], [], []
    for side in (pair.fixed, pair.moving):
        scan = source.read(source.names.index(side.image))
        volumes.append(images.load(_as_image(scan.image, scan.to_lps), scan.name))
        known = None if scan.labels is None else _as_image(scan.labels.astype(np.int32), scan.to_lps)
        labels.append(None if known is None else scoring.load_labels(known, f"segmentation of {scan.name}"))
        points.append(scan.points)
    landmarks: list[np.ndarray | None] = [None, None]
    if points[0] is not None and points[1] is not None:
        both = np.isfinite(points[0]).all(1) & np.isfinite(points[1]).all(1)
        if both.any():
            frames = zip(points, volumes, strict=True)
            landmarks = [scoring.landmarks_lps(p[both][:, ::-1], "voxel", v, "landmarks") for p, v in frames]
    return Loaded(*volumes, scoring.Truth(volumes[0], *labels, *landmarks))


def _as_image(values: np.ndarray, to_lps: np.ndarray) -> sitk.Image:
    """Make an image of an array with axes S, P, L and its 4x4, index -> LPS mm."""
    image = sitk.GetImageFromArray(values)
    image.SetSpacing(np.linalg.norm(to_lps[:3, :3], axis=0)[::-1].tolist())
    image.SetOrigin(to_lps[:3, 3].tolist())
    return image
