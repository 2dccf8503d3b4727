"""Transforms of other programs, and lists of pairs: what the module reads and writes as files."""

from __future__ import annotations

import csv
import json
import sys
from pathlib import Path

import numpy as np
import pytest
import SimpleITK as sitk

from LDRCore.io import transforms
from LDRCore.models import weights
from Testing.slicer_scene import (
    LPS,
    blobs,
    image_of,
    linear,
    local,
    moved,
    process_runs,
    snapshot,
    spin,
    turned,
    wait_until,
)
from Testing.slicer_window import choose, click, run, unfold

slicer = pytest.importorskip("slicer", reason="needs slicer-core (make test installs it)")

FORMATS = sorted(set(transforms.FORMATS) - {"dicom"})  # which is written for DICOM series only
POINTS = [(-4.0, 3.0, 5.0), (2.0, -6.0, -3.0), (6.0, 2.0, 1.0)]


def made_for(fixed, moving, transform):
    """A transform node of a registration of two volumes."""
    from LightweightRegistrationLib import outputs

    outputs.record_roles(transform, fixed, moving)
    return transform


def waves(fixed, moving):
    """A transform node with a smooth field on the fixed volume's grid."""
    from LightweightRegistrationLib import transform_nodes, volume_nodes

    shape = slicer.util.arrayFromVolume(fixed).shape
    k, j, i = np.meshgrid(*[np.linspace(0, np.pi, n) for n in shape], indexing="ij")
    vectors = np.stack((3 * np.sin(i), 2 * np.sin(j), -4 * np.sin(k)), -1).astype(np.float32)
    to_lps = LPS @ volume_nodes.parent_to_world(fixed, "fixed") @ local(fixed)
    node = slicer.mrmlScene.AddNewNodeByClass("vtkMRMLTransformNode", "waves")
    transform_nodes.write_field(node, transform_nodes.Field(vectors, to_lps))
    return made_for(fixed, moving, node)


def shifted(fixed, moving):
    """A rigid transform node."""
    return made_for(fixed, moving, linear("rigid", turned(5, (2.0, -1.0, 3.0))))


def test_the_formats_are_those_of_the_library(slicer_module):
    from LightweightRegistrationLib import transform_files

    known = {name: (one.title, one.linear_suffixes, one.dense_suffixes) for name, one in transforms.FORMATS.items()}
    assert known == transform_files.FORMATS
    for suffix in transform_files.BY_NAME:
        assert transforms.check_target(Path(f"a{suffix}"), "auto")


@pytest.mark.parametrize("make", [waves, shifted])
@pytest.mark.parametrize("name", FORMATS)
def test_a_transform_comes_back_from_every_format(logic, scene, tmp_path, name, make):
    """Both volumes lie under a parent transform: files count in the voxels of the volumes as they lie in the world."""
    from LightweightRegistrationLib import transform_files

    if name == "x5":
        pytest.importorskip("h5py")
    fixed, moving = blobs()
    angles = (20, -8) if name != "afni" else (0, 0)  # which refuses oblique images
    if name == "afni":
        moving.CopyOrientation(fixed)
    for node, angle, shift in zip((fixed, moving), angles, ((5, 0, 9), (0, 3, 0)), strict=True):
        matrix = turned(angle, shift, axis=0)
        node.SetAndObserveTransformNodeID(linear("parent", matrix).GetID())
    transform = make(fixed, moving)
    suffixes = transform_files.suffixes_of(name, linear=make is shifted)
    path = logic.saveTransform(transform, tmp_path / f"saved{suffixes[0]}", name)
    back = logic.loadTransform(path, fixed, moving, name)
    assert back.GetName() == "saved"
    for point in POINTS:
        assert moved(back, point) == pytest.approx(moved(transform, point), abs=0.02)
        assert moved(back, point) != pytest.approx(point, abs=0.5)
    again = logic.saveTransform(back, tmp_path / "again.h5")  # the node knows its volumes
    assert again.is_file()


