"""Training end to end on a tiny data set: resuming, several processes, objectives, extraction, export."""

from __future__ import annotations

import dataclasses
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import SimpleITK as sitk
import torch

import LDRCore
from LDRCore.distillation.teacher_store import TeacherStore
from LDRCore.io.transforms import transform_lattice
from LDRCore.models import registry, weights
from Training import (
    checkpoints,
    engine,
    export_weights,
    extract_teacher,
    inspect_critic,
    objectives,
    processes,
    prune_student,
    train_stem,
    train_student,
    train_teacher,
)
from Training.config import ConfigError

TINY = {"shape": (32, 32, 32), "initial": "centred", "cache": None, "val_pairs": 2, "save_every": 2, "device": "cpu"}
LIGHT = {**TINY, "network": "ldr", "options": ("head=half",), "cascades": 1}


def student(data, out, **changes) -> train_student.StudentSettings:
    return train_student.StudentSettings(**{"data": data, "out": out, "steps": 4, "lr": 1e-3, **LIGHT, **changes})


def weights_of(path: Path) -> dict:
    return torch.load(path, weights_only=True)["model"]


def curves(path: Path) -> list[dict]:
    """The lines that hold loss terms."""
    text = path.with_suffix(".curves.jsonl").read_text(encoding="utf-8")
    return [line for line in map(json.loads, text.splitlines()) if "validation" not in line]


def test_coarse_first_cascades_and_a_start_from_the_fine_one_among_them(tiny_brains, tmp_path):
    light = ("head=half", "channels=8x32x64x128")
    coarse = {"cascades": 2, "stages": ("ldr head=deconv image_stride=2", " ".join(("ldr", *light)))}
    train_student.train(student(tiny_brains, tmp_path / "two.pt", **coarse))
    facts = checkpoints.read_checkpoint(tmp_path / "two.pt")["facts"]["architecture"]["network"]
    assert [n.get("image_stride", 1) for n in facts] == [2, 1]
    assert tuple(facts[1]["channels"]) == (8, 32, 64, 128)
    start = {"init": str(tmp_path / "two.pt"), "options": light, "cascades": 2, "lr": 1e-9, "warmup": 1}
    train_student.train(student(tiny_brains, tmp_path / "fine.pt", **start))
    before, after = weights_of(tmp_path / "two.pt"), weights_of(tmp_path / "fine.pt")
    for name, value in after.items():
        known = before["networks.1." + name.split(".", 2)[2]]
        assert torch.allclose(value, known, atol=1e-6)


def test_pruning_removes_what_nobody_hears(tiny_brains, tmp_path):
    """Half of every layer's channels are constant or unread; without them the displacements are the same."""
    wide, small = ("head=half", "channels=8x8x8x16"), ("head=half", "channels=4x8x4x8", "up=4x4x4")
    torch.manual_seed(0)
    model = registry.build_cascade(student(tiny_brains, tmp_path / "x.pt", options=wide, cascades=2).architecture())
    layers = dict(model.named_modules())
    for name, layer in layers.items():
        if not isinstance(layer, torch.nn.Conv3d | torch.nn.ConvTranspose3d):
            continue
        torch.nn.init.normal_(layer.weight, 0, (2 / layer.weight[:, 0].numel()) ** 0.5)
        if name.split(".")[-2:] not in (["encoder", "1"],) and not name.endswith("flow"):
            across = isinstance(layer, torch.nn.ConvTranspose3d)
            gone = (layer.weight.transpose(0, 1) if across else layer.weight)[::2]
            torch.nn.init.zeros_(gone)
            torch.nn.init.uniform_(layer.bias[::2], 0.1, 0.3)
    for k in range(2):
        torch.nn.init.normal_(layers[f"networks.{k}.flow"].weight, 0, 0.02)
    facts = {"architecture": student(tiny_brains, tmp_path / "x.pt", options=wide, cascades=2).architecture()}
    checkpoints.save_atomically({"model": model.state_dict(), "facts": facts}, tmp_path / "wide.pt")
    settings = prune_student.PruneSettings(
        data=tiny_brains, out=tmp_path / "narrow.pt", init=str(tmp_path / "wide.pt"), samples=6,
        **{**LIGHT, "options": small, "cascades": 2},
    )  # fmt: skip
    prune_student.run(settings)
    narrow = registry.build_cascade(settings.architecture())
    narrow.load_state_dict(weights_of(tmp_path / "narrow.pt"))
    moving, fixed = torch.nn.functional.interpolate(torch.rand(2, 1, 24, 24, 24), scale_factor=4)[:, None]
    inside = (..., *[slice(18, -18)] * 3)  # what lies beyond the image is not a constant
    with torch.no_grad():
        expected, measured = (c(moving, fixed, 1).displacement[inside] for c in (model, narrow))
    assert float((measured - expected).square().mean().sqrt()) < 0.1 * float(expected.std())
    first, second = layers["networks.0.encoder.0"], layers["networks.0.encoder.1"]
    constant = second.weight[:, ::2].sum((2, 3, 4)) @ first.bias[::2]  # what the channels that are gone added inside
    assert torch.allclose(narrow.networks[0].encoder[1].bias, second.bias + constant, atol=1e-4)
    assert float(constant.detach().abs().max()) > 0.05
    train_student.train(student(tiny_brains, tmp_path / "on.pt", init=str(tmp_path / "narrow.pt"), options=small))
    wider = dataclasses.replace(settings, options=("head=half", "channels=4x16x4x8"))
    with pytest.raises(ConfigError, match=r"must not exceed those of init, got 16 for encoder.1 where there are 8"):
        prune_student.run(wider)
    with pytest.raises(ConfigError, match="cascades must be those of init, 2, got 1"):
        prune_student.run(dataclasses.replace(settings, cascades=1))


