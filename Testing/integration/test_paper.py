"""`Training.paper`: rows within budgets, failures that cost one row, runs that go on, without SimpleITK, a report."""

from __future__ import annotations

import dataclasses
import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from LDRCore.distillation.teacher_store import TeacherStore
from LDRCore.models import weights
from Training import checkpoints, config, evaluate, objectives, paper, paper_rows, paper_runner, prepare_data, report
from Training.config import ConfigError
from Training.data.scan_set import DataError, Scan
from Training.data.scans import open_scans
from Training.evaluation import config as evaluation_config
from Training.evaluation import workers
from Training.extract_teacher import ExtractSettings

ROOT = Path(__file__).parents[2]
CONFIGS = ROOT / "Training" / "configs"
PAPERS = ("paper.toml", "paper-gpu.toml", "paper-arms-ldr.toml", "paper-arms-gradient.toml")
LIGHT = 'cascades = 1\noptions = ["head=half", "channels=4x8x8x8"]\n'
STUDENT = f'kind = "student"\nteacher = "fields"\n{LIGHT}'
ROWS = f"""
data = "{{data}}"
measures = ["overlap", "regularity"]
reference = "plain"
[keys]
shape = [32, 32, 32]
loss_stride = 1
initial = "centred"
stripped = 1.0
n_pairs = 4
val_pairs = 1
n_gen = 1
device = "cpu"
affine = "affine-ldr"
[[row]]
name = "teacher"
kind = "teacher"
system = "teacher"
{LIGHT}
[[row]]
name = "fields"
kind = "store"
teacher = "teacher"
[[row]]
name = "plain"
system = "plain"
objective = "none"
{STUDENT}
[[row]]
name = "aldk"
system = "aldk"
objective = "critic"
{STUDENT}
[[row]]
name = "wild"
system = "wild"
lr = 1e38
{STUDENT}
[[row]]
name = "after-wild"
system = "after wild"
init = "wild"
{STUDENT}
[[row]]
name = "poor"
system = "poor"
{STUDENT}
[[dataset]]
name = "toys"
kind = "csv"
root = "{{data}}"
pairs = "pairs.csv"
[[system]]
name = "nothing"
kind = "nothing"
[[system]]
name = "affine only"
kind = "affine"
model = "teacher"
"""
MINUTES = {"teacher": 0.01, "plain": 0.01, "aldk": 0.01, "wild": 1, "after-wild": 1, "poor": 1e-9}


def write_config(folder: Path, rows: str = ROWS, minutes: dict[str, float] = MINUTES) -> Path:
    (folder / "rows.toml").write_text(rows, encoding="utf-8")
    lines = [f"{name} = {value}" for name, value in minutes.items()]
    text = "\n".join(['title = "toys"', 'rows = "rows.toml"', "[minutes]", *lines])
    (folder / "paper.toml").write_text(text + "\n", encoding="utf-8")
    return folder / "paper.toml"


def in_this_process(tasks, *_):
    cache: dict = {}
    for number, task in enumerate(tasks):
        yield number, workers.perform(task, cache)


@pytest.fixture(scope="module")
def finished(tiny_brains, tmp_path_factory) -> Path:
    """A whole run: its folder OUT, and the exit code beside it."""
    folder = tmp_path_factory.mktemp("paper")
    names = [f"s{k}-{what}.nii.gz" for what in ("image", "labels") for k in (4, 5)]
    header = "fixed,moving,fixed_labels,moving_labels"
    paths = ",".join(str(tiny_brains / name) for name in names)
    (folder / "pairs.csv").write_text(f"{header}\n{paths}\n", encoding="utf-8")
    words = ["--config", write_config(folder), "--data", tiny_brains, "--out", folder / "out", "--no-costs"]
    threads = torch.get_num_threads()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(evaluate, "run_all", in_this_process)
        patch.chdir(folder)
        code = paper.main([str(word) for word in words])
    torch.set_num_threads(threads)
    (folder / "code").write_text(str(code), encoding="utf-8")
    return folder / "out"


def state_of(out: Path) -> dict[str, dict]:
    return json.loads((out / "state.json").read_text(encoding="utf-8"))