@pytest.mark.parametrize("make", [waves, shifted])
def test_simpleitk_reads_what_was_saved(logic, scene, tmp_path, make):
    transform = make(*blobs())
    path = logic.saveTransform(transform, tmp_path / "out.tfm", "itk")
    read = sitk.ReadTransform(str(path))
    for point in POINTS:
        got = np.array(read.TransformPoint((LPS[:3, :3] @ point).tolist()))
        assert LPS[:3, :3] @ got == pytest.approx(moved(transform, point), abs=1e-3)


def test_a_shift_that_simpleitk_wrote_moves_points_likewise(logic, scene, tmp_path):
    sitk.WriteTransform(sitk.TranslationTransform(3, (1.0, 2.0, 3.0)), str(tmp_path / "shift.tfm"))
    node = logic.loadTransform(tmp_path / "shift.tfm", *blobs())
    assert node.IsLinear()
    assert moved(node, (0.0, 0.0, 0.0)) == pytest.approx((-1.0, -2.0, 3.0))  # RAS, fixed -> moving


def test_the_panel_saves_in_the_chosen_format_and_takes_a_file_as_initial_transform(done, monkeypatch, tmp_path):
    import qt

    ui, asked = done.ui, []
    unfold(ui.filesCollapsibleButton)
    titles = [ui.formatComboBox.itemText(n) for n in range(ui.formatComboBox.count())]
    assert titles[0] == "Automatic (by the file)"
    assert {"3D Slicer", "ANTs", "FSL", "elastix", "SPM"} <= set(titles)
    answers = iter(["", str(tmp_path / "out")])
    monkeypatch.setattr(qt.QFileDialog, "getSaveFileName", lambda *given: asked.append(given) or next(answers))
    choose(ui.formatComboBox, "FSL")
    before = snapshot()
    click(ui.saveTransformButton)  # the dialog is cancelled
    assert done.panel.job is None
    click(ui.saveTransformButton)
    run(done)
    assert done.said == []
    assert snapshot() == before
    assert asked[1][3] == "FSL (*.nii.gz *.nii)"  # a field: FSL's matrices cannot hold it
    assert asked[1][2].endswith("blob 1 to blob 0.nii.gz")
    assert ui.statusLabel.text == f"Wrote {tmp_path / 'out.nii.gz'}."
    transform = transforms.read_transform(
        tmp_path / "out.nii.gz",
        format_name="fsl",
        context=transforms.Context(image_of(done.fixed), image_of(done.moving)),
    )
    for point in POINTS:
        got = LPS[:3, :3] @ np.array(transform.TransformPoint((LPS[:3, :3] @ point).tolist()))
        assert got == pytest.approx(moved(done.p.transform, point), abs=0.02)

    monkeypatch.setattr(qt.QFileDialog, "getOpenFileName", lambda *given: str(tmp_path / "out.nii.gz"))
    click(ui.loadTransformButton)
    run(done)
    node = done.p.initialTransform
    assert node.GetName() == "out"
    assert done.ui.statusLabel.text == "“out” is the initial transform now."
    for point in POINTS:
        assert moved(node, point) == pytest.approx(moved(done.p.transform, point), abs=0.02)


def test_the_proposed_name_of_a_file_is_one_that_every_system_takes(done, monkeypatch):
    import qt

    asked = []
    monkeypatch.setattr(qt.QFileDialog, "getSaveFileName", lambda *given: asked.append(given[2]) or "")
    done.p.transform.SetName('2: T1/MPRAGE "sag" to 3')
    unfold(done.ui.filesCollapsibleButton)
    click(done.ui.saveTransformButton)
    assert asked == ["2_ T1_MPRAGE _sag_ to 3.h5"]