def test_options_as_texts_and_back():
    options = {"head": "half", "channels": (8, 32, 64, 128), "width": 0.5, "pool": 3}
    texts = objectives.write_options(options)
    assert texts == ("head=half", "channels=8x32x64x128", "width=0.5", "pool=3")
    assert objectives.parse_options(texts) == options


@pytest.fixture(scope="module")
def teacher(tiny_brains, tmp_path_factory) -> Path:
    """Deformations of a VoxelMorph teacher that trained for a moment."""
    folder = tmp_path_factory.mktemp("teacher")
    train_teacher.train(
        train_teacher.TeacherSettings(
            data=tiny_brains, out=folder / "t.pt", network="voxelmorph", cascades=1, steps=3, lr=1e-2, **TINY
        )
    )
    settings = extract_teacher.ExtractSettings(
        data=tiny_brains,
        teacher=str(folder / "t.pt"),
        out=folder / "t.h5",
        n_pairs=6,
        shape=(32, 32, 32),
        initial="centred",
        cache=None,
        device="cpu",
    )
    return extract_teacher.extract(settings)


def test_a_resumed_run_is_bit_equal_to_an_uninterrupted_one(tiny_brains, teacher, tmp_path):
    """With adversary, augmentation and two cascades: weights of student and discriminator, moments of both Adams."""
    changes = {"teacher": teacher, "cascades": 2, "steps": 8, "free_form": 0.5, "stripped": 0.5, "n_gen": 1}
    changes |= {"average": 0.7}
    train_student.train(student(tiny_brains, tmp_path / "whole.pt", **changes))
    for _ in range(9):
        train_student.train(student(tiny_brains, tmp_path / "parts.pt", minutes=0.0, **changes))
    whole, parts = (torch.load(tmp_path / f"{name}.pt", weights_only=True) for name in ("whole", "parts"))
    assert parts["step"] == 8
    for part in ("model", "trained", "discriminator"):
        assert all(torch.equal(v, parts[part][k]) for k, v in whole[part].items())
    for part in ("optimizer", "discriminator_optimizer"):
        for k, moments in whole[part]["state"].items():
            assert all(torch.equal(v, parts[part]["state"][k][n]) for n, v in moments.items())


def test_a_moving_average_of_the_weights_is_what_is_exported(tiny_brains, tmp_path):
    plain, averaged = (student(tiny_brains, tmp_path / f"{share}.pt", average=share) for share in (0.0, 0.15))
    train_student.train(plain)
    train_student.train(averaged)
    trained = torch.load(averaged.out, weights_only=True)["trained"]
    assert all(torch.equal(v, trained[k]) for k, v in weights_of(plain.out).items())
    difference = max((v - trained[k]).abs().max().item() for k, v in weights_of(averaged.out).items())
    assert 0 < difference < plain.lr  # a tenth or so of the last step, which is at most about lr


