"""The extension's packaging: lists that equal the tree, and what CMake installs. See also test_slicer_catalogue.py."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
MODULE = ROOT / "LightweightRegistration"
CMAKE = (ROOT / "CMakeLists.txt").read_text(encoding="utf-8")


def listed(path: Path, variable: str) -> list[str]:
    """The files of one list in a CMakeLists.txt."""
    text = path.read_text(encoding="utf-8").replace("${MODULE_NAME}", "LightweightRegistration")
    return re.search(rf"set\({variable}\n(.*?)\n  \)", text, re.DOTALL).group(1).split()


def in_tree(folder: Path, *, scripts: bool) -> list[str]:
    files = [
        p for p in folder.rglob("*") if p.is_file() and "__pycache__" not in p.parts and p.name != "CMakeLists.txt"
    ]
    return sorted(str(p.relative_to(folder).as_posix()) for p in files if (p.suffix == ".py") == scripts)


@pytest.mark.parametrize(
    ("folder", "prefix"), [(ROOT / "LDRCore", "LDRCORE"), (MODULE, "MODULE")], ids=["LDRCore", "module"]
)
def test_every_file_is_listed_once(folder, prefix):
    for kind, scripts in (("SCRIPTS", True), ("RESOURCES", False)):
        assert sorted(listed(folder / "CMakeLists.txt", f"{prefix}_PYTHON_{kind}")) == in_tree(folder, scripts=scripts)


@pytest.fixture(scope="module")
def installed(tmp_path_factory) -> Path:
    """The folder of the modules after CMake installed the extension, with stand-ins for Slicer's macros."""
    cmake = shutil.which("cmake", path=str(Path(sys.executable).parent)) or shutil.which("cmake")
    if cmake is None:
        pytest.skip("needs cmake (make test installs it)")
    work = tmp_path_factory.mktemp("cmake")
    source = work / "source"
    source.mkdir()
    # no compiler is needed for Python files; Slicer itself asks for one
    text = CMAKE.replace("project(LightweightRegistration)", "project(LightweightRegistration NONE)")
    (source / "CMakeLists.txt").write_text(text)
    for name in ("LDRCore", "LightweightRegistration"):
        (source / name).symlink_to(ROOT / name)
    slicer = work / "slicer"
    slicer.mkdir()
    (slicer / "SlicerConfig.cmake").write_text(SLICER_CONFIG)
    (slicer / "UseSlicer.cmake").write_text(USE_SLICER)
    (slicer / "Nothing.cmake").write_text("")
    options = [f"-DSlicer_DIR={slicer}", "-DBUILD_TESTING=ON", f"-DCMAKE_INSTALL_PREFIX={work / 'installed'}"]
    done = subprocess.run(
        [cmake, "-S", source, "-B", work / "build", *options], capture_output=True, encoding="utf-8", check=False
    )
    assert done.returncode == 0, done.stderr
    assert "unit test LightweightRegistration.py" in done.stdout
    assert "generic tests of LightweightRegistration" in done.stdout
    subprocess.run([cmake, "--install", work / "build"], capture_output=True, check=True)
    return work / "installed" / "lib" / "qt-scripted-modules"


