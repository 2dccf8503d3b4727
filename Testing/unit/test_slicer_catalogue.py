"""What the extension catalogue asks for, checked from the tree; `make package-check` runs this file alone.

Each rule names its source:
- checks: scripts/check_description_files.py of github.com/Slicer/ExtensionsIndex, which its continuous integration runs
- template: .github/PULL_REQUEST_TEMPLATE.md there, which a new extension fills in (tiers 1 and 3)
- review: the questions of scripts/extension_ai_analysis.py there, which are asked about every submission
- schema: Schemas/slicer-extension-catalog-entry-schema-v1.0.2.json of github.com/Slicer/Slicer
The topic `3d-slicer-extension`, the settings of the repository and whether URLs can be reached are not in the tree:
docs/slicer-release-checklist.md lists them.
"""

from __future__ import annotations

import ast
import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
NAME = "LightweightRegistration"
MODULE = ROOT / NAME
SOURCES = sorted([MODULE / f"{NAME}.py", *(MODULE / f"{NAME}Lib").glob("*.py")])
CMAKE = (ROOT / "CMakeLists.txt").read_text(encoding="utf-8")
README = (ROOT / "README.md").read_text(encoding="utf-8")
ENTRY = json.loads((ROOT / f"{NAME}.json").read_text(encoding="utf-8"))
MOST_MEGABYTES = 100  # checks: check_repository_size


def extension(name: str) -> str:
    """A variable of CMakeLists.txt, read as check_cmakelists_content does: no blank before the bracket."""
    (value,) = re.findall(rf'set\s*\(EXTENSION_{name}\s*"([^"]+)"\)', CMAKE, re.IGNORECASE)
    return value


def test_the_entry_keeps_to_the_schema():
    """schema; checks: check_json_schema, check_category, check_scm_url_syntax."""
    kinds = {
        "$schema": str,
        "category": str,
        "scm_url": str,
        "scm_revision": str,
        "scm_type": str,
        "build_dependencies": list,
        "dicom_support_rule": str,
        "build_subdirectory": str,
        "enabled": bool,
        "tier": int,
    }
    assert {"$schema", "category", "scm_url"} <= set(ENTRY) <= set(kinds)
    for key, value in ENTRY.items():
        assert type(value) is kinds[key]
    assert ENTRY["$schema"].endswith("slicer-extension-catalog-entry-schema-v1.0.2.json#")
    assert ENTRY["category"] == "Registration"  # one of ACCEPTED_EXTENSION_CATEGORIES
    assert ENTRY["tier"] in (1, 3, 5)  # README: 2 and 4 are reserved
    assert ENTRY["scm_url"].startswith("https://")
    assert all(isinstance(name, str) for name in ENTRY["build_dependencies"])


def test_the_entry_has_line_feeds_only():
    """checks: check_json_file_format."""
    assert b"\r" not in (ROOT / f"{NAME}.json").read_bytes()


def test_the_repositorys_name_begins_with_slicer_and_the_extensions_does_not():
    """checks: check_extension_name, check_git_repository_name; template: Slicer + the extension's name."""
    assert not NAME.lower().startswith("slicer")
    assert ENTRY["scm_url"].rpartition("/")[2] == f"Slicer{NAME}.git"


def test_cmake_names_project_icon_and_pictures():
    """checks: check_cmakelists_content: the project is the entry's file, each URL is that of an image."""
    assert re.findall(r"project\s*\(\s*([^\s\)\n\r]+)", CMAKE, re.IGNORECASE) == [NAME]
    urls = [extension("ICONURL"), *extension("SCREENSHOTURLS").split()]
    assert len(urls) >= 2
    for url in urls:
        assert url.startswith("https://raw.githubusercontent.com/")
        path = ROOT / url.split(f"/{ENTRY['scm_revision']}/")[1]
        assert path.read_bytes().startswith(b"\x89PNG")
        assert path.stat().st_size < 300_000


def test_the_three_descriptions_agree():
    """template: the entry is consistent with CMakeLists.txt; the .s4ext is read by older tools."""
    lines = (ROOT / f"{NAME}.s4ext").read_text(encoding="utf-8").splitlines()
    old = dict(line.partition(" ")[::2] for line in lines if not line.startswith("#"))
    assert old["scmurl"] == ENTRY["scm_url"]
    assert old["scmrevision"] == ENTRY["scm_revision"]
    assert old["category"] == ENTRY["category"] == extension("CATEGORY")
    assert old["depends"].split() == ENTRY["build_dependencies"] == extension("DEPENDS").split()
    for key in ("homepage", "contributors", "iconurl", "description", "screenshoturls"):
        assert old[key] == extension(key.upper())
    assert ENTRY["scm_url"] == f"{extension('HOMEPAGE')}.git"


def test_no_variable_of_the_extension_has_a_blank_before_its_bracket():
    """checks: check_cmakelists_content does not find such a list of pictures."""
    lines = [line for line in CMAKE.splitlines() if line.startswith("set(EXTENSION_")]
    assert len(lines) == 7
    assert not [line for line in lines if re.search(r"\s\)$", line)]


