"""The direction of imports, and that importing costs nothing."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
CORE = sorted((ROOT / "LDRCore").rglob("*.py"))
SCRIPTS = sorted((ROOT / "Training").rglob("*.py"))

# what a layer may import from the package (itself excepted); everything not listed may import everything but Training
ALLOWED = {
    "LDRCore.errors": set(),
    "LDRCore.memory": set(),
    "LDRCore.compiling": set(),
    "LDRCore.turns": {"LDRCore.compiling"},
    "LDRCore.kernels": {"LDRCore.compiling"},
    "LDRCore.sampling": {"LDRCore.kernels"},
    "LDRCore.spatial": {"LDRCore.sampling"},
    "LDRCore.losses": {"LDRCore.spatial"},
    "LDRCore.metrics": set(),
    "LDRCore.surface": set(),
    "LDRCore.refine": {"LDRCore.spatial", "LDRCore.losses"},
    "LDRCore.aldk": {"LDRCore.spatial", "LDRCore.losses", "LDRCore.models.discriminator"},
    "LDRCore.geometry": {"LDRCore.errors", "LDRCore.images"},
    "LDRCore.images": {"LDRCore.errors"},
    "LDRCore.hdf5": {"LDRCore.errors"},
    "LDRCore.teacher_store": {"LDRCore.errors", "LDRCore.hdf5"},
    "LDRCore.scoring": {
        "LDRCore.errors",
        "LDRCore.geometry",
        "LDRCore.images",
        "LDRCore.metrics",
        "LDRCore.surface",
    },
    "LDRCore.preprocess": {"LDRCore.geometry", "LDRCore.sampling"},
}
MODELS = {"LDRCore.spatial", "LDRCore.losses", "LDRCore.sampling", "LDRCore.compiling", "LDRCore.turns"}


def module_name(path: Path) -> str:
    return ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")


def imports(path: Path) -> set[str]:
    """Modules that a file imports anywhere, type-checking blocks left out."""
    found: set[str] = set()

    def visit(node: ast.AST) -> None:
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
            return
        if isinstance(node, ast.Import):
            found.update(alias.name for alias in node.names)
        if isinstance(node, ast.ImportFrom) and node.module:
            if node.module == "LDRCore":
                found.update(f"LDRCore.{alias.name}" for alias in node.names)
            else:
                found.add(node.module)
        for child in ast.iter_child_nodes(node):
            visit(child)

    visit(ast.parse(path.read_text(encoding="utf-8")))
    return found


@pytest.mark.parametrize("path", CORE, ids=module_name)
def test_the_core_never_imports_slicer_or_training(path):
    roots = {name.split(".")[0] for name in imports(path)}
    assert not roots & {"slicer", "vtk", "qt", "ctk", "Training", "Testing", "monai"}


@pytest.mark.parametrize("path", [p for p in CORE if p.parent.name == "models" or p.stem in ("spatial", "losses")])
def test_spatial_losses_and_models_are_torch_only(path):
    assert "SimpleITK" not in {name.split(".")[0] for name in imports(path)}


@pytest.mark.parametrize("path", CORE, ids=module_name)
def test_imports_go_one_way(path):
    name = module_name(path)
    inside = {i for i in imports(path) if i.startswith("LDRCore.")} - {name}
    if name.startswith("LDRCore.models"):
        assert all(i in MODELS or i.startswith("LDRCore.models") for i in inside), inside
    elif name in ALLOWED:
        assert inside <= ALLOWED[name]


def test_scripts_were_found():
    assert len(CORE) > 10
    assert SCRIPTS


@pytest.mark.parametrize("statement", ["import LDRCore", "import LDRCore.cli", "import LDRCore; LDRCore.__version__"])
def test_importing_brings_neither_torch_nor_simpleitk(statement):
    heavy = ("torch", "SimpleITK", "numpy", "matplotlib", "numba")
    code = f"import sys; {statement}; print([m for m in {heavy} if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT)
    assert done.stdout.strip() == "[]"


def test_public_names_exist():
    import LDRCore

    assert all(getattr(LDRCore, name) is not None for name in LDRCore.__all__)
    with pytest.raises(AttributeError, match="no attribute 'regsiter'"):
        _ = LDRCore.regsiter