SLICER_CONFIG = """
set(Slicer_USE_FILE ${CMAKE_CURRENT_LIST_DIR}/UseSlicer.cmake)
set(Slicer_EXTENSION_GENERATE_CONFIG ${CMAKE_CURRENT_LIST_DIR}/Nothing.cmake)
set(Slicer_EXTENSION_CPACK ${CMAKE_CURRENT_LIST_DIR}/Nothing.cmake)
set(Slicer_QTSCRIPTEDMODULES_LIB_DIR lib/qt-scripted-modules)
set(Slicer_INSTALL_QTSCRIPTEDMODULES_LIB_DIR lib/qt-scripted-modules)
"""
# CTK's macro copies each file to DESTINATION_DIR under its relative path and installs that folder as a whole: under its
# own name in INSTALL_DIR, or its contents alone with NO_INSTALL_SUBDIR. Slicer's macro hands its files to it.
USE_SLICER = """
function(ctkMacroCompilePythonScript)
  cmake_parse_arguments(MY "NO_INSTALL_SUBDIR" "TARGET_NAME;DESTINATION_DIR;INSTALL_DIR" "SCRIPTS;RESOURCES" ${ARGN})
  if(MY_UNPARSED_ARGUMENTS)
    message(FATAL_ERROR "unknown: ${MY_UNPARSED_ARGUMENTS}")
  endif()
  foreach(name TARGET_NAME SCRIPTS DESTINATION_DIR INSTALL_DIR)
    if(NOT MY_${name})
      message(FATAL_ERROR "${name} is mandatory")
    endif()
  endforeach()
  foreach(file ${MY_SCRIPTS} ${MY_RESOURCES})
    if(NOT EXISTS ${CMAKE_CURRENT_SOURCE_DIR}/${file})
      message(FATAL_ERROR "given nonexistent file '${file}'")
    endif()
    configure_file(${CMAKE_CURRENT_SOURCE_DIR}/${file} ${MY_DESTINATION_DIR}/${file} COPYONLY)
  endforeach()
  set(folder ${MY_DESTINATION_DIR})
  if(MY_NO_INSTALL_SUBDIR)
    set(folder ${MY_DESTINATION_DIR}/)
  endif()
  install(DIRECTORY ${folder} DESTINATION ${MY_INSTALL_DIR})
endfunction()
function(slicerMacroBuildScriptedModule)
  cmake_parse_arguments(MY "WITH_GENERIC_TESTS" "NAME" "SCRIPTS;RESOURCES" ${ARGN})
  if(MY_UNPARSED_ARGUMENTS)
    message(FATAL_ERROR "unknown: ${MY_UNPARSED_ARGUMENTS}")
  endif()
  ctkMacroCompilePythonScript(
    TARGET_NAME ${MY_NAME}
    SCRIPTS "${MY_SCRIPTS}"
    RESOURCES "${MY_RESOURCES}"
    DESTINATION_DIR ${CMAKE_BINARY_DIR}/${Slicer_QTSCRIPTEDMODULES_LIB_DIR}
    INSTALL_DIR ${Slicer_INSTALL_QTSCRIPTEDMODULES_LIB_DIR}
    NO_INSTALL_SUBDIR
    )
  if(MY_WITH_GENERIC_TESTS)
    message(STATUS "generic tests of ${MY_NAME}")
  endif()
endfunction()
function(slicer_add_python_unittest)
  cmake_parse_arguments(MY "" "SCRIPT" "" ${ARGN})
  message(STATUS "unit test ${MY_SCRIPT}")
endfunction()
"""

REGISTER = """
import sys
from pathlib import Path
from Testing.standin import application
application.MODULE = Path(sys.argv[1])
module = application.module()
assert Path(module.__file__).parent == application.MODULE, module.__file__
from Testing.slicer_scene import blobs
logic = module.LightweightRegistrationLogic()
outputs = logic.register(*blobs(), 1)
assert logic.worker._library_folder == application.MODULE, logic.worker._library_folder
from LightweightRegistrationLib import sample
sample.load_pair()
print(outputs.report["model"], outputs.warped.GetName())
"""


def test_every_file_is_installed_in_its_own_folder(installed):
    library, module = (sorted(in_tree(f, scripts=True) + in_tree(f, scripts=False)) for f in (ROOT / "LDRCore", MODULE))
    there = {p.relative_to(installed).as_posix() for p in installed.rglob("*") if p.is_file()}
    assert there == {*module, *(f"LDRCore/{file}" for file in library)}


def test_the_installed_extension_registers_with_its_own_library_and_weights(installed):
    pytest.importorskip("slicer", reason="needs slicer-core (make test installs it)")
    assert (installed / "LightweightRegistration.py").is_file()
    assert (installed / "Resources" / "UI" / "LightweightRegistration.ui").is_file()
    done = subprocess.run(
        [sys.executable, "-c", REGISTER, installed], capture_output=True, encoding="utf-8", cwd=ROOT, check=False
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1] == "brain-t1-gradient blob 1 warped to blob 0"
