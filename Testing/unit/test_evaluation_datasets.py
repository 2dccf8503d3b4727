"""Readers of the evaluation's data sets, on tiny files in the published layouts."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import SimpleITK as sitk

from LDRCore.errors import RegistrationError
from Training.evaluation import datasets
from Training.evaluation.config import DataSet

h5py = pytest.importorskip("h5py", reason="the JSON + HDF5 layout needs the package h5py")


def scan(seed: int = 0, origin=(3.0, -4.0, 5.0)) -> sitk.Image:
    image = sitk.GetImageFromArray(np.random.default_rng(seed).integers(1, 200, (8, 9, 10)).astype(np.int16))
    image.SetOrigin(origin)
    image.SetSpacing((2.0, 1.0, 1.5))
    return image


def labels(image: sitk.Image) -> sitk.Image:
    values = np.zeros(sitk.GetArrayViewFromImage(image).shape, np.uint8)
    values[2:6, 3:7, 2:8] = 4
    values[3, 4, 5] = 9
    out = sitk.GetImageFromArray(values)
    out.CopyInformation(image)
    return out


@pytest.fixture
def ixi(tmp_path) -> DataSet:
    lines = ["subject,split,image,labels"]
    for n, name in enumerate(("a", "b")):
        sitk.WriteImage(scan(n), str(tmp_path / f"{name}.nii.gz"))
        sitk.WriteImage(labels(scan(n)), str(tmp_path / f"{name}-l.nii.gz"))
        lines.append(f"{name},test,{name}.nii.gz,{name}-l.nii.gz")
    (tmp_path / "manifest.csv").write_text("\n".join(lines) + "\n")
    (tmp_path / "pairs.csv").write_text("fixed,moving,pose_seed\na,b,7\nb,a,\n")
    return DataSet("x", "ixi", str(tmp_path), str(tmp_path / "pairs.csv"), stripped=True)


def test_ixi_strips_by_labels_and_poses_only_the_moving_image(ixi):
    first, second = datasets.list_pairs(ixi)
    assert (first.name, first.pose_seed, second.pose_seed) == ("a<-b pose 7", 7, None)
    loaded = datasets.load(ixi, first)
    fixed = sitk.GetArrayFromImage(loaded.fixed)
    inside = sitk.GetArrayFromImage(labels(scan())) > 0
    assert np.array_equal(fixed > 0, inside)
    assert loaded.fixed.GetOrigin() == pytest.approx((3, -4, 5))
    assert loaded.moving.GetDirection() != loaded.fixed.GetDirection()
    assert loaded.moving.GetDirection() == loaded.truth.moving_labels.GetDirection()
    turn = np.array(loaded.moving.GetDirection()).reshape(3, 3)
    assert turn @ turn.T == pytest.approx(np.eye(3), abs=1e-9)
    unposed = datasets.load(ixi, second)
    assert np.array_equal(sitk.GetArrayFromImage(unposed.fixed), sitk.GetArrayFromImage(loaded.moving))
    assert unposed.moving.GetDirection() == scan().GetDirection()


def test_ixi_names_a_subject_that_is_not_there(ixi):
    Path(ixi.pairs).write_text("fixed,moving,pose_seed\na,c,0\n")
    with pytest.raises(RegistrationError, match="must be in the manifest, got 'c'"):
        datasets.list_pairs(ixi)
    Path(ixi.pairs).write_text("fixed,pose_seed\na,0\n")
    with pytest.raises(RegistrationError, match="must have a column 'moving'"):
        datasets.list_pairs(ixi)
    Path(ixi.pairs).write_text("fixed,moving,pose_seed\n")
    with pytest.raises(RegistrationError, match="must list at least one pair"):
        datasets.list_pairs(ixi)
    Path(ixi.pairs).unlink()
    with pytest.raises(RegistrationError, match="the list of pairs must exist"):
        datasets.list_pairs(ixi)


@pytest.mark.parametrize("frame", ["lps", "ras", "voxel"])
def test_csv_with_landmarks_of_any_frame(tmp_path, frame):
    image = scan()
    sitk.WriteImage(image, str(tmp_path / "f.nrrd"))
    sitk.WriteImage(labels(image), str(tmp_path / "l.nrrd"))
    index = (4, 5, 6)
    lps = image.TransformIndexToPhysicalPoint(index)
    point = {"lps": lps, "ras": (-lps[0], -lps[1], lps[2]), "voxel": index}[frame]
    (tmp_path / "p.csv").write_text("x,y,z\n" + ",".join(map(str, point)) + "\n")
    (tmp_path / "pairs.csv").write_text(
        "fixed,moving,fixed_labels,moving_labels,fixed_landmarks,moving_landmarks\n"
        "f.nrrd,f.nrrd,l.nrrd,l.nrrd,p.csv,p.csv\n"
    )
    data = DataSet("x", "csv", str(tmp_path), str(tmp_path / "pairs.csv"), landmarks=frame)
    (pair,) = datasets.list_pairs(data)
    truth = datasets.load(data, pair).truth
    assert truth.fixed_landmarks_lps == pytest.approx(np.array([lps]))
    assert set(np.unique(sitk.GetArrayFromImage(truth.moving_labels))) == {0, 4, 9}
    (tmp_path / "p.csv").write_text("900,900,900\n")
    with pytest.raises(RegistrationError, match="fixed landmarks must lie inside their image, got 1 of 1 outside"):
        datasets.load(data, pair)
    (tmp_path / "f.nrrd").unlink()
    with pytest.raises(RegistrationError, match="image must be an existing file"):
        datasets.load(data, pair)


def test_learn2reg_finds_labels_and_landmarks_beside_images(tmp_path):
    for folder in ("imagesTr", "labelsTr", "keypointsTr"):
        (tmp_path / folder).mkdir()
    names = [f"OASIS_000{n}_0000" for n in (1, 2)]
    for name in names:
        sitk.WriteImage(scan(), str(tmp_path / "imagesTr" / f"{name}.nii.gz"))
        sitk.WriteImage(labels(scan()), str(tmp_path / "labelsTr" / f"{name}.nii.gz"))
        (tmp_path / "keypointsTr" / f"{name}.csv").write_text("1.5,2,3\n4,5,6\n")
    listed = [{"fixed": f"./imagesTr/{names[0]}.nii.gz", "moving": f"./imagesTr/{names[1]}.nii.gz"}]
    path = tmp_path / "OASIS_dataset.json"
    path.write_text(json.dumps({"name": "OASIS", "training": [], "registration_val": listed}))
    data = DataSet("x", "learn2reg", str(tmp_path), landmarks="voxel")
    (pair,) = datasets.list_pairs(data)
    assert pair.name == f"{names[0]}<-{names[1]}"
    truth = datasets.load(data, pair).truth
    expected = scan().TransformContinuousIndexToPhysicalPoint((1.5, 2, 3))
    assert truth.fixed_landmarks_lps[0] == pytest.approx(expected)
    assert truth.moving_labels is not None

    path.write_text(json.dumps({"validation": listed, "training": []}))  # LUMIR's key; files without labels
    for file in (tmp_path / "labelsTr").iterdir():
        file.unlink()
    (pair,) = datasets.list_pairs(DataSet("x", "learn2reg", str(path), "validation"))
    assert datasets.load(DataSet("x", "learn2reg", str(path), landmarks="voxel"), pair).truth.fixed_labels is None
    with pytest.raises(RegistrationError, match=r"must list pairs with fixed and moving under test, got the keys"):
        datasets.list_pairs(DataSet("x", "learn2reg", str(path), "test"))
    path.unlink()
    with pytest.raises(RegistrationError, match=r"must hold one \*dataset.json, got 0"):
        datasets.list_pairs(data)


@pytest.fixture
def rcn(tmp_path) -> Path:
    """The published layout: JSON in datasets/, paths from the folder above, one group a scan."""
    folder = tmp_path / "datasets"
    folder.mkdir()
    rng = np.random.default_rng(0)
    for file, groups in {"lits_val": ("1", "2", "3"), "msd": ("liver/7",), "lpba_val": ("S01", "S02")}.items():
        with h5py.File(folder / f"{file}.h5", "w") as stream:
            for name in groups:
                group = stream.create_group(name)
                group["volume"] = rng.integers(0, 255, (16, 16, 16)).astype(np.uint8)
                segmentation = np.zeros((16, 16, 16), np.uint8)
                segmentation[4:9, 5:10, 6:12] = 21 if file == "lpba_val" else 255
                segmentation[10:12, 5:10, 6:12] = 100  # a tumour, or a value that does not count
                group["segmentation"] = segmentation
                group["point"] = np.array([[1, 2, 3], [-1, -1, -1]], np.float32)
    files = {
        "lits": {"type": "HDF5", "path": "datasets/lits_val.h5"},
        "lpba": {"type": "HDF5", "path": "datasets/lpba_val.h5"},
        "/": {"type": "HDF5", "path": "datasets/msd.h5"},
    }
    liver = {
        "files": files,
        "image_size": [16, 16, 16],
        "schemes": {"lits": {"lits-val": 1.0}},
        "subsets": {
            "lits-val": ["lits/1", "lits/2", "lits/3"],
            "train": ["liver/7", "lits/1"],
            "pigs-val": ["lits/3", "lits/1"],
        },
    }
    (folder / "liver.json").write_text(json.dumps(liver))
    brain = {
        "files": files,
        "image_size": [16, 16, 16],
        "schemes": {},
        "subsets": {"lpba-val": ["lpba/S01", "lpba/S02"]},
        "atlas": "lpba/S01",
    }
    (folder / "brain.json").write_text(json.dumps(brain | {"segmentation_class_value": {"21": 21, "22": 22}}))
    return folder


def test_rcn_pairs_masks_and_points(rcn):
    data = DataSet("x", "rcn", str(rcn / "liver.json"), "lits")
    pairs = datasets.list_pairs(data)
    assert len(pairs) == 6
    assert pairs[0].name == "lits/1<-lits/2"
    loaded = datasets.load(data, pairs[0])
    assert loaded.fixed.GetSpacing() == (1, 1, 1)
    mask = sitk.GetArrayFromImage(loaded.truth.fixed_labels)
    assert np.unique(mask).tolist() == [0, 1]
    assert mask.sum() == 5 * 5 * 6  # the value 100 is below 128
    assert loaded.truth.fixed_landmarks_lps.tolist() == [[3, 2, 1]]  # tensor order (1, 2, 3); the missing one left out
    data = DataSet("x", "rcn", str(rcn / "liver.json"), "train")
    scans = datasets.list_pairs(data)
    assert [datasets.load(data, p).fixed.GetSize() for p in scans] == [(16, 16, 16)] * 2


def test_rcn_pairs_within_a_subject_and_with_an_atlas(rcn):
    paired = datasets.list_pairs(DataSet("x", "rcn", str(rcn / "liver.json"), "pigs-val", intra_subject=True))
    assert [p.name for p in paired] == ["lits/3<-lits/1", "lits/1<-lits/3"]
    data = DataSet("x", "rcn", str(rcn / "brain.json"), "lpba-val")
    (pair,) = datasets.list_pairs(data)
    assert pair.name == "lpba/S01<-lpba/S02"
    assert np.unique(sitk.GetArrayFromImage(datasets.load(data, pair).truth.fixed_labels)).tolist() == [0, 21]


def test_rcn_refusals(rcn):
    with pytest.raises(RegistrationError, match=r"scheme must be one of lits or a subset of .*, got 'sliver'"):
        datasets.list_pairs(DataSet("x", "rcn", str(rcn / "liver.json"), "sliver"))
    data = DataSet("x", "rcn", str(rcn / "liver.json"), "lits")
    (rcn / "lits_val.h5").unlink()
    with pytest.raises(RegistrationError, match=r"every file of an RCN \.json must exist, got .*lits_val"):
        datasets.list_pairs(data)
    (rcn / "liver.json").write_text("{")
    with pytest.raises(RegistrationError, match="JSON must be readable"):
        datasets.list_pairs(data)
