"""A few hundred files that are changed at random; `fuzz.py` runs more."""

from __future__ import annotations

import importlib.util
import os
import sys
from pathlib import Path
from types import ModuleType

import pytest

from LDRCore import RegistrationError
from LDRCore.io.quiet import silent_libraries


@pytest.fixture(scope="module")
def fuzz() -> ModuleType:
    spec = importlib.util.spec_from_file_location("fuzz", Path(__file__).with_name("fuzz.py"))
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_no_mutated_file_is_read_wrongly_or_ends_in_a_traceback(fuzz):
    told: list[str] = []
    outcomes = fuzz.run(400, 0, told.append)
    assert told == []
    kinds = {kind for counts in outcomes.values() for kind in counts}
    assert kinds == {"clean", "refused", "other values"}


def test_random_geometries_agree_with_simpleitk(fuzz):
    told: list[str] = []
    outcomes = fuzz.geometries(200, 0, told.append)
    assert told == []
    assert outcomes["clean"] >= 195


def test_messages_are_one_printable_line():
    assert str(RegistrationError("a\nb\0c\x1bd")) == "a b?c?d"


def test_stderr_comes_back_after_blocks_that_overlap(capfd):
    """Blocks of two threads end in any order."""
    first, second = silent_libraries(), silent_libraries()
    first.__enter__()
    second.__enter__()
    os.write(2, b"lost")
    first.__exit__(None, None, None)
    os.write(2, b"lost too")
    second.__exit__(None, None, None)
    print("shown", file=sys.stderr, flush=True)
    assert capfd.readouterr().err == "shown\n"
