"""Readers of training data: small files in every published layout, made here."""

from __future__ import annotations

import csv
import json
import pickle
import sys
from pathlib import Path

import h5py
import numpy as np
import pytest
import SimpleITK as sitk

from Training import prepare_data
from Training.data import prepared, scan_files, scan_set
from Training.data.scan_set import DataError
from Training.data.scans import open_scans


def spl_array(seed: int = 0, shape=(10, 12, 8)) -> np.ndarray:
    return np.random.default_rng(seed).uniform(0, 900, shape).astype(np.float32)


def write_image(path: Path, array: np.ndarray, *, spacing=2.0, orientation="LPS") -> Path:
    """An array with axes S, P, L as a file whose axes point elsewhere."""
    image = sitk.GetImageFromArray(array)
    image.SetSpacing([spacing] * 3 if isinstance(spacing, (int, float)) else spacing)
    path.parent.mkdir(parents=True, exist_ok=True)
    sitk.WriteImage(sitk.DICOMOrient(image, orientation), str(path))
    return path


def write_csv(path: Path, columns: str, *rows: str) -> Path:
    path.write_text("\n".join([columns, *rows]) + "\n")
    return path


@pytest.fixture
def folder(tmp_path):
    """manifest.csv of three subjects, two of them to train on, stored with axes P, S, R."""
    for name, seed in (("a", 1), ("b", 2), ("c", 3)):
        write_image(tmp_path / f"t1/{name}.nii.gz", spl_array(seed), orientation="PSR")
        labels = (spl_array(seed) // 100).astype(np.uint8)
        write_image(tmp_path / f"seg/{name}.nii.gz", labels, orientation="PSR")
    rows = [f"{n},{s},t1/{n}.nii.gz,seg/{n}.nii.gz,30" for n, s in (("b", "train"), ("a", "train"), ("c", "val"))]
    write_csv(tmp_path / "manifest.csv", "subject,split,image,labels,age", *rows)
    return tmp_path


# folders


def test_a_folder_is_read_voxel_for_voxel(folder):
    opened = open_scans(folder, "train")
    assert opened.names == ["b", "a"]
    assert (len(opened), opened.spacing_mm, opened.n_labels, opened.pairs) == (2, 2.0, 9, None)
    original = spl_array(1)
    wanted = np.clip(original * (255 / np.percentile(original, 99.95)), 0, 255).round()
    np.testing.assert_array_equal(opened[1].image, wanted)
    np.testing.assert_array_equal(opened[1].labels, original // 100)
    np.testing.assert_allclose(opened[1].to_lps, [[0, 0, 2, 0], [0, 2, 0, 0], [2, 0, 0, 0], [0, 0, 0, 1]], atol=1e-5)
    assert opened[1].image.dtype == opened[1].labels.dtype == np.uint8
    assert opened[-1] is opened[1]
    with pytest.raises(IndexError):
        opened[2]


def test_two_different_scans_are_drawn(folder):
    opened = open_scans(folder, "train")
    drawn = {opened.draw_pair(np.random.default_rng(k)) for k in range(20)}
    assert drawn == {(0, 1), (1, 0)}


def test_identity_depends_on_names_and_split_alone(folder, tmp_path_factory):
    other = tmp_path_factory.mktemp("other")
    for name in ("a", "b"):
        write_image(other / f"{name}.mha", spl_array(9))
    write_csv(other / "manifest.csv", "patient,split,file", "a,train,a.mha", "b,train,b.mha")
    assert open_scans(other, "train").identity == open_scans(folder, "train").identity
    (folder / "manifest.csv").write_text(
        (folder / "manifest.csv").read_text(encoding="utf-8").replace("b,train", "z,train")
    )
    assert open_scans(other, "train").identity != open_scans(folder, "train").identity


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("c,val", "a,val", "subject must be listed once, got 'a' in train and val"),
        ("subject,split", "subject,splits", "must have columns subject, split and image"),
        ("image,labels", "image,label", r"got 'label' .* \(did you mean 'labels'\?\)"),
        ("t1/b.nii.gz", "t1/x.nii.gz", r"must be an existing file, got .*t1/x.nii.gz \(not found\)"),
        ("t1/b.nii.gz", "", "every row must name its image, got none for 'b'"),
        (
            "seg/b.nii.gz",
            "small.nii.gz",
            r"must lie on the grid of their image \(size .*got size .*small.nii.gz",
        ),
        ("seg/b.nii.gz", "shifted.nii.gz", "labels must lie on the grid of their image"),
        ("t1/b.nii.gz", "broken.nii.gz", "must be a file that SimpleITK can read, got .*broken.nii.gz"),
        ("t1/b.nii.gz", "flat.nii.gz", "must be three-dimensional, got size"),
        ("b,train", "b,val", r"must hold a pair of scans, got 1 scan in 'train'"),
        ("seg/b.nii.gz", "halves.nii.gz", "labels must be whole numbers from 0 to 32767, got .*halves.nii.gz"),
        ("t1/b.nii.gz", "nan.nii.gz", "must hold only finite values, got 1 voxels"),
        ("t1/b.nii.gz", "empty.nii.gz", "must show something, got a constant image"),
    ],
)
def test_a_folder_that_is_wrong(folder, old, new, message):
    write_image(folder / "small.nii.gz", np.zeros((9, 12, 8), np.uint8), orientation="PSR")
    shifted = sitk.ReadImage(str(folder / "seg/b.nii.gz"))
    shifted.SetOrigin((1.0, 0, 0))
    sitk.WriteImage(shifted, str(folder / "shifted.nii.gz"))
    (folder / "broken.nii.gz").write_bytes(b"nothing")
    sitk.WriteImage(sitk.Image([5, 6], sitk.sitkUInt8), str(folder / "flat.nii.gz"))
    write_image(folder / "halves.nii.gz", spl_array(2) + 0.5, orientation="PSR")
    holed = spl_array(2)
    holed[3, 3, 3] = np.nan
    write_image(folder / "nan.nii.gz", holed, orientation="PSR")
    write_image(folder / "empty.nii.gz", np.zeros((10, 12, 8), np.float32), orientation="PSR")
    path = folder / "manifest.csv"
    path.write_text(path.read_text(encoding="utf-8").replace(old, new))
    with pytest.raises(DataError, match=message):
        open_scans(folder, "train")[0]


