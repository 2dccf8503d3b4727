"""Reading images: every accepted form, and one clear sentence for every other."""

from __future__ import annotations

import numpy as np
import pytest
import SimpleITK as sitk

from LDRCore import RegistrationError
from LDRCore.io import images


def image(array: np.ndarray) -> sitk.Image:
    return sitk.GetImageFromArray(array)


GOOD = np.arange(8 * 9 * 10, dtype=np.float32).reshape(8, 9, 10)


def test_array_with_affine_is_nibabels_convention():
    affine = np.array([[0, -2.0, 0, 10], [3.0, 0, 0, -20], [0, 0, 1.5, 5], [0, 0, 0, 1]])
    array = GOOD.transpose(2, 1, 0)  # [i, j, k]
    loaded = images.load((array, affine), "fixed image")
    index = (4, 3, 2)
    ras = (affine @ [*index, 1])[:3]
    assert loaded.TransformIndexToPhysicalPoint(index) == pytest.approx((-ras[0], -ras[1], ras[2]))
    assert loaded[index] == array[index]


def test_four_dimensions_with_one_frame_are_three():
    four = sitk.JoinSeries([image(GOOD)])
    assert images.load(four, "fixed image").GetDimension() == 3


def test_a_folder_with_one_dicom_series_is_read(tmp_path):
    write_series(tmp_path, "1.2.3")
    loaded = images.load(tmp_path, "fixed image")
    assert loaded.GetSize() == (10, 9, 8)
    assert loaded.GetSpacing() == pytest.approx((1.0, 1.0, 2.0))


def write_series(folder, uid: str) -> None:
    volume = sitk.Cast(image(GOOD), sitk.sitkInt16)
    for k in range(8):
        piece = volume[:, :, k]
        tags = {
            "0020|000e": uid,
            "0020|000d": "1.2",
            "0020|0032": f"0\\0\\{2 * k}",
            "0020|0037": "1\\0\\0\\0\\1\\0",
            "0020|0013": str(k),
            "0008|0060": "MR",
            "0018|0050": "2",
        }
        for tag, value in tags.items():
            piece.SetMetaData(tag, value)
        writer = sitk.ImageFileWriter()
        writer.KeepOriginalImageUIDOn()
        writer.SetFileName(str(folder / f"{uid}-{k}.dcm"))
        writer.Execute(piece)


NAN, INFINITE = GOOD.copy(), GOOD.copy()
NAN[0, 0, :3] = np.nan
INFINITE[1, 1, 1] = np.inf


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("no/such/file.nii.gz", r"fixed image must be an existing file, got .*not found"),
        (image(GOOD[0]), r"fixed image must be 3D, got 2D of size \(10, 9\)"),
        (sitk.JoinSeries([image(GOOD), image(GOOD)]), r"must be 3D, got 4D of size .*: give one of its 2 volumes$"),
        (sitk.GetImageFromArray(np.zeros((8, 9, 10, 3), np.uint8), isVector=True), r"one value a voxel, got 3"),
        (image(NAN), r"only finite values, got 3 voxels"),
        (image(INFINITE), r"only finite values, got 1 voxels"),
        (image(np.full((8, 9, 10), 7, np.int16)), r"constant image \(every voxel 7\)"),
        (image(GOOD[:2]), r"at least 4 voxels along every axis, got size \(10, 9, 2\)"),
        ((GOOD, np.eye(3)), r"affine of fixed image must be 4x4, got \(3, 3\)"),
        ((GOOD, np.zeros((4, 4))), r"must be invertible"),
        ((GOOD[0], np.eye(4)), r"must be 3D, got an array of shape \(9, 10\)"),
        (42, r"a path, a SimpleITK image or \(array, affine\), got int"),
    ],
)
def test_one_sentence_for_what_cannot_be_registered(source, message):
    with pytest.raises(RegistrationError, match=message) as caught:
        images.load(source, "fixed image")
    assert "\n" not in str(caught.value)


def test_an_unreadable_file_is_named(tmp_path):
    path = tmp_path / "broken.nii.gz"
    path.write_bytes(b"not an image")
    with pytest.raises(RegistrationError, match=r"must be an image that SimpleITK can read.*broken\.nii\.gz"):
        images.load(path, "moving image")


def test_dicom_folders_that_cannot_be_used(tmp_path):
    with pytest.raises(RegistrationError, match=r"one DICOM series, got .* \(none\)"):
        images.load(tmp_path, "fixed image")
    write_series(tmp_path, "1.2.3")
    write_series(tmp_path, "1.2.4")
    with pytest.raises(RegistrationError, match=r"one DICOM series, got .* with 2: .*convert it to NIfTI"):
        images.load(tmp_path, "fixed image")


def test_masks_must_fit_and_hold_something():
    reference = image(GOOD)
    assert images.load_mask(None, reference, "fixed mask") is None
    inside = images.load_mask(image((GOOD > 100).astype(np.uint8)), reference, "fixed mask")
    assert inside is not None
    assert inside.sum() == (GOOD > 100).sum()
    with pytest.raises(RegistrationError, match="above 0, got an empty mask"):
        images.load_mask(image(np.zeros_like(GOOD)), reference, "fixed mask")
    with pytest.raises(RegistrationError, match=r"grid of its image.*got size \(10, 9, 7\)"):
        images.load_mask(image(GOOD[:7]), reference, "fixed mask")
    shifted = image(GOOD)
    shifted.SetOrigin((5, 0, 0))
    with pytest.raises(RegistrationError, match="another origin or direction"):
        images.load_mask(shifted, reference, "fixed mask")


@pytest.mark.parametrize("suffix", [".nii", ".nii.gz"])
@pytest.mark.parametrize("kind", [np.int16, np.float32])
def test_a_nifti_file_that_was_cut_off_is_refused(tmp_path, suffix, kind):
    values = np.random.default_rng(0).integers(1, 1000, (20, 22, 24)).astype(kind)
    path = tmp_path / f"scan{suffix}"
    sitk.WriteImage(sitk.GetImageFromArray(values), str(path))
    assert np.array_equal(sitk.GetArrayFromImage(images.load(path, "fixed image")), values)
    path.write_bytes(path.read_bytes()[:-500])
    with pytest.raises(RegistrationError, match=r"fixed image must be a whole file, got .* \(cut off or damaged\)"):
        images.load(path, "fixed image")