def test_what_fails_costs_its_own_row(finished):
    state = state_of(finished)
    assert (finished.parent / "code").read_text(encoding="utf-8") == "1"
    assert {name: row["status"] for name, row in state.items()} == {
        **dict.fromkeys(("teacher", "fields", "plain", "aldk"), "done"),
        **dict.fromkeys(("wild", "after-wild", "poor"), "failed"),
    }
    assert state["wild"]["message"].startswith("every loss term must be finite, got ")
    assert "untouched" not in state["wild"]["message"]
    assert state["after-wild"]["message"] == "row after-wild needs row wild, which failed"
    assert state["poor"]["message"].startswith("a budget must hold one step, got 1e-09 minutes where one takes ")
    assert not list(finished.glob("runs/*probe*"))


def test_a_budget_becomes_a_number_of_steps(finished):
    for name in ("teacher", "plain", "aldk"):
        row = state_of(finished)[name]
        assert row["steps"] == int(60 * MINUTES[name] / row["step_s"])
        checkpoint = checkpoints.read_checkpoint(finished / "runs" / f"{name}.pt")
        assert checkpoint["step"] == checkpoint["config"]["steps"] == row["steps"]
        assert not any("optimizer" in key for key in checkpoint)  # it is finished, and smaller for that
        assert row["best"]["criterion"] == "Dice, 1 cascades"


def test_the_plain_student_takes_the_teachers_pairs_and_nothing_else(finished):
    plain, aldk = (checkpoints.read_checkpoint(finished / "runs" / f"{name}.pt") for name in ("plain", "aldk"))
    assert plain["config"]["teacher"] == aldk["config"]["teacher"] == str(finished / "stores" / "fields.h5")
    assert "teacher" not in plain["facts"]
    assert "discriminator" not in plain
    assert "discriminator" in aldk
    assert report.teacher_name(weights.model_info(str(finished / "models" / "plain.pt"))) == "none"
    assert report.teacher_name(weights.model_info(str(finished / "models" / "aldk.pt"))).startswith("ldr, 1 cascades")
    assert len(TeacherStore(finished / "stores" / "fields.h5")) == 4


def test_the_report_has_every_row(finished):
    text = (finished / "report.md").read_text(encoding="utf-8")
    rows = {line.split(" | ")[0].strip("| "): line for line in text.splitlines() if line.startswith("| ")}
    assert rows["fields"].startswith("| fields | - | store | teacher | - | ")  # not in the tables; no budget of its own
    assert "4 pairs, local correlation raised in " in rows["fields"]
    assert "p against plain" in text
    for name in ("nothing", "affine only", "teacher", "plain", "aldk"):
        assert any(f"| {name} | 1 | " in line for line in text.splitlines()), name
    assert "not run: no weights yet: row wild failed (every loss term must be finite" in text


def test_a_finished_run_goes_on_with_nothing(finished, tiny_brains, monkeypatch):
    """Failed rows stay failed; a row with other keys is refused."""
    before = state_of(finished)
    config_file = finished.parent / "paper.toml"
    monkeypatch.setattr(paper_runner.Runner, "_train", lambda *_: pytest.fail("nothing is left to train"))
    words = ["--config", config_file, "--data", tiny_brains, "--out", finished, "--stage", "train"]
    assert paper.main([str(word) for word in words]) == 1
    assert state_of(finished) == before
    rows = paper_rows.load(config_file)
    rows.rows[2] = dataclasses.replace(rows.rows[2], keys={**rows.rows[2].keys, "seed": 5})
    with pytest.raises(ConfigError, match="row plain must have the keys of the run in"):
        paper_runner.Runner(rows, finished, str(tiny_brains))


def one_row(folder: Path, more: str = "") -> paper_rows.Paper:
    text = ROWS[: ROWS.index("[[row]]")] + f'[[row]]\nname = "one"\nkind = "student"\nsteps = 3\n{LIGHT}{more}'
    return paper_rows.load(write_config(folder, text, {}))


