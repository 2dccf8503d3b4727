"""The map between two scans before the networks: same voxel, centred, label centroids, a model's stem, or aligned."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from functools import lru_cache

import numpy as np
import SimpleITK as sitk
import torch
from tqdm import tqdm

from LDRCore import geometry
from LDRCore.distillation.teacher_store import pair_key
from LDRCore.pipeline import preprocess
from LDRCore.pipeline.affine import centring_candidates, estimate_affine, predict_affine
from LDRCore.pipeline.model import load_model
from Training.config import ConfigError
from Training.data.centroids import label_centroids
from Training.data.scan_set import ScanSet
from Training.pair_settings import PairSettings


class InitialTransforms:
    """Finds initial transforms as 4x4 matrices, fixed scan voxel -> moving scan voxel."""

    def __init__(
        self, settings: PairSettings, scans: ScanSet, canonical: Callable[[int], np.ndarray], device: torch.device
    ) -> None:
        """Prepare what the kind of transform needs.

        Args:
            settings: `initial` says which kind.
            scans: of the data set.
            canonical: a scan's canonical window: 4x4, window voxel -> scan voxel.
            device: where the stem runs.
        """
        self.settings, self.scans, self.canonical, self.device = settings, scans, canonical, device
        models = {"stem": settings.stem, "aligned": "none"}
        self._stem = load_model(models[settings.initial], str(device)) if settings.initial in models else None
        self._prepared = lru_cache(maxsize=256)(self._prepare)
        self._centroids = lru_cache(maxsize=None)(self._centroids_of)
        self._kept: dict[tuple[int, int], np.ndarray] = {}

    def moving_from_fixed(self, fixed: int, moving: int, *, keep: bool) -> np.ndarray:
        """Find the transform of a pair of scans.

        Args:
            fixed, moving: indexes of the scans.
            keep: in memory, for the next time.

        Raises:
            ConfigError: too few labels that both scans have.
        """
        if (fixed, moving) in self._kept:
            return self._kept[fixed, moving]
        found = self._find(fixed, moving)
        if keep:
            self._kept[fixed, moving] = found
        return found

    def _find(self, fixed: int, moving: int) -> np.ndarray:
        kind = self.settings.initial
        if kind == "grid" or fixed == moving:
            return np.eye(4)
        if kind == "centred":
            return self.canonical(moving) @ np.linalg.inv(self.canonical(fixed))
        if kind == "centroids":
            return self._by_centroids(fixed, moving)
        return self._by_stem(fixed, moving)

    def _by_centroids(self, fixed: int, moving: int) -> np.ndarray:
        (fixed_points, fixed_size), (moving_points, moving_size) = self._centroids(fixed), self._centroids(moving)
        both = (fixed_size > 0) & (moving_size > 0)
        if both.sum() < 4:
            key = pair_key(self.scans.names[fixed], self.scans.names[moving])
            raise ConfigError(f"initial = centroids needs four common labels, got fewer in {key}")
        weights = np.minimum(fixed_size, moving_size)[both] ** 0.25
        return geometry.fit_affine(fixed_points[both], moving_points[both], weights)

    def _by_stem(self, fixed: int, moving: int) -> np.ndarray:
        assert self._stem is not None
        fixed_image, moving_image = self._prepared(fixed), self._prepared(moving)
        candidates = centring_candidates(fixed_image, moving_image)
        if self._stem.stem is None:
            affine_lps = estimate_affine(self._stem, fixed_image, moving_image, candidates).affine_lps
        else:
            affine_lps = predict_affine(self._stem, fixed_image, moving_image, candidates[:1])
        return np.linalg.inv(moving_image.native.to_lps) @ affine_lps @ fixed_image.native.to_lps

    def _prepare(self, index: int) -> preprocess.PreparedImage:
        scan = self.scans[index]
        array = scan.image
        if self.settings.stripped >= 0.5 and scan.labels is not None:
            array = np.where(scan.labels > 0, array, 0)
        image = sitk.GetImageFromArray(array)
        image.SetSpacing([scan.spacing_mm] * 3)
        assert self._stem is not None
        grid = self._stem.card["working_grid"]
        return preprocess.prepare(
            image, None, fine_mm=grid["spacing_mm"], coarse_mm=grid["stem_spacing_mm"], device=self.device
        )

    def _centroids_of(self, index: int) -> tuple[np.ndarray, np.ndarray]:
        labels = self.scans[index].labels
        assert labels is not None
        return label_centroids(labels, self.scans.n_labels)

    def run_stem(self, pairs: list[tuple[int, int]]) -> None:
        """Run the stem once for every pair of a list, and keep the results in the cache folder; else do nothing."""
        if self._stem is None or not pairs:
            return
        facts = (
            self.scans.source.stamp(),
            self.scans.spacing_mm,
            self._stem.card.get("sha256", self._stem.name),
            self.settings.stripped >= 0.5,
            sorted(pairs),
        )
        name = hashlib.sha256(repr(facts).encode()).hexdigest()[:16]
        path = self.settings.cache / f"starts-{name}.npz" if self.settings.cache else None
        if path and path.exists():
            with np.load(path) as stored:
                self._kept = dict(zip(map(tuple, stored["pairs"].tolist()), stored["maps"], strict=True))
            return
        for pair in tqdm(pairs, desc="initial transforms", mininterval=5):
            self.moving_from_fixed(*pair, keep=True)
        if path:
            path.parent.mkdir(parents=True, exist_ok=True)
            part = path.with_suffix(".part.npz")
            np.savez(part, pairs=np.array(list(self._kept)), maps=np.stack(list(self._kept.values())))
            part.replace(path)
