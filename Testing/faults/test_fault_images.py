"""Images that are damaged, misnamed or oddly placed are read rightly or refused in one sentence."""

from __future__ import annotations

import gzip
import json
import re
from pathlib import Path

import numpy as np
import pytest
import SimpleITK as sitk

import LDRCore
from LDRCore import RegistrationError, cli
from LDRCore.io import images, writing
from LDRCore.io.transforms import Context

SHAPE = (10, 11, 12)
VALUES = np.random.default_rng(1).normal(100, 20, SHAPE).astype(np.float32)
WHOLE = np.round(VALUES * 50).astype(np.int16)
DIRECTION = (0.8, -0.6, 0.0, 0.6, 0.8, 0.0, 0.0, 0.0, 1.0)


def ldr(*arguments: object) -> int:
    return cli.main([str(a) for a in arguments])


def image_of(values: np.ndarray) -> sitk.Image:
    image = sitk.GetImageFromArray(values)
    image.SetSpacing((1.0, 1.5, 2.0))
    image.SetOrigin((5.0, -6.0, 7.0))
    image.SetDirection(DIRECTION)
    return image


def refused(source: object, message: str) -> None:
    with pytest.raises(RegistrationError, match=message) as caught:
        images.load(source, "fixed image")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("suffix", ["nii", "nii.gz", "img", "mha", "mhd", "nrrd", "nhdr", "vtk", "gipl"])
@pytest.mark.parametrize("compressed", [False, True])
def test_nan_is_found_in_every_format(tmp_path, suffix, compressed):
    name = f"a.{suffix}"
    values = VALUES.copy()
    values[3, 4, 5], values[0, 0, 0] = np.nan, np.inf
    sitk.WriteImage(image_of(values), str(tmp_path / name), compressed)
    refused(tmp_path / name, "only finite values, got 2 voxels")
    if name == "a.img":
        refused(tmp_path / "a.hdr", "only finite values, got 2 voxels")


@pytest.mark.parametrize("order", ["<", ">"])
@pytest.mark.parametrize("kind", [np.float32, np.float64, np.int16])
def test_a_pair_of_header_and_values_is_read_as_written(tmp_path, order, kind):
    """Of a big-endian pair all numbers are swapped by hand: those of the header from NIfTI's table of types."""
    sitk.WriteImage(image_of(VALUES.astype(kind)), str(tmp_path / "a.img"))
    if order == ">":
        fields = [
            ("i4", 0, 1),
            ("i4", 32, 1),
            ("i2", 36, 1),
            ("i2", 40, 8),
            ("f4", 56, 3),
            ("i2", 68, 4),
            ("f4", 76, 8),
        ]
        fields += [("f4", 108, 3), ("i2", 120, 1), ("f4", 124, 4), ("i4", 140, 2), ("i2", 252, 2), ("f4", 256, 18)]
        header = bytearray((tmp_path / "a.hdr").read_bytes())
        for code, start, count in fields:
            numbers = np.frombuffer(header, "<" + code, count, start)
            header[start : start + numbers.nbytes] = numbers.astype(">" + code).tobytes()
        (tmp_path / "a.hdr").write_bytes(header)
        stored = np.frombuffer((tmp_path / "a.img").read_bytes(), np.dtype(kind).newbyteorder("<"))
        (tmp_path / "a.img").write_bytes(stored.astype(np.dtype(kind).newbyteorder(">")).tobytes())
    for name in ("a.img", "a.hdr"):
        loaded = images.load(tmp_path / name, "fixed image")
        assert np.array_equal(sitk.GetArrayFromImage(loaded), VALUES.astype(kind))
        assert np.allclose(loaded.GetDirection(), DIRECTION, atol=1e-6)


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-200])


def flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[-len(data) // 3] ^= 0x55
    path.write_bytes(data)


@pytest.mark.parametrize(
    ("name", "compressed", "values_in", "damage"),
    [
        *((name, False, name, cut) for name in ("a.nii", "a.mha", "a.nrrd", "a.vtk", "a.gipl")),
        *((name, True, name, damage) for name in ("a.nii.gz", "a.mha", "a.nrrd") for damage in (cut, flip)),
        ("a.img", False, "a.img", cut),
        ("a.hdr", False, "a.img", cut),
        ("a.mhd", False, "a.raw", cut),
        *(("a.mhd", True, "a.zraw", damage) for damage in (cut, flip)),
        *(("a.nhdr", True, "a.raw.gz", damage) for damage in (cut, flip)),
    ],
)
@pytest.mark.parametrize("kind", [np.float32, np.int16])
def test_what_is_cut_off_or_damaged_is_refused(tmp_path, capfd, name, compressed, values_in, damage, kind):
    sitk.WriteImage(image_of(VALUES.astype(kind)), str(tmp_path / name), compressed)
    damage(tmp_path / values_in)
    capfd.readouterr()
    message = "must be a whole file" if name != "a.nrrd" or compressed else "fread got only"
    refused(tmp_path / name, message)
    assert capfd.readouterr() == ("", "")


@pytest.mark.parametrize(("name", "values_in"), [("a.mhd", "a.raw"), ("a.mhd", "a.zraw"), ("a.nhdr", "a.raw.gz")])
def test_values_that_are_missing_are_named(tmp_path, capfd, name, values_in):
    sitk.WriteImage(image_of(VALUES), str(tmp_path / name), values_in != "a.raw")
    (tmp_path / values_in).unlink()
    refused(tmp_path / name, rf"must lie beside the file of its values, got no .*{values_in}")
    assert capfd.readouterr().err == ""


@pytest.mark.parametrize(
    ("written", "name", "compressed"),
    [
        ("a.nii", "b.nii.gz", False),
        ("a.nii.gz", "b.nii", True),
        ("a.nii.gz", "scan", True),
        ("a.nii", "b.mha", False),
        ("a.nrrd", "b.nii", True),
        ("a.mha", "b.nrrd", True),
        ("a.mha", "b", False),
    ],
)
@pytest.mark.parametrize("values", [VALUES, WHOLE], ids=["float", "int"])
def test_the_content_decides_on_the_format(tmp_path, written, name, compressed, values):
    sitk.WriteImage(image_of(values), str(tmp_path / written), compressed)
    (tmp_path / written).rename(tmp_path / name)
    loaded = images.load(tmp_path / name, "fixed image")
    assert np.array_equal(sitk.GetArrayFromImage(loaded), values)
    assert np.allclose(loaded.GetDirection(), DIRECTION, atol=1e-6)
    cut(tmp_path / name)
    refused(tmp_path / name, rf"got {tmp_path / name} ")


@pytest.mark.parametrize("values", [VALUES, WHOLE], ids=["float", "int"])
def test_bytes_after_a_compressed_file_are_passed_over_and_parts_are_joined(tmp_path, values):
    sitk.WriteImage(image_of(values), str(tmp_path / "a.nii"))
    content = (tmp_path / "a.nii").read_bytes()
    halves = gzip.compress(content[:1000]) + gzip.compress(content[1000:])
    for data in (halves, halves + b"junk and more", halves + bytes(300)):
        (tmp_path / "a.nii.gz").write_bytes(data)
        assert np.array_equal(sitk.GetArrayFromImage(images.load(tmp_path / "a.nii.gz", "fixed image")), values)


def test_a_header_that_asks_for_more_memory_than_its_file_can_fill(tmp_path):
    sitk.WriteImage(image_of(VALUES), str(tmp_path / "a.nii"))
    header = bytearray((tmp_path / "a.nii").read_bytes())
    header[42:48] = np.array([20000] * 3, "<i2").tobytes()
    (tmp_path / "a.nii").write_bytes(header)
    (tmp_path / "b.nii.gz").write_bytes(gzip.compress(header))
    for name in ("a.nii", "b.nii.gz"):
        refused(tmp_path / name, "must be a whole file")


@pytest.mark.parametrize("kind", ["f2", ">f4", ">f8", "g", ">i2", ">u2", ">i4", "i8", ">i8", "u8", "u4", "i1", "?"])
def test_arrays_of_any_type_of_numbers(kind):
    values = (WHOLE % 2 if kind == "?" else WHOLE % 100).astype(kind)
    loaded = images.load((values.transpose(2, 1, 0), np.diag([1, 1, 2, 1])), "fixed image")
    assert np.array_equal(sitk.GetArrayFromImage(loaded), values)


@pytest.mark.parametrize(
    ("array", "affine", "message"),
    [
        (WHOLE.astype(object), np.eye(4), "must hold numbers, got an array of type object"),
        (WHOLE.astype(str), np.eye(4), "must hold numbers, got an array of type <U"),
        (WHOLE.astype("M8[s]"), np.eye(4), "must hold numbers"),
        (WHOLE.astype("c8"), np.eye(4), "must be real-valued"),
        (np.zeros((5, 0, 5)), np.eye(4), "must be 3D, got an array of shape"),
        ([[1, 2], [3]], np.eye(4), "must be two arrays of numbers"),
        (WHOLE, np.full((4, 4), np.nan), "the affine of fixed image must be finite"),
        (WHOLE, [["a"] * 4] * 4, "must be two arrays of numbers"),
        (WHOLE, None, "the affine of fixed image must be 4x4"),
        (WHOLE, [[1, 0.1, 0, 0], [0, 1, 0, 0], [0, 0, 1, 0], [0, 0, 0, 1]], "axes at right angles"),
    ],
)
def test_arrays_that_are_no_images(array, affine, message):
    refused((array, affine), message)


def test_axes_that_are_not_at_right_angles(tmp_path):
    for suffix in (".nrrd", ".mha"):
        image = image_of(WHOLE)
        image.SetDirection((1, 0.2, 0, 0, 0.98, 0, 0, 0, 1))
        sitk.WriteImage(image, str(tmp_path / f"a{suffix}"))
        refused(tmp_path / f"a{suffix}", "axes at right angles, got a sheared direction")
    sheared = LDRCore.warp_image(image, sitk.Transform(3, sitk.sitkIdentity), image)  # in memory it means what it says
    assert np.array_equal(sitk.GetArrayFromImage(sheared), WHOLE)
    with pytest.raises(RegistrationError, match="an image that is written must have axes at right angles"):
        writing.write_image(sheared, tmp_path / "b.nii.gz")
    image = image_of(WHOLE)
    image.SetOrigin((np.nan, 0, 0))
    refused(image, "must have a finite origin")


@pytest.mark.parametrize(
    ("name", "stored", "changed"),
    [
        ("a.mha", b"Offset = 5", b"Offset = nan"),
        ("a.mhd", b"Offset = 5", b"Offset = inf"),
        ("a.nrrd", b"(5,-6,7)", b"(nan,nan,nan)"),
        ("a.nhdr", b"(0,0,2)", b"(nan,nan,nan)"),
    ],
)
def test_a_placement_that_is_not_finite(tmp_path, name, stored, changed):
    """ITK reads an origin of 0 there."""
    sitk.WriteImage(image_of(WHOLE), str(tmp_path / name))
    header = (tmp_path / name).read_bytes()
    assert header.count(stored) == 1
    (tmp_path / name).write_bytes(header.replace(stored, changed))
    refused(tmp_path / name, f"must have a finite origin, direction and spacing, got .*(nan|inf).* in .*{name}")
    with pytest.raises(RegistrationError, match="must have a finite origin"):
        _ = Context(tmp_path / name).fixed


def test_what_is_no_image_at_all():
    refused("", r"must be an existing file, got an empty name")
    for source in (None, 3, b"x"):
        refused(source, "must be a path")


def test_folders_without_dicom_say_one_sentence(tmp_path, capfd):
    (tmp_path / "readme.txt").write_text("nothing here")
    refused(tmp_path, r"one DICOM series, got .* \(none\)")
    assert capfd.readouterr() == ("", "")


def write_series(folder: Path, positions: np.ndarray, *, slopes: tuple[str, ...] = (), turned: int = -1) -> None:
    """Write DICOM slices of 12 x 11 pixels at (N, 3) mm; slice `turned` with another orientation."""
    writer = sitk.ImageFileWriter()
    writer.KeepOriginalImageUIDOn()
    folder.mkdir()
    for number, position in enumerate(positions):
        slice_image = sitk.GetImageFromArray(WHOLE[number % len(WHOLE)] % 500)
        orientation = "1\\0\\0\\0\\1\\0" if number != turned else "0.9\\0.436\\0\\-0.436\\0.9\\0"
        tags = {"0008|0060": "MR", "0020|000e": "1.2.3", "0020|000d": "1.2", "0020|0013": str(number)}
        tags |= {"0020|0032": "\\".join(f"{v:.4f}" for v in position), "0020|0037": orientation}
        tags |= {"0008|0018": f"1.2.3.{number + 1}", "0028|0030": "1\\1"}
        tags |= {"0028|1053": slopes[number], "0028|1052": "0"} if slopes else {}
        for tag, text in tags.items():
            slice_image.SetMetaData(tag, text)
        writer.SetFileName(str(folder / f"{number}.dcm"))
        writer.Execute(slice_image)


STACK = np.array([[3.0, 4.0, 2.0 * k] for k in range(8)])


@pytest.mark.parametrize(
    ("positions", "message"),
    [
        (STACK, ""),
        (STACK[::-1], ""),
        (np.delete(STACK, 3, axis=0), r"distances of 2.000 to 4.000 mm in .*a slice missing"),
        (STACK + [[0, 0.5 * k, 0] for k in range(8)], "gantry tilt"),
        (np.concatenate([STACK, STACK]), "several slices at one position .*two volumes"),
        (STACK * [[1, 1, 1 + 0.1 * k] for k in range(8)], "must be parallel slices at equal distances, got distances"),
    ],
)
def test_slices_must_make_one_volume(tmp_path, positions, message):
    write_series(tmp_path / "s", positions)
    if message:
        refused(tmp_path / "s", message)
        return
    loaded = images.load(tmp_path / "s", "fixed image")
    assert loaded.GetSize() == (12, 11, 8)
    assert loaded.GetSpacing() == pytest.approx((1, 1, 2))


def test_slices_of_another_orientation_and_single_slices(tmp_path):
    write_series(tmp_path / "s", STACK, turned=4)
    refused(tmp_path / "s", "got several orientations")
    refused(tmp_path / "s" / "1.dcm", "must be a whole series, got one DICOM slice of it: give the folder")


@pytest.mark.parametrize("kind", [np.float32, np.int16])
@pytest.mark.parametrize(
    ("codes", "shift", "message"),
    [
        ((1, 1), 0.0, ""),
        ((1, 2), 12.0, "its (s|q)form was taken, its (q|s)form is up to 12.0 mm off"),
        ((1, 0), 12.0, ""),
        ((0, 1), 0.0, ""),
        ((0, 0), 0.0, "places its voxels nowhere"),
    ],
)
def test_a_header_that_places_its_voxels_twice_or_nowhere(tmp_path, kind, codes, shift, message):
    path = tmp_path / "a.nii"
    sitk.WriteImage(image_of(VALUES.astype(kind)), str(path))
    header = bytearray(path.read_bytes())
    header[252:256] = np.array(codes, "<i2").tobytes()
    rows = np.frombuffer(header, "<f4", 12, 280).copy()
    rows[3] += shift
    header[280:328] = rows.tobytes()
    path.write_bytes(header)
    placement = images.describe(images.load(path, "fixed image")).get("placement", "")
    assert re.search(message, placement)
    assert bool(placement) == bool(message)


def masked(values: np.ndarray) -> np.ndarray | None:
    mask = image_of(values)
    return images.load_mask(mask, image_of(WHOLE), "fixed mask")


def test_masks_that_tell_nothing():
    some = np.zeros(SHAPE, np.float32)
    some[2:6, 2:7, 2:8] = 1
    assert masked(some) is not None
    broken = some.copy()
    broken[0, 0, 0] = np.nan
    with pytest.raises(RegistrationError, match="fixed mask must hold only finite values, got 1 voxels"):
        masked(broken)
    few = np.zeros(SHAPE, np.uint8)
    few[2, 2, 2:5] = 1
    with pytest.raises(RegistrationError, match="must have 64 voxels, got 3"):
        masked(few)
    head = np.zeros(SHAPE, np.int16)
    head[:, :, 6:] = WHOLE[:, :, 6:]
    air = np.zeros(SHAPE, np.uint8)
    air[:, :, :6] = 1
    with pytest.raises(RegistrationError, match="got only air"):
        images.load_mask(image_of(air), image_of(head), "fixed mask")


@pytest.mark.parametrize("scale", [0.01, 1.0, 100.0])
def test_a_mask_may_be_off_by_a_part_of_a_voxel(scale):
    """In millimetres a tenth of a voxel is much for a large grid and nothing for a small one."""
    reference, near, far = image_of(WHOLE), image_of(np.ones(SHAPE, np.uint8)), image_of(np.ones(SHAPE, np.uint8))
    for image, shift in ((reference, 0.0), (near, 0.04), (far, 0.3)):
        image.SetSpacing((scale,) * 3)
        image.SetOrigin((shift * scale, 0, 0))
    assert images.load_mask(near, reference, "fixed mask") is not None
    with pytest.raises(RegistrationError, match="another origin or direction"):
        images.load_mask(far, reference, "fixed mask")


@pytest.mark.parametrize("kind", [np.uint8, np.int16, np.int32, np.uint16])
def test_integers_are_rounded_when_warped(kind):
    """Half a voxel between 10 and 21 is 15.5, a quarter 12.75: 16 and 13, not 15 and 12."""
    values = np.full(SHAPE, 10, kind)
    values[:, :, 6:] = 21
    image = sitk.GetImageFromArray(values)
    for shift, expected in ((0.5, 16), (0.25, 13), (0.75, 18)):
        warped = LDRCore.warp_image(image, sitk.TranslationTransform(3, (shift, 0, 0)), image)
        assert warped.GetPixelID() == image.GetPixelID()
        assert sitk.GetArrayFromImage(warped)[4, 4, 4:8].tolist() == [10, expected, 21, 21]


def test_negative_integers_and_masks_keep_their_mean():
    values = (np.indices(SHAPE).sum(0) % 7 - 300).astype(np.int16)
    image = sitk.GetImageFromArray(values)
    shifted = LDRCore.warp_image(image, sitk.TranslationTransform(3, (0.5, 0, 0)), image)
    exact = (values[:, :, :-1] + values[:, :, 1:].astype(float)) / 2
    assert np.abs(sitk.GetArrayFromImage(shifted)[:, :, :-1] - exact).max() <= 0.5


def test_labels_are_noticed(tmp_path, capsys):
    labels = np.zeros(SHAPE, np.uint8)
    labels[2:8, 2:6, 2:10], labels[2:8, 6:9, 2:10] = 3, 17
    for name, values in (("labels", labels), ("scan", WHOLE)):
        sitk.WriteImage(image_of(values), str(tmp_path / f"{name}.nii.gz"))
    sitk.WriteTransform(sitk.TranslationTransform(3, (0.4, 0, 0)), str(tmp_path / "t.tfm"))
    given = ("--transform", tmp_path / "t.tfm", "--reference", tmp_path / "scan.nii.gz", "--json")
    for name, extra, interpolation, warnings in (
        ("labels", (), "linear", 1),
        ("labels", ("--interpolation", "auto"), "nearest", 0),
        ("labels", ("--nearest",), "nearest", 0),
        ("scan", (), "linear", 0),
        ("scan", ("--interpolation", "auto"), "linear", 0),
    ):
        out = tmp_path / "out.nii.gz"
        assert ldr("warp", tmp_path / f"{name}.nii.gz", *given, "--out", out, "--overwrite", *extra) == 0
        said = json.loads(capsys.readouterr().out)
        assert (said["interpolation"], len(said["warnings"])) == (interpolation, warnings)
    auto = LDRCore.warp_image(tmp_path / "labels.nii.gz", tmp_path / "t.tfm", tmp_path / "scan.nii.gz", "auto")
    assert set(np.unique(sitk.GetArrayFromImage(auto))) == {0, 3, 17}


NUMBER = np.arange(WHOLE.size).reshape(SHAPE)
BLOCKS = (np.indices(SHAPE) // 3).transpose(1, 2, 3, 0) @ np.array([16, 4, 1])  # of 3 voxels a side, values 0 to 59


@pytest.mark.parametrize(
    ("values", "labels"),
    [
        (BLOCKS.astype(np.uint8), True),  # 2 of 3 voxels have the next one's value: many small structures
        (BLOCKS.astype(np.float32), True),
        (BLOCKS.astype(np.float32) + 0.5, False),
        (np.where(NUMBER < 900, 0, WHOLE) - (NUMBER == 5), False),  # a background, one voxel darker
    ],
)
def test_labels_are_told_by_their_regions(values, labels):
    assert images.looks_like_labels(image_of(values)) is labels
