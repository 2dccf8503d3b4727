"""The structure of the code: which package may import which, no circles, and that importing costs nothing."""

from __future__ import annotations

import ast
import functools
import re
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
ARCHITECTURE = ROOT / "docs" / "architecture.md"
LONGEST_FILE = 400  # lines

# Which part of LDRCore may import which. A row names only rows above it: imports go one way.
# A part is a package of LDRCore or a file beside them. docs/architecture.md prints this table; a test compares.
MAY_IMPORT: dict[str, set[str]] = {
    "errors": set(),
    "torch_context": set(),
    "sampling": set(),
    "geometry": {"errors"},
    "io": {"errors", "geometry"},
    "transforms": {"errors", "torch_context", "sampling", "geometry"},
    "refinement": {"sampling"},
    "alignment": {"sampling", "geometry", "transforms", "refinement"},
    "losses": {"sampling", "transforms", "refinement"},
    "models": {"errors", "transforms", "losses", "refinement"},
    "cpu": {"errors", "torch_context", "refinement", "models"},
    "distillation": {"errors", "transforms", "losses"},
    "pipeline": {
        *(
            "errors",
            "torch_context",
            "sampling",
            "geometry",
            "io",
            "transforms",
            "losses",
            "refinement",
            "alignment",
            "models",
            "cpu",
        ),
    },
    "result": {"errors", "geometry", "io"},
    "report": {"errors", "sampling", "geometry", "io", "transforms", "losses", "pipeline"},
    "registration": {"errors", "torch_context", "geometry", "io", "models", "pipeline", "result", "report"},
    "evaluation": {"errors", "geometry", "io", "registration"},
    "overview": {"geometry"},
    "viewer": {"errors", "geometry", "io"},
    "cohort": {
        *("errors", "geometry", "io", "models", "cpu", "pipeline", "result", "registration", "evaluation", "overview"),
    },
    "cli": {
        *("errors", "sampling", "geometry", "io", "transforms", "models", "cpu", "pipeline", "result", "registration"),
        *("evaluation", "overview", "viewer", "cohort"),
    },
}

# Which packages of others a part may import, at the top of a file or inside a function. None in every part not listed.
OTHERS: dict[str, set[str]] = {
    "torch_context": {"torch"},
    "sampling": {"numpy", "torch", "numba"},
    "geometry": {"numpy", "SimpleITK"},
    "io": {"numpy", "SimpleITK", "h5py", "pydicom"},
    "transforms": {"numpy", "torch", "SimpleITK"},
    "refinement": {"numpy", "torch"},
    "alignment": {"numpy", "torch"},
    "losses": {"numpy", "torch"},
    "models": {"torch"},
    "cpu": {"torch"},
    "distillation": {"numpy", "torch", "h5py"},
    "pipeline": {"numpy", "torch", "SimpleITK"},
    "result": {"numpy", "SimpleITK"},
    "report": {"numpy", "torch", "SimpleITK"},
    "registration": {"numpy", "SimpleITK"},
    "evaluation": {"numpy", "SimpleITK"},
    "overview": {"numpy", "SimpleITK", "matplotlib"},
    "viewer": {"numpy", "SimpleITK"},
    "cohort": {"numpy", "SimpleITK", "torch", "dask", "distributed"},
    "cli": {"numpy", "torch", "SimpleITK", "tqdm"},
}


@dataclass(frozen=True)
class Import:
    """One import statement's target.

    Attributes:
        module: full name of the imported module.
        name: what is taken from it with `from module import name`, or "".
        types_only: it stands in a TYPE_CHECKING block.
    """

    module: str
    name: str
    types_only: bool


def files_of(package: str) -> dict[str, Path]:
    """{module name: file} of a folder beside this one's parents."""
    files = {}
    for path in sorted((ROOT / package).rglob("*.py")):
        files[".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")] = path
    return files


