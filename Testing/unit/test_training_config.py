"""Configuration of training scripts: file, command line, defaults; every refusal names the key."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest

from Training import config
from Training.config import ConfigError, option
from Training.train_student import StudentSettings


@dataclasses.dataclass(frozen=True, kw_only=True)
class Example:
    out: Path = option(help="where to")
    steps: int = option(10, "how many")
    lr: float = option(0.5, "how fast")
    shape: tuple[int, int, int] = option((1, 2, 3), "how large")
    names: tuple[str, ...] = option((), "which")
    minutes: float | None = option(None, "how long")
    on: bool = option(False, "whether")


def test_the_command_line_wins_over_the_file_and_the_file_over_the_defaults(tmp_path):
    file = tmp_path / "a.toml"
    file.write_text('out = "x.pt"\nsteps = 20\nshape = [4, 5, 6]\nlr = 1\nnames = ["a=1", "b"]\n')
    settings = config.load(Example, ["--config", str(file), "--steps=30", "--minutes", "2", "--on", "true"], "")
    assert settings == Example(
        out=Path("x.pt"), steps=30, lr=1.0, shape=(4, 5, 6), names=("a=1", "b"), minutes=2.0, on=True
    )
    assert config.load(Example, ["--out", "y", "--shape", "7,8,9", "--minutes", "none"], "").shape == (7, 8, 9)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--out", "x", "--step", "3"], "a key must be one of lr, .*; got 'step'"),
        (["--out", "x", "--steps", "3.5"], "steps must be of type int, got '3.5'"),
        (["--out", "x", "--shape", "1,2"], "shape must be of type .*, got '1,2'"),
        (["--out", "x", "--on", "maybe"], "on must be of type bool, got 'maybe'"),
        (["--steps", "3"], r"out must be given \(where to\), got nothing"),
        (["--out"], "--out must be followed by a value, got none"),
        (["steps", "3"], "arguments must come as --key value, got 'steps'"),
    ],
)
def test_refusals_name_the_key(arguments, message):
    with pytest.raises(ConfigError, match=message):
        config.load(Example, arguments, "")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("steps = true", "steps must be of type int, got True"),
        ("steps = 2.0", "steps must be of type int, got 2.0"),
        ('lr = "fast"', "lr must be of type float, got 'fast'"),
        ("[run]\nsteps = 1", r"config must hold plain keys only, got a table \[run\]"),
        ("steps = ", "config must be valid TOML"),
    ],
)
def test_refusals_of_a_file(tmp_path, text, message):
    file = tmp_path / "a.toml"
    file.write_text(text)
    with pytest.raises(ConfigError, match=message):
        config.load(Example, ["--config", str(file), "--out", "x"], "")


@pytest.mark.parametrize("given", [{"distil": 1.0}, {"teacher_gain": 0.0}])
def test_what_a_teacher_is_needed_for_is_refused_without_one(given):
    (name,) = given
    with pytest.raises(ConfigError, match=f"{name} needs a teacher, got {given[name]} without one"):
        config.build(StudentSettings, {"data": "x", **given})
    config.build(StudentSettings, {"data": "x", "teacher": "x", **given})


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(ConfigError, match=r"config must be a readable TOML file, got .*nowhere.toml"):
        config.load(Example, ["--config", str(tmp_path / "nowhere.toml")], "")


def test_help_tells_every_key(capsys):
    with pytest.raises(SystemExit):
        config.load(Example, ["--help"], "What it does.")
    text = capsys.readouterr().out
    assert "What it does." in text
    assert all(f"  {f.name} " in text and f.metadata["help"] in text for f in dataclasses.fields(Example))


def test_the_shipped_configurations_are_valid():
    from Training.train_teacher import TeacherSettings

    files = sorted((Path(config.__file__).parent / "configs").glob("*.toml"))
    kinds = {"teacher": TeacherSettings, "student": StudentSettings}
    checked = [f for f in files if f.stem.split("-")[0] in kinds]
    assert {f.stem.split("-")[0] for f in checked} == set(kinds)
    for file in checked:
        config.load(kinds[file.stem.split("-")[0]], ["--config", str(file), "--data", "anywhere"], "")