def test_a_split_or_source_that_is_not_there(folder):
    with pytest.raises(DataError, match=r"got 'test' in .*manifest.csv \(it has train, val\)"):
        open_scans(folder, "test")
    with pytest.raises(DataError, match=r"must be an existing folder or file, got .*nowhere"):
        open_scans(folder / "nowhere", "train")
    with pytest.raises(DataError, match="must be a folder, or a file that ends in"):
        open_scans(folder / "t1/a.nii.gz", "train")
    with pytest.raises(DataError, match=r"a scheme needs a .json"):
        open_scans(folder, "train", scheme="1")
    with pytest.raises(DataError, match="spacing_mm must be above 0, got 0"):
        open_scans(folder, "train", spacing_mm=0)


def test_scans_of_different_spacing_need_a_word(folder):
    write_image(folder / "t1/b.nii.gz", spl_array(2), spacing=1.2, orientation="PSR")
    write_image(folder / "seg/b.nii.gz", np.ones((10, 12, 8), np.uint8), spacing=1.2, orientation="PSR")
    with pytest.raises(DataError, match=r"smallest voxel edges of 1.2 to 2 mm"):
        open_scans(folder, "train")
    assert open_scans(folder, "train", spacing_mm=2)[0].shape == (6, 7, 5)  # ceil(9, 11 and 7 steps of 1.2 / 2 mm)


# geometry


def turned(angles=(0.3, -0.2, 0.4)) -> np.ndarray:
    transform = sitk.Euler3DTransform()
    transform.SetRotation(*angles)
    return np.array(transform.GetMatrix()).reshape(3, 3)


