"""From scans to what a network trains on: a window on the fixed scan and a moving scan behind a starting map.

All maps are 4x4 matrices between voxels (tensor-axis order): window -> fixed scan, window -> moving scan. What a sample
looks like depends on (seed, step, index) alone, so a run that is resumed, or shared by several processes, sees the
same samples. Window and teacher fields: the canonical window of a scan is unturned and centred on its brain (or, where
it has no labels, on its foreground); a stored displacement u lies between canonical windows: fixed window voxel
x -> moving window voxel x + u(x).
"""

from __future__ import annotations

import dataclasses
import hashlib
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import SimpleITK as sitk
import torch
from tqdm import tqdm

from LDRCore import geometry
from LDRCore.distillation.teacher_store import TeacherStore, pair_key
from LDRCore.pipeline import preprocess
from LDRCore.pipeline.affine import centring_candidates, estimate_affine
from LDRCore.pipeline.model import load_model
from LDRCore.transforms import spatial
from Training import windows
from Training.config import ConfigError, option
from Training.data import augment, views
from Training.data.scans import ScanSet, open_scans
from Training.windows import LabelPair, Sample

INITIALS = ("grid", "centred", "centroids", "stem")


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
    synthesis: bool = option(False, "make the images from the labels, a new contrast for each")
    n_pairs: int | None = option(None, "train on so many pairs, drawn once; none: any two scans at every step")
    initial: str = option("stem", f"map between the scans before the networks: one of {', '.join(INITIALS)}")
    stem: str = option("brain-t1", "model whose stem gives that map, where initial is stem")
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
        if self.initial not in INITIALS:
            raise ConfigError(f"initial must be one of {INITIALS}, got {self.initial!r}")
        if self.loss_stride not in (1, 2):
            raise ConfigError(f"loss_stride must be 1 or 2, got {self.loss_stride}")
        if any(n % 16 for n in self.shape):
            raise ConfigError(f"every axis of shape must be a multiple of 16, got {self.shape}")
        for name in ("stripped", "unlike", "cut", "free_form"):
            if not 0 <= getattr(self, name) <= 1:
                raise ConfigError(f"{name} must lie between 0 and 1, got {getattr(self, name)}")


