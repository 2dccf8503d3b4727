"""The log that outlives the application, and the files of a run that are kept on request."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from Testing.slicer_scene import add_volume, array, blobs
from Testing.slicer_window import choose, click, run, unfold

slicer = pytest.importorskip("slicer", reason="needs slicer-core (make test installs it)")


@pytest.fixture
def settings_folder(slicer_module, tmp_path, monkeypatch) -> Path:
    """Where the application keeps its settings."""
    monkeypatch.setattr(slicer.app, "slicerUserSettingsFilePath", str(tmp_path / "NA-MIC" / "Slicer.ini"))
    return tmp_path / "NA-MIC"


def test_every_run_and_every_error_is_in_the_log_and_the_button_opens_it(settings_folder, chosen, monkeypatch):
    import qt

    log = settings_folder / "LightweightRegistration.log"
    click(chosen.ui.applyButton)
    run(chosen)
    add_volume("A patient's name", np.full((8, 8, 8), 3, np.int16))
    choose(chosen.ui.movingSelector, "A patient's name")
    click(chosen.ui.applyButton)
    run(chosen)
    lines = log.read_text(encoding="utf-8").splitlines()
    begun, done, begun_again, refused = lines[:4]
    assert "Apply: 5.12.0-stand-in, (28, 26, 24) of [3.0, 3.0, 3.0] mm, (28, 26, 26) of [3.0, 3.0, 4.0] mm" in begun
    assert "'kind': 'deformable'" in begun
    assert json.loads(done.partition(" s: ")[2])["kind"] == "deformable"
    assert "A patient's name" not in begun_again
    assert "error: The moving volume must show something" in refused
    opened = []
    monkeypatch.setattr(qt.QDesktopServices, "openUrl", opened.append)
    unfold(chosen.ui.advancedCollapsibleButton)
    click(chosen.ui.logButton)
    assert [url.toLocalFile() for url in opened] == [str(log)]


def test_the_log_does_not_grow_for_ever_and_never_stops_a_run(settings_folder, monkeypatch):
    from LightweightRegistrationLib import session_log

    monkeypatch.setattr(session_log, "MOST_BYTES", 150)
    for n in range(5):
        session_log.write(f"{n} {'x' * 80}")
    old, new = (session_log.path().with_name(f"{session_log.NAME}{end}").read_text() for end in (".1", ""))
    assert [line.split()[2] for line in (old + new).splitlines()] == ["2", "3", "4"]
    monkeypatch.setattr(slicer.app, "slicerUserSettingsFilePath", "/dev/null/settings/Slicer.ini")
    session_log.write("nowhere")


@pytest.mark.parametrize("keep", [False, True])
def test_files_of_a_run_are_kept_where_that_is_asked_for(logic, scene, keep):
    from LightweightRegistrationLib import background

    before = set(Path(slicer.app.temporaryPath).glob(f"{background.KEPT_PREFIX}*"))
    fixed, moving = blobs()
    job = logic.startRegistration(fixed, moving, 1, refine="none", keepFiles=keep)
    made = logic.wait(job)
    kept = set(Path(slicer.app.temporaryPath).glob(f"{background.KEPT_PREFIX}*")) - before
    assert kept == set(job.kept)
    assert len(kept) == keep
    for folder in kept:
        assert json.loads((folder / "request.json").read_text())["options"]["cascades"] == 1
        assert np.array_equal(np.load(folder / "fixed.npy"), array(fixed))
        assert np.array_equal(np.load(folder / "warped.npy"), array(made.warped))
        assert (folder / "log.txt").exists()
        assert json.loads((folder / "events.jsonl").read_text().splitlines()[-1])["event"] == "done"
        background.remove_stale_sessions(Path(slicer.app.temporaryPath))
        assert folder.exists()


def test_files_are_kept_after_an_error_and_the_panel_says_where(chosen, monkeypatch):
    from LightweightRegistrationLib import outputs

    unfold(chosen.ui.advancedCollapsibleButton)
    click(chosen.ui.keepFilesCheckBox)
    click(chosen.ui.applyButton)
    job = chosen.panel.job
    run(chosen)
    assert chosen.ui.statusLabel.text.endswith(f" Files are in {job.kept[0]}.")
    with monkeypatch.context() as broken:
        broken.setattr(outputs, "record_roles", lambda *_: 1 / 0)
        click(chosen.ui.applyButton)
        job = chosen.panel.job
        run(chosen)
    assert "ZeroDivisionError" in chosen.ui.statusLabel.text
    assert (job.kept[0] / "fixed.npy").exists()
