"""NIfTI files are read as by SimpleITK, except where ITK 5 loses something: NaN, scaled vectors."""

from __future__ import annotations

import gzip
import io
import math
import struct
from pathlib import Path

import numpy as np
import pytest
import SimpleITK as sitk

from LDRCore import RegistrationError, warp_image
from LDRCore.io import containers, images, transforms

CODES = {"u1": (2, 8), "i2": (4, 16), "i8": (1024, 64), "f4": (16, 32), "f8": (64, 64)}  # NIfTI's datatype and bits
DISPLACEMENT, VECTOR = 1006, 1007
SHAPE = (6, 7, 8)  # z, y, x
VALUES = (np.arange(6 * 7 * 8).reshape(SHAPE) * 37 % 199).astype(float)


def write_nifti(
    path: Path,
    values: np.ndarray,
    kind: str = "f4",
    order: str = "<",
    *,
    scaling: tuple[float, float] = (1, 0),
    offset: int = 352,
    intent: int = 0,
    more_dimensions: tuple[int, ...] = (),
) -> Path:
    """Write a NIfTI-1 file byte by byte: values (z, y, x) or, for vectors, (component, z, y, x), oblique."""
    header = bytearray(offset)
    sizes = [*values.shape[-3:][::-1], *more_dimensions, *([1, values.shape[0]] if values.ndim == 4 else [])]
    struct.pack_into(order + "i", header, 0, 348)
    struct.pack_into(order + "8h", header, 40, *([len(sizes), *sizes] + [1] * 7)[:8])
    struct.pack_into(order + "3h", header, 68, intent, *CODES[kind])
    struct.pack_into(order + "8f", header, 76, 1, 1.5, 2.0, 2.5, 1, 1, 1, 1)
    struct.pack_into(order + "3f", header, 108, offset, *scaling)
    struct.pack_into(order + "2h", header, 252, 1, 0)  # quaternion: half a radian about the third axis
    struct.pack_into(order + "6f", header, 256, 0, 0, math.sin(0.25), 10, 20, 30)
    header[344:348] = b"n+1\0"
    content = bytes(header) + values.astype(order + kind).tobytes()
    path.write_bytes(gzip.compress(content) if path.suffix == ".gz" else content)
    return path


def assert_same(ours: sitk.Image, theirs: sitk.Image) -> None:
    assert ours.GetPixelID() == theirs.GetPixelID()
    for part in ("Size", "Spacing", "Origin", "Direction"):
        assert getattr(ours, f"Get{part}")() == getattr(theirs, f"Get{part}")()
    assert np.array_equal(sitk.GetArrayFromImage(ours), sitk.GetArrayFromImage(theirs))


@pytest.mark.parametrize("suffix", [".nii", ".nii.gz"])
@pytest.mark.parametrize("order", ["<", ">"])
@pytest.mark.parametrize("kind", CODES)
@pytest.mark.parametrize("scaling", [(1, 0), (0, 0), (2.5, -7), (0, 5), (1, 3), (math.nan, 0)])
def test_files_are_read_as_simpleitk_reads_them(tmp_path, suffix, order, kind, scaling):
    path = write_nifti(tmp_path / f"scan{suffix}", VALUES, kind, order, scaling=scaling)
    assert_same(images.load(path, "fixed image"), sitk.ReadImage(str(path)))


@pytest.mark.parametrize("options", [{"offset": 400}, {"more_dimensions": (1,)}, {"more_dimensions": (1, 1)}])
def test_unusual_headers_are_read_as_simpleitk_reads_them(tmp_path, options):
    path = write_nifti(tmp_path / "scan.nii.gz", VALUES, **options)
    assert_same(images.load(path, "fixed image"), sitk.ReadImage(str(path)))


@pytest.mark.parametrize("over", [-2, -1, 0, 1])
def test_a_gzip_member_that_ends_where_a_piece_of_the_file_does(over):
    """The next member counts also where its first byte alone was read with this one."""
    noise = np.random.default_rng(0).bytes(containers.CHUNK_BYTES)
    long = gzip.compress(noise[:-64_000], 0)
    exact = containers.CHUNK_BYTES + over - len(long) - len(gzip.compress(noise[:1000], 0)) + 1000
    file = long + gzip.compress(noise[:exact], 0)
    assert len(file) == containers.CHUNK_BYTES + over
    assert b"".join(containers.inflated(io.BytesIO(file + gzip.compress(b"more")))).endswith(b"more")


