"""The Learn2Reg export against a fresh reader and a fresh implementation of the challenge's published definition.

Published: fields of shape (X, Y, Z, 3) in voxels; labels warped with map_coordinates(moving, identity + field,
order 0); landmarks (voxels) moved by the field at the fixed landmark, their distance times the moving image's spacing.
"""

from __future__ import annotations

import gzip
import json
import struct
from pathlib import Path

import numpy as np
import pytest
import SimpleITK as sitk
from scipy.ndimage import map_coordinates

from LDRCore import cli, geometry
from LDRCore.errors import RegistrationError
from LDRCore.evaluation import learn2reg, scoring


def nifti(path: Path) -> np.ndarray:
    """The array of a NIfTI-1 file as stored: first axis fastest, scaled, header axes only."""
    with gzip.open(path) as stream:
        content = stream.read()
    dims = struct.unpack_from("<8h", content, 40)
    kind = struct.unpack_from("<h", content, 70)[0]
    start = int(struct.unpack_from("<f", content, 108)[0])
    slope, offset = struct.unpack_from("<2f", content, 112)
    dtype = {2: "u1", 4: "<i2", 8: "<i4", 16: "<f4", 64: "<f8"}[kind]
    shape = dims[1 : 1 + dims[0]]
    values = np.frombuffer(content, dtype, int(np.prod(shape)), start).reshape(shape, order="F").astype(float)
    return values * slope + offset if slope else values


def image(values: np.ndarray, angles: tuple[float, float, float], spacing, origin) -> sitk.Image:
    out = sitk.GetImageFromArray(values)
    out.SetSpacing(spacing)
    out.SetDirection(sitk.Euler3DTransform((0, 0, 0), *angles).GetMatrix())
    out.SetOrigin(origin)
    return out


@pytest.fixture
def case(tmp_path) -> dict:
    """An oblique, anisotropic pair of different sizes with labels, a bent transform, and all of it as files."""
    rng = np.random.default_rng(0)
    coarse = rng.integers(1, 200, (5, 6, 4)).astype(float)
    fixed = image(np.kron(coarse, np.ones((4, 4, 5))).astype(np.int16), (0.2, -0.1, 0.3), (1.5, 1.0, 2.0), (3, -4, 5))
    moving = image(np.kron(coarse, np.ones((5, 3, 6))).astype(np.int16), (-0.1, 0.2, 0.1), (1.2, 1.4, 1.7), (-2, 1, 8))
    field = sitk.GetImageFromArray(rng.normal(size=(4, 4, 4, 3)), isVector=True)
    field.SetSpacing((14.0, 14.0, 20.0))
    field.SetOrigin((-10, -20, -10))
    transform = sitk.CompositeTransform(3)
    transform.AddTransform(sitk.Euler3DTransform((5, 5, 5), 0.1, 0.05, -0.1, (2.0, -1.0, 1.0)))
    transform.AddTransform(sitk.DisplacementFieldTransform(sitk.Cast(field, sitk.sitkVectorFloat64)))
    files = {}
    for name, one in (("OASIS_0438_0000", fixed), ("OASIS_0439_0000", moving)):
        files[name] = str(tmp_path / f"{name}.nii.gz")
        sitk.WriteImage(one, files[name])
    sitk.WriteTransform(transform, str(tmp_path / "t.h5"))
    images = [sitk.ReadImage(f) for f in files.values()]  # with the rounding of the NIfTI header
    return {"files": list(files.values()), "images": images, "transform": transform, "folder": tmp_path}


def test_their_warp_of_our_file_is_our_warp(case):
    fixed, moving = case["images"]
    path = case["folder"] / "disp_0438_0439.nii.gz"
    learn2reg.write_submission(path, learn2reg.displacement_in_voxels(case["transform"], fixed, moving), fixed)
    disp = nifti(path)
    fixed_array, moving_array = (nifti(Path(f)) for f in case["files"])
    assert disp.shape == (*fixed_array.shape, 3)
    identity = np.meshgrid(*[np.arange(n) for n in fixed_array.shape], indexing="ij")
    theirs = map_coordinates(moving_array, np.array(identity) + disp.transpose(3, 0, 1, 2), order=0, cval=-1)
    ours = sitk.GetArrayFromImage(
        sitk.Resample(moving, fixed, case["transform"], sitk.sitkNearestNeighbor, -1)
    ).transpose(2, 1, 0)
    inside = (theirs != -1) & (ours != -1)
    assert inside.mean() > 0.3
    assert (theirs == ours)[inside].mean() > 0.999  # a point between two voxels may be rounded either way
    assert len(np.unique(ours[inside])) > 50


