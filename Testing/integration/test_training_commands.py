"""The commands of the pages on training run as they are printed."""

from __future__ import annotations

import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from LDRCore.distillation.teacher_store import TeacherStore
from Training import checkpoints, config
from Training.extract_teacher import ExtractSettings
from Training.prune_student import PruneSettings
from Training.train_student import StudentSettings, from_card
from Training.train_teacher import TeacherSettings

ROOT = Path(__file__).parents[2]
PAGES = ("training.md", "distillation.md")
SETTINGS = {
    "Training.train_teacher": TeacherSettings,
    "Training.extract_teacher": ExtractSettings,
    "Training.train_student": StudentSettings,
    "Training.prune_student": PruneSettings,
}
# what a CPU does in seconds; the windows are those of the files
SHORT = {
    "Training.train_teacher": "--options width=0.125 --affine_options width=0.125 --steps 2 --batch 1 --device cpu",
    "Training.extract_teacher": "--device cpu",
    "Training.train_student": "--options head=half,channels=8x8x8x8 --steps 4 --batch 1 --device cpu",
}


def blocks(page: str) -> list[list[list[str]]]:
    """The commands of every code block of a page, as words, with the variables that a block sets filled in."""
    listed = []
    whole = (ROOT / "docs" / page).read_text(encoding="utf-8")
    whole = re.sub(r"^```\w+\n.*?^```\n", "", whole, flags=re.M | re.S)  # blocks of other languages
    for text in re.findall(r"^```\n(.*?)^```", whole, re.M | re.S):
        for name, quoted, bare in re.findall(r'\b([A-Z])=(?:"([^"]*)"|([^\s;"]+))', text):
            text = re.sub(rf"\${name}\b", quoted or bare, text)
        lines = text.replace("\\\n", " ").splitlines()
        listed.append([shlex.split(line, comments=True) for line in lines if line.startswith("python -m Training.")])
    return [commands for commands in listed if commands]


def test_the_commands_are_found():
    example, fine_tuning, extraction, box, contrasts = blocks("training.md")
    proof, distilled = blocks("distillation.md")
    assert [words[2] for words in example] == list(SHORT)
    assert [words[2] for words in fine_tuning] == ["Training.train_student", "Training.export_weights"]
    assert [words[2] for words in extraction] == ["Training.extract_teacher"]
    assert [words[2] for words in contrasts] == ["Training.train_student"] * 2
    assert [words[2] for words in box] == ["Training.prepare_data", "Training.paper", "Training.paper"]
    assert len(proof) == 11
    assert [words[2] for words in distilled] == ["Training.extract_teacher", "Training.train_student"]
    assert proof[0][3:7] == ["--config", "Training/configs/teacher-proof.toml", "--data", "DIR"]


def test_the_first_example_runs_as_printed(tiny_brains, tmp_path):
    """Also its windows: a student's that is not its teacher's is refused."""
    shutil.copytree(ROOT / "Training" / "configs", tmp_path / "Training" / "configs")
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    for words in blocks("training.md")[0]:
        command = [sys.executable, *(str(tiny_brains) if word == "DIR" else word for word in words[1:])]
        command += SHORT[words[2]].split()
        done = subprocess.run(
            command, env=environment, cwd=tmp_path, capture_output=True, encoding="utf-8", check=False
        )
        assert done.returncode == 0, f"{shlex.join(words)}\n{done.stderr[-2000:]}"
    assert len(TeacherStore(tmp_path / "teacher.h5")) == 12  # every ordered pair of four subjects
    student = checkpoints.read_checkpoint(tmp_path / "runs" / "s.pt")
    assert student["step"] == 4
    assert student["facts"]["teacher"]["shape"] == list(student["config"]["shape"])
    assert "discriminator" in student


def settings_of(words: list[str]):
    """The resolved configuration of a printed command; None for a script that does not train."""
    cls = SETTINGS.get(words[2])
    if cls is None:
        return None
    known = set(cls.__dataclass_fields__)
    under = from_card if issubclass(cls, StudentSettings) else None
    ignore = (lambda key: key not in known) if cls is ExtractSettings else None
    return config.load(cls, words[3:], "", under, ignore)


@pytest.mark.parametrize("page", PAGES)
def test_every_printed_command_has_keys_that_exist_and_a_window_that_fits(page, monkeypatch):
    monkeypatch.chdir(ROOT)
    for commands in blocks(page):
        stores: dict[Path, tuple] = {}
        for words in commands:
            settings = settings_of(words)
            if isinstance(settings, ExtractSettings):
                stores[settings.out] = (settings.shape, settings.spacing_mm)
            if isinstance(settings, StudentSettings) and settings.teacher is not None:
                assert stores[settings.teacher] == (settings.shape, settings.spacing_mm), shlex.join(words)


def test_the_shipped_students_window_can_be_made_the_teachers(tmp_path, monkeypatch):
    """As the page says for brain T1."""
    monkeypatch.chdir(ROOT)
    base = ["--data", str(tmp_path), "--config"]
    teacher = config.load(TeacherSettings, [*base, "Training/configs/teacher-brain-t1.toml"], "")
    student = [*base, "Training/configs/student-brain-t1.toml", "--shape", "128,128,128"]
    student_settings = config.load(StudentSettings, student, "")
    assert (teacher.shape, teacher.spacing_mm) == (student_settings.shape, student_settings.spacing_mm)