def test_a_moving_average_by_hand():
    model, average = torch.nn.Linear(1, 1, bias=False), torch.nn.Linear(1, 1, bias=False)
    torch.nn.init.constant_(average.weight, 0.0)
    expected = 0.0
    for step, (weight, kept) in enumerate([(1.0, 1 / 10), (2.0, 2 / 11), (3.0, 0.2), (4.0, 0.2)]):
        torch.nn.init.constant_(model.weight, weight)
        engine.follow(average, model, 0.2, step)
        expected = kept * expected + (1 - kept) * weight
        assert average.weight.item() == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize("objective", ["critic", "paper", "none"])
def test_every_objective_trains_and_reports_every_term(tiny_brains, teacher, tmp_path, objective):
    out = tmp_path / "s.pt"
    s = student(tiny_brains, out, teacher=teacher, objective=objective, n_gen=1, distil=1.0)
    train_student.train(s)
    terms = {k for line in curves(out) for k in line}
    adversarial = {"distillation", "penalty", "student", "discriminator"}
    assert {"reconstruction", "correlation", "smooth_each", "field_difference"} <= terms
    assert adversarial <= terms if objective != "none" else not adversarial & terms
    assert all(0 <= line["waiting"] < 1 for line in curves(out))  # the share of time in which steps waited for data
    assert s.aldk().gamma == 0.3  # the preset for MRI
    if objective == "none":
        return
    look = inspect_critic.InspectSettings(student=out, teacher=teacher, data=tiny_brains, pairs=3, cache=None)
    measured = inspect_critic.inspect(look)
    assert all(np.isfinite(v) for v in measured.values())
    assert 0.5 <= measured["told_apart"] <= 1
    assert -1 <= measured["pull_cosine"] <= 1
    assert objective != "paper" or 0 < measured["score_student"] < 1


def test_a_teachers_pairs_alone_change_nothing_else(tiny_brains, teacher, tmp_path):
    """Objective none and distil 0: the samples are those of a student that is taught, step by step."""
    more = {"teacher": teacher, "n_gen": 1, "free_form": 0.5, "pose_deg": 20.0, "jitter_deg": 10.0, "lr": 0.0}
    terms = []
    for name, changes in {"alone": {"objective": "none"}, "taught": {"distil": 1.0}}.items():
        train_student.train(student(tiny_brains, tmp_path / f"{name}.pt", save_every=1, **more, **changes))
        terms.append([line["correlation"] for line in curves(tmp_path / f"{name}.pt") if "correlation" in line])
    assert terms[0] == terms[1]
    assert len(set(terms[0])) == 4
    alone, taught = (checkpoints.read_checkpoint(tmp_path / f"{name}.pt") for name in ("alone", "taught"))
    assert "teacher" in taught["facts"]
    assert "teacher" not in alone["facts"]  # a card says that it had none


