"""`ldr register`."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import SimpleITK as sitk

from LDRCore import registration
from LDRCore.cli.files import Outcome, progress_bar
from LDRCore.errors import RegistrationError
from LDRCore.io import images
from LDRCore.io.transforms import read_transform
from LDRCore.result import RegistrationResult, check_output_folder


def run(options: argparse.Namespace) -> Outcome:
    """Register two scans and write a result folder."""
    initial: str | sitk.Transform = options.initial
    if options.initial not in ("center", "none"):
        initial = read_transform(options.initial)
    result, files = register_and_save(
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
    return {"report": result.report, "files": files}, summary(result.report, files)


def register_and_save(
    options: argparse.Namespace, fixed: images.ImageLike, moving: images.ImageLike, title: str, **extra: Any
) -> tuple[RegistrationResult, list[str]]:
    """Register two images and write the result folder; return the result and the files' names."""
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
        progress=progress_bar(options),
        **extra,
    )

    def overview(folder: Path) -> None:
        from LDRCore.cli.overview import write_overview

        write_overview(folder / "overview.png", fixed_image, moving_image, result.transform, title)

    files = result.save(options.out, overwrite=options.overwrite, extra=overview if draw else None)
    return result, [str(f) for f in files]


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


def summary(report: dict[str, Any], files: list[str]) -> str:
    """Return what a person reads of a report."""
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
