"""Every command that README.md, CONTRIBUTING.md and docs/*.md print: run on small data, or listed here with a reason.

Commands are the lines of fenced shell blocks, python blocks, and inline code that begins with the name of a program.
Those of one page run in order in one folder, so that a later one finds what an earlier one wrote. Placeholders get
values (`PLACEHOLDERS`), long work gets small (`SMALL`); a shown option that no longer exists still fails.
"""

from __future__ import annotations

import csv
import importlib
import itertools
import re
import shlex
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest
import SimpleITK as sitk
import torch

from LDRCore import cli
from Training import evaluate
from Training.evaluation import workers

ROOT = Path(__file__).parents[2]
PAGES = ["README.md", "CONTRIBUTING.md", *sorted(p.relative_to(ROOT).as_posix() for p in (ROOT / "docs").glob("*.md"))]
PROGRAMS = ("ldr", "python", "make", "pip", "torchrun")
OTHER_LANGUAGES = ("toml", "text", "csv")  # of fenced blocks that hold no commands; none is a shell's
SETTING = r'([A-Z]+)=("[^"]*"|[^\s;"]+)'  # of a variable in a shell block
WITHOUT_ARGUMENTS = ("models", "doctor", "demo")  # commands of ldr

# Commands that are not run: (page, beginning of the command) as regular expressions -> why.
NOT_RUN = {
    (r".*", r"pip install"): "changes the environment that runs this test; `make test` installs it the same way",
    (r".*", r"make test$"): "is what runs this test",
    (r".*", r"make test-torch"): "installs another torch, several hundred MB",
    (r".*", r"make lint"): "is a step of CI of its own (.ci/run)",
    (r".*", r"make package-check"): "are tests of their own (test_slicer_catalogue.py)",
    (r"docs/reliability\.md", r"python Testing/faults/fuzz\.py"): "is run, shorter, by test_fault_fuzz.py",
    (r"docs/verdict\.md", r"python Testing/faults/calibrate_verdict\.py"): "needs the brains; takes hours",
    (r".*", r"make clean"): "removes the environment that runs this test",
    (r".*", r"make (tables|paper)$"): "names the target, which needs DATA; with it, it is run",
    (r"docs/training\.md", r"make paper .*TRIAL"): "trains two steps of 33 rows; some are run by test_paper.py",
    (r"docs/distillation\.md", r"make paper"): "trains for days; its configurations are checked by test_paper.py",
    (r"CONTRIBUTING\.md", r"python -m Testing\.standin\.pictures"): "draws pictures of the Slicer module for minutes",
    (r"docs/training\.md", r"torchrun .*\.\.\."): "is elided; two processes are run by test_training.py",
    (r"docs/training\.md", r"python -m Training\.(train_teacher|extract_teacher|train_student) --config"): (
        "teacher, its deformations and student are run by test_training.py"
    ),
    (r"README\.md|docs/cohorts\.md", r"ldr (view result|register \.\.\. --open)$"): (
        "shows a page until Ctrl-C; `--save` and the server are run by test_cohort_page.py"
    ),
    (r"README\.md", r"from LightweightRegistration import"): "needs Slicer's scene; run by test_slicer_logic.py",
    (r"docs/slicer-.*\.md", r".*"): "needs Slicer's Python; run by test_slicer_logic.py and test_slicer_others.py",
}

# What stands for a user's own files and folders.
PLACEHOLDERS = {
    "FIXED": "fixed.nii.gz",
    "MOVING": "moving.nii.gz",
    "IMAGE": "moving.nii.gz",
    "FL": "fixed_labels.nii.gz",
    "ML": "moving_labels.nii.gz",
    "FP": "fixed.csv",
    "MP": "moving.csv",
    "T": "transform.h5",
    "DIR": "data",
    "PYTHON": sys.executable,
}
# Outputs, a new one for every command: the ending of FILE depends on the command.
OUTPUTS = {"FOLDER": "", "CSV": ".csv", "FILE": {"invert": ".h5"}}