def test_their_landmark_error_is_ours(case):
    fixed, moving = case["images"]
    disp = learn2reg.displacement_in_voxels(case["transform"], fixed, moving).astype(float)
    rng = np.random.default_rng(1)
    ours, theirs = rng.integers(3, 12, (2, 6, 3)).astype(float)
    at = np.stack([map_coordinates(disp[..., c], ours.T, order=1) for c in range(3)], 1)
    expected = np.linalg.norm((ours + at - theirs) * np.array(moving.GetSpacing()), axis=1)
    points = [scoring.landmarks_lps(p, "voxel", i, "points") for p, i in ((ours, fixed), (theirs, moving))]
    scores = scoring.score(case["transform"], scoring.Truth(fixed, None, None, *points), measures=["landmarks"])
    assert scores["tre_mm"] == pytest.approx(expected.mean(), abs=1e-3)
    assert scores["tre_max_mm"] == pytest.approx(expected.max(), abs=1e-3)


def test_the_command_writes_the_submission(case, capsys):
    out = case["folder"] / "submission"
    arguments = ["evaluate", *case["files"], "--transform", str(case["folder"] / "t.h5"), "--learn2reg", str(out)]
    assert cli.main([*arguments, "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["pairs"][0]["learn2reg"] == str(out / "disp_0438_0439.nii.gz")
    assert [p.name for p in out.iterdir()] == ["disp_0438_0439.nii.gz"]
    fixed, moving = case["images"]
    expected = learn2reg.displacement_in_voxels(case["transform"], fixed, moving)
    assert nifti(out / "disp_0438_0439.nii.gz") == pytest.approx(expected, abs=1e-3)
    assert cli.main(arguments) == 2
    assert "the output must not exist yet" in capsys.readouterr().err
    assert cli.main([*arguments, "--overwrite"]) == 0


@pytest.mark.parametrize(
    ("fixed", "moving", "name"),
    [
        ("x/OASIS_0438_0000.nii.gz", "OASIS_0439_0000.nii.gz", "disp_0438_0439.nii.gz"),
        ("LungCT_0001_0000.nii.gz", "LungCT_0001_0001.nii.gz", "disp_0001_0001.nii.gz"),
        ("A_0003_0002.nii.gz", "A_0004_0001.nii.gz", "disp_0003_0002_0004_0001.nii.gz"),
    ],
)
def test_names(fixed, moving, name):
    assert learn2reg.submission_name(fixed, moving) == name


def test_refusals(case):
    with pytest.raises(RegistrationError, match=r"named \.\.\._CCCC_MMMM\.nii\.gz .*, got brain\.nii\.gz"):
        learn2reg.submission_name("/data/brain.nii.gz", "A_0004_0001.nii.gz")
    fixed = case["images"][0]
    with pytest.raises(RegistrationError, match=r"fixed image's shape \(20, 24, 20, 3\), got \(2, 2, 2, 3\)"):
        learn2reg.write_submission(case["folder"] / "d.nii.gz", np.zeros((2, 2, 2, 3)), fixed)
    with pytest.raises(RegistrationError, match=r"written as \.nii\.gz, got d\.mha"):
        learn2reg.write_submission(case["folder"] / "d.mha", np.zeros((20, 24, 20, 3)), fixed)


def test_zero_where_nothing_moves(case):
    fixed = case["images"][0]
    nothing = learn2reg.displacement_in_voxels(sitk.Transform(3, sitk.sitkIdentity), fixed, fixed)
    assert np.abs(nothing).max() < 1e-4
    along = geometry.index_to_lps(fixed)[:3, 2] * 2  # two voxels along the file's first axis
    moved = learn2reg.displacement_in_voxels(sitk.TranslationTransform(3, along.tolist()), fixed, fixed)
    assert moved[3, 4, 5] == pytest.approx([2, 0, 0], abs=1e-4)
