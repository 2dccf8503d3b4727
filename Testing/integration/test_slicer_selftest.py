"""The test that runs inside the application, run here on slicer-core."""

from __future__ import annotations

import pytest

pytest.importorskip("slicer", reason="needs slicer-core (make test installs it)")


@pytest.mark.parametrize("name", ["test_register", "test_bring_along", "test_refusal"])
def test_the_modules_own_test_passes(slicer_module, scene, name):
    case = slicer_module.LightweightRegistrationTest()
    case.setUp()
    getattr(case, name)()


def test_the_modules_own_test_runs_all_of_them(slicer_module, scene, monkeypatch):
    ran = []
    case = slicer_module.LightweightRegistrationTest()
    for name in [n for n in dir(case) if n.startswith("test_")]:

        def note(name=name) -> None:
            ran.append(name)

        note.__name__ = name
        monkeypatch.setattr(case, name, note)
    case.runTest()
    assert sorted(ran) == sorted(n for n in dir(case) if n.startswith("test_"))
