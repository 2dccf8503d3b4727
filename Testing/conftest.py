"""Small images that tests share. Nothing here reads anything that is not in the repository."""

from __future__ import annotations

import os

import numpy as np
import pytest
import SimpleITK as sitk

from LDRCore import demo


@pytest.hookimpl(tryfirst=True)
def pytest_sessionfinish(session: pytest.Session) -> None:
    """With ALL_SLICER_TESTS set (on CI), a skipped test of the Slicer module is a failure."""
    reporter = session.config.pluginmanager.get_plugin("terminalreporter")
    if not os.environ.get("ALL_SLICER_TESTS") or reporter is None:
        return
    skipped = [report.nodeid for report in reporter.stats.get("skipped", []) if "test_slicer" in report.nodeid]
    if skipped and session.exitstatus == pytest.ExitCode.OK:
        reporter.write_line(f"skipped although ALL_SLICER_TESTS is set: {', '.join(skipped)}", red=True)
        session.exitstatus = pytest.ExitCode.TESTS_FAILED


@pytest.fixture(scope="session")
def demo_pair() -> dict:
    """Paths of the demo pair and the number of its labels."""
    return demo.pair()


@pytest.fixture
def blob() -> sitk.Image:
    """A small, bright, slightly irregular ellipsoid on a dark ground, 3 mm, int16."""
    k, j, i = np.meshgrid(*[np.arange(n) for n in (30, 32, 28)], indexing="ij")
    inside = ((k - 14) / 10) ** 2 + ((j - 16) / 12) ** 2 + ((i - 14) / 9) ** 2 < 1
    values = np.where(inside, 400 + 20 * np.sin(k) * np.cos(j) + 5 * i, 0)
    image = sitk.GetImageFromArray(values.astype(np.int16))
    image.SetSpacing((3.0, 3.0, 3.0))
    return image


@pytest.fixture(scope="session")
def slicer_module():
    """The Slicer module's file, on slicer-core."""
    pytest.importorskip("slicer", reason="needs slicer-core (make test installs it)")
    from Testing.standin import application

    return application.module()


@pytest.fixture
def scene(slicer_module):
    """An empty MRML scene."""
    import slicer

    from Testing.standin import application

    application.clear()
    yield slicer.mrmlScene
    application.clear()


@pytest.fixture
def logic(slicer_module):
    """The module's logic; all share one process."""
    return slicer_module.LightweightRegistrationLogic()


@pytest.fixture
def pair(scene):
    """The demo pair as volume nodes."""
    from LightweightRegistrationLib import sample

    return sample.load_pair()


@pytest.fixture
def opened(slicer_module, scene, monkeypatch):
    """The module's window on an empty scene; skipped where Qt cannot be used."""
    try:
        from PySide6 import QtWidgets  # noqa: F401
    except ImportError as error:  # also where a library of the system is missing
        pytest.skip(f"PySide6 cannot be used here: {error} (README, 'In 3D Slicer', names the packages)")
    from Testing import slicer_window

    made = slicer_window.open_window(slicer_module, monkeypatch)
    yield made
    slicer_window.close_window(made)


@pytest.fixture
def chosen(opened):
    """The window with two small volumes chosen."""
    from Testing import slicer_scene, slicer_window

    opened.fixed, opened.moving = slicer_scene.blobs()
    slicer_window.choose(opened.ui.fixedSelector, "blob 0")
    slicer_window.choose(opened.ui.movingSelector, "blob 1")
    opened.p = opened.widget._parameterNode
    opened.p.cascades = 1
    return opened


@pytest.fixture
def done(chosen):
    """The window after a registration."""
    from Testing import slicer_window

    slicer_window.click(chosen.ui.applyButton)
    slicer_window.run(chosen)
    return chosen
