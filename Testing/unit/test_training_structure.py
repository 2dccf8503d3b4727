"""Imports among the training modules go one way, and every file name that a help text prints is there."""

from __future__ import annotations

import ast
import importlib
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
FILES = sorted((ROOT / "Training").rglob("*.py"))


def module_name(path: Path) -> str:
    return ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")


MODULES = {module_name(path): path for path in FILES}


def imported(path: Path) -> set[str]:
    """Return the training modules that a file imports anywhere, in functions and for type checking as well."""
    modules: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            modules.update(alias.name for alias in node.names)
        if isinstance(node, ast.ImportFrom) and node.module:
            assert not node.level, f"{path} imports relatively"
            modules.add(node.module)
            modules.update(f"{node.module}.{alias.name}" for alias in node.names)
    return modules & set(MODULES)


def circles(graph: dict[str, set[str]]) -> list[list[str]]:
    """Return every circle of imports, as the modules along it."""
    done: set[str] = set()
    closed: list[list[str]] = []

    def walk(name: str, way: list[str]) -> None:
        if name in way:
            closed.append([*way[way.index(name) :], name])
            return
        if name in done:
            return
        for other in sorted(graph[name]):
            walk(other, [*way, name])
        done.add(name)

    for name in graph:
        walk(name, [])
    return closed


def test_no_training_module_imports_itself_through_others():
    graph = {name: imported(path) - {name} for name, path in MODULES.items()}
    assert circles(graph) == []


def test_a_circle_is_found():
    assert circles({"a": {"b"}, "b": {"c"}, "c": {"b"}, "d": {"a"}}) == [["b", "c", "b"]]
    assert circles({"a": {"b", "c"}, "b": {"c"}, "c": set()}) == []


# --- what texts name

DOCUMENTS = [ROOT / "docs" / "training.md", ROOT / "docs" / "distillation.md"]
TEXTS = [*FILES, *sorted((ROOT / "Training" / "configs").glob("*.toml")), *DOCUMENTS]
PATH = re.compile(r"(?<![\w/.-])(?:Training|LDRCore|LightweightRegistration|Testing|docs)/[\w./-]*\w")
FILE = re.compile(r"(?<![\w/.{}-])[\w-]+\.(?:py|toml|md)\b")
MODULE = re.compile(r"\b(?:Training|LDRCore)(?:\.\w+)+")
SECTION = re.compile(r"(README(?:\.md)?|docs/\w+\.md), \"([^\"]+)\"")
WRITTEN = {"report.md", "tables-NAME.md", "FILE.toml"}  # by a script, or by the user
SHIPPED = {
    path.name
    for part in ("Training", "LDRCore", "LightweightRegistration", "docs")
    for path in (ROOT / part).rglob("*")
} | {path.name for path in ROOT.iterdir()}


def text_of(path: Path) -> str:
    """What a file says to a reader: of a Python file its strings, docstrings and help texts among them."""
    if path.suffix != ".py":
        return path.read_text(encoding="utf-8")
    nodes = ast.walk(ast.parse(path.read_text(encoding="utf-8")))
    return "\n".join(n.value for n in nodes if isinstance(n, ast.Constant) and isinstance(n.value, str))


def is_there(dotted: str) -> bool:
    """Whether a dotted name is a module, or something in one."""
    parts = dotted.split(".")
    for cut in range(len(parts), 0, -1):
        try:
            item = importlib.import_module(".".join(parts[:cut]))
        except ModuleNotFoundError:
            continue
        for name in parts[cut:]:
            if not hasattr(item, name):
                return False
            item = getattr(item, name)
        return True
    return False


def missing_in(text: str) -> list[str]:
    """Names in a text of files, modules and sections that are not in this repository."""
    names = [name for name in PATH.findall(text) if not (ROOT / name).exists()]
    names += [name for name in FILE.findall(text) if name not in SHIPPED | WRITTEN]
    names += [name for name in MODULE.findall(text) if not is_there(name)]
    for file, title in SECTION.findall(text):
        page = ROOT / (file if file.endswith(".md") else f"{file}.md")
        headings = [line.lstrip("# ") for line in page.read_text(encoding="utf-8").splitlines() if line.startswith("#")]
        names += [] if title in headings else [f'{file}, "{title}"']
    return names


@pytest.mark.parametrize("path", TEXTS, ids=lambda path: str(path.relative_to(ROOT)))
def test_what_a_text_names_is_there(path):
    assert missing_in(text_of(path)) == []


def test_names_that_are_not_there_are_found():
    text = 'See Training/configs/none.toml, none.py, Training.none, LDRCore.models.weights.none, README, "None".'
    assert missing_in(text) == [
        "Training/configs/none.toml", "none.py", "Training.none", "LDRCore.models.weights.none", 'README, "None"',
    ]  # fmt: skip
    assert missing_in('LDRCore.models.weights.BUNDLED, docs/training.md, "Data sets", runs/mine.toml') == []
