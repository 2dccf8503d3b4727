"""Instance optimisation within `register`: what it refines, what it reports, and when it leaves a result alone."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import SimpleITK as sitk

import LDRCore
from LDRCore import RegistrationError
from LDRCore.cli import demo
from LDRCore.evaluation.metrics import mean_dice
from LDRCore.transforms import inversion


def array(image: sitk.Image) -> np.ndarray:
    return sitk.GetArrayFromImage(image).astype(float)


@pytest.fixture(scope="module")
def refined(demo_pair) -> LDRCore.RegistrationResult:
    return LDRCore.register(
        demo_pair["fixed"], demo_pair["moving"], model="brain-t1-small", refine="fast", inverse=True
    )


def ball(radius_mm: float, centre_mm: tuple[float, float, float], spacing_mm: float = 2.0) -> sitk.Image:
    """A ball with some texture in a cube of 80 mm."""
    n = round(80 / spacing_mm)
    x = [spacing_mm * (np.arange(n) - n / 2) - c for c in centre_mm[::-1]]
    z, y, x = np.meshgrid(*x, indexing="ij")
    inside = z**2 + y**2 + x**2 < radius_mm**2
    values = np.where(inside, 500 + 120 * np.sin(z / 3) * np.cos(y / 4) + 90 * np.sin(x / 5), 0)
    image = sitk.GetImageFromArray(values.astype(np.float32))
    image.SetSpacing((spacing_mm,) * 3)
    image.SetOrigin((-spacing_mm * n / 2,) * 3)
    return image


def test_the_report_measures_on_the_fixed_grid(refined):
    determinant = array(refined.jacobian_determinant)
    report = refined.report
    assert report["folding_count"] == int((determinant <= 0).sum())
    assert report["folding_fraction"] == report["folding_count"] / determinant.size
    assert report["jacobian_determinant"] == {
        "min": pytest.approx(determinant.min(), abs=1e-4),
        "max": pytest.approx(determinant.max(), abs=1e-4),
    }


def test_behind_a_bent_start_the_whole_transform_is_measured():
    """The start folds: what the registration adds to it would not."""
    folded = np.zeros((10, 10, 10, 3))
    folded[:, :, 4, 0], folded[:, :, 5, 0] = 12.0, -12.0
    field = sitk.GetImageFromArray(folded, isVector=True)
    field.SetSpacing((8.0, 8.0, 8.0))
    field.SetOrigin((-40.0, -40.0, -40.0))
    image = ball(30, (0, 0, 0))
    report = LDRCore.register(
        image, image, model="none", initial=sitk.DisplacementFieldTransform(sitk.Cast(field, sitk.sitkVectorFloat64))
    ).report
    assert report["folding_fraction"] > 0.02
    assert report["jacobian_determinant"]["min"] < 0


def test_refining_gains_overlap_without_folding(demo_pair, refined):
    plain = LDRCore.register(demo_pair["fixed"], demo_pair["moving"], model="brain-t1-small")
    scores = [demo.score(demo_pair, r)["deformable"] for r in (plain, refined)]
    assert scores[1] > scores[0] + 0.03
    assert refined.report["folding_count"] == 0
    assert refined.report["similarity_chosen"]["name"] == "local-ncc"
    for level in refined.report["refinement"]:
        before, after = level["similarity"]
        assert after > before


def upper_half(path: str) -> sitk.Image:
    """The half of an image's slices that lies higher."""
    image = sitk.ReadImage(path)
    axis = int(np.abs(np.array(image.GetDirection()).reshape(3, 3)[2]).argmax())
    part = [slice(None)] * 3
    part[axis] = slice(image.GetSize()[axis] // 2, None)
    return image[tuple(part)]


@pytest.mark.parametrize("cut", [("fixed",), ("moving",), ("fixed", "moving")], ids=" and ".join)
def test_half_of_a_head_is_not_pulled_over_the_cut(demo_pair, cut):
    """A cut is no edge of the head. Where it was taken for one, the Jacobian came to 34 and vectors to 69 mm."""
    images = {n: upper_half(demo_pair[n]) if n in cut else sitk.ReadImage(demo_pair[n]) for n in ("fixed", "moving")}
    result = LDRCore.register(**images, model="none", refine="fast")
    still = sitk.Transform(3, sitk.sitkIdentity)

    def warped(labels: str, transform: sitk.Transform) -> np.ndarray:
        return array(LDRCore.warp_image(demo_pair[labels], transform, images["fixed"], "nearest"))

    fixed = warped("fixed_labels", still)
    dice = [mean_dice(warped("moving_labels", t), fixed) for t in (result.affine, result.transform)]
    assert dice[1] > dice[0] + 0.03
    assert result.report["folding_count"] == 0
    assert result.report["jacobian_determinant"]["max"] < 6
    assert result.report["dense_displacement_mm"]["max"] < 15


def test_the_inverse_is_measured_between_voxels_too(refined):
    told = refined.report["inverse_consistency_mm"]
    assert 0 < told["mean"] < 0.1 * 2.0  # a tenth of a working voxel
    assert told["mean"] < told["p99_9"] < told["max"]
    points = np.random.default_rng(1).uniform(-30, 30, (50, 3)) + array_centre(refined.warped)
    back = LDRCore.transform_points(LDRCore.transform_points(points, refined.transform), refined.inverse_transform)
    assert np.linalg.norm(back - points, axis=1).mean() < 0.1 * 2.0


def array_centre(image: sitk.Image) -> np.ndarray:
    return np.array(image.TransformContinuousIndexToPhysicalPoint([n / 2 for n in image.GetSize()]))


def test_inverting_any_transform_is_measured_against_that_transform():
    """A wave of 6 mm on a grid of 1 mm: a copy on 3 mm would lose it, and would not see that it did."""
    y = np.broadcast_to(np.arange(40.0)[:, None], (40, 40, 40))
    wave = np.stack([0.5 * np.sin(2 * np.pi * y / 6), 0 * y, 0 * y], axis=-1)
    field = sitk.GetImageFromArray(wave, isVector=True)
    waves = sitk.DisplacementFieldTransform(sitk.Cast(field, sitk.sitkVectorFloat64))
    shifted = sitk.CompositeTransform([sitk.TranslationTransform(3, (1.0, 2.0, 3.0)), waves])
    reference = sitk.Image((40, 40, 40), sitk.sitkUInt8)
    inverse, told = inversion.invert_transform(shifted, reference)
    points = np.random.default_rng(2).uniform(5, 34, (500, 3))
    back = np.array([inverse.TransformPoint(shifted.TransformPoint(p)) for p in points.tolist()])
    distance = np.linalg.norm(back - points, axis=1)
    assert distance.mean() < 0.1
    assert told.mean == pytest.approx(distance.mean(), abs=0.1)
    assert dataclasses.asdict(told).keys() == {"mean", "p99_9", "max"}


def test_without_a_network_and_without_affine_the_centred_images_are_refined():
    """The moving ball is smaller and lies elsewhere; the scanner coordinates are wrong, the centroid is right."""
    fixed, moving = ball(26, (0, 0, 0)), ball(21, (6, -5, 4))
    options = {"model": "none", "fixed": fixed, "moving": moving, "affine": False}
    start, refined = (LDRCore.register(**options, refine=name) for name in ("none", "best"))
    assert start.report["cascades"] == 0
    covered = [float((array(r.warped)[array(fixed) > 0] > 0).mean()) for r in (start, refined)]
    assert covered[0] < 0.75
    assert covered[1] > 0.93
    assert refined.report["model"] == "none"
    assert len(refined.report["refinement"]) > 1


def test_a_given_transform_is_refined_without_a_network():
    fixed, moving = ball(26, (0, 0, 0)), ball(26, (9, 0, 0))
    start = sitk.TranslationTransform(3, (9.0, 0.0, 0.0))
    result = LDRCore.register(fixed, moving, model="none", initial=start, affine=False, refine="fast")
    moved = LDRCore.transform_points([[0.0, 0.0, 0.0], [10.0, 5.0, -8.0]], result.transform)
    assert np.abs(moved - [[9.0, 0.0, 0.0], [19.0, 5.0, -8.0]]).max() < 1.0


def test_native_voxels_are_refined_where_asked_for():
    fixed, moving = ball(26, (0, 0, 0), spacing_mm=1.0), ball(25, (1, 0, 0), spacing_mm=1.0)
    options = {"model": "none", "fixed": fixed, "moving": moving, "refine_steps": 2}
    working, native = (LDRCore.register(**options, refine_spacing=name) for name in ("working", "native"))
    assert working.report["refinement"][-1]["spacing_mm"] == [2.0, 2.0, 2.0]
    assert native.report["refinement"][-1]["spacing_mm"] == [1.0, 1.0, 1.0]
    assert native.report["refinement"][-2]["spacing_mm"] == [2.0, 2.0, 2.0]


@pytest.mark.parametrize("case", ["masks", "apart"])
def test_what_has_nothing_in_common_is_not_refined_and_says_so(case):
    fixed = ball(26, (0, 0, 0))
    moving, more, reason = ball(26, (0, 0, 0)), {}, "the images do not overlap after the affine alignment"
    if case == "masks":
        left, right = (sitk.Cast(fixed * 0, sitk.sitkUInt8) for _ in range(2))
        left[:15, :, :], right[25:, :, :] = 1, 1
        more, reason = {"fixed_mask": left, "moving_mask": right}, "the masks leave no voxel that lies in both"
    else:
        moving.SetOrigin((500.0, 0.0, 0.0))
    result = LDRCore.register(fixed, moving, model="none", initial="none", affine=False, refine="fast", **more)
    assert any(reason in warning for warning in result.report["warnings"])
    assert result.report["refinement"] == []
    assert result.report["dense_displacement_mm"]["max"] == 0


def test_unrelated_images_are_refined_by_descriptors_and_the_report_says_why():
    noise = np.random.default_rng(0).uniform(0.2, 1, (2, 40, 40, 40)).astype(np.float32)
    images = [sitk.GetImageFromArray(values) for values in noise]
    for image in images:
        image.SetSpacing((2.0, 2.0, 2.0))
    chosen = LDRCore.register(*images, model="none", initial="none", affine=False, refine_steps=1).report
    assert chosen["similarity_chosen"]["name"] == "mind"
    assert "turned round" in chosen["similarity_chosen"]["why"]


def test_cancelling_an_iteration_ends_the_registration(demo_pair):
    class CancelledError(Exception):
        pass

    seen = []

    def cancel(fraction: float, message: str) -> None:
        seen.append((fraction, message))
        if message == "refining" and fraction > 0.55:
            raise CancelledError

    with pytest.raises(CancelledError):
        LDRCore.register(demo_pair["fixed"], demo_pair["moving"], cascades=0, refine="fast", progress=cancel)
    assert len([1 for _, message in seen if message == "refining"]) > 2


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"refine_spacing": "1 mm"}, r"refine_spacing must be one of \('working', 'native'\), got '1 mm'"),
        ({"model": "none", "cascades": 1}, "cascades must be 0 to 0 for model none, got 1"),
    ],
)
def test_wrong_options_are_named(blob, options, message):
    with pytest.raises(RegistrationError, match=message):
        LDRCore.register(blob, blob, **options)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"model": ""}, "model must be a name or a path, got ''"),
        ({"model": 5}, "model must be a name or a path, got 5"),
        ({"device": "meta"}, "device must be .*got 'meta'"),
        ({"device": None}, "device must be a text, got None"),
        ({"similarity": ["mind"]}, "similarity must be a text, got"),
    ],
)
def test_values_of_other_types_are_named(blob, options, message):
    with pytest.raises(RegistrationError, match=message):
        LDRCore.register(blob, blob, **options)


