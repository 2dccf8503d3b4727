"""What each `ldr` command does. Every `run_*` takes the parsed options and returns (dict for --json, text).

Files are written under a temporary name and renamed, so an interrupted command leaves nothing half done.
"""

from __future__ import annotations

import argparse
import csv
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import SimpleITK as sitk

from LDRCore import geometry, registration
from LDRCore.errors import RegistrationError
from LDRCore.io import images
from LDRCore.io.points import read_points
from LDRCore.io.transforms import read_transform
from LDRCore.result import RegistrationResult, check_output_folder

Outcome = tuple[dict[str, Any], str]


def _progress(options: argparse.Namespace) -> Callable[[float, str], None] | None:
    """A progress bar on stderr, where someone is looking."""
    if options.json or not sys.stderr.isatty():
        return None
    from tqdm import tqdm

    bar = tqdm(total=100, bar_format="{l_bar}{bar}| {elapsed}", leave=False)

    def show(fraction: float, message: str) -> None:
        bar.set_description_str(f"{message:<28}")
        bar.update(round(100 * fraction) - bar.n)
        if fraction >= 1:
            bar.close()

    return show


def check_output_file(path: Path, overwrite: bool) -> None:
    """Refuse an output file before any work is done for it."""
    if path.is_dir():
        raise RegistrationError(f"the output must be a file, got the folder {path}")
    if path.exists() and not overwrite:
        raise RegistrationError(f"the output must not exist yet (or --overwrite must be given), got {path}")
    check_output_folder(path.resolve().parent, overwrite=True)