def test_a_run_that_is_interrupted_goes_on_to_the_same_weights(tiny_brains, tmp_path, monkeypatch):
    rows = one_row(tmp_path)
    paper_runner.Runner(rows, tmp_path / "whole", str(tiny_brains)).run()
    times = iter([None, *[0.0] * 9])  # the timing is not cut short; after it one step a start
    monkeypatch.setattr(paper_runner.Runner, "_left_minutes", lambda _: next(times))
    for step in (1, 2):
        with pytest.raises(paper_runner.InterruptedRunError, match=f"one stopped after step {step} of 3"):
            paper_runner.Runner(rows, tmp_path / "parts", str(tiny_brains)).run()
        assert state_of(tmp_path / "parts")["one"]["status"] == "begun"
    paper_runner.Runner(rows, tmp_path / "parts", str(tiny_brains)).run()
    assert state_of(tmp_path / "parts")["one"]["status"] == "done"
    whole, parts = (checkpoints.read_checkpoint(tmp_path / n / "runs" / "one.pt")["model"] for n in ("whole", "parts"))
    assert all(torch.equal(value, parts[name]) for name, value in whole.items())


def test_a_signal_during_the_last_step_of_a_row_ends_the_run_after_it(tiny_brains, tmp_path, monkeypatch):
    text = ROWS[: ROWS.index("[[row]]")]
    text += "".join(f'[[row]]\nname = "{name}"\nkind = "student"\nsteps = 1\n{LIGHT}' for name in ("one", "two"))
    rows = paper_rows.load(write_config(tmp_path, text, {}))
    monkeypatch.setattr(objectives, "validate", lambda *_: signal.raise_signal(signal.SIGTERM) or {"Dice, 1": 0.5})
    with pytest.raises(paper_runner.InterruptedRunError, match="one is done"):
        paper_runner.Runner(rows, tmp_path / "out", str(tiny_brains)).run()
    assert {name: row["status"] for name, row in state_of(tmp_path / "out").items()} == {"one": "done"}


def test_no_time_at_all_begins_nothing(tiny_brains, tmp_path, capsys):
    words = ["--config", write_config(tmp_path), "--data", tiny_brains, "--out", tmp_path / "out", "--minutes", 0]
    assert paper.main([str(word) for word in words]) == 130
    assert "run the same command to go on" in capsys.readouterr().err
    assert not (tmp_path / "out" / "runs").exists()


def test_a_trial_takes_two_steps_a_row(tiny_brains, tmp_path):
    words = ["--config", write_config(tmp_path), "--data", tiny_brains, "--out", tmp_path / "out", "--trial"]
    assert paper.main([*map(str, words), "--stage", "train", "--only", "plain"]) == 0
    state = state_of(tmp_path / "out")
    assert list(state) == ["teacher", "fields", "plain"]  # what it needs as well
    assert [state[name].get("steps") for name in state] == [2, None, 2]
    assert len(TeacherStore(tmp_path / "out" / "stores" / "fields.h5")) == 2


WITHOUT_SIMPLEITK = """
import sys
class Hidden:
    def __init__(self, finder):
        self.finder = finder
    def find_spec(self, name, *more):
        return None if name.partition(".")[0] == "SimpleITK" else self.finder.find_spec(name, *more)
sys.meta_path[:] = [Hidden(finder) for finder in sys.meta_path]
from Training import paper
code = paper.main(sys.argv[1:])
from Training.data import scan_files
try:
    scan_files.read_header(scan_files.Path(sys.executable))
except Exception as error:
    print(error)
sys.exit(code)
"""


def test_a_box_without_simpleitk_trains_on_prepared_data(tiny_brains, tmp_path):
    prepare_data.prepare(tiny_brains, ["train", "val"], tmp_path / "toys.npz", stripped=True)
    words = ["--config", write_config(tmp_path), "--prepared", tmp_path / "toys.npz", "--out", tmp_path / "out"]
    words += ["--trial", "--stage", "train", "--only", "aldk"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, "-c", WITHOUT_SIMPLEITK, *map(str, words)],
        env=environment, cwd=tmp_path, capture_output=True, encoding="utf-8", check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]
    assert (tmp_path / "out" / "models" / "aldk.pt").exists()
    assert "SimpleITK must be installed to read or align images, got none" in done.stdout


