"""`register` end to end on real brains of awkward geometry, and on what it must refuse."""

from __future__ import annotations

import json
import os
from pathlib import Path

import numpy as np
import pytest
import SimpleITK as sitk

import LDRCore
from LDRCore import RegistrationError, geometry
from LDRCore.cli import demo
from LDRCore.models import weights


@pytest.fixture(scope="module")
def result(demo_pair) -> LDRCore.RegistrationResult:
    return LDRCore.register(demo_pair["fixed"], demo_pair["moving"], inverse=True)


def array(image: sitk.Image) -> np.ndarray:
    return sitk.GetArrayFromImage(image).astype(float)


def test_the_demo_pair_is_awkward(demo_pair):
    fixed, moving = (sitk.ReadImage(demo_pair[k]) for k in ("fixed", "moving"))
    assert fixed.GetSpacing() != moving.GetSpacing()
    assert len(set(fixed.GetSpacing())) > 1
    for image in (fixed, moving):
        assert np.abs(np.array(image.GetDirection())).max() < 0.999  # oblique: no axis along the patient's
    assert np.linalg.det(np.array(moving.GetDirection()).reshape(3, 3)) < 0  # flipped


def test_labels_agree_better_after_every_stage(demo_pair, result):
    scores = demo.score(demo_pair, result)
    assert scores["nothing"] < scores["affine"] < scores["deformable"]
    assert scores["affine"] > 0.52  # 0.49 by the stem alone
    assert scores["deformable"] > scores["affine"] + 0.06


def test_more_cascades_register_better(demo_pair):
    scores = [
        demo.score(demo_pair, LDRCore.register(demo_pair["fixed"], demo_pair["moving"], cascades=n))["deformable"]
        for n in (1, 2, 3)
    ]
    assert scores[0] < scores[1] < scores[2]


def test_the_transform_reproduces_the_warped_image(demo_pair, result):
    fixed, moving = (sitk.ReadImage(demo_pair[k]) for k in ("fixed", "moving"))
    again = sitk.Resample(moving, fixed, result.transform, sitk.sitkLinear, 0.0, sitk.sitkFloat32)
    off = np.abs(array(again) - array(result.warped))  # warped is int16, so half a unit of rounding is allowed
    span = float(array(moving).max())
    assert (off > 0.5 + 1e-3 * span).mean() < 1e-4
    assert result.warped.GetPixelID() == moving.GetPixelID()
    for image in (result.warped, result.displacement_field, result.jacobian_determinant):
        assert image.GetSize() == fixed.GetSize()
        assert image.GetDirection() == pytest.approx(fixed.GetDirection())


def test_displacement_field_is_the_transform_on_the_fixed_grid(result):
    field = result.displacement_field
    index = (40, 50, 30)
    point = np.array(field.TransformIndexToPhysicalPoint(index))
    assert point + np.array(field[index]) == pytest.approx(result.transform.TransformPoint(point.tolist()), abs=1e-3)


def test_inverse_brings_points_back(demo_pair, result):
    labels = sitk.ReadImage(demo_pair["fixed_labels"])
    index = np.argwhere(sitk.GetArrayViewFromImage(labels) > 0)[::5000]
    points = (index @ geometry.index_to_lps(labels)[:3, :3].T) + geometry.index_to_lps(labels)[:3, 3]
    there = LDRCore.transform_points(points, result.transform)
    back = LDRCore.transform_points(there, result.inverse_transform)
    error_mm = np.linalg.norm(back - points, axis=1)
    assert np.linalg.norm(there - points, axis=1).mean() > 5
    assert np.median(error_mm) < 0.15
    assert error_mm.max() < 1.0


def test_report_says_what_happened(result):
    report = result.report
    assert report["similarity"]["after"] > report["similarity"]["affine"] > report["similarity"]["before"]
    assert {"read", "prepare", "affine", "dense", "warp", "invert", "total"} <= set(report["times_s"])
    assert report["folding_fraction"] < 0.01
    assert report["jacobian_determinant"]["min"] < 1 < report["jacobian_determinant"]["max"]
    assert report["warnings"] == []
    assert report["versions"]["LDRCore"] == LDRCore.__version__
    json.dumps(report)


def test_registering_an_image_to_itself_changes_little(demo_pair):
    fixed = sitk.ReadImage(demo_pair["fixed"])
    same = LDRCore.register(fixed, fixed)
    assert same.report["similarity"]["after"] > 0.97
    labels = sitk.ReadImage(demo_pair["fixed_labels"])
    assert demo.warped_dice(labels, same.transform, labels) > 0.85


