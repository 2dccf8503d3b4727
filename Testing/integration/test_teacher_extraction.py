"""Teacher deformations that are refined pair by pair, extracted by several processes, with their quality."""

from __future__ import annotations

import contextlib
import dataclasses
import os
import signal
import subprocess
import sys
import threading

import numpy as np
import pytest
import torch

from LDRCore import losses
from LDRCore.distillation.teacher_store import TeacherStore
from LDRCore.transforms import spatial
from Training import extract_teacher, refined_teacher, train_student
from Training.config import ConfigError
from Training.extract_teacher import ExtractSettings, extract
from Training.samples import LabelPair, Sample

SHAPE = (32, 32, 32)
N_LABELS = 4


def still(moving: torch.Tensor, fixed: torch.Tensor) -> torch.Tensor:
    """A teacher that moves nothing."""
    return torch.zeros(1, 3, *fixed.shape[2:])


def settings_for(data, out, **changes) -> ExtractSettings:
    base = {"n_pairs": 3, "shape": SHAPE, "initial": "centred", "cache": None, "device": "cpu", "threads": 1}
    return ExtractSettings(data=data, out=out, teacher=f"{__name__}:still", **{**base, **changes})


def pair() -> Sample:
    """Three boxes and noise; in the moving scan they are larger, and of these the noise says nothing."""
    generator = torch.Generator().manual_seed(0)
    images, labels = [], []
    for grow in (0, 2):
        label = torch.zeros(SHAPE, dtype=torch.uint8)
        for n, k in enumerate((4, 12, 20), 1):
            label[k : k + 6, 6 - grow : 24 + grow, 8 - grow : 20 + grow] = n
        images.append((label.float() / 3 + 0.2 * torch.rand(SHAPE, generator=generator))[None, None])
        labels.append(label)
    fixed, moving = images
    long = labels[0].long()
    return Sample(
        fixed, moving, fixed, moving, [LabelPair(long, long.ravel(), labels[1], np.eye(4), None)], None, ["k"]
    )


def test_labels_make_a_refined_displacement_better():
    sample = pair()
    start = torch.zeros(1, 3, 16, 16, 16)
    dice = {}
    for weight in (0.0, 1.5):
        refined = refined_teacher.refine_displacement(start, sample, "fast", weight, N_LABELS)
        assert refined.shape == (1, 3, *SHAPE)
        figures = refined_teacher.measure(refined, sample)
        assert figures["lncc"] > figures["lncc_start"]
        dice[weight] = figures["dice"]
    assert dice[1.5] > dice[0.0] > figures["dice_start"]


def test_the_overlaps_gradient_points_uphill():
    """A small step composed before a displacement raises the soft Dice by the gradient's product with the step."""
    sample = pair()
    labels = sample.labels[0]
    # stretches two axes, so that the Jacobian is not one; between voxels, where linear interpolation is smooth
    displacement = torch.full((3, *SHAPE), 0.4)
    stretch = 0.47 * (torch.arange(32.0) - 15.5)
    displacement[1], displacement[2] = stretch.view(1, 32, 1), stretch

    class NoImages:
        def gradient(self, u, out=None):
            far = torch.zeros(3, *SHAPE)
            far[0, 0, 0, 0] = 1e6  # the longest vector, where no label is: nothing else is shortened
            return far, 0.0

    similarity = refined_teacher.WithOverlap(NoImages(), labels, 1.0, N_LABELS)
    gradient, before = similarity.gradient(displacement)
    gradient[0, 0, 0, 0] = 0
    step = 1e-2 * gradient / gradient.abs().max()
    _, after = similarity.gradient(spatial.compose(displacement[None], step[None])[0])
    expected = float((gradient * step).sum()) / labels.fixed.numel()
    assert expected > 1e-4
    assert after - before == pytest.approx(expected, rel=0.1)


def test_no_vector_of_the_overlap_is_longer_than_the_images_longest():
    sample = pair()

    class Images:
        def gradient(self, u, out=None):
            return torch.full((3, *SHAPE), 0.5), 0.25

    similarity = refined_teacher.WithOverlap(Images(), sample.labels[0], 100.0, N_LABELS)
    gradient, value = similarity.gradient(torch.zeros(3, *SHAPE))
    longest = 0.5 * 3**0.5
    assert float((gradient - 0.5).norm(dim=0).max()) == pytest.approx(longest, rel=1e-4)
    soft = 1 - losses.label_overlap(
        spatial.identity_grid(SHAPE)[0].flatten(1), sample.labels[0].moving, sample.labels[0].fixed.ravel(), 1,
        n_labels=N_LABELS,
    )  # fmt: skip
    assert value == pytest.approx(0.25 + 100 * float(soft), rel=1e-5)