# --- stripped data


def test_stripped_scans_keep_what_is_labelled_where_it_was(tiny_brains, tmp_path):
    whole = open_scans(tiny_brains, "train")
    prepare_data.prepare(tiny_brains, ["train"], tmp_path / "toys.npz", stripped=True)
    small = open_scans(tmp_path / "toys.npz", "train")
    assert (small.names, small.identity, small.n_labels) == (whole.names, whole.identity, whole.n_labels)
    for k in range(len(whole)):
        a, b = whole[k], small[k]
        assert np.prod(b.shape) < 0.8 * np.prod(a.shape)
        offset = np.rint(np.linalg.solve(a.to_lps[:3, :3], b.to_lps[:3, 3] - a.to_lps[:3, 3])).astype(int)
        points = np.argwhere(b.labels > 0)
        assert len(points) == (a.labels > 0).sum()
        there = tuple((points + offset).T)
        assert np.array_equal(a.labels[there], b.labels[tuple(points.T)])
        assert np.array_equal(a.image[there], b.image[tuple(points.T)])
        assert not b.image[:2].any()  # air at the border
        assert not b.labels[: prepare_data.MARGIN].any()


def test_stripping_by_hand():
    """One labelled voxel in a corner: it and its 26 neighbours stay."""
    image = np.full((4, 4, 4), 7, np.uint8)
    labels = np.zeros_like(image)
    labels[0, 0, 0] = 3
    scan = Scan("a", image, labels, np.array([[0.0, 0.0, 0.0]]), 2.0, np.diag([2.0, 2.0, 2.0, 1.0]))
    small = prepare_data.strip(scan)
    assert small.shape == (7, 7, 7)
    assert small.labels[3, 3, 3] == 3
    assert (small.image > 0).sum() == 8  # of the neighbours, those that are inside the scan
    assert small.points.tolist() == [[3.0, 3.0, 3.0]]
    assert small.to_lps[:3, 3].tolist() == [-6.0, -6.0, -6.0]
    with pytest.raises(DataError, match="stripping needs an image and labels, got none for a"):
        prepare_data.strip(dataclasses.replace(scan, labels=None))


# --- configurations


@pytest.mark.parametrize("name", PAPERS)
def test_every_shipped_configuration_can_be_run(name, tmp_path):
    found = paper_rows.load(CONFIGS / name)
    systems = [*found.evaluation["system"], *found.systems()]
    settings = evaluation_config.from_table({**found.evaluation, "system": systems}, found.path, {"data": "x"})
    assert len(settings.systems) == len(systems)
    made = {row.name for row in found.rows}
    named = {s.model for s in settings.systems if s.kind in ("affine", "model")}
    assert named <= made | set(weights.list_models())


@pytest.mark.parametrize("name", PAPERS[:2])
def test_every_row_of_the_papers_tables_is_made(name):
    found = paper_rows.load(CONFIGS / name)
    made = {s["name"] for s in [*found.evaluation["system"], *found.systems()]}
    layout = evaluation_config.read_toml(report.LAYOUT)
    wanted = {row["system"] for table in layout["table"] for row in table["row"]}
    assert wanted - made == {f"LDR small {n}-cas" for n in (1, 2, 3)}  # pruned from a wide one, no row of the paper
    by_name = {row.system: row for row in found.rows if row.system}
    for table in layout["table"]:
        for row in table["row"]:
            if "architecture" in row and row["system"] in by_name:
                keys, expected = by_name[row["system"]].keys, row["architecture"]
                network = expected["network"] if isinstance(expected["network"], str) else expected["network"]["name"]
                assert (keys["network"], keys["affine"]) == (network, expected["stem"]), row["system"]
                assert keys["cascades"] == expected["cascades"], row["system"]


def test_budgets_are_a_weekend_and_a_quarter_of_an_hour():
    weekend, box = (sum(r.minutes for r in paper_rows.load(CONFIGS / n).rows) for n in PAPERS[:2])
    assert 24 * 60 < weekend < 62 * 60
    assert box < 13  # the rest is for timing steps and starting


