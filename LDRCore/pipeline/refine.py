"""Stage 3, refine: instance optimisation of the pair's own displacement, by `LDRCore.refinement`.

It starts from what came before (networks, an affine map, or an initial transform alone) and looks at both images at
the working resolution, not at the field's coarser one. Where either image ends, other than in air, nothing is known:
windows that reach there count for nothing (see `preprocess.continued`). Never touches a model's weights.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F

from LDRCore import sampling
from LDRCore.geometry import Grid
from LDRCore.pipeline.inputs import Inputs, Pair, prepare_pair
from LDRCore.pipeline.intensities import FOREGROUND_LEVEL
from LDRCore.pipeline.options import Options
from LDRCore.pipeline.preprocess import PreparedImage, continued
from LDRCore.refinement.optimiser import Settings, optimise
from LDRCore.refinement.similarity import LocalCorrelation, Mind, Similarity, Warp, choose_similarity
from LDRCore.transforms.field import DenseField, multiply, with_taper
from LDRCore.transforms.volume import Volume

# Of the Gaussians on updates by descriptors and on their total, voxels; descriptors are noisier. On validation pairs of
# T1 and FLAIR-like heads, sigma_total 0.4, 0.7, 1.0: Dice .570, .608, .614 ("fast"), .579, .620, .624 ("best"), folding
# .03 and .08 % for 0.4, else none; 1.4 is less good.
MIND_SIGMA_UPDATE, MIND_SIGMA_TOTAL = 1.2, 1.0
MARGIN_MM = 8.0  # of the grid about the fixed image's content
TAPER_MM = 24.0  # the field fades to zero over such a distance outside of the grid, or a larger one
MAX_VOXELS = 5_000_000  # of the grid; content that needs more is looked at more coarsely
MAX_NATIVE_VOXELS = 16_000_000  # of the grid where the fixed image's own voxels were asked for
_WHOLE = 0.99  # of what a voxel averages is known, but for rounding
_PARALLEL = 1e-3  # of a voxel over the grid, by which axes may deviate from the patient's and count as parallel


@dataclass(frozen=True)
class Level:
    """One level of a plan.

    Attributes:
        stride: the level's voxels are so many times as long as those of the working resolution, along every axis whose
            own are shorter; 0 for the image's own voxels.
        settings: of the optimiser.
        window: edge of the windows of local correlation, voxels.
    """

    stride: int
    settings: Settings
    window: int = 3


PLANS: dict[str, tuple[Level, ...]] = {
    "none": (),
    "fast": (Level(2, Settings(10)), Level(1, Settings(10))),
    "best": (Level(2, Settings(20), window=5), Level(1, Settings(30), window=5)),
}
"""Levels by name, coarsest first; chosen on the validation pairs of `Training/configs/evaluate-refine.toml`."""
FROM_AFFINE = (
    Level(4, Settings(60, sigma_update=1.6, sigma_total=0.6, stall=3e-4)),
    Level(2, Settings(40, sigma_update=1.2)),
)
"""Levels that come first where no network has run. Smoother ones move farther; a level of stride 8 was worse."""


def choose_plan(refine: str, steps: int, *, networks: bool, native: bool = False) -> tuple[Level, ...]:
    """Return the levels to run, coarsest first.

    Args:
        refine: a key of `PLANS`.
        steps: iterations at each level, instead of the plan's own (of "fast" for "none"); 0 for the plan's.
        networks: whether dense networks came before.
        native: whether a level of the image's own voxels comes last.
    """
    levels = PLANS["fast" if steps and refine == "none" else refine]
    if levels and not networks:
        levels = (*FROM_AFFINE, levels[-1])
    if levels and native:
        levels = (*levels, replace(levels[-1], stride=0))
    if steps:
        levels = tuple(replace(level, settings=replace(level.settings, iterations=steps)) for level in levels)
    return levels


def run(
    field: DenseField,
    pair: Pair,
    inputs: Inputs,
    options: Options,
    card: dict[str, Any],
    progress: Callable[[float], None] | None,
) -> tuple[DenseField, dict[str, Any]]:
    """Improve a dense field as the options of a registration say; see `refine`.

    Args:
        field: what comes from the networks, or zero after an affine map.
        pair: prepared at the working resolution.
        inputs: the images themselves, prepared anew where the voxels of the fixed image are asked for.
        options: of the registration.
        card: of the model.
        progress: see `refine`.
    """
    working_mm = float(pair.fixed.fine.spacing_mm.min())
    native = options.refine_spacing == "native" and pair.fixed.fine.data.shape != pair.fixed.native.data.shape
    if native:
        unaveraged = card | {"working_grid": card["working_grid"] | {"spacing_mm": 0.0}}
        pair = prepare_pair(inputs, options.nonlinear_initial, unaveraged, options.device)
    levels = choose_plan(options.refine, options.refine_steps, networks=options.cascades > 0, native=native)
    most = MAX_NATIVE_VOXELS if native else MAX_VOXELS
    field, facts = refine(
        field, pair.fixed, pair.moving, levels, options.similarity, progress, working_mm=working_mm, max_voxels=most
    )
    if native and min(field.grid.spacing_mm) > 1.01 * pair.fixed.fine.spacing_mm.min():
        facts["refinement_coarser"] = (
            f"instance optimisation ended at {min(field.grid.spacing_mm):.2f} mm, as the fixed image has more voxels "
            f"than {MAX_NATIVE_VOXELS:,}"
        )
    return field, facts


@torch.no_grad()
def refine(
    field: DenseField,
    fixed: PreparedImage,
    moving: PreparedImage,
    levels: tuple[Level, ...],
    similarity: str = "auto",
    progress: Callable[[float], None] | None = None,
    *,
    working_mm: float | None = None,
    max_voxels: int = MAX_VOXELS,
) -> tuple[DenseField, dict[str, Any]]:
    """Improve a dense field.

    Args:
        field: T(x) = A (x + u(x)); A is kept.
        fixed, moving: prepared images, at the resolution of the finest level.
        levels: see `choose_plan`; without any the field is returned as it is.
        similarity: "auto", "local-ncc" or "mind".
        progress: called after every iteration with the fraction done; an exception raised in it cancels.
        working_mm: spacing that levels count their strides in; that of the finest grid if not given.
        max_voxels: of the finest level's grid.

    Returns:
        (field, facts for the report). The field is the one that was given where the images have nothing in common to
        refine by; the facts then say why.
    """
    if not levels:
        return field, {}
    finest = refinement_grid(fixed, max_voxels)
    unit_mm = max(working_mm or 0.0, min(finest.spacing_mm))
    total = sum(level.settings.iterations for level in levels)
    done, why = 0, "it was asked for"
    facts: list[dict[str, Any]] = []
    for level in levels:
        blocks = _blocks(finest, level.stride * unit_mm)
        grid = coarsened(finest, blocks)
        displacement = field.on(grid)
        warp = _warper(moving.fine.averaged(min(grid.spacing_mm)), grid, field.affine_lps)
        target, inside = _on_level(fixed.fine, finest, blocks)
        mask = _mask(fixed, moving, grid, field.affine_lps)
        if not facts:
            begin = warp(displacement).clamp_min_(0)
            obstacle = _obstacle(begin, target, mask)
            if obstacle:
                return field, {"refinement": [], "refinement_skipped": obstacle}
            if similarity == "auto":
                similarity, why = choose_similarity(begin, target, FOREGROUND_LEVEL)
        settings = level.settings
        if similarity == "mind":
            settings = replace(settings, sigma_update=MIND_SIGMA_UPDATE, sigma_total=MIND_SIGMA_TOTAL)
        share = settings.iterations / total
        outcome = optimise(
            displacement,
            _make_similarity(similarity, level, warp, target, mask, inside),
            settings,
            progress=None if progress is None else _part(progress, done / total, share),
        )
        done += settings.iterations
        field = DenseField(outcome.displacement[None], grid, field.affine_lps)
        facts.append(
            {
                "spacing_mm": [round(s, 3) for s in grid.spacing_mm],
                "iterations": len(outcome.similarity) - 1,
                "similarity": [round(outcome.similarity[0], 5), round(outcome.best, 5)],
            }
        )
    cells = math.ceil(TAPER_MM / max(field.grid.spacing_mm))
    field = with_taper(field.displacement_vox, field.grid, field.affine_lps, cells)
    return field, {"refinement": facts, "similarity_chosen": {"name": similarity, "why": why}}


def _make_similarity(
    name: str,
    level: Level,
    warp: Warp,
    target: torch.Tensor,
    mask: torch.Tensor | None,
    inside: torch.Tensor | None,
) -> Similarity:
    if name == "local-ncc":
        return LocalCorrelation(warp, target, window=level.window, mask=mask, inside=inside)
    return Mind(warp, target, mask=mask, inside=inside)


def _obstacle(warped: torch.Tensor, target: torch.Tensor, mask: torch.Tensor | None) -> str | None:
    """Say why two images on a level's grid cannot be refined; None if they can."""
    if mask is not None and not mask.any():
        return "the masks leave no voxel that lies in both"
    common = (warped > FOREGROUND_LEVEL) & (target > FOREGROUND_LEVEL)
    if not (common if mask is None else common * mask).any():
        return "the images do not overlap after the affine alignment"
    return None