def test_distilling_field_values_brings_the_student_to_the_teacher(tiny_brains, tmp_path, monkeypatch):
    """Also that stored deformations arrive on the student's grid, with the right axes and scale."""
    (tmp_path / "shifts.py").write_text(
        "import torch\ndef shift(moving, fixed):\n"
        "    return torch.tensor([3.0, -2.0, 1.0]).view(1, 3, 1, 1, 1).expand(1, 3, 32, 32, 32)\n"
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    teacher = extract_teacher.extract(
        extract_teacher.ExtractSettings(
            data=tiny_brains,
            teacher="shifts:shift",
            out=tmp_path / "t.h5",
            n_pairs=6,
            shape=(32, 32, 32),
            initial="centred",
            cache=None,
            device="cpu",
        )
    )
    out = tmp_path / "s.pt"
    train_student.train(
        student(
            tiny_brains,
            out,
            teacher=teacher,
            objective="none",
            distil=10.0,
            n_gen=0,
            steps=60,
            lr=1e-2,
            jitter_deg=0.0,
            jitter_mm=0.0,
            jitter_scale=0.0,
            pose_deg=0.0,
            pose_scale=0.0,
            offset_mm=0.0,
        )
    )
    measured = [line["field_difference"] for line in curves(out)]
    half = [3 * 15 / 31, -2 * 15 / 31, 15 / 31]  # the shift in voxels of the half-size field
    assert measured[0] == pytest.approx(sum(h**2 for h in half) / 3, rel=0.1)
    assert measured[-1] < 0.3 * measured[0]


def test_two_processes_equal_one_with_the_doubled_batch(tiny_brains, teacher, tmp_path):
    arguments = [
        "--data", str(tiny_brains), "--teacher", str(teacher), "--shape", "32,32,32", "--initial", "centred",
        "--cache", "none", "--network", "ldr", "--options", "head=half", "--cascades", "1", "--batch", "2",
        "--steps", "4", "--save_every", "1", "--n_gen", "1", "--device", "cpu", "--val_split", "none", "--lr", "1e-3",
    ]  # fmt: skip
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    for name, count in (("one", 1), ("two", 2)):
        run = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", str(count), "--master-port",
               "0", "--rdzv-backend", "c10d", "--rdzv-endpoint", "localhost:0"]  # fmt: skip
        command = [*run, "-m", "Training.train_student", *arguments, "--out", str(tmp_path / f"{name}.pt")]
        done = subprocess.run(command, env=environment, capture_output=True, encoding="utf-8", check=False)
        assert done.returncode == 0, done.stderr[-2000:]
    one, two = (weights_of(tmp_path / f"{name}.pt") for name in ("one", "two"))
    moved = max((v - w).abs().max() for v, w in zip(one.values(), two.values(), strict=True))
    assert moved < 1e-5
    first, second = (torch.load(tmp_path / f"{n}.pt", weights_only=True)["discriminator"] for n in ("one", "two"))
    assert all(torch.allclose(v, second[k], atol=1e-5) for k, v in first.items())


def test_rcn_trains_end_to_end_with_its_affine_stem_and_exports(tiny_brains, tmp_path):
    settings = train_teacher.TeacherSettings(
        data=tiny_brains, out=tmp_path / "rcn.pt", network="vtn", options=("width=0.125",), affine="affine-vtn",
        affine_options=("width=0.125",), cascades=2, steps=2, precision="bfloat16", **{**TINY, "shape": (64, 64, 64)},
    )  # fmt: skip
    train_teacher.train(settings)
    assert {"determinant", "orthogonality", "correlation"} <= set(curves(tmp_path / "rcn.pt")[0])
    card = export_weights.export(
        export_weights.ExportSettings(
            dense=tmp_path / "rcn.pt", out=tmp_path, name="tiny-rcn", summary="s", made_for="m", licence="l"
        )
    )
    model = LDRCore.load_model(card.with_suffix(".pt"))
    assert model.cascade.stem is not None
    assert len(model.cascade) == 2
    assert model.card["recipe"]["networks"]["config"]["network"] == "vtn"
    assert str(tmp_path) not in card.read_text(encoding="utf-8")


