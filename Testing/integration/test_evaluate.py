"""`Training.evaluate` on blobs: baselines, a model, command lines that work, fail, hang; resuming; cards; peers."""

from __future__ import annotations

import csv
import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import SimpleITK as sitk

from LDRCore.models import weights
from Training import evaluate
from Training.evaluation import costs, memory, result_rows, systems, workers
from Training.evaluation.config import DataSet, System
from Training.evaluation.datasets import Pair, Side
from Training.evaluation.systems import Place

SCRIPT = """
import sys, time
import SimpleITK as sitk
fixed, moving, out, what = sys.argv[1:]
if what == "crash":
    print("it broke")
    sys.exit(3)
if what == "hang":
    time.sleep(60)
if what == "silent":
    sys.exit(0)
a, b = (sitk.ReadImage(p) for p in (fixed, moving))
shift = [y - x for x, y in zip(a.GetOrigin(), b.GetOrigin())]
transform = sitk.TranslationTransform(3, shift)
if out.endswith(".nii.gz"):
    field = sitk.TransformToDisplacementField(
        transform, sitk.sitkVectorFloat64, a.GetSize(), a.GetOrigin(), a.GetSpacing(), a.GetDirection()
    )
    sitk.WriteImage(field, out)
else:
    sitk.WriteTransform(transform, out)
"""


@pytest.fixture
def folder(tmp_path, blob) -> Path:
    """Two pairs of the same blob, the moving one shifted in its header by 12 and -7 mm."""
    labels = sitk.BinaryThreshold(blob, 1, 10000, 1, 0)
    lines = ["fixed,moving,fixed_labels,moving_labels"]
    sitk.WriteImage(blob, str(tmp_path / "f.nii.gz"))
    sitk.WriteImage(labels, str(tmp_path / "fl.nii.gz"))
    for name, shift in (("m", 12.0), ("n", -7.0)):
        for image, file in ((blob, name), (labels, f"{name}l")):
            moved = sitk.Image(image)
            moved.SetOrigin((shift, 0.0, 0.0))
            sitk.WriteImage(moved, str(tmp_path / f"{file}.nii.gz"))
        lines.append(f"f.nii.gz,{name}.nii.gz,fl.nii.gz,{name}l.nii.gz")
    (tmp_path / "pairs.csv").write_text("\n".join(lines) + "\n")
    (tmp_path / "tool.py").write_text(SCRIPT)
    return tmp_path


def command(name: str, folder: Path, what: str, **more: object) -> str:
    line = f"{sys.executable} {folder / 'tool.py'} {{fixed}} {{moving}} {{out}} {what}"
    extra = "\n".join(f"{k} = {json.dumps(v)}" for k, v in more.items())
    return f'[[system]]\nname = "{name}"\nkind = "command"\ncommand = "{line}"\n{extra}\n'


def config(folder: Path, *more: str) -> Path:
    text = f"""
measures = ["overlap", "surface", "regularity"]
[[dataset]]
name = "blobs"
kind = "csv"
root = "{folder}"
pairs = "pairs.csv"
[[dataset]]
name = "not here"
kind = "csv"
root = "{folder}"
pairs = "none.csv"
optional = true
[[system]]
name = "nothing"
kind = "nothing"
[[system]]
name = "affine only"
kind = "affine"
model = "brain-t1"
"""
    path = folder / "c.toml"
    path.write_text(text + "\n".join(more))
    return path


@pytest.fixture
def in_process(monkeypatch):
    """Rows are made in this process: quicker where worker processes are not what is tested."""

    def run_all(tasks, *_):
        cache = {}
        for number, task in enumerate(tasks):
            yield number, workers.perform(task, cache)

    monkeypatch.setattr(evaluate, "run_all", run_all)
    monkeypatch.setattr(costs, "run_all", run_all)


def run(path: Path, out: Path, *more: str) -> int:
    return evaluate.main(["--config", str(path), "--out", str(out), "--no-costs", *more])