_TRAIN = "--steps 2 --batch 1 --val_pairs 2 --device cpu"
_WINDOW = "--shape 64,64,64 --device cpu"
_EVALUATE = "--no-costs --workers 1 --pairs 1"
SMALL = {  # appended, so that they win over what a page prints
    "Training.train_teacher": f"{_TRAIN} --shape 64,64,64 --options width=0.125 --affine_options width=0.125",
    "Training.extract_teacher": f"{_WINDOW} --n_pairs 4",
    "Training.train_student": f"{_TRAIN} --shape 64,64,64 --n_gen 1",
    "Training.train_student --init": f"{_TRAIN} --shape 64,80,64",
    "Training.train_student --init --teacher": f"{_TRAIN} --shape 64,64,64",
    "Training.inspect_critic": "--pairs 2",
    "Training.evaluate": f'{_EVALUATE} --systems "LDR small 1-cas"',
    "Training.evaluate --model": _EVALUATE,
    "Training.report": '--pairs 1 --systems "LDR small 1-cas"',
    "Training.benchmark": "--parts warps --repeats 1 --threads 1 --sizes 128^3",
    "Training.paper": "--trial --only ldr-1 --no-costs",
    "Training.measure_store": "--fields 2 --shape 8 8 8 --rounds 1 --processes 1",
    "Training.data.throughput": "--repeats 1",
}
ELIDED = {"Training.export_weights": '--summary "T1" --made_for "T1" --licence "as the data"'}  # what a page's ... is


@dataclass(frozen=True)
class Command:
    """One documented command.

    Attributes:
        page, line: where it stands.
        text: one line of shell, or a block of Python.
        python: whether it is the latter.
    """

    page: str
    line: int
    text: str
    python: bool = False

    def __str__(self) -> str:
        return f"{self.page}:{self.line}: {self.text}"


class UnknownLineError(ValueError):
    """A line in a shell block that is neither a known command nor the setting of a variable."""


def commands_of(page: str, text: str) -> list[Command]:
    """The commands of a page in order; variables that a block sets are put in."""
    commands = []
    prose = text
    for block in re.finditer(r"^```(\w*)\n(.*?)^```", text, re.MULTILINE | re.DOTALL):
        first = text.count("\n", 0, block.start(2)) + 1
        prose = prose.replace(block[0], re.sub(r"[^\n]", " ", block[0]), 1)
        if block[1] == "python":
            commands.append(Command(page, first, block[2], python=True))
        elif block[1] not in OTHER_LANGUAGES:
            commands += shell_commands(page, first, block[2])
    for code in re.finditer(r"`([^`]+)`", prose):
        command = " ".join(code[1].split())
        if command.split()[0] in PROGRAMS and " " in command:
            commands.append(Command(page, prose.count("\n", 0, code.start()) + 1, command))
    commands.sort(key=lambda command: command.line)
    return list({command.text: command for command in reversed(commands)}.values())[::-1]  # of equal ones the first


def shell_commands(page: str, first: int, block: str) -> list[Command]:
    """Commands of one fenced block of shell."""
    commands, variables = [], {}
    line_number, pending = first, ""
    for number, line in enumerate(block.splitlines(), first):
        line_number = line_number if pending else number
        pending += re.sub(r"(^|\s)#.*$", "", line)
        if pending.rstrip().endswith("\\"):
            pending = pending.rstrip()[:-1]
            continue
        command, pending = " ".join(pending.split()), ""
        if not command:
            continue
        if re.fullmatch(rf"({SETTING};?\s*)+", command):
            variables |= {name: value.strip('"') for name, value in re.findall(SETTING, command)}
            continue
        for name, value in variables.items():
            command = re.sub(rf"\${name}\b", value, command)
        if command.split()[0] not in PROGRAMS:
            raise UnknownLineError(
                f"a line of a shell block must begin with one of {PROGRAMS}, got {page}:{line_number}: {command} "
                f"(a block that is no shell names its language, one of {('python', *OTHER_LANGUAGES)})"
            )
        commands.append(Command(page, line_number, command))
    return commands


def why_not_run(command: Command) -> str | None:
    """The reason in `NOT_RUN`, or None."""
    for (page, beginning), reason in NOT_RUN.items():
        if re.fullmatch(page, command.page) and re.match(beginning, command.text.strip()):
            return reason
    return None


