"""Keys that say which pairs are trained on and how they are made."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

from Training.config import ConfigError, option

INITIALS = ("grid", "centred", "centroids", "stem", "aligned")
SHARES = ("stripped", "unlike", "cut", "free_form", "more_share", "synthesis", "remap", "thick", "crop", "same")


@dataclasses.dataclass(frozen=True, kw_only=True)
class PairSettings:
    """Keys that say which pairs to train on and how they are made."""

    data: Path | None = option(
        None, "data set: folder with manifest.csv, dataset.json, RCN .json, .csv, or a prepared cache"
    )
    pairs: Path | None = option(None, "CSV of one's own pairs (fixed, moving, ...), used instead of `data`")
    scheme: str | None = option(None, "scheme or subset of an RCN .json")
    split: str = option("train", "split to train on")
    val_split: str | None = option("val", "split to validate on; none to leave validation out")
    cache: Path | None = option(Path(".cache"), "folder for what is read once and kept")
    shape: tuple[int, int, int] = option((80, 96, 80), "window, voxels along S, P, L")
    spacing_mm: float = option(2.0, "voxel edge of the window")
    scan_spacing_mm: float | None = option(
        None, "voxel edge that scans are read at; none: their own (`pairs`: the window's)"
    )
    more_data: Path | None = option(None, "a second data set; a pair is drawn within one of them")
    more_share: float = option(0.5, "share of the pairs that come from it")
    synthesis: float = option(
        0.0, "share of images that are made from the labels, each of a new contrast; 1 where scans have no images"
    )
    remap: float = option(0.0, "share of images whose contrast is changed: inverted, T2-, FLAIR-like, random")
    thick: float = option(0.0, "share of images of slices up to 5 mm thick along some axis")
    crop: float = option(0.0, "share of images whose field of view ends within the body")
    same: float = option(0.0, "share of pairs of which both are one scan, the moving one deformed at random")
    n_pairs: int | None = option(None, "train on so many pairs, drawn once; none: any two scans at every step")
    initial: str = option("stem", f"map between the scans before the networks: one of {', '.join(INITIALS)}")
    stem: str = option("brain-t1", "model whose stem gives that map, where initial is stem")
    val_initial: str | None = option(None, "the same for the pairs to validate on; none: as initial")
    jitter_deg: float = option(4.0, "that map is disturbed by up to so many degrees about each axis,")
    jitter_mm: float = option(4.0, "so many millimetres,")
    jitter_scale: float = option(0.04, "and so much scale (half of it shear)")
    pose_deg: float = option(12.0, "the window is turned in the fixed scan by up to so much,")
    pose_scale: float = option(0.05, "scaled by so much,")
    offset_mm: float = option(10.0, "and moved by so much (one in ten: four times as much)")
    stripped: float = option(0.0, "share of pairs without skull (needs labels)")
    unlike: float = option(0.0, "share of pairs of which just one has its skull")
    cut: float = option(0.0, "share of scans (with labels) whose field of view ends below the brain")
    free_form: float = option(0.0, "share of pairs whose moving scan is deformed at random (5^3 control points)")
    intensity: bool = option(True, "gamma, gain, bias field, noise of each image")
    loss_stride: int = option(2, "the loss looks at every so many voxels of the window: 1 or 2")
    val_pairs: int = option(8, "pairs to validate on")

    def __post_init__(self) -> None:
        if (self.data is None) == (self.pairs is None):
            raise ConfigError(f"one of data and pairs must be given, got data={self.data} and pairs={self.pairs}")
        for name in ("initial", "val_initial"):
            if getattr(self, name) not in (*INITIALS, None)[: len(INITIALS) + (name == "val_initial")]:
                raise ConfigError(f"{name} must be one of {INITIALS}, got {getattr(self, name)!r}")
        if self.loss_stride not in (1, 2):
            raise ConfigError(f"loss_stride must be 1 or 2, got {self.loss_stride}")
        if any(n % 16 for n in self.shape):
            raise ConfigError(f"every axis of shape must be a multiple of 16, got {self.shape}")
        for name in SHARES:
            if not 0 <= getattr(self, name) <= 1:
                raise ConfigError(f"{name} must lie between 0 and 1, got {getattr(self, name)}")


def defaults(given: dict[str, Any]) -> dict[str, Any]:
    """Keys that follow from others: one's own pairs are not split unless a split to validate on is named."""
    return {"val_split": None} if given.get("pairs") else {}
