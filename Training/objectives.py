"""What teachers and students minimise before any distillation, and how they are validated."""

from __future__ import annotations

import dataclasses
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

from LDRCore import losses
from LDRCore.models import registry, weights
from LDRCore.models.cascade import Cascade, CascadeOutput
from LDRCore.transforms import spatial
from Training import checkpoints, engine
from Training.config import ConfigError, option
from Training.pairs import PairSource
from Training.samples import LabelPair, Sample


def _no_similarity(warped: torch.Tensor, fixed: torch.Tensor) -> torch.Tensor:
    """For images of unlike contrast, which labels alone bring together."""
    return warped.new_zeros(())


LOCAL_WINDOW = 5  # odd edge of the window of local correlation in validation, voxels
SIMILARITIES = {"correlation": losses.correlation, "local_ncc": losses.local_ncc, "none": _no_similarity}


@dataclasses.dataclass(frozen=True, kw_only=True)
class ModelSettings:
    """Keys that say what is trained and on which loss."""

    network: str = option("ldr", "dense network, a name of LDRCore.models.registry.DENSE")
    options: tuple[str, ...] = option((), 'its options, as in ["head=half", "channels=8x32x64x128"]')
    stages: tuple[str, ...] = option(
        (), 'or the networks one by one, as ["ldr head=deconv image_stride=2", "ldr-gradient hidden=16 repeat=4"]'
    )
    cascades: int = option(
        3, "how many networks, each with its own weights; with `stages` their number, repeat counted"
    )
    multiplier: float | None = option(None, "factor on every network's displacement; none: 1 / cascades")
    affine: str | None = option(None, "affine stem trained along with the networks (a name of STEMS)")
    affine_options: tuple[str, ...] = option((), "its options")
    detach: bool = option(False, "no gradient through the images that later cascades see (cheaper)")
    frozen: int = option(0, "so many networks, the first ones, stay as they were started")
    init: str | None = option(None, "start from a checkpoint's or a model's networks (as many or fewer cascades)")
    similarity: str = option("correlation", '"correlation" (global, Eq. 9-11), "local_ncc" or "none"')
    window: int = option(7, "odd edge of the window of local_ncc, voxels of the loss grid")
    every_cascade: bool = option(False, "similarity, overlap and folding after every cascade, not only the last")
    smooth: float = option(0.0, "weight of the smoothness of the composed displacement")
    smooth_each: float = option(1.0, "weight of the smoothness of every network's own displacement")
    fold: float = option(0.0, "weight of the folding penalty")
    dice: float = option(0.0, "weight of the soft Dice of the training labels")
    determinant: float = option(0.1, "weight of the stem's determinant loss")
    orthogonality: float = option(0.1, "weight of the stem's orthogonality loss")

    def __post_init__(self) -> None:
        if self.similarity not in SIMILARITIES:
            raise ConfigError(f"similarity must be one of {sorted(SIMILARITIES)}, got {self.similarity!r}")
        if self.similarity == "none" and not self.dice:
            raise ConfigError("similarity none needs dice > 0 (labels then drive the training), got dice = 0")
        if self.window < 3 or self.window % 2 == 0:
            raise ConfigError(f"window must be an odd number from 3, got {self.window}")
        if self.cascades < 1:
            raise ConfigError(f"cascades must be at least 1, got {self.cascades}")

    def architecture(self) -> dict[str, Any]:
        """The model card's `architecture` entry."""
        network: Any = {"name": self.network, **parse_options(self.options)}
        if self.stages:
            named = [stage.split() or [""] for stage in self.stages]
            network = [{"name": name, **parse_options(tuple(options))} for name, *options in named]
        entry: dict[str, Any] = {"network": network, "cascades": self.cascades, "multiplier": self.multiplier}
        if self.affine:
            entry["stem"] = {"name": self.affine, **parse_options(self.affine_options)}
        return entry


def parse_options(options: tuple[str, ...]) -> dict[str, Any]:
    """Keyword arguments from texts like "head=half".

    Raises:
        ConfigError: no equals sign.
    """
    found: dict[str, Any] = {}
    for text in options:
        name, equals, value = text.partition("=")
        if not equals:
            raise ConfigError(f'options must look like "name=value", got {text!r}')
        found[name] = _parse(value)
    return found


def _parse(value: str) -> Any:
    """A number, numbers like "8x32x64x128", or the text itself."""
    try:
        numbers = tuple(float(part) if "." in part else int(part) for part in value.split("x"))
    except ValueError:
        return value
    return numbers if len(numbers) > 1 else numbers[0]