def test_what_a_format_cannot_hold_is_one_sentence(done, monkeypatch, tmp_path):
    import qt

    ui = done.ui
    unfold(ui.filesCollapsibleButton)
    choose(ui.formatComboBox, "DICOM")
    monkeypatch.setattr(qt.QFileDialog, "getSaveFileName", lambda *given: str(tmp_path / "out.dcm"))
    click(ui.saveTransformButton)
    run(done)
    (text,) = done.said
    assert "DICOM" in text
    assert not list(tmp_path.iterdir())
    (tmp_path / "matrix.txt").write_text("1 0 0 0\n0 1 0 0\n0 0 1 0\n0 0 0 1\n")
    monkeypatch.setattr(qt.QFileDialog, "getOpenFileName", lambda *given: str(tmp_path / "matrix.txt"))
    choose(ui.formatComboBox, "Automatic (by the file)")
    before = snapshot()
    click(ui.loadTransformButton)
    run(done)
    assert "name one of greedy, niftyreg, fsl" in done.said[1]
    assert snapshot() == before


def test_buttons_say_what_is_missing(opened):
    unfold(opened.ui.filesCollapsibleButton)
    assert not opened.ui.saveTransformButton.enabled
    assert opened.ui.saveTransformButton.toolTip == "Register first, or choose a transform in Outputs"
    assert not opened.ui.loadTransformButton.enabled
    unfold(opened.ui.batchCollapsibleButton)
    click(opened.ui.batchButton)
    assert opened.ui.statusLabel.text.startswith("Choose a list of pairs, or a folder of fixed")
    opened.ui.batchListEdit.currentPath = "pairs.csv"
    click(opened.ui.batchButton)
    assert opened.ui.statusLabel.text == "Choose a folder for the results."
    opened.ui.batchFixedEdit.currentPath = "folder"
    click(opened.ui.batchButton)
    assert opened.ui.statusLabel.text == "Choose a list or two folders, not both."
    assert opened.said == []


# batch


@pytest.fixture
def folders(scene, tmp_path) -> tuple[Path, Path]:
    """Two folders with two images each, of the same names; the scene is left empty."""
    from Testing.standin import application

    made = (tmp_path / "fixed", tmp_path / "moving")
    for folder, node in zip(made, blobs(), strict=True):
        folder.mkdir()
        for name in ("a.nii.gz", "b.nii.gz"):
            sitk.WriteImage(image_of(node), str(folder / name))
        (folder / "notes.txt").touch()
    application.clear()
    return made


def test_the_panel_registers_the_pairs_of_two_folders_and_shows_the_page(opened, folders, monkeypatch, tmp_path):
    import qt

    ui, p = opened.ui, opened.widget._parameterNode
    p.cascades = p.threads = 1
    unfold(ui.batchCollapsibleButton)
    assert not ui.pageButton.enabled
    ui.batchFixedEdit.currentPath, ui.batchMovingEdit.currentPath = map(str, folders)
    ui.batchOutputEdit.currentPath = str(tmp_path / "out")
    before, seen = snapshot(), set()
    click(ui.batchButton)
    run(opened, until=lambda: bool(seen.add((opened.panel.job.fraction, opened.panel.job.message))))
    assert opened.said == []
    assert {fraction for fraction, _ in seen} >= {0.0, 0.5}
    assert snapshot() == before
    page = tmp_path / "out" / "index.html"
    assert ui.statusLabel.text == f"2 pairs registered. The page to judge them is {page}."
    assert page.is_file()
    rows = list(csv.DictReader((tmp_path / "out" / "results.csv").open(encoding="utf-8")))
    assert [(row["name"], row["status"]) for row in rows] == [("a", "done"), ("b", "done")]
    settings = json.loads((tmp_path / "out" / "cohort.json").read_text(encoding="utf-8"))["settings"]["options"]
    assert (settings["cascades"], settings["refine"], settings["model"]) == (1, "fast", weights.DEFAULT)
    shown = []
    monkeypatch.setattr(qt.QDesktopServices, "openUrl", shown.append)
    click(ui.pageButton)
    assert shown[0].toLocalFile() == str(page)