class PairSource:
    """Draws samples from a data set; see the top of this file."""

    def __init__(
        self,
        settings: PairSettings,
        split: str,
        seed: int,
        device: torch.device,
        *,
        labels: bool = False,
        teacher: TeacherStore | None = None,
        field_shape: tuple[int, ...] | None = None,
        keys: list[str] | None = None,
    ) -> None:
        """Open the data set.

        Args:
            settings: which pairs, and how they are made.
            split: of the data set.
            seed: of all randomness.
            device: where samples are made.
            labels: whether samples carry label maps (plain ones always do).
            teacher: deformations; pairs are then drawn from it.
            field_shape: grid that the student's displacement, so also the teacher's in a sample, lives on.
            keys: of these pairs only.

        Raises:
            ConfigError: no pair, labels needed and missing, or a teacher of other scans.
        """
        self.settings, self.seed, self.device, self.teacher = settings, seed, device, teacher
        self.with_labels, self.field_shape = labels, field_shape
        source = settings.pairs or settings.data
        spacing = settings.scan_spacing_mm or (settings.spacing_mm if settings.pairs else None)
        self.scans: ScanSet = open_scans(
            source, split, spacing_mm=spacing, cache=settings.cache, scheme=settings.scheme
        )
        first = self.scans[0]
        for wanted, rule in (
            (settings.initial == "centroids", "initial = centroids"),
            (settings.stripped > 0, "stripped > 0"),
            (settings.cut > 0, "cut > 0"),
            (settings.synthesis, "synthesis"),
            (labels, "dice > 0"),
        ):
            if wanted and first.labels is None:
                raise ConfigError(f"{rule} needs labels, got none for {first.name} in {source}")
        if first.image is None and not settings.synthesis:
            raise ConfigError(f"a data set without images needs synthesis = true, got {source}")
        if first.image is None and settings.initial == "stem":
            raise ConfigError(f"initial = stem needs images, got label maps alone in {source}")
        self.subject = lru_cache(maxsize=512)(self._subject)
        self._prepared = lru_cache(maxsize=256)(self._prepare)
        self._centroids = lru_cache(maxsize=None)(self._centroids_of)
        self.canonical = lru_cache(maxsize=None)(self._canonical)
        self._stem = load_model(settings.stem, str(device)) if settings.initial == "stem" else None
        self._starts: dict[tuple[int, int], np.ndarray] = {}
        self.waited_s = 0.0  # for the last batch: what making it took longer than learning from the one before
        self.pairs = self._list_pairs(keys)
        if self._stem is not None and self.pairs is not None:
            self._precompute_starts()

    def _list_pairs(self, keys: list[str] | None) -> list[tuple[int, int]] | None:
        """The finite list of pairs, or None where any two scans will do."""
        if keys is None and self.teacher is not None:
            keys = self.teacher.keys
        if keys is not None:
            index = {name: k for k, name in enumerate(self.scans.names)}
            every = {pair_key(f, m): (index[f], index[m]) for f in index for m in index if f != m}
            unknown = [k for k in keys if k not in every]
            if unknown:
                raise ConfigError(
                    f"a pair must name two scans of the data set, got {unknown[0]!r} ({len(unknown)} unknown)"
                )
            return [every[k] for k in keys]
        if self.scans.pairs is not None:
            return self.scans.pairs
        if self.settings.n_pairs is None:
            return None
        rng = np.random.default_rng((self.seed, 11))
        found: dict[tuple[int, int], None] = {}
        most = len(self.scans) * (len(self.scans) - 1)
        while len(found) < min(self.settings.n_pairs, most):
            found[self.scans.draw_pair(rng)] = None
        return list(found)

    def key(self, fixed: int, moving: int) -> str:
        """Name of a pair."""
        return pair_key(self.scans.names[fixed], self.scans.names[moving])

    # one scan

    def _subject(self, index: int) -> views.Subject:
        return views.make_subject(self.scans[index], device=self.device)

    def _canonical(self, index: int) -> np.ndarray:
        """Canonical window of a scan: 4x4, window voxel -> scan voxel."""
        scan = self.scans[index]
        if self.settings.initial == "grid":
            centre = (np.array(scan.shape) - 1) / 2
        else:
            subject = self.subject(index)
            if subject.brain is None:
                body = preprocess.normalise(subject.image, *preprocess.intensity_range(subject.image))
            else:
                body = subject.brain.float()
            centre = views.foreground_centre(body)
        return views.grid_matrix(self.settings.shape, self.settings.spacing_mm / scan.spacing_mm, centre)

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
        return centroids(labels, self.scans.n_labels)

    # one pair

    def start(self, fixed: int, moving: int) -> np.ndarray:
        """The map before the networks: 4x4, fixed scan voxel -> moving scan voxel."""
        if (fixed, moving) not in self._starts:
            found = self._find_start(fixed, moving)
            if self.pairs is None:
                return found
            self._starts[fixed, moving] = found
        return self._starts[fixed, moving]

    def _find_start(self, fixed: int, moving: int) -> np.ndarray:
        kind = self.settings.initial
        if kind == "grid":
            return np.eye(4)
        if kind == "centred":
            return self.canonical(moving) @ np.linalg.inv(self.canonical(fixed))
        if kind == "centroids":
            (x, size_x), (y, size_y) = self._centroids(fixed), self._centroids(moving)
            both = (size_x > 0) & (size_y > 0)
            if both.sum() < 4:
                raise ConfigError(
                    f"initial = centroids needs four common labels, got fewer in {self.key(fixed, moving)}"
                )
            return geometry.fit_affine(x[both], y[both], np.minimum(size_x, size_y)[both] ** 0.25)
        assert self._stem is not None
        f, m = self._prepared(fixed), self._prepared(moving)
        affine_lps = estimate_affine(self._stem, f, m, centring_candidates(f, m)[:1])
        return np.linalg.inv(m.native.to_lps) @ affine_lps @ f.native.to_lps

    def _precompute_starts(self) -> None:
        """Run the stem once for every pair of the list, and keep the result in the cache folder."""
        assert self.pairs is not None
        assert self._stem is not None
        facts = (self.scans.identity, self._stem.card["sha256"], self.settings.stripped >= 0.5, sorted(self.pairs))
        name = hashlib.sha256(repr(facts).encode()).hexdigest()[:16]
        path = self.settings.cache / f"starts-{name}.npz" if self.settings.cache else None
        if path and path.exists():
            with np.load(path) as stored:
                self._starts = dict(zip(map(tuple, stored["pairs"].tolist()), stored["maps"], strict=True))
            return
        for pair in tqdm(self.pairs, desc="affine starts", mininterval=5):
            self.start(*pair)
        if path:
            path.parent.mkdir(parents=True, exist_ok=True)
            part = path.with_suffix(".part.npz")
            np.savez(part, pairs=np.array(list(self._starts)), maps=np.stack(list(self._starts.values())))
            part.replace(path)

    def sample(self, step: int, index: int, *, teacher: bool = False, plain: bool = False) -> Sample:
        """The pair number `index` of a step.

        Args:
            step, index: with the seed they determine the sample.
            teacher: with the teacher's deformation, so on the canonical window and without free-form deformation.
            plain: without any augmentation, on the canonical window (validation, extraction).
        """
        rng = np.random.default_rng((self.seed, step, index))
        if self.pairs is not None:
            fixed, moving = self.pairs[index if plain else int(rng.integers(len(self.pairs)))]
        else:
            fixed, moving = self.scans.draw_pair(rng)
        return self.make(fixed, moving, rng, teacher=teacher, plain=plain)

    def make(
        self, fixed: int, moving: int, rng: np.random.Generator, *, teacher: bool = False, plain: bool = False
    ) -> Sample:
        """See `sample`."""
        s = self.settings
        shape, loss_shape = s.shape, tuple(n // s.loss_stride for n in s.shape)
        window = self.canonical(fixed)
        middle = (np.array(shape) - 1) / 2
        # every draw is made in every case, so that runs with and without a teacher see the same pairs and jitters
        pose = views.random_pose(rng, s.pose_deg, 0, s.pose_scale)
        pose[:3, 3] = rng.uniform(-s.offset_mm, s.offset_mm, 3) * (4 if rng.random() < 0.1 else 1)
        jitter = views.random_pose(rng, s.jitter_deg, s.jitter_mm, s.jitter_scale, s.jitter_scale / 2)
        deform = rng.random() < s.free_form
        if not plain and not teacher:
            window = window @ windows.about_middle(middle, pose, s.spacing_mm)
        to_moving = self.start(fixed, moving) @ window
        if not plain:
            to_moving = to_moving @ windows.about_middle(middle, jitter, s.spacing_mm)
        free_form = None
        if deform and not plain and not teacher:
            free_form = augment.free_form(rng, shape, device=self.device)
        volumes = self._volumes(fixed, moving, rng, plain)
        full = spatial.identity_grid(shape, device=self.device)
        coarse = windows.lattice(shape, loss_shape, self.device)
        images = [
            windows.image_at(volumes[0], window, full),
            windows.image_at(volumes[1], to_moving, windows.through(full, free_form)),
        ]
        targets = images
        if loss_shape != shape:
            deformed = windows.through(coarse, free_form)
            targets = [
                windows.image_at(volumes[0], window, coarse, s.loss_stride),
                windows.image_at(volumes[1], to_moving, deformed, s.loss_stride),
            ]
        if s.intensity and not plain:
            images = [augment.intensity(image, rng) for image in images]
        labels = (
            self._labels(fixed, moving, window, to_moving, coarse, free_form) if plain or self.with_labels else None
        )
        deformation = None
        if teacher:
            assert self.teacher is not None
            stored = torch.from_numpy(self.teacher.read(self.key(fixed, moving)))[None].to(self.device)
            points = self.field_shape or tuple(stored.shape[2:])
            deformation = windows.behind(stored, shape, points, self.between_windows(fixed, moving, to_moving))
        return Sample(*images, *targets, [labels], deformation, [self.key(fixed, moving)])

    def between_windows(self, fixed: int, moving: int, to_moving: np.ndarray | None = None) -> np.ndarray:
        """4x4, moving canonical window voxel -> fixed window voxel before the start that leads to `to_moving`."""
        if to_moving is None:
            to_moving = self.start(fixed, moving) @ self.canonical(fixed)
        return np.linalg.inv(to_moving) @ self.canonical(moving)

    def _volumes(self, fixed: int, moving: int, rng: np.random.Generator, plain: bool) -> list[torch.Tensor]:
        s = self.settings
        strip = [rng.random() < s.stripped] * 2
        if plain:
            strip = [s.stripped >= 0.5] * 2
        elif rng.random() < s.unlike and s.stripped > 0:
            strip[1] = not strip[1]
        found = []
        for index, stripped in zip((fixed, moving), strip, strict=True):
            cut = not plain and rng.random() < s.cut
            subject = self.subject(index)
            if s.synthesis:
                subject = views.synthetic(subject, rng, stripped=bool(stripped))
            view = views.make_view(subject, np.eye(4), rng, stripped=bool(stripped), cut=cut)
            found.append(view.volume)
        return found

    def _labels(self, fixed, moving, window, to_moving, coarse, free_form) -> LabelPair | None:
        known, other = self.subject(fixed).labels, self.subject(moving).labels
        if known is None or other is None:
            return None
        full = spatial.identity_grid(self.settings.shape, device=self.device)
        at_full = windows.nearest(known, windows.apply(window, full).reshape(3, -1)).reshape(self.settings.shape)
        at_loss = windows.nearest(known, windows.apply(window, coarse).reshape(3, -1))
        return LabelPair(at_full, at_loss, other, to_moving, free_form)

    def batches(self, steps: Iterator[int], share: range, with_teacher) -> Iterator[tuple[int, Sample]]:
        """(step, batch) in the order of `steps`; the next batch is made while this one is learned from.

        Args:
            steps: the run.
            share: indexes of this process's pairs within the batch.
            with_teacher: whether a step needs the teacher's deformation.
        """

        def make(step: int) -> Sample:
            return windows.collate([self.sample(step, k, teacher=with_teacher(step)) for k in share])

        with ThreadPoolExecutor(1) as background:
            upcoming: tuple[int, Any] | None = None
            for step in steps:
                ready = upcoming[1] if upcoming and upcoming[0] == step else background.submit(make, step)
                upcoming = (step + 1, background.submit(make, step + 1))
                began = time.perf_counter()
                batch = ready.result()
                self.waited_s = time.perf_counter() - began
                yield step, batch


def defaults(given: dict[str, Any]) -> dict[str, Any]:
    """Keys that follow from others: one's own pairs are not split unless a split to validate on is named."""
    return {"val_split": None} if given.get("pairs") else {}


def validation_pairs(settings: PairSettings, device: torch.device) -> PairSource:
    """The same few pairs of the validation split at every call."""
    assert settings.val_split
    few = dataclasses.replace(settings, n_pairs=settings.val_pairs)
    source = PairSource(few, settings.val_split, 7, device)
    source.pairs = source.pairs[: settings.val_pairs] if source.pairs else None
    return source


def centroids(labels: np.ndarray, n_labels: int) -> tuple[np.ndarray, np.ndarray]:
    """(n_labels, 3) centroid voxel and (n_labels,) size of every label of a map; size 0 where absent."""
    flat = labels.reshape(-1)
    size = np.bincount(flat, minlength=n_labels).astype(float)
    lines = np.ix_(*[np.arange(n) for n in labels.shape])
    sums = [
        np.bincount(flat, weights=np.broadcast_to(line, labels.shape).reshape(-1), minlength=n_labels) for line in lines
    ]
    size[0] = 0
    return np.stack(sums, 1) / np.maximum(size, 1)[:, None], size