def write_options(options: dict[str, Any]) -> tuple[str, ...]:
    """The texts from which `parse_options` makes these options."""

    def text(value: Any) -> str:
        return "x".join(map(str, value)) if isinstance(value, list | tuple) else str(value)

    return tuple(f"{name}={text(value)}" for name, value in options.items())


def write_stage(entry: registry.Entry) -> str:
    """The text of `ModelSettings.stages` for a network of a model card."""
    more = {"image_stride": entry.image_stride} if entry.image_stride > 1 else {}
    more |= {"repeat": entry.repeat} if entry.repeat > 1 else {}
    return " ".join((entry.name, *write_options(entry.options | more)))


def build(settings: ModelSettings, run: engine.RunSettings, shape: tuple[int, int, int]) -> Cascade:
    """The model to train, started from `settings.init` where given.

    Raises:
        ConfigError: unknown names or options, weights that do not fit, or a window that the network cannot take.
    """
    try:
        model = registry.build_cascade(settings.architecture())
    except (ValueError, TypeError) as error:
        raise ConfigError(str(error)) from None
    multiple = max(model.multiple, model.stem.multiple if model.stem is not None else 1)
    if any(n % multiple for n in shape):
        raise ConfigError(f"every axis of shape must be a multiple of {multiple} for {settings.network}, got {shape}")
    model.detach_images = settings.detach
    model.precision = getattr(torch, run.precision)
    if settings.init:
        load_networks(model, settings.init)
    model.networks[: settings.frozen].requires_grad_(False)
    return model


def load_networks(model: Cascade, source: str) -> None:
    """Start a cascade's networks from a checkpoint's or a model's; later cascades from the last one that there is.

    Networks of the source that have another layout are passed over.

    Raises:
        ConfigError: no such source, or none of its networks has the layout that is needed.
    """
    if checkpoints.is_checkpoint(source):
        state = checkpoints.read_checkpoint(Path(source))["model"]
    else:
        state = weights.load_cascade(source).state_dict()
    numbers = sorted({int(name.split(".")[1]) for name in state if name.startswith("networks.")})
    known = [_part(state, f"networks.{k}.") for k in numbers]
    for k, network in enumerate(model.networks):
        wanted = {name: value.shape for name, value in network.state_dict().items()}
        fitting = [part for part in known if {name: value.shape for name, value in part.items()} == wanted]
        if not fitting:
            raise ConfigError(f"init must hold networks of the same layout, got {source!r} with another one")
        network.load_state_dict(fitting[min(k, len(fitting) - 1)])
    stem = _part(state, "stem.")
    if model.stem is not None and stem:
        try:
            model.stem.load_state_dict(stem)
        except RuntimeError:
            raise ConfigError(f"init must hold a stem of the same layout, got {source!r} with another one") from None


def _part(state: dict[str, torch.Tensor], prefix: str) -> dict[str, torch.Tensor]:
    """The entries of a state that begin with a prefix, without it."""
    return {name.removeprefix(prefix): value for name, value in state.items() if name.startswith(prefix)}


def reconstruction(
    settings: ModelSettings, output: CascadeOutput, batch: Sample, rng: np.random.Generator, n_labels: int
) -> tuple[torch.Tensor, dict[str, float]]:
    """l_rec and the regularisation of a batch.

    Args:
        settings: weights and kind of the terms.
        output: of the cascade on `batch`.
        batch: with targets on the loss grid.
        rng: chooses how far the label term reaches.
        n_labels: larger than every label value.

    Returns:
        The total, scalar; and every term of the last cascade as a number.
    """
    count = len(output.composed)
    shares = [0.5] * (count - 1) + [1.0] if settings.every_cascade else [0.0] * (count - 1) + [1.0]
    stride = int(rng.integers(1, 3))  # labels at full and at half resolution in turn: precise, and far-reaching
    total = torch.zeros((), device=batch.fixed.device)
    terms: dict[str, float] = {}
    grid = batch.fixed_target.shape[2:]
    similarity = SIMILARITIES[settings.similarity]
    if settings.similarity == "local_ncc":
        similarity = partial(similarity, window=settings.window)
    for share, composed, increment in zip(shares, output.composed, output.increments, strict=True):
        if settings.frozen and not increment.requires_grad:
            continue
        each = losses.smoothness(increment)
        total = total + settings.smooth_each * each * (share or 1.0)
        if not share:
            continue
        fine = spatial.upsample(composed, grid)
        warped = spatial.warp(batch.moving_target, fine)
        parts = {settings.similarity: (1.0, similarity(warped, batch.fixed_target))}
        if settings.smooth:
            parts["smooth"] = (settings.smooth, losses.smoothness(composed))
        if settings.fold:
            parts["fold"] = (settings.fold, losses.folding_penalty(composed))
        if settings.dice:
            parts["overlap"] = (settings.dice, _overlap(fine, batch, stride, n_labels))
        total = total + share * sum(weight * value for weight, value in parts.values())
        terms = {k: float(v.detach()) for k, (_, v) in parts.items()} | {"smooth_each": float(each.detach())}
    if output.affine is not None:
        det, orth = losses.affine_determinant(output.affine[0]), losses.affine_orthogonality(output.affine[0])
        total = total + settings.determinant * det + settings.orthogonality * orth
        terms |= {"determinant": float(det.detach()), "orthogonality": float(orth.detach())}
    return total, terms