def test_several_workers_extract_what_one_does(tiny_brains, tmp_path):
    more = {"refine": "fast", "refine_overlap": 1.0}
    one = TeacherStore(extract(settings_for(tiny_brains, tmp_path / "one.h5", **more)))
    two = TeacherStore(extract(settings_for(tiny_brains, tmp_path / "two.h5", workers=2, threads=2, **more)))
    assert (one.keys, one.meta, one.quality) == (two.keys, two.meta, two.quality)
    assert all(np.array_equal(one.read(key), two.read(key)) for key in one.keys)
    assert one.meta["refine"] == "fast"
    for quality in one.quality.values():
        assert quality["lncc"] > quality["lncc_start"]
        assert quality["dice"] > quality["dice_start"]


def test_the_quality_is_that_of_what_a_student_is_taught(tiny_brains, tmp_path):
    """Zero displacements: before and after are the same."""
    store = TeacherStore(extract(settings_for(tiny_brains, tmp_path / "t.h5")))
    assert len(store.quality) == 3
    for quality in store.quality.values():
        assert quality["lncc"] == pytest.approx(quality["lncc_start"], abs=1e-6)
        assert quality["dice"] == quality["dice_start"]
    assert "refine" not in store.meta
    assert extract_teacher.summary(store).startswith("3 pairs, local correlation raised in")


def test_an_interrupted_refinement_keeps_what_it_has(tiny_brains, tmp_path, monkeypatch):
    settings = settings_for(tiny_brains, tmp_path / "t.h5")
    run = extract_teacher.Extraction.run
    done = []

    def dies(self, *pair):
        if len(done) == 2:
            raise KeyboardInterrupt
        done.append(pair)
        return run(self, *pair)

    monkeypatch.setattr(extract_teacher.Extraction, "run", dies)
    with pytest.raises(KeyboardInterrupt):
        extract(settings)
    monkeypatch.setattr(extract_teacher.Extraction, "run", lambda self, *pair: done.append(pair) or run(self, *pair))
    assert len(TeacherStore(extract(settings)).quality) == 3
    assert len(done) == len(set(done)) == 3  # none was extracted twice
    with pytest.raises(Exception, match=r"refine = None there, 'fast' now"):
        extract(dataclasses.replace(settings, refine="fast"))


def ends(moving: torch.Tensor, fixed: torch.Tensor) -> torch.Tensor:
    """A teacher whose process ends."""
    os._exit(1)


def test_a_worker_that_ends_is_told(tiny_brains, tmp_path):
    settings = settings_for(tiny_brains, tmp_path / "t.h5", workers=2, threads=2)
    with pytest.raises(ConfigError, match="every worker must live, got one that ended"):
        extract(dataclasses.replace(settings, teacher=f"{__name__}:ends"))


def kills(moving: torch.Tensor, fixed: torch.Tensor) -> torch.Tensor:
    """A teacher that kills the process that writes, and never returns."""
    os.kill(os.getppid(), signal.SIGKILL)
    threading.Event().wait()
    raise AssertionError


def test_no_worker_outlives_an_extraction_that_is_killed(tiny_brains, tmp_path):
    words = ["--data", tiny_brains, "--out", tmp_path / "t.h5", "--teacher", f"{__name__}:kills", "--workers", 2]
    words += ["--shape", "32,32,32", "--initial", "centred", "--n_pairs", 2, "--cache", "none", "--device", "cpu"]
    command = [sys.executable, "-m", "Training.extract_teacher", *map(str, words)]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    paths = {"PYTHONPATH": os.pathsep.join(sys.path)}
    with subprocess.Popen(command, env=os.environ | paths, start_new_session=True, **pipes) as run:
        try:
            _, errors = run.communicate(
                timeout=600
            )  # until the last process has let go of the pipes; only a fault takes so long
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(run.pid, signal.SIGKILL)
    assert run.returncode == -signal.SIGKILL, errors


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"refine": "well"}, r"refine must be one of \('none', 'fast', 'best'\), got 'well'"),
        ({"refine_overlap": 1.0}, "refine_overlap must be 0 or more, and 0 without refine, got 1.0"),
        ({"refine": "best", "refine_overlap": -1.0}, "refine_overlap must be 0 or more"),
        ({"workers": 0}, "workers must be at least 1, got 0"),
    ],
)
def test_what_is_refused(tmp_path, changes, message):
    with pytest.raises(ConfigError, match=message):
        settings_for(tmp_path, tmp_path / "t.h5", **changes)