class Runner:
    """Runs the commands of one page in one folder, in this process."""

    def __init__(self) -> None:
        self.names = (f"output-{number}" for number in itertools.count())
        self.variables: dict[str, object] = {}

    def run(self, command: Command) -> None:
        """Run one command.

        Raises:
            AssertionError, or whatever the command raised.
        """
        if command.python:
            exec(compile(command.text, f"{command.page}:{command.line}", "exec"), self.variables)
            return
        words = shlex.split(command.text)
        if words[0] == "make":
            lines = make_recipe(words[1:])
            assert lines, f"make must run something for {command}"
        else:
            lines = [words]
        for line in lines:
            self.run_words(line)

    def run_words(self, words: list[str]) -> None:
        """Run `ldr ...` or `python -m MODULE ...`."""
        words = self.substitute(words)
        program = Path(words[0]).name
        if program == "ldr":
            if len(words) == 2 and words[1] not in WITHOUT_ARGUMENTS:
                words.append("--help")  # a mention: the command exists
            code = run_main(cli.main, words[1:])
        else:
            assert program.startswith("python"), f"only ldr, make and python -m are run, got {words}"
            assert words[1] == "-m"
            arguments = [*words[3:], *shlex.split(small(words[2], words[3:]))]
            if "..." in arguments:
                at = arguments.index("...")
                arguments[at : at + 1] = shlex.split(ELIDED[words[2]])
            code = run_main(importlib.import_module(words[2]).main, arguments)
        assert code == 0, f"exit code {code} of {shlex.join(words)}"
        for name, value in itertools.pairwise(words):
            assert name != "--out" or Path(value).exists(), f"{value} must be written by {shlex.join(words)}"

    def substitute(self, words: list[str]) -> list[str]:
        """Put values in place of placeholders, and small files in place of names that pages make up."""
        made = []
        for before, word in zip(["", *words], words, strict=False):
            if before == "--out" or (before == "--learn2reg" and word in OUTPUTS):
                ending = OUTPUTS.get(word)
                if isinstance(ending, dict):
                    ending = ending.get(words[1], ".nii.gz")
                made.append(word if ending is None else next(self.names) + ending)
            elif word == "CSV":
                made.append("pairs.csv" if before == "--pairs" else "fixed.csv")
            else:
                made.append(PLACEHOLDERS.get(word, word))
        return made


def small(module: str, arguments: list[str]) -> str:
    """What is appended to a module's arguments; an option that changes the kind of run has a row of its own."""
    chosen = [key for key in SMALL if key.split()[0] == module and set(key.split()[1:]) <= set(arguments)]
    return SMALL[chosen[-1]] if chosen else ""


def run_main(main, arguments: list[str]) -> int:
    """Call a program's main function as the shell would, and return its exit code."""
    before = sys.argv
    sys.argv = ["program", *arguments]
    try:
        return int(main(arguments) or 0) if main is cli.main else int(main() or 0)
    except SystemExit as end:
        return int(end.code or 0)
    finally:
        sys.argv = before


def make_recipe(arguments: list[str]) -> list[list[str]]:
    """What `make` would run after its set-up, as `python -m ...` and `ldr ...`."""
    installed = [f"--old-file=.venv/.installed{part}" for part in ("", "-test", "-evaluate", "-lint")]
    given = [re.sub("=DIR$", f"={PLACEHOLDERS['DIR']}", argument) for argument in arguments]
    command = ["make", "--dry-run", "--no-print-directory", *installed, *given]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, encoding="utf-8", check=True)
    text = done.stdout.replace("\\\n", " ")
    return [shlex.split(line.partition("||")[0]) for line in text.splitlines() if line.strip()]


def read_page(page: str) -> list[Command]:
    return commands_of(page, (ROOT / page).read_text(encoding="utf-8"))


def test_every_reason_belongs_to_a_command():
    every = [command for page in PAGES for command in read_page(page)]
    assert len(every) > 40
    for page, beginning in NOT_RUN:
        matching = [c for c in every if re.fullmatch(page, c.page) and re.match(beginning, c.text.strip())]
        assert matching, f"no command is left for the reason of {page} {beginning}"


def test_parsing_by_hand():
    text = (
        'Say `ldr models` or `ldr`\n```\nP=a/b; D="--data DIR"\npython -m x \\\n    --y 1   # why\nldr z $P $D\n```\n'
        "`make\ndemo` and `register`\n```python\nimport x\n```\n```toml\nkey = 1\n```\n"
    )
    commands = [(c.line, c.text, c.python) for c in commands_of("p", text)]
    assert commands == [
        (1, "ldr models", False),
        (4, "python -m x --y 1", False),
        (6, "ldr z a/b --data DIR", False),
        (8, "make demo", False),
        (11, "import x\n", True),
    ]
    with pytest.raises(UnknownLineError, match=r"must begin with one of .*, got p:3: rm x"):
        commands_of("p", "```\nldr models\nrm x\n```\n")