def test_a_file_that_inflates_a_thousandfold_comes_in_pieces():
    pieces = list(containers.inflated(io.BytesIO(gzip.compress(bytes(10**7)))))
    assert sum(map(len, pieces)) == 10**7
    assert max(map(len, pieces)) <= containers.CHUNK_BYTES


def test_bytes_after_the_values_and_several_gzip_members_do_no_harm(tmp_path):
    path = write_nifti(tmp_path / "scan.nii", VALUES)
    content = path.read_bytes() + bytes(77)
    (tmp_path / "scan.nii.gz").write_bytes(gzip.compress(content[:500]) + gzip.compress(content[500:]))
    assert np.array_equal(sitk.GetArrayFromImage(images.load(tmp_path / "scan.nii.gz", "fixed image")), VALUES)


def test_a_series_of_volumes_is_refused_for_its_dimension(tmp_path):
    path = write_nifti(tmp_path / "scan.nii.gz", VALUES[:3], more_dimensions=(2,))
    with gzip.open(path) as stream:
        content = stream.read()
    path.write_bytes(gzip.compress(content + VALUES[3:].astype("<f4").tobytes()))
    with pytest.raises(RegistrationError, match=r"fixed image must be 3D, got 4D of size \(8, 7, 3, 2\)"):
        images.load(path, "fixed image")


@pytest.mark.parametrize(
    ("pixels", "message"),
    [
        (sitk.GetImageFromArray(np.ones((*SHAPE, 3), np.uint8), isVector=True), "one value a voxel, got 3"),
        (sitk.Cast(sitk.GetImageFromArray(VALUES), sitk.sitkComplexFloat32), "must be real-valued, got complex"),
    ],
)
def test_colour_and_complex_files_are_refused_for_what_they_are(tmp_path, pixels, message):
    """Not as cut off: their header counts the bits of a whole voxel."""
    sitk.WriteImage(pixels, str(tmp_path / "scan.nii.gz"))
    with pytest.raises(RegistrationError, match=message):
        images.load(tmp_path / "scan.nii.gz", "fixed image")


@pytest.mark.parametrize("suffix", [".nii", ".nii.gz"])
@pytest.mark.parametrize("order", ["<", ">"])
@pytest.mark.parametrize("kind", ["f4", "f8"])
@pytest.mark.parametrize("scaling", [(1, 0), (2.5, -7)])
def test_nan_and_infinity_in_a_file_are_refused(tmp_path, suffix, order, kind, scaling):
    values = VALUES.copy()
    values.flat[[3, 50, 99]] = np.nan, np.inf, -np.inf
    path = write_nifti(tmp_path / f"scan{suffix}", values, kind, order, scaling=scaling)
    with pytest.raises(RegistrationError, match="moving image must hold only finite values, got 3 voxels"):
        images.load(path, "moving image")


def test_a_compressed_file_is_decompressed_once(tmp_path, monkeypatch):
    """SimpleITK must not read it as well: half of the time to read a scan."""
    path = write_nifti(tmp_path / "scan.nii.gz", VALUES)

    def refuse(*arguments):
        raise AssertionError("read by SimpleITK too")

    monkeypatch.setattr(sitk, "ReadImage", refuse)
    assert images.load(path, "fixed image").GetSize() == (8, 7, 6)


@pytest.mark.parametrize("kind", ["i2", "f4"])
def test_a_damaged_file_is_refused(tmp_path, kind):
    """One wrong byte among the compressed values: no plausible scan may come of it."""
    values = np.random.default_rng(0).integers(1, 1000, (40, 40, 40))
    path = write_nifti(tmp_path / "scan.nii.gz", values, kind)
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 0xFF
    path.write_bytes(content)
    with pytest.raises(RegistrationError, match=r"cut off or damaged|that SimpleITK can read"):
        images.load(path, "fixed image")


@pytest.mark.parametrize("value", [np.inf, -np.inf, np.nan])
def test_an_sform_that_is_not_finite_is_refused(tmp_path, value):
    """ITK 5.4 does not come back from reading a header with an infinite one."""
    path = write_nifti(tmp_path / "scan.nii", VALUES)
    header = bytearray(path.read_bytes())
    header[308:312] = np.array([value], "<f4").tobytes()
    path.write_bytes(header)
    with pytest.raises(
        RegistrationError, match=r"must have a finite placement, got an sform that is not in .*scan\.nii"
    ):
        images.load(path, "fixed image")
    with pytest.raises(RegistrationError, match="must have a finite placement"):
        _ = transforms.Context(path).fixed


