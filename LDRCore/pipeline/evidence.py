"""Measures by which a result can be told from a failure, inside the fixed image's content: see `verdict`.

Everything is measured on a grid like the fine one of `alignment.search`, over the fixed content (4.5 mm for a head),
with its windows; the bounds of `verdict` hold for that resolution. Local correlation is squared, in windows of the
fixed content that have texture: it does not mind gain, offset, bias fields or a background that agrees. How clear a
result is, is the ratio of its local correlation to the best that the same two images have when one of them is shifted
along an axis: noise lowers both, and right maps stand out from their surroundings.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import torch

from LDRCore.alignment.objective import EPSILON, TEXTURE
from LDRCore.alignment.search import FINE_VOXELS, FINE_WINDOW, fine_spacing
from LDRCore.geometry import Grid
from LDRCore.pipeline.inputs import Pair
from LDRCore.pipeline.intensities import FOREGROUND_LEVEL
from LDRCore.pipeline.preprocess import PreparedImage
from LDRCore.refinement import torch_ops
from LDRCore.transforms import spatial
from LDRCore.transforms.field import DenseField
from LDRCore.transforms.volume import Volume

SHIFT = 3  # by how far images are shifted, voxels
TISSUE, AIR = 0.3, 0.05  # means of 3 voxels cubed: tissue and air for certain
CLEAR = 1.3  # clearness from which the affine part is beyond doubt
EXTREME = 5.0  # a volume that shrinks or grows more
JACOBIAN_VOXELS, FLAT_VOXELS = 50_000, 50_000  # looked at, about


@torch.no_grad()
def measure(pair: Pair, field: DenseField) -> dict[str, Any]:
    """Measure a result.

    Args:
        pair: prepared.
        field: the result, fixed -> moving.

    Returns:
        local_correlation: of the affine part and after, 0 to 1; clearness: the same over that of shifted images, after
        the deformation only where the affine part's is below `CLEAR` (else None);
        same_contrast: of the affine part, 1 where bright is bright in both, -1 where it is dark; inside: share of the
        fixed content that lies in the moving image's field of view (and mask); missing: share of the fixed tissue at
        which the moving image shows air; determinant and stretches (smallest, largest) of the affine part; extreme and
        folding: share of the fixed content whose volume changes more than `EXTREME` times, or that folds, beside the
        affine part; flat: of each image, share of its content's voxels that have exactly the value of the next one.
    """
    spacing = max(fine_spacing(pair.fixed.box_lps), float(pair.fixed.fine.spacing_mm.min()))
    grid = Grid.around(
        *pair.fixed.box_lps, spacing_mm=spacing, margin_mm=SHIFT * spacing, multiple=1, max_voxels=8 * FINE_VOXELS
    )
    fixed = pair.fixed.fine.averaged(spacing).on(grid)
    moving = pair.moving.fine.averaged(spacing)
    displacement = field.on(grid)[None]
    aligned, known = moving.on(grid, field.affine_lps), _known(pair.moving, moving).on(grid, field.affine_lps)
    content = fixed[0, 0] > FOREGROUND_LEVEL
    if pair.fixed.mask is not None:
        content &= pair.fixed.mask.on(grid)[0, 0] > 0.5
    comparison = _Comparison(fixed[0, 0], content)
    affine = comparison.correlate(aligned[0, 0], known[0, 0] > 0.5)
    after, inside = affine, known[0, 0] > 0.5
    warped = aligned
    if bool(displacement.any()):
        warped, inside = spatial.warp(aligned, displacement), spatial.warp(known, displacement)[0, 0] > 0.5
        after = comparison.correlate(warped[0, 0], inside, shifted=affine[1] < CLEAR)
    tissue, mean = comparison.tissue & inside, torch_ops.window_means(warped[0, 0], 3)
    stretches = np.linalg.svd(field.affine_lps[:3, :3], compute_uv=False)
    measures = {
        "local_correlation": {"affine": affine[0], "after": after[0]},
        "clearness": {"affine": affine[1], "after": after[1] if math.isfinite(after[1]) else None},
        "same_contrast": affine[2],
        "inside": _share(content & inside, content),
        "missing": _share(tissue & (mean < AIR), tissue),
        "determinant": float(np.linalg.det(field.affine_lps[:3, :3])),
        "stretches": [float(stretches[-1]), float(stretches[0])],
        **_volume_changes(field, pair.fixed),
        "flat": {"fixed": _flatness(pair.fixed), "moving": _flatness(pair.moving)},
    }
    return {name: _rounded(value) for name, value in measures.items()}


def _known(prepared: PreparedImage, averaged: Volume) -> Volume:
    """1 where an image may be compared: in its field of view and its mask; 0 outside."""
    return prepared.mask if prepared.mask is not None else Volume(torch.ones_like(averaged.data), averaged.to_lps)


def _flatness(image: PreparedImage) -> float:
    """Share of the content's voxels, in some slices, that have exactly the value of the next one along a row."""
    values = image.native.data[0, 0]
    slices = values[:: max(1, values.numel() // FLAT_VOXELS)]
    measured = image.intensities
    content = slices[..., :-1] > measured.low + FOREGROUND_LEVEL * (measured.high - measured.low)
    return _share(content & (slices[..., :-1] == slices[..., 1:]), content)


def _share(part: torch.Tensor, whole: torch.Tensor) -> float:
    return float(part.sum()) / max(float(whole.sum()), 1.0)


def _rounded(value: Any) -> Any:
    if isinstance(value, dict):
        return {name: _rounded(v) for name, v in value.items()}
    if value is None:
        return None
    return [_rounded(v) for v in value] if isinstance(value, list) else round(value, 4)


class _Comparison:
    """Local correlation of images with the fixed image, whose own statistics are computed once."""

    def __init__(self, fixed: torch.Tensor, content: torch.Tensor) -> None:
        self._fixed = fixed
        self._mean, self._variance = torch_ops.window_statistics(fixed, FINE_WINDOW, EPSILON)
        self._valid = content & (self._variance > TEXTURE + EPSILON)
        self.tissue = content & (torch_ops.window_means(fixed, 3) > TISSUE)

    def correlate(
        self, image: torch.Tensor, inside: torch.Tensor, *, shifted: bool = True
    ) -> tuple[float, float, float]:
        """Return squared local correlation, clearness, and the signed mean of local correlation over its length.

        Without `shifted`, clearness is not measured: infinite.
        """
        mean, variance = torch_ops.window_statistics(image, FINE_WINDOW, EPSILON)
        valid = self._valid & inside
        whole = slice(None), slice(None), slice(None)
        covariance = self._covariance(image, mean, whole, whole)
        product = variance * self._variance
        square, signed = covariance.square() / product, covariance / product.sqrt()
        count = max(float(valid.sum()), 1.0)
        value = float((square * valid).sum()) / count
        same = float((signed * valid).sum()) / count / max(math.sqrt(value), 1e-6)
        if not shifted:
            return value, math.inf, same
        chance = 0.0
        for axis, n in enumerate(image.shape):
            if n <= SHIFT:
                continue
            low, high = [slice(None)] * 3, [slice(None)] * 3
            low[axis], high[axis] = slice(0, n - SHIFT), slice(SHIFT, n)
            for own, other in ((tuple(low), tuple(high)), (tuple(high), tuple(low))):
                covariance = self._covariance(image, mean, own, other)
                square = covariance.square_() / (variance[other] * self._variance[own])
                counts = valid[own]
                chance = max(chance, float((square * counts).sum()) / max(float(counts.sum()), 1.0))
        return value, value / max(chance, 1e-3), same

    def _covariance(self, image: torch.Tensor, mean: torch.Tensor, own: Any, other: Any) -> torch.Tensor:
        """Of the windows `own` of the fixed image and `other` of another one."""
        cross = torch_ops.window_means(self._fixed[own] * image[other], FINE_WINDOW)
        return cross.addcmul_(self._mean[own], mean[other], value=-1)


def _volume_changes(field: DenseField, fixed: PreparedImage) -> dict[str, float]:
    """Shares of the fixed content whose volume changes much, and that folds: at a regular subsample of the voxels."""
    u = field.content_displacement_vox[0]
    if min(u.shape[1:]) < 3 or not bool(u.any()):
        return {"extreme": 0.0, "folding": 0.0}
    step = math.ceil((u[0].numel() / JACOBIAN_VOXELS) ** (1 / 3))
    middle = [slice(None), *(slice(1, n - 1, step) for n in u.shape[1:])]
    rows = []
    for axis, n in enumerate(u.shape[1:], 1):
        after, before = list(middle), list(middle)
        after[axis], before[axis] = slice(2, n, step), slice(0, n - 2, step)
        rows.append((u[tuple(after)] - u[tuple(before)]) / 2)
    matrix = torch.stack(rows)  # [a, c] = d u_c / d x_a
    for axis in range(3):
        matrix[axis, axis] += 1
    determinant = spatial.determinant(matrix)
    grid = field.content_grid
    coarse = Grid(
        tuple(o + s for o, s in zip(grid.origin_lps, grid.spacing_mm[::-1], strict=True)),  # type: ignore[arg-type]
        tuple(s * step for s in grid.spacing_mm),  # type: ignore[arg-type]
        tuple(determinant.shape),  # type: ignore[arg-type]
    )
    content = fixed.coarse.on(coarse)[0, 0] > FOREGROUND_LEVEL
    extreme = (determinant < 1 / EXTREME) | (determinant > EXTREME)
    return {"extreme": _share(content & extreme, content), "folding": _share(content & (determinant <= 0), content)}