@pytest.mark.parametrize("name", PAPERS[2:])
def test_arms_differ_in_their_distillation_alone(name):
    found = paper_rows.load(CONFIGS / name)
    store, *arms = found.rows
    assert store.keys["n_pairs"] == 2000
    assert config.build(ExtractSettings, {**store.keys, "out": "x", "data": "x"}).refine == "best"
    differing = {"objective", "distil"}
    assert len({json.dumps({k: v for k, v in row.keys.items() if k not in differing}) for row in arms}) == 1
    chosen = [(row.keys["objective"], row.keys.get("distil", 0.0)) for row in arms]
    assert chosen == [("none", 0.0), ("critic", 0.0), ("paper", 0.0), ("none", 1.0), ("critic", 1.0)]
    assert all(row.needs == {"teacher": "refined"} and row.keys["steps"] == 10000 for row in arms)


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("n_gen = 1", "n_gen = 1\nspeed = 3", "keys must be those of a training script and not out, .* got 'speed'"),
        ("n_gen = 1", 'n_gen = 1\nout = "x"', "got 'out'"),
        ('name = "aldk"', 'name = "plain"', "every row must have a name of its own, got 'plain'"),
        ('kind = "store"', 'kind = "shop"', "kind of row fields must be one of"),
        ('kind = "store"', 'kind = "store"\nlr = 1.0', "row fields must have keys of a store, got 'lr'"),
        ('init = "wild"', 'init = "fields"', "init of row after-wild must not be a row of kind store, got 'fields'"),
        ('teacher = "fields"', 'teacher = "teacher"', "teacher of row plain must not be a row of kind teacher"),
        ('teacher = "fields"', 'teacher = "later"', "teacher of row plain must be an earlier row, got 'later'"),
        ("head=half", "head=none", "row teacher: head must be"),
        ("lr = 1e38", "lr = 1.0\nsteps = 4", "row wild must have minutes or steps, got both"),
        ("lr = 1e38", "lr = true", "row wild: lr must be of type float, got True"),
    ],
)
def test_what_is_wrong_with_rows_is_said_before_anything_runs(tmp_path, old, new, message):
    assert old in ROWS
    with pytest.raises(ConfigError, match=message):
        paper_rows.load(write_config(tmp_path, ROWS.replace(old, new)))


@pytest.mark.parametrize(
    ("minutes", "message"),
    [
        ({**MINUTES, "plain": 0}, "minutes of row plain must be a number above 0, got 0"),
        ({**MINUTES, "none": 1}, "minutes must name rows of rows.toml, got 'none'"),
        ({k: v for k, v in MINUTES.items() if k != "aldk"}, "row aldk must have minutes or steps, got neither"),
    ],
)
def test_budgets_that_cannot_be_used(tmp_path, minutes, message):
    with pytest.raises(ConfigError, match=message):
        paper_rows.load(write_config(tmp_path, minutes=minutes))


def test_rows_that_do_not_exist_cannot_be_chosen(tmp_path):
    with pytest.raises(ConfigError, match=r"only must name rows of rows.toml, got 'none'"):
        paper_rows.load(write_config(tmp_path), ("none",))


def test_a_mistake_is_one_sentence_and_exit_code_2(tmp_path, capsys):
    words = ["--config", write_config(tmp_path), "--out", tmp_path / "out"]
    assert paper.main([str(word) for word in words]) == 2
    assert capsys.readouterr().err == "paper: one of --data and --prepared must be given, got neither\n"


def test_data_that_are_missing_fail_no_row(tmp_path, capsys):
    words = ["--config", write_config(tmp_path), "--prepared", tmp_path / "none.npz", "--out", tmp_path / "out"]
    assert paper.main([str(word) for word in words]) == 2
    message = f"paper: the data to train on must exist, got {tmp_path / 'none.npz'} (not found)\n"
    assert capsys.readouterr().err == message
    assert not (tmp_path / "out").exists()  # the same command with the right name needs no --retry-failed