@functools.cache
def imports_of(path: Path) -> tuple[Import, ...]:
    """Every import of a file, those inside functions and TYPE_CHECKING blocks as well."""
    return tuple(imports_in(path.read_text(encoding="utf-8")))


def imports_in(text: str) -> list[Import]:
    imports: list[Import] = []

    def visit(node: ast.AST, types_only: bool) -> None:
        if isinstance(node, ast.Import):
            imports.extend(Import(alias.name, "", types_only) for alias in node.names)
        if isinstance(node, ast.ImportFrom):
            assert node.level == 0, "imports are absolute here"
            imports.extend(Import(node.module or "", alias.name, types_only) for alias in node.names)
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
            for child in node.body:
                visit(child, True)
            for child in node.orelse:
                visit(child, types_only)
            return
        for child in ast.iter_child_nodes(node):
            visit(child, types_only)

    visit(ast.parse(text), False)
    return imports


def edges(files: dict[str, Path], *, with_types: bool) -> dict[str, set[str]]:
    """{module: modules of the same folder that it imports}.

    `LDRCore/__init__.py` re-exports names of modules that import it for `__version__`, which needs none of them. That
    name alone is not an edge.
    """
    graph: dict[str, set[str]] = {}
    for name, path in files.items():
        targets = set()
        for item in imports_of(path):
            if item.types_only and not with_types:
                continue
            full = f"{item.module}.{item.name}"
            target = full if full in files else item.module
            if target in files and (target, item.name) != ("LDRCore", "__version__"):
                targets.add(target)
        graph[name] = targets
    return graph


def circle(graph: dict[str, set[str]]) -> list[str]:
    """The modules of one circle in the order in which they import each other; empty where there is none."""
    finished: set[str] = set()
    path: list[str] = []

    def follow(module: str) -> list[str]:
        if module in path:
            return [*path[path.index(module) :], module]
        if module in finished:
            return []
        path.append(module)
        closed = next((c for c in map(follow, sorted(graph[module])) if c), [])
        path.pop()
        finished.add(module)
        return closed

    return next((c for c in map(follow, sorted(graph)) if c), [])


CORE = files_of("LDRCore")
TRAINING = files_of("Training")


def part_of(module: str) -> str:
    """The row of `MAY_IMPORT` that a module of LDRCore belongs to; "" is LDRCore/__init__.py."""
    return module.partition(".")[2].partition(".")[0]


def test_every_part_of_the_core_has_its_row():
    parts = {part_of(name) for name in CORE} - {""}
    assert parts == set(MAY_IMPORT)
    assert parts >= set(OTHERS)
    assert len(TRAINING) > 20


def test_rows_name_only_rows_above_them():
    above: set[str] = set()
    for part, allowed in MAY_IMPORT.items():
        assert allowed <= above, f"{part} must import only what stands above it, got {sorted(allowed - above)}"
        above.add(part)


@pytest.mark.parametrize("part", MAY_IMPORT)
def test_a_part_imports_only_what_its_row_allows(part):
    own = {name: path for name, path in CORE.items() if part_of(name) == part}
    forbidden = {
        f"{name} imports {target}"
        for name, targets in edges(CORE, with_types=True).items()
        if name in own
        for target in targets
        if part_of(target) not in {part, *MAY_IMPORT[part]}
    }
    assert not forbidden


@pytest.mark.parametrize("part", MAY_IMPORT)
def test_a_part_imports_only_the_other_packages_of_its_row(part):
    """So the core never imports Slicer, Qt, VTK or Training, and networks and losses know torch alone."""
    own = [path for name, path in CORE.items() if part_of(name) == part]
    roots = {item.module.partition(".")[0] for path in own for item in imports_of(path)}
    assert roots - set(sys.stdlib_module_names) - {"LDRCore"} <= OTHERS.get(part, set())


def test_inside_the_core_only_the_version_comes_from_the_root():
    """`from LDRCore import register` inside LDRCore would close a circle through the root."""
    from_root = {
        f"{name} imports {item.name or 'LDRCore'} from the root"
        for name, path in CORE.items()
        for item in imports_of(path)
        if item.module == "LDRCore" and item.name != "__version__" and f"LDRCore.{item.name}" not in CORE
    }
    assert not from_root