def test_a_warped_image_keeps_nan_where_it_is(tmp_path):
    """The fill value is the smallest number, not NaN."""
    values = VALUES + 10
    values[2, 3, 4] = np.nan
    path = write_nifti(tmp_path / "map.nii.gz", values)
    far = sitk.TranslationTransform(3, (3000.0, 0.0, 0.0))
    assert np.array_equal(sitk.GetArrayFromImage(warp_image(path, far, path)), np.full(SHAPE, 10.0))
    same = sitk.GetArrayFromImage(warp_image(path, sitk.Transform(3, sitk.sitkIdentity), path))
    assert np.isnan(same[2, 3, 4])


def field_of(path: Path) -> np.ndarray:
    """(z, y, x, component) mm LPS of a displacement field file."""
    transform = transforms.read_transform(str(path))
    return sitk.GetArrayFromImage(sitk.DisplacementFieldTransform(transform).GetDisplacementField())


VECTORS = np.stack([VALUES, VALUES + 300, VALUES + 600])


@pytest.mark.parametrize("order", ["<", ">"])
@pytest.mark.parametrize(("kind", "intent"), [("f4", VECTOR), ("f8", VECTOR), ("i2", VECTOR), ("f4", DISPLACEMENT)])
def test_displacement_fields_are_read_as_simpleitk_reads_them(tmp_path, order, kind, intent):
    path = write_nifti(tmp_path / "warp.nii.gz", VECTORS, kind, order, intent=intent)
    expected = sitk.GetArrayFromImage(sitk.ReadImage(str(path), sitk.sitkVectorFloat64))
    assert np.array_equal(field_of(path), expected)
    assert field_of(path)[1, 2, 3, 2] == VALUES[1, 2, 3] + 600


@pytest.mark.parametrize("kind", ["i2", "f4"])
@pytest.mark.parametrize(("intent", "sign"), [(VECTOR, 1), (DISPLACEMENT, -1)])
def test_every_component_of_a_scaled_field_is_scaled(tmp_path, kind, intent, sign):
    """ITK 5.4 scales a third of the floating-point values, and writes beyond its buffer for integers."""
    path = write_nifti(tmp_path / "warp.nii.gz", VECTORS, kind, intent=intent, scaling=(0.5, 4))
    expected = (VECTORS * 0.5 + 4) * np.array([sign, sign, 1]).reshape(3, 1, 1, 1)
    assert np.array_equal(field_of(path), np.moveaxis(expected, 0, -1))


@pytest.mark.parametrize("tail", [(3,), (3, 1), (1, 3, 1)])
@pytest.mark.parametrize(("intent", "sign"), [(VECTOR, 1), (DISPLACEMENT, -1)])
@pytest.mark.parametrize("kind", ["i2", "f4", "i8"])
def test_fields_whose_vectors_lie_along_another_axis(tmp_path, tail, intent, sign, kind):
    """Some programs write (x, y, z, 3), a series of scalars to ITK, with the intent of vectors."""
    path = write_nifti(tmp_path / "warp.nii.gz", VECTORS, kind, intent=intent)
    content = bytearray(gzip.decompress(path.read_bytes()))
    struct.pack_into("<8h", content, 40, *([3 + len(tail), *SHAPE[::-1], *tail] + [1] * 7)[:8])
    path.write_bytes(gzip.compress(bytes(content)))
    assert np.array_equal(field_of(path), np.moveaxis(VECTORS * np.reshape([sign, sign, 1], (3, 1, 1, 1)), 0, -1))


@pytest.mark.parametrize("intent", [VECTOR, DISPLACEMENT])
def test_displacement_fields_with_nan_or_cut_off_are_refused(tmp_path, intent):
    vectors = VECTORS.copy()
    vectors[2, 0, 0, :2] = np.nan, np.inf
    path = write_nifti(tmp_path / "warp.nii.gz", vectors, intent=intent)
    with pytest.raises(RegistrationError, match=r"must hold only finite values, got 2 others in .*warp\.nii\.gz"):
        transforms.read_transform(str(path))
    path = write_nifti(tmp_path / "warp.nii", VECTORS, intent=intent)
    path.write_bytes(path.read_bytes()[:-6])
    with pytest.raises(RegistrationError, match=r"must be a whole file, got .*warp\.nii \(cut off or damaged\)"):
        transforms.read_transform(str(path))
