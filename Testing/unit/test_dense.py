"""What the networks are shown of two images, one of which ends within the other; how their field ends."""

from __future__ import annotations

import numpy as np
import pytest
import SimpleITK as sitk
import torch

from LDRCore.geometry import Grid
from LDRCore.models.cascade import CascadeOutput
from LDRCore.pipeline.dense import estimate_dense
from LDRCore.pipeline.model import Model
from LDRCore.pipeline.preprocess import ends_in_tissue, prepare
from LDRCore.transforms import field, spatial

CARD = {"working_grid": {"spacing_mm": 2.0, "margin_mm": 8.0}}


class Recorder:
    """In place of a cascade: stores the images that it is given, and predicts nothing."""

    multiple, field_stride = 4, 2

    def dense(self, moving: torch.Tensor, fixed: torch.Tensor, n_cascades: int) -> CascadeOutput:
        self.moving, self.fixed = moving, fixed
        return CascadeOutput(torch.zeros(1, 3, *(n // 2 for n in fixed.shape[2:])))


def body(first: int) -> sitk.Image:
    """A textured box within air, 40 x 40 x 40 voxels of 2 mm, of which the slices before `first` are missing."""
    values = np.zeros((40, 40, 40), np.float32)
    values[8:32, 8:32, 8:32] = 50 + 50 * np.random.default_rng(0).random((24, 24, 24))
    image = sitk.GetImageFromArray(values[first:])
    image.SetSpacing([2.0] * 3)
    image.SetOrigin([0.0, 0.0, 2.0 * first])
    return image


def shown(fixed: sitk.Image, moving: sitk.Image) -> Recorder:
    images = [prepare(image, None, fine_mm=2.0, coarse_mm=4.0) for image in (fixed, moving)]
    recorder = Recorder()
    estimate_dense(Model("mine", CARD, recorder, "cpu"), *images, np.eye(4), 1)
    return recorder


def test_where_the_fixed_view_ends_the_networks_see_neither_image():
    """The working grid begins 4 voxels (8 mm) before the first slice that is left; the moving image goes on there."""
    seen = shown(body(20), body(0))
    assert not seen.moving[0, 0, :4].any()
    assert not seen.fixed[0, 0, :4].any()
    assert seen.moving[0, 0, 4, 10:20, 10:20].min() > 0.3
    assert seen.fixed[0, 0, 4, 10:20, 10:20].min() > 0.3


def test_where_the_moving_view_ends_the_networks_see_the_fixed_image():
    seen = shown(body(0), body(20))
    assert not seen.moving[0, 0, :14].any()
    assert seen.fixed[0, 0, 6:14, 10:20, 10:20].min() > 0.3


@pytest.mark.parametrize(("first", "ends"), [(0, False), (20, True)])
def test_an_image_ends_in_tissue_or_in_air(first, ends):
    assert ends_in_tissue(prepare(body(first), None, fine_mm=2.0, coarse_mm=4.0).fine) is ends


@pytest.mark.parametrize(("across", "taper"), [((10.0, 0.0, 0.0), 20), ((4.0, -3.0, 5.0), 24), ((1.0, 1.0, 1.0), 6)])
def test_a_field_fades_out_without_folding(across, taper):
    grid = Grid((1.0, 2.0, 3.0), (2.0, 2.0, 2.0), (8, 9, 10))
    u = torch.tensor(across).view(1, 3, 1, 1, 1).expand(1, 3, *grid.shape)
    faded = field.with_taper(u, grid, np.eye(4), 6)
    assert faded.taper == taper
    assert faded.content_grid == grid
    assert torch.equal(faded.content_displacement_vox, u)
    assert spatial.folding_fraction(faded.displacement_vox) == 0
    assert (spatial.folding_fraction(field.fade_out(u, 6)) > 0) == (taper > 6)