def by_system(out: Path) -> dict[str, list[result_rows.Row]]:
    rows_by_system: dict[str, list[result_rows.Row]] = {}
    for row in result_rows.read(out / "rows.csv"):
        rows_by_system.setdefault(row["system"], []).append(row)
    return rows_by_system


def test_systems_are_compared_and_a_failing_one_does_not_stop_the_others(folder, tmp_path, capsys):
    out = tmp_path / "out"
    path = config(
        folder,
        command("shift field", folder, "work"),
        command("shift transform", folder, "work", writes=".tfm"),
        command("crash", folder, "crash"),
        command("hang", folder, "hang", timeout_s=0.5),
        command("silent", folder, "silent"),
        '[[system]]\nname = "other model"\nkind = "model"\nmodel = "no-such"\ncascades = 1\n',
        '[[system]]\nname = "no program"\nkind = "command"\ncommand = "no-such-program {fixed}"\n',
    )
    assert run(path, out, "--workers", "2") == 1
    results = by_system(out)
    assert set(results) == {"nothing", "affine only", "shift field", "shift transform", "crash", "hang", "silent"}
    assert all(len(r) == 2 for r in results.values())
    for name in ("shift field", "shift transform"):
        assert [r["dice_mean"] for r in results[name]] == [1, 1]
        assert [r["hd95_mm"] for r in results[name]] == [0, 0]
        assert all(r["seconds"] > 0 and r["peak_mb"] > 5 and r["folding_count"] == 0 for r in results[name])
    assert [r["dice_mean"] for r in results["nothing"]] == pytest.approx([1, 1], abs=0.02)  # centring undoes a shift
    assert results["crash"][0]["message"] == "ended with code 3: it broke"
    assert results["hang"][0]["message"] == "took longer than 0.5 seconds and was stopped"
    assert results["silent"][0]["message"] == "the command must write its {out}, got no file out.nii.gz"
    table = (out / "tables-c.md").read_text(encoding="utf-8")
    assert "| crash | 0 |" in table
    assert "not run: no weights yet: no model 'no-such'" in table
    assert "not run: the program no-such-program is not installed" in table
    assert "## not here\n\nNo data: the list of pairs must exist" in table
    lines = json.loads((out / "tables-c.json").read_text(encoding="utf-8"))["blobs"]["lines"]
    assert lines[2]["values"]["dice_mean"]["mean"] == 1
    assert (out / "tables-c.tex").read_text(encoding="utf-8").count("tabular") == 2
    assert "failed: crash on blobs" in capsys.readouterr().err


def test_a_second_run_computes_nothing_and_an_interrupted_one_goes_on(folder, tmp_path, monkeypatch, in_process):
    out = tmp_path / "out"
    path = config(folder, command("shift", folder, "work"), command("crash", folder, "crash"))
    assert run(path, out, "--pairs", "1") == 1
    assert len(result_rows.read(out / "rows.csv")) == 4
    assert run(path, out) == 1
    whole = (out / "rows.csv").read_bytes()
    assert len(result_rows.read(out / "rows.csv")) == 8
    given = []
    monkeypatch.setattr(evaluate, "run_all", lambda tasks, *_: (given.extend(tasks), iter(()))[1])
    assert run(path, out) == 1
    assert given == []
    run(path, out, "--retry-failed")
    assert {t.system.name for t in given} == {"crash"}
    given.clear()
    (out / "rows.csv").write_bytes(whole[: whole.rfind(b"\n", 0, -1) + 40])  # cut off in the last row
    run(path, out)
    assert len(given) == 1
    given.clear()
    (out / "rows.csv").write_bytes(whole)
    text = path.read_text(encoding="utf-8")
    path.write_text(text.replace(" work", " crash", 1))  # the system changed: its rows are no longer its own
    run(path, out)
    assert {t.system.name for t in given} == {"shift"}