def test_a_second_run_is_bit_identical(demo_pair, result):
    again = LDRCore.register(demo_pair["fixed"], demo_pair["moving"], inverse=True)
    assert np.array_equal(array(again.warped), array(result.warped))
    assert np.array_equal(array(again.displacement_field), array(result.displacement_field))


def test_how_the_voxels_are_stored_does_not_matter(demo_pair, result):
    """The same scan with permuted and flipped axes gives the same answer in space."""
    moving = sitk.DICOMOrient(sitk.ReadImage(demo_pair["moving"]), "SPL")
    again = LDRCore.register(demo_pair["fixed"], moving)
    difference = array(again.displacement_field) - array(result.displacement_field)
    assert np.median(np.linalg.norm(difference, axis=-1)) < 0.2


def test_a_far_away_moving_image_is_found(demo_pair, result):
    moving = sitk.ReadImage(demo_pair["moving"])
    moving.SetOrigin(np.add(moving.GetOrigin(), (300, -250, 400)).tolist())
    far = LDRCore.register(demo_pair["fixed"], moving)
    assert far.report["similarity"]["before"] == 0
    shift = array(far.displacement_field) - array(result.displacement_field)
    assert np.median(shift.reshape(-1, 3), axis=0) == pytest.approx([300, -250, 400], abs=1.0)


def test_initial_transform_and_none(demo_pair):
    moving = sitk.ReadImage(demo_pair["moving"])
    shift = sitk.TranslationTransform(3, (18.0, -9.0, 14.0))
    given = LDRCore.register(demo_pair["fixed"], moving, initial=shift)
    assert given.report["initial"] == "transform"
    assert given.report["similarity"]["after"] > given.report["similarity"]["before"]
    plain = LDRCore.register(demo_pair["fixed"], moving, initial="none", affine=False)
    assert np.allclose(plain.report["affine_matrix_lps"], np.eye(4))


def moved_blob(blob: sitk.Image) -> sitk.Image:
    """The blob where another scanner put it."""
    moved = sitk.Image(blob)
    moved.SetOrigin((9.0, -6.0, 12.0))
    return moved


SHIFT = sitk.TranslationTransform(3, (9.0, -6.0, 12.0))


def bent_shift(blob: sitk.Image) -> sitk.Transform:
    """The same shift, not linear: at all points alike, but as a displacement field."""
    wide = sitk.Image([n + 20 for n in blob.GetSize()], sitk.sitkUInt8)
    wide.SetSpacing(blob.GetSpacing())
    wide.SetOrigin((-30.0, -30.0, -30.0))
    field = sitk.TransformToDisplacementField(
        SHIFT, sitk.sitkVectorFloat64, wide.GetSize(), wide.GetOrigin(), wide.GetSpacing(), wide.GetDirection()
    )
    return sitk.DisplacementFieldTransform(field)


@pytest.mark.parametrize("kind", ["linear", "nonlinear"])
def test_before_is_where_the_scanner_put_the_images_and_initial_is_after_the_initial_transform(blob, kind):
    moving = moved_blob(blob)
    scanned = LDRCore.register(blob, moving, initial="none", cascades=1).report["similarity"]
    initial = SHIFT if kind == "linear" else bent_shift(blob)
    similarity = LDRCore.register(blob, moving, initial=initial, cascades=1).report["similarity"]
    assert scanned["before"] == scanned["initial"] < 0.9
    assert similarity["before"] == scanned["before"]
    assert similarity["initial"] == pytest.approx(1.0, abs=1e-3)


def test_a_linear_composite_is_a_linear_initial_transform(blob):
    """One matrix, applied in the composite's order, and no second interpolation of the moving image."""
    turn = sitk.Euler3DTransform((40.0, 45.0, 42.0), 0.0, 0.0, 0.2)
    composite = sitk.CompositeTransform([SHIFT, turn])  # the turn is applied first
    expected = np.eye(4)
    expected[:3, :3] = np.array(turn.GetMatrix()).reshape(3, 3)
    expected[:3, 3] = SHIFT.TransformPoint(turn.TransformPoint((0.0, 0.0, 0.0)))
    result = LDRCore.register(blob, moved_blob(blob), initial=composite, affine=False, cascades=1)
    assert np.allclose(result.report["affine_matrix_lps"], expected, atol=1e-5)
    assert result.affine.GetName() == "AffineTransform"


@pytest.mark.parametrize("initial", [sitk.AffineTransform(2), sitk.CompositeTransform(2)])
def test_a_two_dimensional_initial_transform_is_refused(blob, initial):
    with pytest.raises(
        RegistrationError, match=r'^initial must be "center", "none" or a 3D SimpleITK transform or its path, got'
    ) as e:
        LDRCore.register(blob, blob, initial=initial)
    assert "\n" not in str(e.value)