def student(data, out, teacher, **changes) -> train_student.StudentSettings:
    base = {"shape": SHAPE, "initial": "centred", "cache": None, "device": "cpu", "options": ("head=half",)}
    base |= {"cascades": 1, "steps": 2, "val_split": None, "objective": "none", "distil": 1.0, "n_gen": 1}
    return train_student.StudentSettings(data=data, out=out, teacher=teacher, **{**base, **changes})


def test_a_student_leaves_out_pairs_that_its_teacher_did_not_make_better(tiny_brains, tmp_path):
    store = TeacherStore(extract(settings_for(tiny_brains, tmp_path / "t.h5", refine="fast")))
    gains = sorted(quality["lncc"] - quality["lncc_start"] for quality in store.quality.values())
    settings = student(tiny_brains, tmp_path / "s.pt", store.path, teacher_gain=gains[0])
    assert len(train_student.keys_to_use(store, settings)) == 2
    train_student.train(settings)
    none = dataclasses.replace(settings, teacher_gain=1.0, out=tmp_path / "none.pt")
    with pytest.raises(ConfigError, match=r"teacher_gain must leave a pair, got 1\.0 with 3 pairs"):
        train_student.train(none)
    store.quality.clear()
    with pytest.raises(ConfigError, match="teacher_gain needs the quality of every pair, got none for"):
        train_student.keys_to_use(store, settings)


def test_stores_of_other_windows_and_of_other_scans_are_refused(tiny_brains, tmp_path):
    path = extract(settings_for(tiny_brains, tmp_path / "t.h5", n_pairs=12))
    with pytest.raises(ConfigError, match=r"must have been made with shape = \[48, 32, 32\], got \[32, 32, 32\]"):
        train_student.train(student(tiny_brains, tmp_path / "s.pt", path, shape=(48, 32, 32)))
    manifest = (tiny_brains / "manifest.csv").read_text(encoding="utf-8").splitlines()
    fewer = tmp_path / "fewer"
    fewer.mkdir()
    train = [line for line in manifest[1:] if "train" in line.split(",")]
    for file in tiny_brains.iterdir():
        if file.name != "manifest.csv":
            (fewer / file.name).symlink_to(file)
    kept = [line for line in manifest if line not in train[:1]]
    (fewer / "manifest.csv").write_text("\n".join(kept) + "\n", encoding="utf-8")
    with pytest.raises(ConfigError, match="a pair must name two scans of the data set, got"):
        train_student.train(student(fewer, tmp_path / "s.pt", path))


def test_time_that_is_over_leaves_a_store_of_what_is_done(tiny_brains, tmp_path):
    path = extract(settings_for(tiny_brains, tmp_path / "t.h5", n_pairs=4, minutes=0.0))
    some = TeacherStore(path)
    assert len(some) == 1
    assert set(some.quality) == set(some.keys)
    some.close()
    every = TeacherStore(extract(settings_for(tiny_brains, tmp_path / "t.h5", n_pairs=4)))
    assert len(every) == 4
    assert every.keys[0] == some.keys[0]


def test_a_pair_whose_displacement_is_not_finite_is_left_out(tiny_brains, tmp_path, monkeypatch, capsys):
    run = extract_teacher.Extraction.run
    made = []

    def one_is_wild(self, *pair):
        key, displacement, quality = run(self, *pair)
        made.append(key)
        return key, displacement * (np.nan if len(made) == 2 else 1), quality

    monkeypatch.setattr(extract_teacher.Extraction, "run", one_is_wild)
    store = TeacherStore(extract(settings_for(tiny_brains, tmp_path / "t.h5", n_pairs=3)))
    assert store.keys == [made[0], made[2]]
    assert f"left out: {made[1]}: the teacher's displacement or its quality is not finite" in capsys.readouterr().out
    store.close()
    assert len(TeacherStore(extract(settings_for(tiny_brains, tmp_path / "t.h5", n_pairs=3)))) == 3