def test_an_interrupted_evaluation_ends_its_programs_and_keeps_its_rows(folder, tmp_path):
    marker = tmp_path / "running"
    text = f"import os, time, pathlib; pathlib.Path({str(marker)!r}).write_text(str(os.getpid())); time.sleep(30)"
    (folder / "slow.py").write_text(text)
    line = f"{sys.executable} {folder / 'slow.py'} {{fixed}}"
    path = config(folder, f'[[system]]\nname = "slow"\nkind = "command"\ncommand = "{line}"\n')
    script = "import sys; from Training import evaluate; sys.exit(evaluate.main(sys.argv[1:]))"
    given = ["--config", str(path), "--out", str(tmp_path / "out"), "--no-costs", "--pairs", "1"]
    process = subprocess.Popen([sys.executable, "-c", script, *given], stderr=subprocess.PIPE, encoding="utf-8")
    deadline = time.monotonic() + 60
    while not (marker.exists() and marker.read_text(encoding="utf-8")) and time.monotonic() < deadline:
        time.sleep(0.05)
    process.terminate()
    assert "interrupted; finished rows are kept" in process.communicate(timeout=20)[1]
    assert process.returncode == 130
    assert {r["system"] for r in result_rows.read(tmp_path / "out" / "rows.csv")} == {"nothing", "affine only"}
    with pytest.raises(ProcessLookupError):
        os.kill(int(marker.read_text(encoding="utf-8")), 0)


@pytest.mark.skipif(sys.platform != "linux", reason="peak memory of other processes is read as Linux reports it")
def test_peak_memory_is_the_programs_own(tmp_path):
    """Neither this (large) process's memory nor only the launcher's: a child of 100 MB in a process of 10."""
    held = np.ones(40_000_000)  # 320 MB here
    child = "import time; a = bytearray(100_000_000); a[::4096] = b'x' * len(a[::4096]); time.sleep(0.5)"
    code = f"import subprocess, sys; subprocess.run([sys.executable, '-c', {child!r}], check=True)"
    seconds, peak_mb = systems.call([sys.executable, "-c", code], timeout_s=30, threads=1, folder=tmp_path)
    assert 95 < peak_mb < 200
    assert seconds > 0.5
    assert memory.peak_mb() > 300
    assert held[0] == 1


class Bomb:
    """Ends the process that unpickles it."""

    def __reduce__(self):
        return os._exit, (7,)


def test_a_dead_worker_costs_one_row(folder):
    data = DataSet("d", "csv", str(folder), str(folder / "pairs.csv"))
    side = Side(str(folder / "f.nii.gz"), str(folder / "fl.nii.gz"))
    pair, place = Pair("p", side, side), Place((), sys.executable, 1)
    tasks = [workers.Task(data, pair, System("nothing", "nothing"), place, ("overlap",)) for _ in range(3)]
    tasks[1] = workers.Task(data, pair, System("bomb", "nothing"), place, Bomb())
    results = dict(workers.run_all(tasks, 1, 1))
    assert results[1] == {"status": "failed", "message": "its process ended with code 7"}
    assert results[0]["dice_mean"] == results[2]["dice_mean"] == 1


def test_what_goes_wrong_with_a_pair_is_in_its_row(folder):
    data = DataSet("d", "csv", str(folder), str(folder / "pairs.csv"))
    good, gone = Side(str(folder / "f.nii.gz")), Side(str(folder / "gone.nii.gz"))
    task = workers.Task(data, Pair("p", good, gone), System("x", "nothing"), Place((), "", 1), ())
    results = workers.perform(task, {})
    assert results["status"] == "failed"
    assert "image must be an existing file" in results["message"]