def test_thick_slices_stay_whole_at_every_level():
    fixed = sitk.Resample(
        ball(26, (0, 0, 0), 1.0), (80, 80, 16), sitk.Transform(), sitk.sitkLinear, (-40.0,) * 3, (1, 1, 5)
    )
    moving = ball(25, (2, 1, 0), spacing_mm=1.0)
    levels = LDRCore.register(
        fixed, moving, model="none", affine=False, refine_steps=2, refine_spacing="native"
    ).report["refinement"]
    assert [level["spacing_mm"][0] for level in levels] == [10.0, 5.0, 5.0, 5.0]
    assert [level["spacing_mm"][2] for level in levels] == [8.0, 4.0, 2.0, 1.0]


def test_a_moving_mask_counts_behind_a_nonlinear_start():
    """A start of zero displacement changes nothing: what the mask's cut edge may pull is the same."""
    fixed, moving = ball(26, (0, 0, 0)), ball(26, (0, 0, 0))
    mask = sitk.Cast(moving > 0, sitk.sitkUInt8)
    mask[:, :, 20:] = 0
    zero = sitk.Image((40, 40, 40), sitk.sitkVectorFloat64, 3)
    zero.CopyInformation(fixed)
    options = {"model": "none", "affine": False, "moving_mask": mask, "refine": "fast", "similarity": "local-ncc"}
    lengths = []
    for initial in ("none", sitk.DisplacementFieldTransform(zero)):
        field = LDRCore.register(fixed, moving, initial=initial, **options).displacement_field
        lengths.append(np.linalg.norm(array(field), axis=-1)[array(fixed) > 0].mean())
    assert lengths[1] == pytest.approx(lengths[0], rel=0.1)


def test_a_field_with_a_shift_is_inverted_up_to_the_borders_of_its_image():
    """Outside of its image a displacement field is zero, which must not reach into it."""
    z, y, x = np.meshgrid(*[np.arange(40.0)] * 3, indexing="ij", sparse=True)
    bend = 2 * np.sin(x / 8) * np.cos(y / 9) * np.cos(z / 7)
    vectors = np.stack([20 + bend, 10 - bend, bend - 15], axis=-1)
    image = sitk.GetImageFromArray(vectors, isVector=True)
    image.SetSpacing((2.0, 2.0, 2.0))
    transform = sitk.DisplacementFieldTransform(sitk.Cast(image, sitk.sitkVectorFloat64))
    reference = sitk.Image((40, 40, 40), sitk.sitkUInt8)
    reference.SetSpacing((2.0, 2.0, 2.0))
    inverse, told = inversion.invert_transform(transform, reference)
    points = np.random.default_rng(3).uniform(4, 74, (400, 3))
    back = np.array([inverse.TransformPoint(transform.TransformPoint(p)) for p in points.tolist()])
    assert np.linalg.norm(back - points, axis=1).max() < 0.2
    assert told.mean < 0.1