def test_a_list_goes_on_where_it_ended_and_a_pair_that_fails_is_named(logic, folders, tmp_path):
    (tmp_path / "pairs.csv").write_text("fixed,moving\nfixed/a.nii.gz,moving/a.nii.gz\n")
    options = {"kind": "rigid", "threads": 1}
    first = logic.registerMany(tmp_path / "pairs.csv", tmp_path / "out", **options)
    assert (first["done"], first["reused"], first["failed"]) == (1, 0, 0)
    rows = [{"fixed": str(folders[0] / name), "moving": str(folders[1] / name)} for name in ("a.nii.gz", "b.nii.gz")]
    (folders[1] / "b.nii.gz").write_bytes(b"no image")
    second = logic.registerMany(rows, tmp_path / "out", **options)
    assert (second["done"], second["reused"], second["failed"]) == (1, 1, 1)
    assert second["problems"][0].startswith("b: ")


def test_folders_whose_names_do_not_agree_are_refused(logic, folders, tmp_path):
    from LightweightRegistrationLib.module_errors import InputError
    from LightweightRegistrationLib.worker import pairs_of_folders

    atlas = tmp_path / "atlas"
    atlas.mkdir()
    with pytest.raises(InputError, match=r"a folder of images must hold some, got none in .*atlas"):
        logic.registerMany((atlas, folders[1]), tmp_path / "out")
    (folders[0] / "b.nii.gz").rename(atlas / "mean.nrrd")
    pairs = pairs_of_folders(atlas, folders[1])
    assert [(Path(p["fixed"]).name, Path(p["moving"]).name) for p in pairs] == [
        ("mean.nrrd", "a.nii.gz"),
        ("mean.nrrd", "b.nii.gz"),
    ]
    (folders[0] / "c.nii.gz").touch()
    with pytest.raises(InputError, match=r"fixed one of the same name, got none for b\.nii\.gz"):
        logic.registerMany(folders, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_list_with_an_unknown_pre_alignment_is_refused(logic, folders, tmp_path):
    from LightweightRegistrationLib.module_errors import InputError

    with pytest.raises(InputError, match=r"prealignment must be one of .*, got 'center'"):
        logic.registerMany(folders, tmp_path / "out", kind="rigid", threads=1, prealignment="center")


def test_a_list_that_nothing_would_align_is_refused(logic, folders, tmp_path):
    from LightweightRegistrationLib.module_errors import InputError

    with pytest.raises(InputError, match=r"the affine registration must align something, got the pre-alignment 'none'"):
        logic.registerMany(folders, tmp_path / "out", kind="affine", threads=1, prealignment="none")
    assert not (tmp_path / "out").exists()


def test_a_batch_is_cancelled_by_the_button_and_can_be_pressed_again(opened, folders, tmp_path):
    ui, p = opened.ui, opened.widget._parameterNode
    p.cascades = p.threads = 1
    unfold(ui.batchCollapsibleButton)
    ui.batchFixedEdit.currentPath, ui.batchMovingEdit.currentPath = map(str, folders)
    ui.batchOutputEdit.currentPath = str(tmp_path / "out")
    click(ui.batchButton)
    assert ui.applyButton.text == "Cancel"
    assert not ui.batchButton.enabled
    click(ui.applyButton)
    assert opened.panel.job is None
    assert ui.statusLabel.text == "Cancelled; what is finished stays."
    click(ui.batchButton)
    run(opened)
    assert opened.said == []
    assert ui.statusLabel.text.startswith("2 pairs registered. ")


@pytest.mark.skipif(sys.platform != "linux", reason="reads processes as Linux lists them")
def test_cancel_ends_the_processes_of_a_batch_and_the_next_run_works(logic, folders, tmp_path):
    job = logic.startBatch(folders, tmp_path / "out", refinementSteps=1_000_000, threads=1)
    process = logic.worker.process

    def children() -> list[int]:
        return [int(n) for n in Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()]

    spin(job, until=lambda: bool(children()))
    started = children()
    job.cancel()
    assert process.returncode not in (None, 0)
    wait_until(lambda: not any(process_runs(pid) for pid in started), lambda: f"one of {started} is still there")
    done = logic.registerMany(folders, tmp_path / "out2", kind="rigid", threads=1)
    assert done["done"] == 2