def _part(progress: Callable[[float], None], begin: float, share: float) -> Callable[[float], None]:
    return lambda fraction: progress(begin + share * fraction)


def refinement_grid(fixed: PreparedImage, max_voxels: int) -> Grid:
    """Return the grid that covers the fixed image's content at its working resolution.

    Where the image's axes are the patient's, the grid's voxels are the image's own, so that the fixed image need not be
    interpolated; elsewhere it is isotropic.
    """
    volume = fixed.fine
    low, high = fixed.box_lps[0] - MARGIN_MM, fixed.box_lps[1] + MARGIN_MM
    spacing = _patient_spacing(volume)
    if spacing is None:
        isotropic = float(volume.spacing_mm.min())
        return Grid.around(
            fixed.box_lps[0],
            fixed.box_lps[1],
            spacing_mm=isotropic,
            margin_mm=MARGIN_MM,
            multiple=2,
            max_voxels=max_voxels,
        )
    while True:
        count = [max(2, 2 * math.ceil((h - b) / s / 2)) for b, h, s in zip(low[::-1], high[::-1], spacing, strict=True)]
        if math.prod(count) <= max_voxels:
            break
        spacing = spacing * 2
    index = volume.from_lps @ np.append(low, 1)
    x, y, z = (volume.to_lps @ np.round(index))[:3].tolist()
    d, h, w = count
    a, b, c = spacing.tolist()
    return Grid((x, y, z), (a, b, c), (d, h, w))


