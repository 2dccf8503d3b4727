"""The frame of long runs: resuming, stopping, refusing; learning rate; averaging over processes."""

from __future__ import annotations

import json
import os
import signal
from pathlib import Path

import pytest
import torch

from LDRCore.distillation import disk
from LDRCore.errors import RegistrationError
from Training import checkpoints, engine, processes
from Training.config import ConfigError


def settings(out: Path, **changes) -> engine.RunSettings:
    return engine.RunSettings(**{"out": out, "steps": 6, "save_every": 2, "warmup": 2, "lr": 1.0, **changes})


def counted(s: engine.RunSettings, until: int | None = None, value: float = 1.0) -> tuple[list[int], torch.nn.Linear]:
    """Run with a part whose weight counts the steps."""
    part = torch.nn.Linear(1, 1, bias=False)
    torch.nn.init.zeros_(part.weight)
    run_steps = []
    with engine.Run(s, {"part": part}) as run:
        for step in run:
            run_steps.append(step)
            part.weight.data += 1
            run.log(step, {"term": value})
            if until is not None and step == until:
                os.kill(os.getpid(), signal.SIGTERM)
    return run_steps, part


def test_a_run_that_got_sigterm_saves_stops_and_goes_on(tmp_path):
    out = tmp_path / "a.pt"
    handler = signal.getsignal(signal.SIGTERM)
    run_steps, _ = counted(settings(out), until=2)
    assert run_steps == [0, 1, 2]
    assert signal.getsignal(signal.SIGTERM) == handler
    run_steps, part = counted(settings(out))
    assert run_steps == [3, 4, 5]
    assert part.weight.item() == 6
    assert counted(settings(out))[0] == []  # finished: nothing more to do


def test_the_time_limit_saves_and_stops(tmp_path):
    assert counted(settings(tmp_path / "a.pt", minutes=0.0))[0] == [0]
    assert counted(settings(tmp_path / "a.pt"))[0] == [1, 2, 3, 4, 5]


def test_another_configuration_is_refused(tmp_path):
    counted(settings(tmp_path / "a.pt"))
    with pytest.raises(ConfigError, match=r"lr must be 1.0 to continue .*a.pt, got 2.0 \(give another `out`"):
        counted(settings(tmp_path / "a.pt", lr=2.0))


def test_a_damaged_checkpoint_is_refused(tmp_path):
    (tmp_path / "a.pt").write_bytes(b"no")
    with pytest.raises(ConfigError, match=r"a checkpoint must be readable, got .*a.pt"):
        counted(settings(tmp_path / "a.pt"))


def test_a_value_that_is_not_finite_ends_the_run_and_keeps_the_last_checkpoint(tmp_path):
    out = tmp_path / "a.pt"
    counted(settings(out), until=1)
    before = out.read_bytes()
    with pytest.raises(engine.NotFiniteError, match=r"every loss term must be finite, got term = nan at step 2"):
        counted(settings(out), value=float("nan"))
    assert out.read_bytes() == before


def test_a_checkpoint_that_cannot_be_written_leaves_the_one_before(tmp_path, monkeypatch):
    out = tmp_path / "a.pt"
    checkpoints.save_atomically({"a": 1}, out)

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(torch, "save", full)
    with pytest.raises(OSError, match=r"no checkpoint could be written to .*No space left.*before is untouched"):
        checkpoints.save_atomically({"a": 2}, out)
    assert torch.load(out) == {"a": 1}
    assert [p.name for p in tmp_path.iterdir()] == ["a.pt"]


def test_a_disk_without_room_is_refused_before_the_first_step(tmp_path, monkeypatch):
    monkeypatch.setattr(disk, "free_bytes", lambda _: 10)
    with pytest.raises(RegistrationError, match=r"disk must be free for checkpoints of a.pt, got 0.0 MB"):
        counted(settings(tmp_path / "a.pt"))
    assert not list(tmp_path.iterdir())


def test_curves_are_written_beside_the_checkpoint(tmp_path):
    counted(settings(tmp_path / "a.pt"), value=3.0)
    lines = [json.loads(line) for line in (tmp_path / "a.curves.jsonl").read_text(encoding="utf-8").splitlines()]
    assert [line["step"] for line in lines] == [2, 4, 6]
    assert all(line["term"] == 3.0 for line in lines)


def test_learning_rate_warms_up_and_falls_along_a_cosine(tmp_path):
    s = settings(tmp_path / "a.pt", steps=100, warmup=10, lr=2.0)
    assert engine.learning_rate(s, 0) == pytest.approx(0.2)
    assert engine.learning_rate(s, 50) == pytest.approx(1.0)
    assert engine.learning_rate(s, 99) == pytest.approx(0.02)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"steps": 0}, "steps must be at least 1, got 0"),
        ({"precision": "float16"}, 'precision must be "float32" or "bfloat16"'),
    ],
)
def test_refused_settings(tmp_path, changes, message):
    with pytest.raises(ConfigError, match=message):
        settings(tmp_path / "a.pt", **changes)


def test_a_batch_is_shared_evenly():
    assert list(processes.Rank(1, 2).share(4)) == [2, 3]
    with pytest.raises(ConfigError, match=r"batch must be a multiple of the 2 processes, got 3"):
        processes.Rank(0, 2).share(3)