def _write(path: Path, writer: Callable[[str], None]) -> None:
    """Write a file under a temporary name of the same kind, then rename it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f".part-{path.name}")
    try:
        writer(str(part))
        part.replace(path)
    except RuntimeError as error:
        reason = str(error).strip().splitlines()[-1]
        raise RegistrationError(
            f"the output must have a file type that SimpleITK writes, got {path} ({reason})"
        ) from None
    except OSError as error:
        raise RegistrationError(f"the output must be writable, got {path} ({error})") from None
    finally:
        part.unlink(missing_ok=True)


def _check_transform_name(path: Path) -> None:
    if path.suffix.lower() not in (".h5", ".hdf5", ".tfm", ".txt"):
        raise RegistrationError(f"a transform is written as .h5 or .tfm, got {path.name}")


def _has_overview(options: argparse.Namespace) -> bool:
    if options.no_overview:
        return False
    try:
        import matplotlib  # noqa: F401
    except ImportError:
        raise RegistrationError(
            "overview.png needs matplotlib, which is not installed: install it or give --no-overview"
        ) from None
    return True


def _register_and_save(
    options: argparse.Namespace, fixed: images.ImageLike, moving: images.ImageLike, title: str, **extra: Any
) -> tuple[RegistrationResult, list[str]]:
    check_output_folder(options.out, overwrite=options.overwrite)
    draw = _has_overview(options)
    fixed_image, moving_image = images.load(fixed, "fixed image"), images.load(moving, "moving image")
    result = registration.register(
        fixed_image,
        moving_image,
        model=options.model,
        cascades=options.cascades,
        refine_steps=options.refine,
        device=options.device,
        progress=_progress(options),
        **extra,
    )

    def overview(folder: Path) -> None:
        from LDRCore.cli.overview import write_overview

        write_overview(folder / "overview.png", fixed_image, moving_image, result.transform, title)

    files = result.save(options.out, overwrite=options.overwrite, extra=overview if draw else None)
    return result, [str(f) for f in files]


def _summary(report: dict[str, Any], files: list[str]) -> str:
    similarity, times, determinant = report["similarity"], report["times_s"], report["jacobian_determinant"]
    lines = [
        f"model        {report['model']}, {report['cascades']} cascade(s), {report['device']}, "
        f"{report['threads']} thread(s)",
        f"correlation  {similarity['before']:.3f} as scanned, {similarity['initial']:.3f} centred, "
        f"{similarity['affine']:.3f} affine, {similarity['after']:.3f} deformed",
        f"Jacobian     {determinant['min']:.2f} to {determinant['max']:.2f}, "
        f"folding {100 * report['folding_fraction']:.3f} % of the field",
        "seconds      " + ", ".join(f"{name} {value:.2f}" for name, value in times.items()),
        *[f"warning      {text}" for text in report["warnings"]],
        "written      " + f"{Path(files[0]).parent}: " + ", ".join(Path(f).name for f in files),
    ]
    return "\n".join(lines)


def run_register(options: argparse.Namespace) -> Outcome:
    """Register two scans and write a result folder."""
    initial: str | sitk.Transform = options.initial
    if options.initial not in ("center", "none"):
        initial = read_transform(options.initial)
    result, files = _register_and_save(
        options,
        options.fixed,
        options.moving,
        f"{Path(options.moving).name} onto {Path(options.fixed).name}",
        affine=not options.no_affine,
        initial=initial,
        fixed_mask=options.fixed_mask,
        moving_mask=options.moving_mask,
        inverse=options.inverse,
    )
    return {"report": result.report, "files": files}, _summary(result.report, files)


def run_demo(options: argparse.Namespace) -> Outcome:
    """Register the bundled pair and score it with its labels."""
    from LDRCore.cli import demo

    options.overwrite = True
    pair = demo.pair()
    result, files = _register_and_save(options, pair["fixed"], pair["moving"], "the demo pair", inverse=True)
    scores = demo.scores(pair, result)
    table = "\n".join(
        f"  {name:<22}{value:.3f}"
        for name, value in zip(("nothing", "affine only", "deformable"), scores.values(), strict=True)
    )
    text = (
        _summary(result.report, files)
        + f"\nmean Dice over {pair['n_labels']} brain structures (automatic DLMUSE labels):\n{table}"
        + f"\nlook at {options.out / 'overview.png'}"
    )
    return {"report": result.report, "files": files, "dice": scores}, text


def run_warp(options: argparse.Namespace) -> Outcome:
    """Warp one image."""
    check_output_file(options.out, options.overwrite)
    transform = read_transform(options.transform)
    kind = "nearest" if options.nearest else "linear"
    warped = registration.warp_image(options.image, transform, options.reference, kind)
    _write(options.out, lambda name: sitk.WriteImage(warped, name, useCompression=True))
    return {"file": str(options.out), "interpolation": kind}, f"written {options.out} ({kind})"


def run_points(options: argparse.Namespace) -> Outcome:
    """Map landmarks."""
    check_output_file(options.out, options.overwrite)
    points = read_points(options.points)
    flip = np.array([-1.0, -1.0, 1.0]) if options.ras else np.ones(3)
    mapped = geometry.transform_points(points * flip, read_transform(options.transform)) * flip

    def write(name: str) -> None:
        with open(name, "w", newline="", encoding="utf-8") as stream:
            writer = csv.writer(stream)
            writer.writerow(["x", "y", "z"])
            writer.writerows([[f"{v:.6f}" for v in row] for row in mapped])

    _write(options.out, write)
    frame = "RAS" if options.ras else "LPS"
    result = {"file": str(options.out), "points": len(mapped), "frame": frame}
    return result, f"written {options.out} ({len(mapped)} points, {frame} mm)"


def run_invert(options: argparse.Namespace) -> Outcome:
    """Invert a transform."""
    from LDRCore.transforms import inversion

    check_output_file(options.out, options.overwrite)
    _check_transform_name(options.out)
    transform = read_transform(options.transform)
    reference = images.three_dimensional(images.read(options.reference, "reference"), "reference")
    inverse, residual_mm = inversion.invert_transform(transform, reference)
    _write(options.out, lambda name: sitk.WriteTransform(inverse, name))
    result = {"file": str(options.out), "residual_mm": residual_mm}
    return result, f"written {options.out} (largest residual {residual_mm:.4f} mm)"


def run_jacobian(options: argparse.Namespace) -> Outcome:
    """Map and summarise the Jacobian determinant."""
    if options.out is not None:
        check_output_file(options.out, options.overwrite)
    transform = read_transform(options.transform)
    reference = images.three_dimensional(images.read(options.reference, "reference"), "reference")
    determinant = geometry.jacobian_determinant_image(geometry.displacement_field_image(transform, reference))
    values = sitk.GetArrayViewFromImage(determinant)
    folding = float((values <= 0).mean())
    result = {
        "min": float(values.min()),
        "mean": float(values.mean()),
        "max": float(values.max()),
        "folding_count": int((values <= 0).sum()),
        "folding_fraction": folding,
        "file": str(options.out) if options.out else None,
    }
    if options.out is not None:
        _write(options.out, lambda name: sitk.WriteImage(determinant, name, useCompression=True))
    text = (
        f"Jacobian determinant {result['min']:.3f} to {result['max']:.3f}, mean {result['mean']:.3f}; "
        f"{result['folding_count']} folding voxels ({100 * folding:.4f} %)"
    )
    return result, text + (f"; written {options.out}" if options.out else "")


def _card_text(card: dict[str, Any], indent: int = 0) -> str:
    """A model card as an indented list."""
    lines = []
    for key, value in card.items():
        head = f"{'  ' * indent}{key.replace('_', ' ')}"
        if isinstance(value, dict):
            lines += [head, _card_text(value, indent + 1)]
        else:
            lines.append(f"{head}: {value}")
    return "\n".join(lines)


def run_models(options: argparse.Namespace) -> Outcome:
    """List models and networks, or show one model's card."""
    from LDRCore.models import weights

    if options.name:
        card = weights.model_info(options.name)
        return card, _card_text(card)
    from LDRCore.models import registry

    cards = [weights.model_info(name) for name in weights.list_models()]
    networks = {}
    for name in sorted(registry.DENSE):
        networks[name] = registry.cost(registry.build_network(name))
    networks["ldr (head=half)"] = registry.cost(registry.build_network("ldr", head="half"))
    for name in sorted(registry.STEMS):
        networks[name] = registry.cost(registry.build_stem(name))
    lines = ["models"]
    for card in cards:
        lines.append(f"  {card['name']:<18} 1 to {card['architecture']['cascades']} cascades  {card['summary']}")
    lines += ["networks (one, at 128 x 128 x 128)", f"  {'name':<18} {'parameters':>12} {'multiply-adds':>14}"]
    for name, c in networks.items():
        lines.append(f"  {name:<18} {c.parameters:>12,} {c.multiply_adds / 1e9:>12.2f} G")
    result = {
        "models": cards,
        "networks": {
            n: {"parameters": c.parameters, "multiply_adds": c.multiply_adds, "shape": list(c.shape)}
            for n, c in networks.items()
        },
    }
    return result, "\n".join(lines)


def run_evaluate(options: argparse.Namespace) -> Outcome:
    """Measure one pair or a list of pairs."""
    from LDRCore.evaluation import pairs

    show = _progress(options)
    if options.out is not None:
        check_output_file(options.out, options.overwrite)
    found = pairs.evaluate(
        pairs.listed(options),
        model={k: getattr(options, k) for k in ("model", "cascades", "device")} | {"refine_steps": options.refine},
        frame=options.frame,
        protocol=options.protocol,
        surface=not options.no_surface,
        learn2reg=options.learn2reg,
        overwrite=options.overwrite,
        keep_going=options.pairs is not None,
        progress=show,
    )
    if options.out is not None:
        _write(options.out, lambda name: pairs.write_csv(found, name))
    return found, pairs.text(found)


def run_doctor(options: argparse.Namespace) -> Outcome:
    """Check the installation."""
    from LDRCore.cli import doctor

    facts, problems = doctor.examine()
    lines = [f"{name:<14} {value}" for name, value in facts.items()]
    lines += [f"PROBLEM        {problem}" for problem in problems] or ["all well"]
    return {"facts": facts, "problems": problems}, "\n".join(lines)