def _patient_spacing(volume: Volume) -> np.ndarray | None:
    """Spacing along S, P, L of a volume whose axes are the patient's (permuted, flipped); None for an oblique one."""
    columns = volume.to_lps[:3, :3]
    main = np.abs(columns).argmax(0)
    if len(set(main.tolist())) < 3:
        return None
    stray = columns.copy()
    stray[main, range(3)] = 0
    if (np.abs(stray) @ np.array(volume.data.shape[2:])).max() > _PARALLEL * volume.spacing_mm.min():
        return None
    spacing = np.empty(3)
    spacing[2 - main] = np.abs(columns[main, range(3)])
    return spacing


Blocks = tuple[int, int, int]
"""How many voxels of the finest grid a level's voxel spans along each axis."""


def _blocks(finest: Grid, target_mm: float) -> Blocks:
    """Blocks that come nearest to a length; one voxel along axes whose voxels are as long."""
    a, b, c = (max(1, round(target_mm / s)) for s in finest.spacing_mm)
    return a, b, c


def coarsened(grid: Grid, blocks: Blocks) -> Grid:
    """Return a grid of blocks of voxels, each at the middle of its block."""
    if blocks == (1, 1, 1):
        return grid
    steps = zip(grid.origin_lps, grid.spacing_mm[::-1], blocks[::-1], strict=True)
    x, y, z = (o + s * (n - 1) / 2 for o, s, n in steps)
    a, b, c = (s * n for s, n in zip(grid.spacing_mm, blocks, strict=True))
    d, h, w = (max(2, n // m) for n, m in zip(grid.shape, blocks, strict=True))
    return Grid((x, y, z), (a, b, c), (d, h, w))


def _on_level(volume: Volume, finest: Grid, blocks: Blocks) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Average an image over the blocks of the finest grid.

    Returns:
        The image on a level's grid, and where it is known there, boolean; None where it is everywhere. (D, H, W) each.
    """
    image = continued(volume.averaged(min(finest.spacing_mm))).on(finest, padding="border")[0, 0]
    known = (image >= 0).to(image)
    both = torch.stack((image.clamp_min_(0), known))[None]
    if blocks != (1, 1, 1):
        sizes = zip(reversed(finest.shape), reversed(blocks), strict=True)
        pad = [p for n, m in sizes for p in (0, max(0, 2 * m - n))]
        both = F.avg_pool3d(F.pad(both, pad, mode="replicate") if any(pad) else both, blocks)
    inside = both[0, 1] > _WHOLE
    return both[0, 0].contiguous(), None if inside.all() else inside


def _warper(volume: Volume, grid: Grid, affine_lps: np.ndarray) -> Callable[[torch.Tensor], torch.Tensor]:
    """Return what samples the moving image once at A (x + u(x)), for u in voxels of the grid.

    The result is below 0 where it is not known, see `preprocess.continued`.
    """
    source = continued(volume)
    image, moving_from_grid = source.data[0, 0], source.from_lps @ affine_lps @ grid.to_lps

    def warp(u: torch.Tensor) -> torch.Tensor:
        displacement = multiply(moving_from_grid[:3, :3], u)
        return sampling.on_lattice(image, grid.shape, moving_from_grid, displacement, np.eye(4), padding="border")

    return warp


def _mask(fixed: PreparedImage, moving: PreparedImage, grid: Grid, affine_lps: np.ndarray) -> torch.Tensor | None:
    """1 on a level's grid where both masks allow an influence, (D, H, W); None where there is no mask."""
    mask: torch.Tensor | None = None
    for volume, transform in ((fixed.mask, None), (moving.mask, affine_lps)):
        if volume is not None:
            inside = (volume.on(grid, transform)[0, 0] > 0.5).float()
            mask = inside if mask is None else mask * inside
    return mask