def test_the_description_says_what_it_is_for_and_names_the_licences():
    """template and review: understandable in a few sentences; restrictive licences of what comes with it are named."""
    for words in ("T1-weighted MRI of the head", "CC BY-SA 3.0", "IXI", "licence of NiChart", "Apache-2.0"):
        assert words in extension("DESCRIPTION")


def test_the_licence_is_where_the_catalogue_looks_and_is_named_on_the_homepage():
    """checks: check_license_file; template: LICENSE.txt in the root, its name on the homepage."""
    text = (ROOT / "LICENSE.txt").read_text(encoding="utf-8")
    assert "Apache License" in text
    assert "Version 2.0" in text
    assert re.search(r"Apache-2\.0 \(`LICENSE\.txt`\)", README)
    for name in ("LICENSE", "LICENCE", "COPYING"):
        assert not (ROOT / name).exists()


def test_the_homepage_holds_what_the_catalogue_asks_for():
    """template and review: name, picture, a sentence for each module, publication, tutorial, sample data."""
    assert f"**{NAME}**" in README
    assert re.search(r"!\[[^\]]+\]\(docs/[\w-]+\.png\)", README)
    assert "module *Registration > Lightweight Registration*" in README
    assert "https://arxiv.org/abs/2110.01293" in README
    assert "docs/slicer-tutorial.md" in README
    tutorial = (ROOT / "docs" / "slicer-tutorial.md").read_text(encoding="utf-8")
    assert "**Sample Data**" in tutorial


def test_the_repository_is_small_with_its_history():
    """checks: check_repository_size: checked-out files and history together."""
    git = shutil.which("git")
    if git is None or not (ROOT / ".git").exists():
        pytest.skip("needs a git checkout")

    def answer(*command: str) -> str:
        return subprocess.run([git, *command], cwd=ROOT, capture_output=True, encoding="utf-8", check=True).stdout

    history = int(answer("rev-list", "--disk-usage", "--objects", "HEAD"))
    files = [ROOT / name for name in answer("ls-files", "-z").split("\0") if name]
    size = history + sum(file.stat().st_size for file in files if file.is_file())
    assert size < MOST_MEGABYTES * 2**20


def test_what_the_tree_cannot_show_is_on_the_release_checklist():
    """checks: check_git_repository_topics; template: unused features of the repository are hidden."""
    checklist = (ROOT / "docs" / "slicer-release-checklist.md").read_text(encoding="utf-8")
    for words in ("`3d-slicer-extension`", "Wiki", "raw.githubusercontent.com"):
        assert words in checklist


@pytest.mark.parametrize("path", SOURCES, ids=lambda p: p.stem)
def test_files_import_and_run_only_what_slicer_allows_when_it_starts(path):
    """review: at file scope only the standard library, slicer, vtk, qt, numpy and the module's own; no call."""
    allowed = {
        *sys.stdlib_module_names,
        "slicer",
        "vtk",
        "qt",
        "ctk",
        "SimpleITK",
        "numpy",
        "LightweightRegistrationLib",
    }
    for node in ast.parse(path.read_text(encoding="utf-8")).body:
        if isinstance(node, ast.Import):
            assert {alias.name.split(".")[0] for alias in node.names} <= allowed
        elif isinstance(node, ast.ImportFrom):
            assert node.level or node.module.split(".")[0] in allowed
        elif isinstance(node, ast.Expr):
            assert isinstance(node.value, ast.Constant)  # a docstring
        elif isinstance(node, (ast.Assign, ast.AnnAssign)):
            calls = [ast.unparse(call.func) for call in ast.walk(node) if isinstance(call, ast.Call)]
            assert set(calls) <= {
                "Path",
                "Path(__file__).with_name",
                "Path(__file__).resolve",
                "np.diag",
                "'.'.join",
                "map",
            }
        else:
            assert isinstance(node, (ast.FunctionDef, ast.ClassDef, ast.If)), ast.unparse(node)[:80]


@pytest.mark.parametrize("path", SOURCES, ids=lambda p: p.stem)
def test_the_module_holds_no_tensor_code_and_only_the_worker_imports_the_library(path):
    """review: torch is not installed with pip_install; the extension PyTorch does that."""
    names = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and not node.level:
            names.add(node.module.split(".")[0])
    if path.stem != "worker":
        assert not names & {"LDRCore", "torch", "SimpleITK"}
    assert "light_the_torch" not in names
    assert "pip_install" not in path.read_text(encoding="utf-8")


def test_no_file_of_the_module_has_the_name_of_a_file_of_the_library_or_of_training():
    """A reader who looks for a file by its name finds one. Slicer puts every extension's scripts in one folder."""
    theirs = {p.stem for folder in ("LDRCore", "Training") for p in (ROOT / folder).rglob("*.py")} - {"__init__"}
    assert theirs
    assert not theirs & {p.stem for p in SOURCES}