def test_no_circle_in_the_core_even_for_types():
    assert circle(edges(CORE, with_types=True)) == []


def test_no_circle_in_training():
    assert circle(edges(TRAINING, with_types=False)) == []


def test_imports_and_circles_by_hand():
    text = "import a.b\ndef f():\n    from c import d\nif TYPE_CHECKING:\n    from e import f\nelse:\n    import g\n"
    expected = [("a.b", "", False), ("c", "d", False), ("e", "f", True), ("g", "", False)]
    assert [(i.module, i.name, i.types_only) for i in imports_in(text)] == expected
    assert circle({"a": {"b"}, "b": {"c"}, "c": {"b"}}) == ["b", "c", "b"]
    assert circle({"a": {"b", "c"}, "b": {"c"}, "c": set()}) == []


@pytest.mark.parametrize("name", CORE)
def test_files_of_the_core_are_short(name):
    assert len(CORE[name].read_text(encoding="utf-8").splitlines()) <= LONGEST_FILE


def test_cmake_lists_exactly_the_files_of_the_core():
    """What is not listed is missing in Slicer; what is listed and missing stops its build."""
    text = (ROOT / "LDRCore" / "CMakeLists.txt").read_text(encoding="utf-8")
    (listed,) = re.findall(r"set\(LDRCORE_PYTHON_SCRIPTS\s+(.*?)\)", text, re.DOTALL)
    assert sorted(listed.split()) == sorted(p.relative_to(ROOT / "LDRCore").as_posix() for p in CORE.values())


def test_an_installation_holds_every_package():
    text = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    (listed,) = re.findall(r"^packages = \[(.*?)\]", text, re.MULTILINE | re.DOTALL)
    packages = {name for name, path in CORE.items() if path.name == "__init__.py"}
    assert sorted(re.findall(r'"([^"]+)"', listed)) == sorted(packages)


def test_the_architecture_page_prints_these_tables():
    rows = {}
    for line in ARCHITECTURE.read_text(encoding="utf-8").splitlines():
        cells = [cell.strip() for cell in line.strip().strip("|").split("|")]
        if re.fullmatch(r"`[a-z_]+`", cells[0]) and len(cells) == 4:
            rows[cells[0].strip("`")] = [sorted(re.findall(r"[A-Za-z_0-9]+", cell)) for cell in cells[2:]]
    expected = {part: [sorted(MAY_IMPORT[part]), sorted(OTHERS.get(part, set()))] for part in MAY_IMPORT}
    assert rows == expected
    assert list(rows) == list(expected)


def test_the_architecture_page_names_files_that_exist():
    text = ARCHITECTURE.read_text(encoding="utf-8")
    named = set(re.findall(r"`((?:[\w.]+/)*[\w.]+(?:\.py|\.toml|\.ui|\.md|/))`", text))
    places = (ROOT, ROOT / "LDRCore", ROOT / "LightweightRegistration", ROOT / "docs")
    missing = {name for name in named if not any((place / name).exists() for place in places)}
    assert len(named) > 25
    assert not missing


@pytest.mark.parametrize("statement", ["import LDRCore", "import LDRCore.cli", "import LDRCore; LDRCore.__version__"])
def test_importing_brings_neither_torch_nor_simpleitk(statement):
    heavy = ("torch", "SimpleITK", "numpy", "matplotlib", "numba")
    code = f"import sys; {statement}; print([m for m in {heavy} if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, encoding="utf-8", check=True, cwd=ROOT)
    assert done.stdout.strip() == "[]"


def test_public_names_exist():
    import LDRCore

    assert all(getattr(LDRCore, name) is not None for name in LDRCore.__all__)
    with pytest.raises(AttributeError, match="no attribute 'regsiter'"):
        _ = LDRCore.regsiter