def test_a_gpu_that_is_not_there_is_refused():
    if torch.cuda.is_available():
        pytest.skip("there is a GPU here")
    with pytest.raises(ConfigError, match='device must be "cpu" where no CUDA GPU is usable'):
        processes.pick_device("cuda", processes.Rank())
    with pytest.raises(ConfigError, match='device must be "auto", "cpu"'):
        processes.pick_device("quantum", processes.Rank())


def test_curves_and_pictures_go_to_tensorboard(tmp_path):
    pytest.importorskip("tensorboard", reason="needs the package tensorboard (pip install '.[train]')")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    s = settings(tmp_path / "a.pt", tensorboard=tmp_path / "board", picture_every=3)
    with engine.Run(s, {}) as run:
        for step in run:
            run.log(step, {"term": 2.0 * step})
            run.picture(step, lambda: torch.rand(8, 32, 3))
            run.log_validation(step, {"Dice": 0.5}, "Dice")
    board = EventAccumulator(str(tmp_path / "board"))
    board.Reload()
    assert [e.value for e in board.Scalars("loss/term")] == [0, 2, 4, 6, 8, 10]
    assert [e.step for e in board.Images("fixed, moving, warped, grid")] == [0, 3]
    assert len(board.Scalars("validation/Dice")) == 6


def validated(s: engine.RunSettings, figures: list[float], until: int | None = None) -> None:
    """Run with a part whose weight counts the steps, and validate after each of them."""
    part = torch.nn.Linear(1, 1, bias=False)
    torch.nn.init.zeros_(part.weight)
    with engine.Run(s, {"part": part}) as run:
        for step in run:
            part.weight.data += 1
            run.log(step, {"term": 1.0})
            run.log_validation(step + 1, {"Dice": figures[step], "folding": 0.125}, "Dice")
            if step == until:
                os.kill(os.getpid(), signal.SIGTERM)


def best_of(out: Path) -> dict:
    return torch.load(out.with_suffix(".best.pt"), weights_only=True)


def test_validation_figures_are_lines_of_the_curves(tmp_path):
    validated(settings(tmp_path / "new" / "a.pt", steps=2), [0.25, 0.5])
    lines = [
        json.loads(line) for line in (tmp_path / "new" / "a.curves.jsonl").read_text(encoding="utf-8").splitlines()
    ]
    kept = [line for line in lines if "validation" in line]
    assert [line["step"] for line in kept] == [1, 2]
    assert [line["validation"] for line in kept] == [{"Dice": d, "folding": 0.125} for d in (0.25, 0.5)]
    assert [line["step"] for line in lines if "term" in line] == [1, 2]


def test_the_checkpoint_of_the_highest_figure_is_kept(tmp_path):
    out = tmp_path / "a.pt"
    validated(settings(out), [0.5, 0.7, 0.6, 0.7, float("nan"), 0.1])
    kept = best_of(out)
    assert kept["best"] == {"step": 2, "criterion": "Dice", "value": 0.7}
    assert kept["step"] == 2
    assert kept["part"]["weight"].item() == 2
    assert torch.load(out, weights_only=True)["part"]["weight"].item() == 6


def test_the_best_value_survives_a_resume(tmp_path):
    out = tmp_path / "a.pt"
    figures = [0.5, 0.7, 0.6, 0.65, 0.8, 0.1]
    validated(settings(out), figures, until=2)
    assert best_of(out)["step"] == 2
    validated(settings(out), figures, until=3)  # 0.65 is the highest since the resume, but not of the run
    assert best_of(out)["step"] == 2
    validated(settings(out), figures)
    assert best_of(out)["best"] == {"step": 5, "criterion": "Dice", "value": 0.8}


def test_a_best_checkpoint_is_never_newer_than_the_last(tmp_path):
    """Ended without a word after any step, a run goes on from where the best one was kept, or later."""
    out = tmp_path / "a.pt"
    with pytest.raises(IndexError):
        validated(settings(out, save_every=100), [0.5])
    assert best_of(out)["step"] == 1
    assert torch.load(out, weights_only=True)["step"] == 1


def test_a_best_checkpoint_that_cannot_be_written_leaves_the_one_before(tmp_path, monkeypatch):
    out, save = tmp_path / "a.pt", torch.save

    def full(state, path):
        if "best" in state and state["step"] == 2:
            raise OSError(28, "No space left on device")
        save(state, path)

    monkeypatch.setattr(torch, "save", full)
    with pytest.raises(OSError, match=r"no checkpoint could be written to .*a.best.pt"):
        validated(settings(out), [0.5, 0.7, 0.6, 0.6, 0.6, 0.6])
    assert best_of(out)["best"]["value"] == 0.5
    monkeypatch.undo()
    validated(settings(out), [0.5, 0.7, 0.6, 0.6, 0.6, 0.6])  # goes on from step 2, against the best that is there
    assert best_of(out)["best"] == {"step": 3, "criterion": "Dice", "value": 0.6}


def test_a_best_checkpoint_of_another_run_is_refused(tmp_path):
    out = tmp_path / "a.pt"
    validated(settings(out, lr=2.0), [0.5] * 6)
    out.unlink()
    with pytest.raises(ConfigError, match=r"a new run must not find a best checkpoint of another one, got .*a.best.pt"):
        counted(settings(out))
    out.with_suffix(".best.pt").rename(tmp_path / "kept")
    counted(settings(out))
    (tmp_path / "kept").rename(out.with_suffix(".best.pt"))
    with pytest.raises(ConfigError, match=r"lr must be 2.0 to continue .*a.best.pt, got 1.0"):
        counted(settings(out))