def test_a_bent_initial_transform_is_composed_in(demo_pair, result):
    second = LDRCore.register(demo_pair["fixed"], demo_pair["moving"], initial=result.transform, inverse=True)
    assert demo.score(demo_pair, second)["deformable"] > demo.score(demo_pair, result)["affine"]
    again = sitk.Resample(
        sitk.ReadImage(demo_pair["moving"]),
        sitk.ReadImage(demo_pair["fixed"]),
        second.transform,
        sitk.sitkLinear,
        0.0,
    )
    assert np.array_equal(array(again), array(second.warped))
    point = sitk.ReadImage(demo_pair["fixed"]).TransformIndexToPhysicalPoint((40, 50, 30))
    back = second.inverse_transform.TransformPoint(second.transform.TransformPoint(point))
    assert back == pytest.approx(point, abs=1.0)


def test_what_lies_outside_the_masks_cannot_drive_the_result(demo_pair):
    fixed, moving = (sitk.ReadImage(demo_pair[k]) for k in ("fixed", "moving"))
    masks = {f"{k}_mask": sitk.ReadImage(demo_pair[f"{k}_labels"]) > 0 for k in ("fixed", "moving")}
    clean = LDRCore.register(fixed, moving, **masks)
    dirty_images = []
    for image, mask in ((fixed, masks["fixed_mask"]), (moving, masks["moving_mask"])):
        values = sitk.GetArrayFromImage(image)
        outside = sitk.GetArrayViewFromImage(mask) == 0
        values[outside] = np.random.default_rng(0).integers(0, 1200, outside.sum())
        dirty = sitk.GetImageFromArray(values)
        dirty.CopyInformation(image)
        dirty_images.append(dirty)
    dirty = LDRCore.register(*dirty_images, **masks)
    assert np.array_equal(array(dirty.displacement_field), array(clean.displacement_field))
    unmasked = LDRCore.register(*dirty_images)
    assert not np.allclose(array(unmasked.displacement_field), array(clean.displacement_field), atol=0.5)


def test_a_ct_is_registered_but_the_report_says_what_the_model_was_made_for(blob):
    ct = sitk.Cast(blob, sitk.sitkInt16) * 3 - 1000
    done = LDRCore.register(ct, ct, cascades=1)
    assert any("looks like CT" in text and "T1-weighted MRI" in text for text in done.report["warnings"])


def test_refining_registers_better_and_leaves_the_model_alone(demo_pair):
    model = LDRCore.load_model("brain-t1")
    before = {name: value.clone() for name, value in model.cascade.state_dict().items()}
    pair = demo_pair["fixed"], demo_pair["moving"]
    plain, refined = (LDRCore.register(*pair, model="brain-t1", refine_steps=n) for n in (0, 15))
    scores = [demo.score(demo_pair, r)["deformable"] for r in (plain, refined)]
    assert scores[1] > scores[0]
    assert refined.report["similarity"]["after"] > plain.report["similarity"]["after"]
    assert refined.report["refine_steps"] == 15
    after = LDRCore.load_model("brain-t1").cascade.state_dict()
    assert all(bool((after[name] == value).all()) for name, value in before.items())


def test_progress_is_told_and_can_cancel(blob):
    fractions: list[float] = []
    LDRCore.register(blob, blob, cascades=1, progress=lambda fraction, message: fractions.append(fraction))
    assert fractions == sorted(fractions)
    assert fractions[-1] == 1.0

    class CancelledError(Exception):
        pass

    def cancel(fraction: float, message: str) -> None:
        if fraction > 0.2:
            raise CancelledError

    with pytest.raises(CancelledError):
        LDRCore.register(blob, blob, cascades=1, progress=cancel)


