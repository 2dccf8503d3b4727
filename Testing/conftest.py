"""Small images that tests share. Nothing here reads anything that is not in the repository."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import SimpleITK as sitk

from LDRCore import sampling
from LDRCore.cli import demo


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
    return demo.find_pair()


@pytest.fixture(params=["torch", "numba"])
def backend(request: pytest.FixtureRequest) -> Iterator[str]:
    """The name of each backend in turn, which `sampling` is made to use."""
    with sampling.forced(request.param):
        if sampling.backend_name() != request.param:
            pytest.skip("needs the package numba (pip install 'LDRCore[fast]')")
        yield request.param


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
def tiny_brains(tmp_path_factory) -> Path:
    """A data set in manifest layout: 4 training and 2 validation "brains" of 36 voxels and 2 mm with six labels.

    Ellipsoids in a shell, bent differently; labels are the octant-like parts of each.
    """
    root = tmp_path_factory.mktemp("brains")
    rng = np.random.default_rng(3)
    grid = np.stack(np.meshgrid(*[np.arange(36.0)] * 3, indexing="ij"))
    rows = ["subject,split,image,labels"]
    for number in range(6):
        shift, radii = rng.uniform(-1.5, 1.5, 3), np.array([12, 13, 11]) * rng.uniform(0.9, 1.1, 3)
        waves = rng.uniform(-1, 1, 3)
        x = (grid - 17.5 - shift[:, None, None, None]) / radii[:, None, None, None]
        x = x + 0.08 * waves[:, None, None, None] * np.sin(3 * x[[1, 2, 0]])
        radius = np.sqrt((x**2).sum(0))
        part = 1 + (x[0] > 0.1) + 2 * (x[1] > 0) + (x[2] > 0.3) * (x[1] > 0)
        labels = np.where(radius < 0.85, part, 0).astype(np.uint8)
        values = np.where(radius < 0.85, 60 + 25 * part + 10 * np.sin(6 * x[0]), np.where(radius < 1.1, 30, 0))
        values = np.clip(values + rng.normal(0, 1.5, values.shape) * (values > 0), 0, 255)
        origin = rng.uniform(-60, 60, 3).tolist()
        for name, array in (("image", values.astype(np.int16)), ("labels", labels)):
            volume = sitk.GetImageFromArray(array)
            volume.SetSpacing((2.0, 2.0, 2.0))
            volume.SetOrigin(origin)
            sitk.WriteImage(volume, str(root / f"s{number}-{name}.nii.gz"))
        rows.append(f"s{number},{'train' if number < 4 else 'val'},s{number}-image.nii.gz,s{number}-labels.nii.gz")
    (root / "manifest.csv").write_text("\n".join(rows) + "\n")
    return root


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
    opened.p.wantJacobian = True
    return opened


@pytest.fixture
def done(chosen):
    """The window after a registration."""
    from Testing import slicer_window

    slicer_window.click(chosen.ui.applyButton)
    slicer_window.run(chosen)
    return chosen