def test_oblique_flipped_anisotropic_scans_keep_image_labels_and_points_together(tmp_path):
    blob_lps, corner_lps = np.array([12.0, -7.0, 20.0]), np.array([-5.0, 10.0, 0.0])
    direction = turned() @ np.diag([1, -1, 1])
    image = sitk.Image([50, 60, 24], sitk.sitkFloat32)
    image.SetSpacing((1.1, 1.0, 3.0))
    image.SetDirection(direction.ravel().tolist())
    middle = direction @ (np.array([49, 59, 23]) / 2 * [1.1, 1.0, 3.0])
    image.SetOrigin((np.array([3.0, 1.0, 12.0]) - middle).tolist())
    index = np.indices(image.GetSize()[::-1]).reshape(3, -1).T[:, ::-1]
    lps = index * [1.1, 1.0, 3.0] @ direction.T + image.GetOrigin()
    squared = ((lps - blob_lps) ** 2).sum(1)
    shape = image.GetSize()[::-1]
    filled = sitk.GetImageFromArray((1000 * np.exp(-squared / 50)).reshape(shape).astype(np.float32))
    labels = sitk.GetImageFromArray((7 * (squared < 60)).reshape(shape).astype(np.uint8))
    for name, item in (("a", filled), ("a_seg", labels)):
        item.CopyInformation(image)
        sitk.WriteImage(item, str(tmp_path / f"{name}.nrrd"))
    rows = [",".join(map(str, blob_lps)), ",".join(map(str, corner_lps)), ",,"]
    write_csv(tmp_path / "a.csv", "x,y,z", *rows)
    row = "a.nrrd,a_seg.nrrd,a.csv"
    write_csv(tmp_path / "all.csv", "image,labels,landmarks", row, row.replace("a.nrrd", "./a.nrrd"))
    scan = open_scans(tmp_path / "all.csv", "train", spacing_mm=1.5)[0]
    weight = scan.image.astype(float)
    weight[weight < 40] = 0
    centre = [(np.indices(scan.shape)[axis] * weight).sum() / weight.sum() for axis in range(3)]
    np.testing.assert_allclose(scan.points[0], centre, atol=0.1)
    np.testing.assert_allclose(scan.points[0], np.argwhere(scan.labels == 7).mean(0), atol=0.4)
    in_mm = scan.points[:2] @ scan.to_lps[:3, :3].T + scan.to_lps[:3, 3]
    np.testing.assert_allclose(in_mm, [blob_lps, corner_lps], atol=1e-6)
    step_lps = (scan.points[1] - scan.points[0])[::-1] * 1.5  # axes are S, P, L: so L, P, S in mm
    np.testing.assert_allclose(step_lps, corner_lps - blob_lps, atol=1e-6)
    assert np.isnan(scan.points[2]).all()
    assert scan.labels.dtype == np.uint8
    assert set(np.unique(scan.labels)) == {0, 7}