def test_models_their_costs_and_the_card(folder, tmp_path, in_process):
    for file in weights.BUNDLED.glob("brain-t1.*"):
        shutil.copy(file, tmp_path)
    model = tmp_path / "brain-t1.pt"
    path = config(folder, '[[system]]\nname = "1 cascades"\nkind = "model"\nmodel = "{model}"\ncascades = 1\n')
    path.write_text(path.read_text(encoding="utf-8").replace('"blobs"', '"val-blobs"'))
    shared = ["--config", str(path), "--model", str(model), "--out", str(tmp_path / "out"), "--pairs", "1"]
    assert evaluate.main([*shared, "--write-card", "--cost-threads", "1"]) == 0
    card = json.loads((tmp_path / "brain-t1.json").read_text(encoding="utf-8"))
    entry = card["results"]["val"]["systems"]
    assert set(entry["blobs"]) == {"nothing", "1 cascades"}  # the config's affine is another model's
    assert entry["blobs"]["1 cascades"]["dice_mean"] > 0.8
    assert card["sha256"] == weights.model_info("brain-t1")["sha256"]
    with (tmp_path / "out" / "costs.csv").open() as stream:
        costs = {r["system"]: r for r in csv.DictReader(stream)}
    assert float(costs["1 cascades"]["seconds_min"]) <= float(costs["1 cascades"]["seconds"])
    assert float(costs["1 cascades"]["peak_mb"]) > 100
    assert costs["1 cascades"]["runs"] == "3"


def test_costs_of_a_model_by_hand():
    from LDRCore.models import registry

    place = Place((), sys.executable, 1)
    stem = registry.cost(registry.build_stem("affine-ldr"), (64, 64, 64))
    network = registry.cost(registry.build_network("ldr", head="half"))
    for n in (1, 3):
        results = costs.size(System("x", "model", "brain-t1", n), place)
        assert results.parameters == stem.parameters + n * network.parameters
        assert results.multiply_adds == 3 * stem.multiply_adds + n * network.multiply_adds


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--workers", "0"], "--workers must be 1 or more, got 0"),
        (["--systems", "shift,mine"], "--systems must be names of the configuration, got 'mine'"),
        (["--datasets", "x"], "--datasets must be names of the configuration, got 'x'"),
        (["--write-card"], "--write-card needs --model"),
    ],
)
def test_unusable_arguments_end_with_one_sentence_and_nothing_written(folder, tmp_path, capsys, more, message):
    path = config(folder, command("shift", folder, "work"))
    assert run(path, tmp_path / "out", *more) == 2
    printed = capsys.readouterr().err
    assert message in printed
    assert printed.count("\n") == 1
    assert not (tmp_path / "out").exists()


def test_a_data_set_that_is_not_optional_must_be_there(folder, tmp_path, capsys):
    path = config(folder)
    path.write_text(path.read_text(encoding="utf-8").replace("optional = true", ""))
    assert run(path, tmp_path / "out") == 2
    assert "the list of pairs must exist" in capsys.readouterr().err


def test_a_missing_peer_package_is_said(tmp_path):
    place = Place((), shutil.which("false") or "false", 1)
    assert systems.unavailable(System("x", "peer", method="greedy"), place).startswith("the check of greedy ended")
    place = Place((), str(tmp_path / "no-python"), 1)
    assert "the peers' Python cannot be used" in systems.unavailable(System("x", "peer", method="greedy"), place)


PEERS = [
    "ants-affine",
    "ants-syn",
    "greedy-affine",
    "greedy",
    "greedy-tuned",
    "convexadam",
    "elastix-affine",
    "elastix-bspline",
]


@pytest.mark.parametrize("method", PEERS)
def test_peers_align_a_shifted_blob(folder, method):
    """Runs in the Python that LDR_PEER_PYTHON names."""
    if "LDR_PEER_PYTHON" not in os.environ:
        pytest.skip("LDR_PEER_PYTHON names no Python with other registration programs")
    place = Place((), os.environ["LDR_PEER_PYTHON"], 1)
    why = systems.unavailable(System(method, "peer", method=method), place)
    if why:
        pytest.skip(f"{method} cannot run here: {why}")
    data = DataSet("d", "csv", str(folder), str(folder / "pairs.csv"))
    sides = (Side(str(folder / f"{n}.nii.gz"), str(folder / f"{n}l.nii.gz")) for n in ("f", "m"))
    task = workers.Task(data, Pair("p", *sides), System(method, "peer", method=method), place, ("overlap",))
    results = workers.perform(task, {})
    assert results["status"] == "done", results
    assert results["dice_mean"] > 0.9
    assert results["initial"]
    assert np.isfinite(results["seconds"])
    assert results["seconds_io"] >= results["seconds"]