def test_a_command_that_fails_or_writes_nothing_fails_here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(AssertionError, match="exit code 2 of ldr warp"):
        Runner().run(Command("p", 1, "ldr warp none.nii.gz --transform t.h5 --reference r.nii.gz --out FILE"))
    with pytest.raises(AssertionError, match="exit code 2"):
        Runner().run(Command("p", 1, "ldr models --no-such-option"))
    with pytest.raises(AssertionError, match=r"only ldr, make and python -m are run"):
        Runner().run(Command("p", 1, "torchrun x"))


@pytest.fixture
def folder(tmp_path, demo_pair, tiny_brains, monkeypatch) -> Path:
    """Where a page's commands run: a checkout's configurations, the demo pair, and a small data set in `data`."""
    for name in ("fixed", "moving", "fixed_labels", "moving_labels"):
        shutil.copy(demo_pair[name], tmp_path / f"{name}.nii.gz")
    shift = sitk.TranslationTransform(3, [1.0, 2.0, 3.0])
    sitk.WriteTransform(shift, str(tmp_path / "transform.h5"))
    (tmp_path / "fixed.csv").write_text("x,y,z\n-12,30.5,41\n5,10,20\n")
    (tmp_path / "moving.csv").write_text("x,y,z\n-11,32.5,44\n6,12,23\n")
    for name, number in (("fixed", 1), ("moving", 2)):  # as Learn2Reg names images
        shutil.copy(demo_pair[name], tmp_path / f"brain_{number:04}_0000.nii.gz")
    columns = "fixed,moving,fixed_labels,moving_labels\n"
    pair = "brain_0001_0000.nii.gz,brain_0002_0000.nii.gz,fixed_labels.nii.gz,moving_labels.nii.gz\n"
    (tmp_path / "pairs.csv").write_text(columns + pair)
    (tmp_path / "my.csv").write_text("fixed,moving\nfixed.nii.gz,moving.nii.gz\nmoving.nii.gz,fixed.nii.gz\n")
    (tmp_path / "Training").mkdir()
    shutil.copytree(ROOT / "Training" / "configs", tmp_path / "Training" / "configs")
    make_data(tmp_path / "data", tiny_brains)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def make_data(root: Path, brains: Path) -> None:
    """The tiny brains as training data, and under the names of the IXI test subjects as `Training.evaluate` asks."""
    shutil.copytree(brains, root)
    rows = (root / "manifest.csv").read_text().splitlines()
    with (ROOT / "Training" / "configs" / "pairs" / "ixi-test-40.csv").open() as stream:
        pairs = list(csv.DictReader(stream))
    subjects = sorted({row[side] for row in pairs for side in ("fixed", "moving")})
    for number, subject in enumerate(subjects):
        rows.append(f"{subject},test,s{number % 6}-image.nii.gz,s{number % 6}-labels.nii.gz")
    (root / "manifest.csv").write_text("\n".join(rows) + "\n")
    ixi = root / "ixi-brain-t1"
    ixi.mkdir()
    inside = [rows[0], *(re.sub(r",(s\d-)", r",../\1", row) for row in rows[1:])]
    (ixi / "manifest.csv").write_text("\n".join(inside) + "\n")
    lung = root / "lung-ct"
    lung.mkdir()
    for number, name in enumerate(("baseline", "followup")):
        for source, ending in (("image", ""), ("labels", "_mask")):
            image = sitk.ReadImage(str(root / f"s{number}-{source}.nii.gz"))
            for key in image.GetMetaDataKeys():  # NIfTI's, of which MetaImage would warn
                image.EraseMetaData(key)
            sitk.WriteImage(image, str(lung / f"3DCT_lung_{name}{ending}.mha"))


@pytest.fixture
def in_process(monkeypatch):
    """Rows of evaluations are made here, and torch's number of threads is put back."""

    def run_all(tasks, *_):
        cache = {}
        for number, task in enumerate(tasks):
            yield number, workers.perform(task, cache)

    threads = torch.get_num_threads()
    monkeypatch.setattr(evaluate, "run_all", run_all)
    yield
    torch.set_num_threads(threads)


@pytest.mark.parametrize("page", PAGES)
def test_the_commands_of_a_page_run(page, folder, in_process):
    runner = Runner()
    for command in read_page(page):
        if why_not_run(command):
            continue
        try:
            runner.run(command)
        except (Exception, SystemExit) as error:
            raise AssertionError(f"{command} must run, got {type(error).__name__}: {error}") from error
