"""From scans to what a network trains on: a window on the fixed scan, and the moving scan after an initial transform.

All maps are 4x4 matrices between voxels (tensor-axis order), named target first: `fixed_from_window` leads from the
window to the fixed scan. What a sample looks like depends on (seed, step, index) alone, so a run that is resumed, or
shared by several processes, sees the same samples.

The canonical window of a scan is unturned and centred on its brain (or, where it has no labels, on its foreground). A
teacher's stored displacement u lies between canonical windows: fixed window voxel x -> moving window voxel x + u(x).
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import torch

from LDRCore.distillation.teacher_store import TeacherStore, pair_key
from LDRCore.pipeline import preprocess
from LDRCore.transforms import spatial
from Training.config import ConfigError
from Training.data import augmentation, contrasts
from Training.data.joined import Joined
from Training.data.scan_set import Scan, ScanSet
from Training.data.scans import open_scans
from Training.data.subject_views import (
    Subject,
    foreground_centre,
    grid_matrix,
    make_subject,
    make_view,
    random_pose,
    synthetic,
)
from Training.initial_transforms import InitialTransforms
from Training.pair_settings import PairSettings
from Training.samples import LabelPair, Sample, collate
from Training.window_geometry import (
    deform_points,
    pose_about_centre,
    remove_initial,
    sample_labels,
    sample_scan,
    sampling_grid,
    transform_points,
)


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
            labels: whether samples carry label maps (those without augmentation always do).
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
        self._require_parts(self.scans[0], source)
        if settings.more_data:
            second = open_scans(settings.more_data, split, spacing_mm=spacing, cache=settings.cache)
            self._require_parts(second[0], settings.more_data)
            self.scans = ScanSet(Joined(self.scans, second, settings.more_share), split)
        self.subject = lru_cache(maxsize=512)(self._subject)
        self.canonical = lru_cache(maxsize=None)(self._canonical)
        self._initial = InitialTransforms(settings, self.scans, self.canonical, device)
        self.waited_s = 0.0  # for the last batch: what making it took longer than learning from the one before
        self.pairs = self.list_pairs(keys)
        if self.pairs is not None:
            self._initial.run_stem(self.pairs)

    def _require_parts(self, scan: Scan, source: Path | None) -> None:
        """Refuse a data set whose scans lack labels or images that the settings need.

        Args:
            scan: the first one, which stands for all.
            source: of the data set.
        """
        settings = self.settings
        for wanted, rule in (
            (settings.initial == "centroids", "initial = centroids"),
            (settings.stripped > 0, "stripped > 0"),
            (settings.cut > 0, "cut > 0"),
            (settings.synthesis > 0, "synthesis"),
            (self.with_labels, "dice > 0"),
        ):
            if wanted and scan.labels is None:
                raise ConfigError(f"{rule} needs labels, got none for {scan.name} in {source}")
        if scan.image is None and settings.initial in ("stem", "aligned"):
            raise ConfigError(f"initial = {settings.initial} needs images, got label maps alone in {source}")
        if scan.image is None and not settings.synthesis:
            raise ConfigError(f"a data set without images needs synthesis, got 0 for {source}")

    def list_pairs(self, keys: list[str] | None) -> list[tuple[int, int]] | None:
        """List the pairs: those of the keys, of the teacher or of the data set; None where any two scans will do."""
        if keys is None and self.teacher is not None:
            keys = self.teacher.keys
        if keys is not None:
            index = {name: k for k, name in enumerate(self.scans.names)}
            named = [[index.get(name, -1) for name in key.split("|")] for key in keys]
            unknown = [key for key, pair in zip(keys, named, strict=True) if -1 in pair or len(set(pair)) != 2]
            if unknown:
                raise ConfigError(
                    f"a pair must name two scans of the data set, got {unknown[0]!r} ({len(unknown)} unknown)"
                )
            return [(fixed, moving) for fixed, moving in named]
        if self.scans.pairs is not None:
            return self.scans.pairs
        if self.settings.n_pairs is None:
            return None
        rng = np.random.default_rng((self.seed, 11))
        found: dict[tuple[int, int], None] = {}
        wanted = min(self.settings.n_pairs, self.scans.count_pairs())
        while len(found) < wanted:
            found[self.scans.draw_pair(rng)] = None
        return list(found)

    def key(self, fixed: int, moving: int) -> str:
        """Name of a pair."""
        return pair_key(self.scans.names[fixed], self.scans.names[moving])

    # one scan

    def _subject(self, index: int) -> Subject:
        return make_subject(self.scans[index], device=self.device)

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
            centre = foreground_centre(body)
        return grid_matrix(self.settings.shape, self.settings.spacing_mm / scan.spacing_mm, centre)

    # one pair

    def moving_from_fixed(self, fixed: int, moving: int) -> np.ndarray:
        """Find the initial transform of a pair: 4x4, fixed scan voxel -> moving scan voxel."""
        return self._initial.moving_from_fixed(fixed, moving, keep=self.pairs is not None)

    def sample(self, step: int, index: int, *, teacher: bool = False, augment: bool = True) -> Sample:
        """Make the pair number `index` of a step.

        Args:
            step, index: with the seed they determine the sample.
            teacher: with the teacher's deformation, so on the canonical window and without free-form deformation.
            augment: False for no augmentation at all, on the canonical window (validation, extraction).
        """
        rng = np.random.default_rng((self.seed, step, index))
        if self.pairs is not None:
            fixed, moving = self.pairs[int(rng.integers(len(self.pairs))) if augment else index]
        else:
            fixed, moving = self.scans.draw_pair(rng)
        if augment and self.settings.same and rng.random() < self.settings.same:
            moving = fixed
        return self.make(fixed, moving, rng, teacher=teacher, augment=augment)

    def make(
        self, fixed: int, moving: int, rng: np.random.Generator, *, teacher: bool = False, augment: bool = True
    ) -> Sample:
        """Make the sample of a pair of scans; see `sample`."""
        settings = self.settings
        shape, loss_shape = settings.shape, tuple(n // settings.loss_stride for n in settings.shape)
        # every draw is made in every case, so that runs with and without a teacher see the same pairs and jitters
        pose = random_pose(rng, settings.pose_deg, 0, settings.pose_scale)
        offset_mm = rng.uniform(-settings.offset_mm, settings.offset_mm, 3)
        pose[:3, 3] = offset_mm * (4 if rng.random() < 0.1 else 1)
        scale = settings.jitter_scale
        jitter = random_pose(rng, settings.jitter_deg, settings.jitter_mm, scale, scale / 2)
        deform = rng.random() < settings.free_form or fixed == moving

        centre = (np.array(shape) - 1) / 2
        fixed_from_window = self.canonical(fixed)
        if augment and not teacher:
            fixed_from_window = fixed_from_window @ pose_about_centre(centre, pose, settings.spacing_mm)
        moving_from_window = self.moving_from_fixed(fixed, moving) @ fixed_from_window
        if augment:
            moving_from_window = moving_from_window @ pose_about_centre(centre, jitter, settings.spacing_mm)
        free_form = None
        if deform and augment and not teacher:
            free_form = augmentation.free_form(rng, shape, device=self.device)

        fixed_view, moving_view, *target_views = self._views(fixed, moving, rng, augment)
        full = spatial.identity_grid(shape, device=self.device)
        coarse = sampling_grid(shape, loss_shape, self.device)
        images = [
            sample_scan(fixed_view, fixed_from_window, full),
            sample_scan(moving_view, moving_from_window, deform_points(full, free_form)),
        ]
        targets = images
        if loss_shape != shape or target_views:
            stride, deformed = settings.loss_stride, deform_points(coarse, free_form)
            fixed_target, moving_target = target_views or (fixed_view, moving_view)
            targets = [
                sample_scan(fixed_target, fixed_from_window, coarse, stride),
                sample_scan(moving_target, moving_from_window, deformed, stride),
            ]
        if settings.intensity and augment:
            images = [augmentation.intensity(image, rng) for image in images]
        labels = None
        if self.with_labels or not augment:
            labels = self._labels(fixed, moving, fixed_from_window, moving_from_window, coarse, free_form)
        deformation = self._teacher_deformation(fixed, moving, moving_from_window) if teacher else None
        return Sample(*images, *targets, [labels], deformation, [self.key(fixed, moving)])

    def window_from_canonical(
        self, fixed: int, moving: int, moving_from_window: np.ndarray | None = None
    ) -> np.ndarray:
        """Lead from the moving canonical window to the window before the initial transform: 4x4, voxel to voxel.

        Args:
            fixed, moving: indexes of the scans.
            moving_from_window: with the initial transform in it; None for that of the fixed canonical window.
        """
        if moving_from_window is None:
            moving_from_window = self.moving_from_fixed(fixed, moving) @ self.canonical(fixed)
        return np.linalg.inv(moving_from_window) @ self.canonical(moving)

    def _views(self, fixed: int, moving: int, rng: np.random.Generator, augment: bool) -> list[torch.Tensor]:
        """The images of both scans, (1, 1, D, H, W) each: with or without skull, cut, normalised.

        Where their contrasts are changed two more follow, which the loss looks at: both of one contrast.
        """
        settings = self.settings
        strip = [rng.random() < settings.stripped] * 2
        if not augment:
            strip = [settings.stripped >= 0.5] * 2
        elif rng.random() < settings.unlike and settings.stripped > 0:
            strip[1] = not strip[1]
        images, targets = [], []
        changed = settings.remap or settings.thick or settings.crop if augment else settings.remap == 1
        contrast = int(rng.integers(2**62)) if changed else 0  # of targets that are made from labels
        for index, stripped in zip((fixed, moving), strip, strict=True):
            cut = augment and rng.random() < settings.cut
            subject = self.subject(index)
            real = subject.image is not None
            if settings.synthesis and (not real or settings.synthesis == 1 or rng.random() < settings.synthesis):
                subject = synthetic(subject, rng, stripped=bool(stripped))
            images.append(make_view(subject, np.eye(4), rng, stripped=bool(stripped), cut=cut).image)
            if changed:
                subject = self.subject(index)
                if not real:
                    same = np.random.default_rng(contrast)
                    subject = synthetic(subject, same, stripped=bool(stripped), n_labels=self.scans.n_labels)
                target = make_view(subject, np.eye(4), rng, stripped=bool(stripped), cut=False).image
                images[-1], target = self._as_scanned(images[-1], target, rng, bool(stripped), augment)
                targets.append(target)
        return images + targets

    def _as_scanned(
        self, image: torch.Tensor, target: torch.Tensor, rng: np.random.Generator, stripped: bool, augment: bool
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """An image of another contrast, slice thickness and field of view, and its target, which ends where it does."""
        settings = self.settings
        if rng.random() < settings.remap:
            image = contrasts.remap(rng, image, stripped=stripped)
        if not augment:
            return image, target
        if rng.random() < settings.thick:
            image = contrasts.thick_slices(rng, image, self.scans.spacing_mm)
        if rng.random() < settings.crop:
            seen = contrasts.field_of_view(rng, image)
            return image * seen, target * seen
        return image, target

    def _labels(
        self,
        fixed: int,
        moving: int,
        fixed_from_window: np.ndarray,
        moving_from_window: np.ndarray,
        coarse: torch.Tensor,
        free_form: torch.Tensor | None,
    ) -> LabelPair | None:
        fixed_labels, moving_labels = self.subject(fixed).labels, self.subject(moving).labels
        if fixed_labels is None or moving_labels is None:
            return None

        def at(points: torch.Tensor) -> torch.Tensor:
            return sample_labels(fixed_labels, transform_points(fixed_from_window, points).reshape(3, -1))

        full = spatial.identity_grid(self.settings.shape, device=self.device)
        return LabelPair(
            at(full).reshape(self.settings.shape), at(coarse), moving_labels, moving_from_window, free_form
        )

    def _teacher_deformation(self, fixed: int, moving: int, moving_from_window: np.ndarray) -> torch.Tensor:
        """The teacher's displacement of a pair after the initial transform, on the student's grid."""
        assert self.teacher is not None
        stored = torch.from_numpy(self.teacher.read(self.key(fixed, moving)))[None].to(self.device)
        points = self.field_shape or tuple(stored.shape[2:])
        window_from_canonical = self.window_from_canonical(fixed, moving, moving_from_window)
        return remove_initial(stored, self.settings.shape, points, window_from_canonical)

    def batches(
        self, steps: Iterator[int], share: range, with_teacher: Callable[[int], bool]
    ) -> Iterator[tuple[int, Sample]]:
        """(step, batch) in the order of `steps`; the next batch is made while this one is learned from.

        Args:
            steps: the run.
            share: indexes of this process's pairs within the batch.
            with_teacher: whether a step needs the teacher's deformation.
        """

        def make(step: int) -> Sample:
            return collate([self.sample(step, k, teacher=with_teacher(step)) for k in share])

        with ThreadPoolExecutor(1) as background:
            upcoming: tuple[int, Any] | None = None
            for step in steps:
                ready = upcoming[1] if upcoming and upcoming[0] == step else background.submit(make, step)
                upcoming = (step + 1, background.submit(make, step + 1))
                began = time.perf_counter()
                batch = ready.result()
                self.waited_s = time.perf_counter() - began
                yield step, batch


def validation_pairs(settings: PairSettings, device: torch.device) -> dict[str, PairSource]:
    """The same few pairs of the validation split at every call, by the word that their figures begin with.

    Where pairs with and without skull are trained on, both "whole" and "stripped", otherwise as they are, by "". Where
    contrasts are changed each kind once more, "remapped".
    """
    assert settings.val_split
    few = dataclasses.replace(
        settings,
        n_pairs=settings.val_pairs,
        initial=settings.val_initial or settings.initial,
        val_initial=None,
        more_data=None,
    )
    kinds = {"whole": 0.0, "stripped": 1.0} if 0 < settings.stripped < 1 else {"": settings.stripped}
    every = [(kind, stripped, 0.0) for kind, stripped in kinds.items()]
    if settings.remap:
        every += [(f"{kind} remapped".strip(), stripped, 1.0) for kind, stripped in kinds.items()]
    sources = {}
    for kind, stripped, remap in every:
        source = PairSource(dataclasses.replace(few, stripped=stripped, remap=remap), settings.val_split, 7, device)
        source.pairs = source.pairs[: settings.val_pairs] if source.pairs else None
        sources[kind] = source
    return sources