def test_outside_of_an_oblique_ct_lies_its_smallest_value_and_no_edge_goes_dark(tmp_path):
    ct = np.full((20, 21, 23), 50, np.int16)  # odd sizes: averaging in twos leaves a voxel over
    ct[10:, 10:, 10:] = 1000
    ct[:4, :4, :4] = -1024
    straight = write_image(tmp_path / "ct.mha", ct, spacing=1.0)
    scan = scan_files.load(scan_files.Item("ct", straight), 2.0)
    assert scan.shape == (10, 10, 11)
    assert scan.image[:, :, -1].min() > 100  # (50 + 1024) / 2024 * 255 = 135
    image = sitk.ReadImage(str(straight))
    image.SetDirection(turned().ravel().tolist())
    sitk.WriteImage(image, str(straight))
    oblique = scan_files.load(scan_files.Item("ct", straight), 1.0).image
    assert oblique[0, 0, 0] == 0
    assert oblique[tuple(n // 2 for n in oblique.shape)] > 100


def test_intensities_of_ct_and_of_large_volumes(monkeypatch):
    values = np.linspace(-1000, 2000, 30_001).reshape(-1, 1, 1)
    values[7] = 30_000
    opened = scan_files.to_uint8(values)
    low, top = np.percentile(values, (0.05, 99.95))
    assert (opened[0, 0, 0], opened[-2, 0, 0], opened[7, 0, 0]) == (0, 255, 255)
    assert opened[15_000, 0, 0] == round((500 - low) / (top - low) * 255)
    monkeypatch.setattr(scan_files, "_STATISTICS_VOXELS", 5000)
    assert abs(scan_files.to_uint8(values).astype(int) - opened).max() <= 1
    nearly_empty = np.zeros((30, 30, 30))
    nearly_empty[3, 4, 5] = 12
    assert scan_files.to_uint8(nearly_empty)[3, 4, 5] == 255


def test_npz_scans_of_openkbp_are_turned_upright(tmp_path):
    ct = np.zeros((6, 5, 4), np.int16)  # axes P, L, I
    ct[5, 0, 0] = 1000  # back, right, head
    ct[0, 4, 3] = 500  # front, left, feet
    for name in ("p1", "p2"):
        labels = (ct > 0).astype(np.uint8)
        np.savez(tmp_path / f"{name}.npz", ct=ct, labels=labels, spacing=np.array([3.0, 3.0, 3.0]))
    header = "patient,split,file,spacing_mm,nonzero_voxels,labels"
    rows = [f"{n},train,{n}.npz,3.0 3.0 3.0,2,Brainstem Mandible" for n in ("p1", "p2")]
    write_csv(tmp_path / "manifest.csv", header, *rows)
    scan = open_scans(tmp_path, "train")[0]
    assert scan.shape == (4, 6, 5)
    assert scan.image[3, 5, 0] == 255
    assert 120 < scan.image[0, 0, 4] < 140
    assert (scan.labels > 0).sum() == 2
    write_csv(tmp_path / "manifest.csv", header, rows[0].replace("3.0 3.0 3.0", "3.0 3.0 2.5"), rows[1])
    with pytest.raises(DataError, match=r"spacing_mm of 'p1' must be that of its file \(3 3 3\), got '3.0 3.0 2.5'"):
        open_scans(tmp_path, "train")
    np.savez(tmp_path / "p1.npz", image=ct)
    write_csv(tmp_path / "manifest.csv", header, *rows)
    with pytest.raises(DataError, match=r"must hold arrays ct, labels and spacing, got .*p1.npz"):
        open_scans(tmp_path, "train")


def test_a_folder_of_label_maps_has_no_images(tmp_path):
    labels = (spl_array(1) // 100).astype(np.int32)
    labels[0, 0, 0] = 530
    for name in ("one", "two"):
        write_image(tmp_path / f"{name}.nii.gz", labels.astype(np.float32), orientation="LIA")
    opened = open_scans(tmp_path, "train")
    assert opened.names == ["one.nii.gz", "two.nii.gz"]
    assert opened.n_labels == 531
    assert opened[0].image is None
    assert opened[0].labels.dtype == np.int16
    np.testing.assert_array_equal(opened[0].labels, labels)
    with pytest.raises(DataError, match="holds only split 'train', got 'val'"):
        open_scans(tmp_path, "val")
    write_image(tmp_path / "one.nii.gz", np.arange(2000, dtype=np.int16).reshape(20, 10, 10))
    with pytest.raises(DataError, match=r"at most 1000 different values, got more in .*one.nii.gz"):
        open_scans(tmp_path, "train")[0]
    (tmp_path / "sub").mkdir()
    with pytest.raises(DataError, match=r"must hold manifest.csv or label maps"):
        open_scans(tmp_path / "sub", "train")


# one's own CSV


@pytest.fixture
def images(tmp_path):
    for k, name in enumerate("abc"):
        write_image(tmp_path / f"{name}.mha", spl_array(k))
        write_csv(tmp_path / f"{name}_points.csv", "z,y,x,name", "4,6,8,tip", f"{k},2,2,base")
    return tmp_path


def test_a_csv_of_pairs(images):
    table = write_csv(
        images / "pairs.csv",
        "fixed,moving,fixed_landmarks,moving_landmarks,split",
        "a.mha,b.mha,a_points.csv,b_points.csv,train",
        "a.mha,c.mha,a_points.csv,c_points.csv,train",
        "c.mha,b.mha,,,test",
    )
    opened = open_scans(table, "train")
    assert opened.names == ["a.mha", "b.mha", "c.mha"]
    assert opened.pairs == [(0, 1), (0, 2)]
    assert {opened.draw_pair(np.random.default_rng(k)) for k in range(20)} == {(0, 1), (0, 2)}
    np.testing.assert_allclose(opened[2].points, [[2, 3, 4], [1, 1, 1]])  # 2 mm voxels, tensor axes z, y, x
    test = open_scans(table, "test")
    assert (test.names, test.pairs, test[0].points) == (["c.mha", "b.mha"], [(0, 1)], None)


def test_the_same_image_with_other_landmarks_is_another_scan(images):
    table = write_csv(
        images / "pairs.csv",
        "fixed,moving,fixed_landmarks,moving_landmarks",
        "a.mha,b.mha,a_points.csv,b_points.csv",
        "a.mha,b.mha,c_points.csv,b_points.csv",
    )
    opened = open_scans(table, "train")
    assert opened.names == ["a.mha", "b.mha", "a.mha (2)"]
    assert opened.pairs == [(0, 1), (2, 1)]
    assert opened[0].points[1, 0] == 0
    assert opened[2].points[1, 0] == 1


@pytest.mark.parametrize(
    ("columns", "row", "message"),
    [
        ("scan,split", "a.mha,train", "must have column image, or columns fixed and moving, got .*'scan', 'split'"),
        ("fixed,moved", "a.mha,b.mha", "must have column image, or columns fixed and moving"),
        ("image,landmark", "a.mha,a_points.csv", "got 'landmark' .*did you mean 'landmarks'"),
        ("fixed,moving,fixed_label", "a.mha,b.mha,c.mha", "got 'fixed_label' .*did you mean 'fixed_labels'"),
        ("image", "a.mha", "must hold a pair of scans, got 1 scan"),
        ("fixed,moving", "a.mha,", "must name fixed and moving, got an empty field"),
        ("fixed,moving", "a.mha,a.mha", "a pair must be two scans, got a.mha twice"),
        ("fixed,moving,fixed_landmarks", "a.mha,b.mha,none.csv", "landmarks must be an existing CSV, got .*none.csv"),
        ("fixed,moving,fixed_landmarks", "a.mha,b.mha,bad.csv", "landmarks must be numbers, got .*bad.csv"),
        ("fixed,moving,fixed_landmarks", "a.mha,b.mha,raw.csv", "must have columns x, y, z"),
        (
            "fixed,moving,fixed_landmarks,moving_landmarks",
            "a.mha,b.mha,a_points.csv,one.csv",
            "equally many landmarks, got 2 and 1 for a.mha",
        ),
    ],
)
def test_a_csv_that_is_wrong(images, columns, row, message):
    write_csv(images / "bad.csv", "x,y,z", "1,2,three")
    write_csv(images / "raw.csv", "1,2,3", "4,5,6")
    write_csv(images / "one.csv", "x,y,z", "1,2,3")
    with pytest.raises(DataError, match=message):
        open_scans(write_csv(images / "table.csv", columns, row), "train")


def test_a_csv_without_splits_is_to_train_on(images):
    table = write_csv(images / "table.csv", "image", "a.mha", "b.mha")
    assert len(open_scans(table, "train")) == 2
    with pytest.raises(DataError, match="without column split holds only split 'train', got 'val'"):
        open_scans(table, "val")


# Learn2Reg


@pytest.fixture
def learn2reg(tmp_path):
    """Two cases of two times: the second is for validation, and as in the releases listed under training as well."""
    training = []
    for case in (1, 2, 3):
        for time in (0, 1):
            name = f"Lung_{case:04d}_{time:04d}"
            image = sitk.GetImageFromArray(spl_array(10 * case + time))
            image.SetSpacing((2, 2, 2))
            image.SetDirection((-1, 0, 0, 0, -1, 0, 0, 0, 1))  # as NIfTI with RAS axes
            (tmp_path / "imagesTr").mkdir(exist_ok=True)
            sitk.WriteImage(image, str(tmp_path / f"imagesTr/{name}.nii.gz"))
            labels = sitk.Cast(image > 450, sitk.sitkUInt8)
            (tmp_path / "labelsTr").mkdir(exist_ok=True)
            sitk.WriteImage(labels, str(tmp_path / f"labelsTr/{name}.nii.gz"))
            (tmp_path / "keypointsTr").mkdir(exist_ok=True)
            (tmp_path / f"keypointsTr/{name}.csv").write_text(f"1.000,2.000,{case}.000\n5.5,6.0,7.0\n")
            entry = {"image": f"./imagesTr/{name}.nii.gz", "label": f"./labelsTr/{name}.nii.gz"}
            training.append(entry | {"keypoints": f"./keypointsTr/{name}.nii.gz"})

    def pair(case: int) -> dict:
        return {s: f"./imagesTr/Lung_{case:04d}_{t:04d}.nii.gz" for s, t in (("fixed", 0), ("moving", 1))}

    content = {
        "name": "Lung",
        "pairings": "paired",
        "modality": {"0": "CT"},
        "numTraining": 6,
        "training": training,
        "training_paired_images": [pair(1), pair(2), pair(3)],
        "registration_val": [pair(2)],
        "registration_test": [pair(3)],
    }
    path = tmp_path / "Lung_dataset.json"
    path.write_text(json.dumps(content))
    return path, content


def test_learn2reg_keeps_validation_out_of_training(learn2reg):
    path, _ = learn2reg
    train, val, test = (open_scans(path, split) for split in ("train", "val", "test"))
    assert train.names == ["imagesTr/Lung_0001_0000.nii.gz", "imagesTr/Lung_0001_0001.nii.gz"]
    assert val.names == ["imagesTr/Lung_0002_0000.nii.gz", "imagesTr/Lung_0002_0001.nii.gz"]
    assert "Lung_0003_0000" in test.names[0]
    assert train.pairs == val.pairs == test.pairs == [(0, 1)]
    assert (train.n_labels, train.spacing_mm) == (2, 2.0)


def test_learn2reg_keypoints_are_voxels_of_the_file(learn2reg):
    path, _ = learn2reg
    scan = open_scans(path, "train")[0]
    # stored x and y run to the left and front: both are turned; (i, j, k) of an 8 x 12 x 10 file
    np.testing.assert_allclose(scan.points, [[1, 11 - 2, 7 - 1], [7, 11 - 6, 7 - 5.5]])
    stored = sitk.GetArrayFromImage(sitk.ReadImage(str(path.parent / "labelsTr/Lung_0001_0000.nii.gz")))
    assert scan.labels[1, 9, 6] == stored[1, 2, 1]
    np.testing.assert_array_equal(scan.labels, stored[:, ::-1, ::-1])


def test_learn2reg_unpaired_data_have_any_pairs(learn2reg):
    path, content = learn2reg
    path.write_text(json.dumps(content | {"pairings": "unpaired"}))
    assert open_scans(path, "train").pairs is None
    assert open_scans(path, "val").pairs == [(0, 1)]


@pytest.mark.parametrize(
    ("change", "split", "message"),
    [
        ({"registration_val": []}, "val", "must hold a scan, got 'val'"),
        ({"registration_val": [{"fixed": "a"}]}, "val", "every entry of 'registration_val' must name fixed and moving"),
        ({"training": [{"label": "x"}]}, "train", "every entry of 'training' must be an image or name its image"),
        ({}, "all", "must be train, val or test, got 'all'"),
        ({"registration_val": [{"fixed": "x.mha", "moving": "y.mha"}]}, "val", r"got .*x.mha \(not found\)"),
    ],
)
def test_learn2reg_that_is_wrong(learn2reg, change, split, message):
    path, content = learn2reg
    path.write_text(json.dumps(content | change))
    with pytest.raises(DataError, match=message):
        open_scans(path, split)


def test_a_json_of_no_known_layout(tmp_path):
    (tmp_path / "a.json").write_text('{"images": []}')
    with pytest.raises(DataError, match=r"one of the keys subsets, training, registration_val, got .*a.json"):
        open_scans(tmp_path / "a.json", "train")
    (tmp_path / "a.json").write_text("{")
    with pytest.raises(DataError, match=r"must be valid JSON, got .*a.json"):
        open_scans(tmp_path / "a.json", "train")


# Recursive Cascaded Networks

SIZE = (8, 9, 10)


@pytest.fixture
def rcn(tmp_path):
    """datasets/brain.json beside its HDF5 files, whose paths start at the folder above, as published."""
    (tmp_path / "datasets").mkdir()
    for file, groups in (("adni", ["1", "2", "3"]), ("lpba", ["S01", "S02"]), ("msd", ["pancreas/1", "pancreas/2"])):
        with h5py.File(tmp_path / f"datasets/{file}.h5", "w") as stored:
            for k, group in enumerate(groups):
                made = stored.create_group(group)
                made["volume"] = np.full(SIZE, 10 * k + 7, np.uint8)
                if file == "lpba":
                    values = np.zeros(SIZE, np.uint8)
                    values[0, 0, 0], values[1, 1, 1], values[2, 2, 2] = 21, 182, 99
                    made["segmentation"] = values
                if file == "msd":
                    made["segmentation"] = (np.arange(720) // 90 * 36).astype(np.uint8).reshape(SIZE)
                    made["point"] = np.array([[1, 2, 3], [-1, -1, -1]] * 3)
    content = {
        "files": {name: {"path": f"datasets/{name}.h5", "type": "HDF5"} for name in ("adni", "lpba")}
        | {"/": {"path": "datasets/msd.h5", "type": "HDF5"}},
        "image_size": list(SIZE),
        "image_type": "brain",
        "schemes": {"1": {"combine-train": 0.75, "liver": 0.25}, "2": {"lpba-val": 1.0}, "lits": {"liver": 1.0}},
        "subsets": {
            "combine-train": ["adni/1", "adni/2", "adni/3"],
            "lpba-val": ["lpba/S01", "lpba/S02"],
            "liver": ["pancreas/1", "pancreas/2"],
        },
    }
    path = tmp_path / "datasets/brain.json"
    path.write_text(json.dumps(content))
    return path, content


def test_rcn_schemes_draw_subsets_by_their_share(rcn):
    path, _ = rcn
    opened = open_scans(path, "train")
    assert opened.names == ["adni/1", "adni/2", "adni/3", "pancreas/1", "pancreas/2"]
    assert (opened.pairs, opened.spacing_mm) == (None, 1.0)
    np.testing.assert_array_equal(opened[1].image, np.full(SIZE, 17))
    rng = np.random.default_rng(0)
    drawn = [opened.draw_pair(rng) for _ in range(2000)]
    assert all(f != m and (f < 3) == (m < 3) for f, m in drawn)  # never across subsets
    assert np.mean([f < 3 for f, _ in drawn]) == pytest.approx(0.75, abs=0.03)
    assert open_scans(path, "val").names == ["lpba/S01", "lpba/S02"]
    assert open_scans(path, "lits").names == open_scans(path, "train", scheme="liver").names
    assert open_scans(path, "train", spacing_mm=1.5).spacing_mm == 1.5


def test_rcn_segmentation_and_points(rcn):
    path, content = rcn
    scan = open_scans(path, "lits")[0]
    # without class values: one structure above 128
    np.testing.assert_array_equal(scan.labels.reshape(8, 90)[:, 0], [0, 0, 0, 0, 1, 1, 1, 1])  # 0, 36 ... 252
    np.testing.assert_array_equal(scan.points[0], [1, 2, 3])
    assert np.isnan(scan.points[1]).all()
    assert open_scans(path, "lits").n_labels == 2
    path.write_text(json.dumps(content | {"segmentation_class_value": {"21": 21, "182": 182}}))
    opened = open_scans(path, "val")
    assert opened.n_labels == 183
    assert (opened[0].labels[0, 0, 0], opened[0].labels[1, 1, 1], opened[0].labels[2, 2, 2]) == (21, 182, 0)


def test_rcn_atlas_is_the_fixed_scan(rcn):
    path, content = rcn
    path.write_text(json.dumps(content | {"atlas": "lpba/S01"}))
    opened = open_scans(path, "train")
    assert opened.names[5] == "lpba/S01"
    assert opened.pairs == [(5, k) for k in range(5)]
    rng = np.random.default_rng(0)
    drawn = [opened.draw_pair(rng) for _ in range(400)]
    assert set(drawn) == set(opened.pairs)
    assert np.mean([m < 3 for _, m in drawn]) == pytest.approx(0.75, abs=0.06)
    val = open_scans(path, "val")  # the atlas is listed itself: it does not move onto itself
    assert (val.names, val.pairs) == (["lpba/S01", "lpba/S02"], [(0, 1)])


def test_rcn_paired_scans_follow_each_other(rcn):
    path, _ = rcn
    opened = open_scans(path, "test", scheme="lits:paired")
    assert opened.pairs == [(0, 1), (1, 0)]
    with pytest.raises(DataError, match="needs an even number of scans, got 3"):
        open_scans(path, "test", scheme="combine-train:paired")


@pytest.mark.parametrize(
    ("change", "split", "message"),
    [
        ({}, "sliver", "scheme must be one of 1, 2, lits or a subset of combine-train, lpba-val, liver, got 'sliver'"),
        ({"schemes": {"1": {"train": 1.0}}}, "train", "must name subsets with scans, got 'train' in scheme '1'"),
        ({"schemes": []}, "train", "must have an object 'schemes'"),
        ({"image_size": [8, 9, 11]}, "val", r"every volume must have the image_size \(8, 9, 11\), got \(8, 9, 10\)"),
        (
            {"subsets": {"liver": ["pancreas/9", "pancreas/1"]}},
            "liver",
            "with a volume, got none for 'pancreas/9'",
        ),
        ({"files": {"adni": {"path": "x.h5"}}, "atlas": "adni/1"}, "combine-train", r"got .*x.h5 \(not found\)"),
        ({"files": {"adni": {"path": "brain.json"}}}, "combine-train", "must be readable HDF5, got .*brain.json"),
        ({"files": {"adni": {"path": "adni.h5"}}}, "val", "must name one of the files adni, got 'lpba/S01'"),
        ({"files": {"adni": "adni.h5"}}, "val", "every entry of 'files' must give a path, got 'adni.h5'"),
        ({"subsets": {"liver": ["adni/1", "adni/1"]}}, "liver", "must list an entry once, got repeats in 'liver'"),
        ({"subsets": {"liver": ["adni/1"]}}, "liver", "must hold a pair of scans, got 1 scan"),
    ],
)
def test_rcn_that_is_wrong(rcn, change, split, message):
    path, content = rcn
    path.write_text(json.dumps(content | change))
    with pytest.raises(DataError, match=message):
        open_scans(path, split)


# cache and prepared files


def same_scans(a, b) -> bool:
    return all(
        x.name == y.name
        and all(
            (p is None and q is None) or np.array_equal(p, q, equal_nan=p.dtype.kind == "f")
            for p, q in ((getattr(x, what), getattr(y, what)) for what in prepared.ARRAYS)
        )
        for x, y in zip(a, b, strict=True)
    )


def test_a_cache_is_made_once_and_again_when_the_source_changes(folder, tmp_path_factory):
    cache = tmp_path_factory.mktemp("cache")
    plain = open_scans(folder, "train")
    first = open_scans(folder, "train", cache=cache)
    assert same_scans(first, plain)
    assert (first.identity, first.n_labels, first.names) == (plain.identity, plain.n_labels, plain.names)
    (target,) = cache.iterdir()
    made = target.stat().st_mtime_ns
    open_scans(folder, "train", cache=cache)
    assert target.stat().st_mtime_ns == made
    write_image(folder / "t1/b.nii.gz", spl_array(77), orientation="PSR")
    changed = open_scans(folder, "train", cache=cache)
    assert list(cache.iterdir()) == [target]
    assert not same_scans(changed, plain)
    assert same_scans(changed, open_scans(folder, "train"))
    target.write_bytes(b"damaged")
    assert same_scans(open_scans(folder, "train", cache=cache), changed)
    open_scans(folder, "train", spacing_mm=4, cache=cache)
    assert len(list(cache.iterdir())) == 2


@pytest.mark.parametrize("suffix", [".nii.gz", ".nii", ".nrrd"])
@pytest.mark.parametrize("kind", [np.int16, np.float32])
def test_a_file_that_is_cut_off_is_named_and_nothing_half_written_is_left(tmp_path, suffix, kind):
    for name in "ab":
        write_image(tmp_path / f"{name}{suffix}", spl_array(3).astype(kind))
    whole = (tmp_path / f"a{suffix}").read_bytes()
    (tmp_path / f"a{suffix}").write_bytes(whole[:-400])  # the header is whole, voxels are missing
    table = write_csv(tmp_path / "table.csv", "image", f"a{suffix}", f"b{suffix}")
    with pytest.raises(DataError, match=f"a{suffix}"):
        open_scans(table, "train", cache=tmp_path / "cache")
    assert list((tmp_path / "cache").iterdir()) == []


def test_a_nifti_file_with_a_scale_is_whole(tmp_path):
    for name in "ab":
        path = write_image(tmp_path / f"{name}.nii", (np.arange(960) // 4).astype(np.uint8).reshape(10, 12, 8))
        content = bytearray(path.read_bytes())
        content[112:116] = np.float32(0.5).tobytes()  # scl_slope: one byte a voxel on disk, floats when read
        path.write_bytes(content)
    opened = open_scans(write_csv(tmp_path / "table.csv", "image", "a.nii", "b.nii"), "train")
    assert opened[0].image.max() == 255


def test_a_prepared_file_takes_the_place_of_its_source(rcn, tmp_path, capsys, monkeypatch):
    path, content = rcn
    path.write_text(json.dumps(content | {"atlas": "lpba/S01"}))
    out = tmp_path / "prepared.npz"
    command = ["prepare_data", "--source", str(path), "--split", "train", "val", "--out", str(out)]
    monkeypatch.setattr(sys, "argv", command)
    prepare_data.main()
    assert f"{out}: 6 train, 2 val scans at 1 mm, 0.0 MiB" in capsys.readouterr().out
    for split in ("train", "val"):
        source, stored = open_scans(path, split), open_scans(out, split)
        assert same_scans(source, stored)
        assert (stored.pairs, stored.groups, stored.identity) == (source.pairs, source.groups, source.identity)
        assert stored.draw_pair(np.random.default_rng(3)) == source.draw_pair(np.random.default_rng(3))
    with pytest.raises(DataError, match="must be one of train, val, got 'test'"):
        open_scans(out, "test")
    with pytest.raises(DataError, match=r"was prepared at 1 mm, got spacing_mm 2"):
        open_scans(out, "train", spacing_mm=2)
    np.savez(tmp_path / "other.npz", images=np.zeros(3))
    with pytest.raises(DataError, match=r"must be made by Training.prepare_data, got .*other.npz"):
        open_scans(tmp_path / "other.npz", "train")


def test_prepare_data_says_what_is_wrong(folder, capsys, monkeypatch):
    for extra, message in ((["--out", "x.h5"], "out must end in .npz, got x.h5"), (["--split", "all"], "got 'all'")):
        monkeypatch.setattr(sys, "argv", ["prepare_data", "--source", str(folder), "--out", "x.npz", *extra])
        with pytest.raises(SystemExit):
            prepare_data.main()
        assert message in capsys.readouterr().err


def test_scans_are_kept_up_to_a_limit_and_can_be_sent_to_other_processes(folder, monkeypatch):
    monkeypatch.setattr(scan_set, "KEEP_BYTES", 3000)  # one scan of 10 x 12 x 8 with labels is 1920
    opened = open_scans(folder, "train")
    assert opened[0] is opened[0]
    assert opened[1] is not opened[1]
    sent = pickle.loads(pickle.dumps(opened))
    assert same_scans(sent, opened)


def test_rcn_sets_can_be_sent_to_other_processes(rcn):
    opened = open_scans(rcn[0], "train", cache=rcn[0].parent / "cache")
    assert not (rcn[0].parent / "cache").exists()  # HDF5 is read where it lies
    assert same_scans(pickle.loads(pickle.dumps(opened)), opened)


def test_tables_may_start_with_a_byte_order_mark(images):
    path = images / "table.csv"
    path.write_text("image\na.mha\nb.mha\n", encoding="utf-8-sig")
    assert len(open_scans(path, "train")) == 2
    assert next(csv.reader(path.open(encoding="utf-8")))[0] == "\ufeffimage"