def test_fine_tuning_on_ones_own_pairs(demo_pair, tmp_path):
    """README's command on three subjects: two demo brains and one of them turned; other grids, no labels."""
    fixed, moving = sitk.ReadImage(str(demo_pair["fixed"])), sitk.ReadImage(str(demo_pair["moving"]))
    turned = sitk.Image(moving)
    turned.SetOrigin((7.0, -9.0, 12.0))
    for name, image in (("a", fixed), ("b", moving), ("c", turned)):
        sitk.WriteImage(image, str(tmp_path / f"{name}.nii.gz"))
    (tmp_path / "my.csv").write_text("fixed,moving\na.nii.gz,b.nii.gz\nb.nii.gz,c.nii.gz\nc.nii.gz,a.nii.gz\n")
    out = tmp_path / "mine.pt"
    command = [
        sys.executable,
        "-m",
        "Training.train_student",
        "--init",
        "brain-t1",
        "--pairs",
        str(tmp_path / "my.csv"),
    ]
    command += ["--steps", "3", "--out", str(out), "--shape", "64,80,64", "--device", "cpu"]
    command += ["--cache", str(tmp_path / "cache")]
    done = subprocess.run(command, capture_output=True, encoding="utf-8", check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    before = weights.load_cascade("brain-t1").state_dict()
    moved = max(float((v - before[k]).abs().max()) for k, v in weights_of(out).items())
    assert 0 < moved < 1e-3  # started from brain-t1, and learned
    arguments = {"dense": out, "stem": "brain-t1", "out": tmp_path, "name": "mine", "summary": "s", "made_for": "m"}
    card = export_weights.export(export_weights.ExportSettings(licence="l", **arguments))
    result = LDRCore.register(fixed, moving, model=card.with_suffix(".pt"))
    shipped = LDRCore.register(fixed, moving, model="brain-t1")
    assert result.report["model"] == "mine"
    gap = np.abs(sitk.GetArrayFromImage(result.displacement_field) - sitk.GetArrayFromImage(shipped.displacement_field))
    assert 0 < gap.mean() < 1.0


def test_the_stem_trains_and_exports(tiny_brains, tmp_path):
    train_stem.train(
        train_stem.StemSettings(data=tiny_brains, out=tmp_path / "stem.pt", steps=2, batch=2, cache=None, device="cpu")
    )
    train_student.train(student(tiny_brains, tmp_path / "s.pt", steps=2))
    card = export_weights.export(
        export_weights.ExportSettings(
            dense=tmp_path / "s.pt",
            stem=str(tmp_path / "stem.pt"),
            out=tmp_path,
            name="both",
            summary="s",
            made_for="m",
            licence="l",
        )
    )
    stem = weights.load_cascade(card.with_suffix(".pt")).stem
    state = weights_of(tmp_path / "stem.pt")
    assert stem.state_dict().keys() == state.keys()
    assert all(torch.allclose(v, state[k], atol=1e-3) for k, v in stem.state_dict().items())


def test_transforms_on_disk_are_a_teacher(tiny_brains, tmp_path):
    """An affine map and a field in physical space come back as what they do to points."""
    base = {"data": tiny_brains, "shape": (32, 32, 32), "initial": "centred", "cache": None, "device": "cpu"}
    settings = extract_teacher.ExtractSettings(
        **base, teacher=str(tmp_path / "fields"), out=tmp_path / "t.h5", n_pairs=12, half=False
    )
    source = train_student.PairSource(settings, "train", 1, torch.device("cpu"))
    (tmp_path / "fields").mkdir()
    for f, m in source.pairs:
        turn = sitk.Euler3DTransform((0.0, 0.0, 0.0), 0.1, -0.05, 0.08, (3.0, 4.0, float(f + m)))
        name = f"{source.scans.names[f]}_{source.scans.names[m]}"
        if f == 0:
            image = sitk.ReadImage(str(tiny_brains / f"s{f}-image.nii.gz"))
            wide = sitk.Image([80, 80, 80], sitk.sitkUInt8)
            wide.SetOrigin([o - 44 for o in image.GetOrigin()])
            wide.SetSpacing((2.0, 2.0, 2.0))
            field = sitk.TransformToDisplacementField(turn, sitk.sitkVectorFloat64, wide.GetSize(), wide.GetOrigin(),
                                                      wide.GetSpacing(), wide.GetDirection())  # fmt: skip
            sitk.WriteImage(field, str(tmp_path / "fields" / f"{name}.nii.gz"))
        else:
            sitk.WriteTransform(turn, str(tmp_path / "fields" / f"{name}.tfm"))
    store = TeacherStore(extract_teacher.extract(settings))
    assert len(store) == 12
    for f, m in ((0, 2), (1, 3)):
        turn = sitk.Euler3DTransform((0.0, 0.0, 0.0), 0.1, -0.05, 0.08, (3.0, 4.0, float(f + m)))
        u = store.read(source.key(f, m))
        index = np.array([9, 20, 14])
        lps = (source.scans[f].to_lps @ source.canonical(f) @ np.append(index, 1))[:3]
        expected = np.array(turn.TransformPoint(lps))
        measured = (source.scans[m].to_lps @ source.canonical(m) @ np.append(index + u[:, 9, 20, 14], 1))[:3]
        assert np.allclose(measured, expected, atol=0.1)


def test_a_teacher_can_be_any_function(tiny_brains, tmp_path, monkeypatch):
    (tmp_path / "mymodule.py").write_text(
        "import torch\ndef still(moving, fixed):\n    return torch.zeros(1, 3, *fixed.shape[2:])\n"
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    settings = extract_teacher.ExtractSettings(
        data=tiny_brains,
        teacher="mymodule:still",
        out=tmp_path / "t.h5",
        n_pairs=2,
        shape=(32, 32, 32),
        initial="centred",
        cache=None,
        device="cpu",
    )
    store = TeacherStore(extract_teacher.extract(settings))
    assert np.abs(store.read(store.keys[0])).max() == 0
    assert store.shape == (16, 16, 16)


def test_an_interrupted_extraction_goes_on(tiny_brains, teacher, tmp_path, monkeypatch):
    settings = extract_teacher.ExtractSettings(
        data=tiny_brains,
        teacher=str(teacher.with_suffix(".pt")),
        out=tmp_path / "t.h5",
        n_pairs=6,
        shape=(32, 32, 32),
        initial="centred",
        cache=None,
        device="cpu",
    )
    calls = []
    whole = extract_teacher.from_network

    def dies(*arguments):
        calls.append(arguments)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return whole(*arguments)

    monkeypatch.setattr(extract_teacher, "from_network", dies)
    with pytest.raises(KeyboardInterrupt):
        extract_teacher.extract(settings)
    store, reference = TeacherStore(extract_teacher.extract(settings)), TeacherStore(teacher)
    assert len(calls) == 7  # two, one that died, and the four that were missing
    assert set(store.keys) == set(reference.keys)
    assert all(np.array_equal(store.read(k), reference.read(k)) for k in store.keys)


def test_a_student_without_discriminator_cannot_be_looked_into(tiny_brains, teacher, tmp_path):
    train_student.train(student(tiny_brains, tmp_path / "s.pt", steps=1))
    look = inspect_critic.InspectSettings(student=tmp_path / "s.pt", teacher=teacher, data=tiny_brains, cache=None)
    with pytest.raises(ConfigError, match="student must have been trained with a discriminator, got none"):
        inspect_critic.inspect(look)


def test_refusals_come_before_any_step(tiny_brains, teacher, tmp_path):
    cases = [
        ({"teacher": teacher, "spacing_mm": 3.0}, "must have been made with spacing_mm = 3.0, got 2.0"),
        (
            {"teacher": teacher, "initial": "grid"},
            "must both have initial = grid, or neither, got centred in .* and grid",
        ),
        ({"network": "resnet"}, "network must be one of"),
        ({"options": ("head=none",)}, "head must be"),
        ({"options": ("depth=3",)}, "depth"),
        ({"network": "vtn", "options": ()}, "every axis of shape must be a multiple of 64 for vtn"),
        ({"init": str(tmp_path / "no.pt")}, "a checkpoint must exist"),
        ({"init": "brain-t1", "options": ()}, "init must hold networks of the same layout, got 'brain-t1'"),
        ({"split": "training"}, "'training'"),
    ]
    for changes, message in cases:
        with pytest.raises((ConfigError, ValueError), match=message):
            train_student.train(student(tiny_brains, tmp_path / "s.pt", **changes))
    assert not (tmp_path / "s.pt").exists()


def test_a_users_mistake_is_one_sentence_and_exit_code_2(tmp_path):
    command = [sys.executable, "-m", "Training.train_student", "--data", str(tmp_path), "--step", "3"]
    done = subprocess.run(command, capture_output=True, encoding="utf-8", check=False)
    assert done.returncode == 2
    assert done.stderr.startswith("error: a key must be one of")
    assert done.stderr.count("\n") == 1


def test_geometry_of_a_lattice_that_is_turned():
    turn = sitk.Euler3DTransform((5.0, 1.0, -3.0), 0.2, 0.1, -0.3, (1.0, 2.0, 3.0))
    matrix = np.eye(4)
    matrix[:3, :3] = np.array(sitk.Euler3DTransform((0, 0, 0), 0.4, 0.1, 0.2).GetMatrix()).reshape(3, 3)[:, ::-1] * [
        1.0, 2.0, 3.0,
    ]  # fmt: skip
    matrix[:3, 3] = (10, -20, 30)
    moved = transform_lattice(turn, matrix, (3, 4, 5))
    expected = turn.TransformPoint((matrix @ [2, 1, 4, 1])[:3])
    assert np.allclose(moved[2, 1, 4], expected, atol=1e-4)


def test_rank_of_a_process_that_torchrun_did_not_start(monkeypatch):
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    assert processes.join_processes() == processes.Rank(0, 1, 0)