@pytest.mark.parametrize("initial", [None, "bent"])
def test_the_transform_is_told_before_the_image_is_warped(blob, initial):
    start = None
    if initial == "bent":
        start = LDRCore.register(blob, blob, cascades=1).transform
    transforms: list[sitk.Transform] = []
    stages: list[str] = []

    def on_transform(transform: sitk.Transform) -> None:
        transforms.append(transform)
        stages.append("transform")

    result = LDRCore.register(
        blob,
        blob,
        cascades=1,
        initial=start,
        progress=lambda fraction, message: stages.append(message),
        on_transform=on_transform,
    )
    assert len(transforms) == 1
    assert stages.index("transform") < stages.index("measuring")
    points = np.array([[20.0, 30.0, 40.0], [50.0, 40.0, 30.0]])
    expected = LDRCore.transform_points(points, result.transform)
    assert np.array_equal(LDRCore.transform_points(points, transforms[0]), expected)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"cascades": -1}, "cascades must be 0 to 9 for model brain-t1-gradient, got -1"),
        ({"cascades": 10}, "cascades must be 0 to 9 for model brain-t1-gradient, got 10"),
        ({"cascades": 2.0}, "cascades must be 0 to 9 for model brain-t1-gradient, got 2.0"),
        (
            {"model": "liver"},
            r"model must be one of \['brain-t1', 'brain-t1-distilled', 'brain-t1-gradient', 'brain-t1-small', "
            r"'head-any', 'any', 'none'\].*got 'liver'",
        ),
        ({"initial": "magic"}, "initial must be .*got 'magic'"),
        ({"initial": 3}, "initial must be .*got 3"),
        ({"initial": sitk.AffineTransform(2)}, "initial must be .*got a 2D transform"),
        ({"initial": sitk.AffineTransform([0.0] * 9, [0.0] * 3)}, "initial must be finite and invertible, got"),
        ({"initial": sitk.TranslationTransform(3, (0.0, float("nan"), 0.0))}, "initial must be finite and invertible"),
        ({"device": "abacus"}, "device must be .*got 'abacus'"),
        ({"refine": "slow"}, r"refine must be one of \('none', 'fast', 'best'\), got 'slow'"),
        ({"similarity": "ssd"}, "similarity must be one of .*got 'ssd'"),
        ({"refine_steps": -1}, "refine_steps must be a whole number, 0 or more, got -1"),
        ({"refine_steps": 2.5}, "refine_steps must be a whole number, 0 or more, got 2.5"),
    ],
)
def test_wrong_options_are_named(blob, options, message):
    with pytest.raises(RegistrationError, match=message):
        LDRCore.register(blob, blob, **options)


def test_warp_image_refuses_other_interpolations(blob):
    with pytest.raises(RegistrationError, match=r"one of .*'linear', 'nearest'.*got 'sinc'"):
        LDRCore.warp_image(blob, sitk.Transform(), blob, "sinc")


def test_damaged_weights_are_refused(tmp_path, blob):
    card = weights.BUNDLED / "brain-t1.json"
    (tmp_path / "brain-t1.json").write_text(card.read_text(encoding="utf-8"))
    damaged = bytearray((weights.BUNDLED / "brain-t1.pt").read_bytes())
    damaged[len(damaged) // 2] ^= 0xFF
    (tmp_path / "brain-t1.pt").write_bytes(damaged)
    with pytest.raises(RegistrationError, match=r"must have sha256 .*is damaged"):
        LDRCore.register(blob, blob, model=tmp_path / "brain-t1.pt")
    (tmp_path / "brain-t1.pt").unlink()
    with pytest.raises(RegistrationError, match=r"must lie beside their card"):
        LDRCore.register(blob, blob, model=tmp_path / "brain-t1.json")


def test_save_is_complete_or_not_at_all(tmp_path, result):
    def fail(folder: Path) -> None:
        raise OSError("disk full")

    with pytest.raises(RegistrationError, match=r"must be writable.*disk full"):
        result.save(tmp_path / "out", extra=fail)
    assert list(tmp_path.iterdir()) == []
    written = result.save(tmp_path / "out")
    assert {p.name for p in written} >= {"warped.nii.gz", "transform.h5", "inverse_transform.h5", "report.json"}
    with pytest.raises(RegistrationError, match="must not hold an earlier result"):
        result.save(tmp_path / "out")
    result.save(tmp_path / "out", overwrite=True)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["out"]


def test_an_output_folder_without_permission_is_refused(tmp_path, result, monkeypatch):
    locked = tmp_path / "locked"
    locked.mkdir(mode=0o500)
    if os.geteuid() == 0:  # root may write anywhere, so the refusal is played

        def refuse(**options):
            raise PermissionError(13, "Permission denied")

        monkeypatch.setattr("LDRCore.io.files.tempfile.TemporaryFile", refuse)
    with pytest.raises(RegistrationError, match=r"must be writable, got .*locked/out \(Permission denied\)"):
        result.save(locked / "out")
    assert list(locked.iterdir()) == []


def test_an_output_folder_that_cannot_exist_is_refused(tmp_path, result):
    blocker = tmp_path / "file"
    blocker.write_text("")
    with pytest.raises(RegistrationError, match="must be a folder, got the file"):
        result.save(blocker)
    with pytest.raises(RegistrationError, match="must be writable"):
        result.save(blocker / "out")
