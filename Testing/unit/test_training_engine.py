"""The frame of long runs: resuming, stopping, refusing; learning rate; averaging over processes."""

from __future__ import annotations

import json
import os
import signal
from pathlib import Path

import pytest
import torch

from LDRCore.distillation import hdf5
from LDRCore.errors import RegistrationError
from Training import engine
from Training.config import ConfigError


def settings(out: Path, **changes) -> engine.RunSettings:
    return engine.RunSettings(**{"out": out, "steps": 6, "save_every": 2, "warmup": 2, "lr": 1.0, **changes})


def counted(s: engine.RunSettings, until: int | None = None, value: float = 1.0) -> tuple[list[int], torch.nn.Linear]:
    """Run with a part whose weight counts the steps."""
    part = torch.nn.Linear(1, 1, bias=False)
    torch.nn.init.zeros_(part.weight)
    seen = []
    with engine.Run(s, {"part": part}) as run:
        for step in run:
            seen.append(step)
            part.weight.data += 1
            run.log(step, {"term": value})
            if until is not None and step == until:
                os.kill(os.getpid(), signal.SIGTERM)
    return seen, part


def test_a_run_that_got_sigterm_saves_stops_and_goes_on(tmp_path):
    out = tmp_path / "a.pt"
    handler = signal.getsignal(signal.SIGTERM)
    seen, _ = counted(settings(out), until=2)
    assert seen == [0, 1, 2]
    assert signal.getsignal(signal.SIGTERM) == handler
    seen, part = counted(settings(out))
    assert seen == [3, 4, 5]
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
    engine.save_atomically({"a": 1}, out)

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(torch, "save", full)
    with pytest.raises(OSError, match=r"no checkpoint could be written to .*No space left.*before is untouched"):
        engine.save_atomically({"a": 2}, out)
    assert torch.load(out) == {"a": 1}
    assert [p.name for p in tmp_path.iterdir()] == ["a.pt"]


def test_a_disk_without_room_is_refused_before_the_first_step(tmp_path, monkeypatch):
    monkeypatch.setattr(hdf5, "free_bytes", lambda _: 10)
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
    assert list(engine.Rank(1, 2).share(4)) == [2, 3]
    with pytest.raises(ConfigError, match=r"batch must be a multiple of the 2 processes, got 3"):
        engine.Rank(0, 2).share(3)


def test_a_gpu_that_is_not_there_is_refused():
    if torch.cuda.is_available():
        pytest.skip("there is a GPU here")
    with pytest.raises(ConfigError, match='device must be "cpu" where no CUDA GPU is usable'):
        engine.pick_device("cuda", engine.Rank())
    with pytest.raises(ConfigError, match='device must be "auto", "cpu"'):
        engine.pick_device("quantum", engine.Rank())


def test_curves_and_pictures_go_to_tensorboard(tmp_path):
    pytest.importorskip("tensorboard", reason="needs the package tensorboard (pip install '.[train]')")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    s = settings(tmp_path / "a.pt", tensorboard=tmp_path / "board", picture_every=3)
    with engine.Run(s, {}) as run:
        for step in run:
            run.log(step, {"term": 2.0 * step})
            run.picture(step, lambda: torch.rand(8, 32, 3))
            run.note(step, {"Dice": 0.5})
    board = EventAccumulator(str(tmp_path / "board"))
    board.Reload()
    assert [e.value for e in board.Scalars("loss/term")] == [0, 2, 4, 6, 8, 10]
    assert [e.step for e in board.Images("fixed, moving, warped, grid")] == [0, 3]
    assert len(board.Scalars("validation/Dice")) == 6