def _overlap(fine: torch.Tensor, batch: Sample, stride: int, n_labels: int) -> torch.Tensor:
    """Overlap of the labels after displacements on the loss grid."""
    found = []
    for k, labels in enumerate(batch.labels):
        assert isinstance(labels, LabelPair)
        where = labels.positions(fine[k : k + 1])
        found.append(losses.label_overlap(where, labels.moving, labels.fixed_loss, stride, n_labels=n_labels))
    return torch.stack(found).mean()


@torch.no_grad()
def validate(model: Cascade, sources: dict[str, PairSource]) -> dict[str, float]:
    """Mean figures over the pairs of `pairs.validation_pairs`, each on its canonical window without augmentation.

    Dice (all labels of the window, nearest) with the initial transform alone and after every cascade where there are
    labels, correlation always, and of the last cascade local correlation and the folding fraction. Of several kinds of
    pairs those of each, and the mean over all.
    """
    found: dict[str, dict[str, float]] = {}
    for kind, source in sources.items():
        rows = [_figures(model, source.sample(0, k, augment=False)) for k in range(len(source.pairs or []))]
        found[kind] = {name: float(np.mean([row[name] for row in rows])) for name in rows[0]}
    each = {f"{kind} {name}": value for kind, figures in found.items() if kind for name, value in figures.items()}
    names = next(iter(found.values()))
    return each | {name: float(np.mean([figures[name] for figures in found.values()])) for name in names}


def _figures(model: Cascade, sample: Sample) -> dict[str, float]:
    output = model(sample.moving, sample.fixed)
    row: dict[str, float] = {}
    for n, composed in enumerate([None, *output.composed]):
        name = "start" if n == 0 else f"{n} cascades"
        if sample.labels[0] is not None:
            row[f"Dice, {name}"] = sample.labels[0].dice(composed)
        full = torch.zeros_like(sample.fixed).expand(-1, 3, -1, -1, -1)
        if composed is not None:
            full = spatial.upsample(composed, sample.fixed.shape[2:])
        warped = spatial.warp(sample.moving, full)
        row[f"correlation, {name}"] = 1 - float(losses.correlation(warped, sample.fixed))
    row[f"local correlation, {name}"] = 1 - float(losses.local_ncc(warped, sample.fixed, LOCAL_WINDOW))
    row["folding_percent"] = 100 * spatial.folding_fraction(output.displacement)
    return row


def criterion(figures: dict[str, float], similarity: str) -> str:
    """Name the figure of `validate` that says which checkpoint is best: higher is better.

    Dice of the last cascade. Where the validation pairs have no labels, its local correlation if `similarity` is
    "local_ncc", otherwise its correlation.
    """
    dice = [name for name in figures if name.startswith("Dice, ")]
    word = "local correlation, " if similarity == "local_ncc" else "correlation, "
    return (dice or [name for name in figures if name.startswith(word)])[-1]


def picture(batch: Sample, displacement: torch.Tensor) -> torch.Tensor:
    """Middle axial slice of the first pair, anterior up, the patient's right on the left, as one (H, W, 3) picture.

    Fixed, moving, warped, deformation grid.
    """
    with torch.no_grad():
        full = spatial.upsample(displacement[:1].float(), batch.fixed.shape[2:])
        warped = spatial.warp(batch.moving[:1], full)
        where = spatial.identity_grid(batch.fixed.shape[2:], device=full.device) + full
        k = batch.fixed.shape[2] // 2
        # the lines of a grid with 8 voxels between them, carried by the in-plane displacement
        wave = (torch.cos(where[0, 1:, k] * (2 * torch.pi / 8)).amax(0) + 1) / 2
        panels = [batch.fixed[0, 0, k], batch.moving[0, 0, k], warped[0, 0, k], wave.pow(8)]
        return torch.cat([p.clamp(0, 1) for p in panels], dim=1)[..., None].expand(-1, -1, 3).cpu()
