"""The examples in docstrings print what they say."""

from __future__ import annotations

import doctest
import importlib

import pytest

MODULES = [
    "LDRCore.distillation.aldk",
    "LDRCore.distillation.teacher_store",
    "LDRCore.evaluation.learn2reg",
    "LDRCore.evaluation.metrics",
    "LDRCore.geometry.grids",
    "LDRCore.losses.regularity",
    "LDRCore.losses.similarity",
    "LDRCore.losses.supervision",
    "LDRCore.models.registry",
    "LDRCore.transforms.spatial",
]


@pytest.mark.parametrize("name", MODULES)
def test_examples_print_what_they_say(name):
    results = doctest.testmod(importlib.import_module(name))
    assert results.attempted > 0, "no example"
    assert results.failed == 0
