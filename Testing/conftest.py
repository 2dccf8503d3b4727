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
