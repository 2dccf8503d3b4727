"""`ldr register`: register two scans and write a result folder."""

from __future__ import annotations

import argparse
import importlib.util
import os
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import SimpleITK as sitk

from LDRCore import registration
from LDRCore.cli import chain
from LDRCore.cli.output import CommandOutput, describe_folding, progress_bar
from LDRCore.errors import RegistrationError
from LDRCore.io import images, transforms
from LDRCore.pipeline.options import INITIALS, Options, every_cascade, resolve_refine
from LDRCore.result import RegistrationResult, check_output_folder

SIDES = ("fixed", "moving")


def run(options: argparse.Namespace) -> CommandOutput:
    """Register two scans and write a result folder, or a list of pairs."""
    from LDRCore.cli import register_list

    if register_list.is_list(options):
        return register_list.run(options, model_keywords(options))
    register_list.check_pair(options)
    if options.open:
        from LDRCore.viewer.page import niivue_script

        niivue_script()  # refused before any work, where it is missing
    given = options.initial or ["center"]
    initial: str | sitk.Transform = given[0]
    if len(given) > 1 or given[0] not in INITIALS:
        initial = chain.read_chain(given, options.fixed, options.moving)
    formats = [transforms.format_named(word.strip()) for word in options.write.split(",") if word.strip()]
    result, files = register_and_save(
        options,
        options.fixed,
        options.moving,
        f"{Path(options.moving).name} onto {Path(options.fixed).name}",
        formats=formats,
        overwrite=options.overwrite,
        affine=not options.no_affine,
        initial=initial,
        fixed_mask=options.fixed_mask,
        moving_mask=options.moving_mask,
        inverse=options.inverse,
    )
    output = CommandOutput({"report": result.report, "files": files}, describe_report(result.report, files))
    return show_after(output, options.out) if options.open else output


def show_after(output: CommandOutput, folder: Path) -> CommandOutput:
    """Return the output, with the result shown in the browser once it is printed."""
    from LDRCore.cli.view import serve
    from LDRCore.viewer.page import make_page
    from LDRCore.viewer.volumes import read_result

    shown = serve(make_page(read_result(folder, None, None)))
    return CommandOutput(output.data | shown.data, f"{output.text}\n{shown.text}", shown.after)


def register_and_save(
    options: argparse.Namespace,
    fixed: str,
    moving: str,
    title: str,
    *,
    overwrite: bool,
    formats: Sequence[transforms.TransformFormat] = (),
    **extra: Any,
) -> tuple[RegistrationResult, list[str]]:
    """Register two images and write the result folder.

    Args:
        options: of the command: those of the model, `out` and `no_overview`.
        fixed, moving: paths.
        title: of the overview picture.
        overwrite: replace an earlier result.
        formats: of other programs, in which the transform is written as well.
        extra: further keywords of `LDRCore.register`.

    Returns:
        The result, and the paths of the files.
    """
    initials = chain.paths(getattr(options, "initial", None) or [])
    check_output_folder(options.out, overwrite=overwrite, inputs=[*vars(options).values(), *initials])
    _check_overview(options)
    Options(affine=True, initial="center", inverse=False, **model_keywords(options))  # before anything is read
    context = transforms.Context(fixed, moving)
    for chosen in formats:
        chosen.check_context(context)
    began_s = time.perf_counter()
    fixed_image, moving_image = images.load(fixed, "fixed image"), images.load(moving, "moving image")
    read_s = time.perf_counter() - began_s
    result = registration.register(
        fixed_image, moving_image, **model_keywords(options), progress=progress_bar(options), **extra
    )
    for name in ("read", "total"):
        result.facts["times_s"][name] = round(result.facts["times_s"][name] + read_s, 4)

    result.facts["inputs"] = {"fixed": os.path.abspath(fixed), "moving": os.path.abspath(moving)}

    def write_extras(folder: Path) -> None:
        for chosen in formats:
            chosen.write(result.transform, folder / chosen.result_name(result.transform.IsLinear()), context)
        if not options.no_overview:
            draw(folder)

    def draw(folder: Path) -> None:
        from LDRCore.overview import write_overview

        try:
            picture, verdict = folder / "overview.png", result.facts["verdict"]
            write_overview(picture, fixed_image, moving_image, result.transform, title, verdict)
        except Exception as error:  # a picture never costs the result
            (folder / "overview.png").unlink(missing_ok=True)
            result.report["warnings"].append(f"overview.png could not be drawn ({type(error).__name__}: {error})")

    files = result.save(options.out, overwrite=overwrite, extra=write_extras)
    return result, [str(file) for file in files]


def model_keywords(options: argparse.Namespace) -> dict[str, Any]:
    """Return the keywords of `LDRCore.register` that the options of a model stand for."""
    return {
        "kind": options.kind,
        "model": options.model,
        "cascades": every_cascade(options.model, options.kind) if options.cascades is None else options.cascades,
        **refinement_keywords(options),
        "refine_spacing": options.refine_spacing,
        "similarity": options.similarity,
        "device": options.device,
    }


def refinement_keywords(options: argparse.Namespace) -> dict[str, Any]:
    """Return `refine`, or `refine_steps` where a number was given, for `LDRCore.register`."""
    refine = resolve_refine(options.refine, options.model, options.kind, 0)
    return {"refine_steps": int(refine)} if refine.isdecimal() and len(refine) < 10 else {"refine": refine}


def describe_report(report: dict[str, Any], files: list[str]) -> str:
    """Describe a registration for a person: verdict, model, similarity, regularity, times, warnings, files."""
    verdict, times, determinant = report["verdict"], report["times_s"], report["jacobian_determinant"]
    lines = [
        f"verdict      {verdict['verdict']}" + "".join(f"\n             - {reason}" for reason in verdict["reasons"]),
        f"model        {report['model']}, {report['kind']}, {report['cascades']} cascade(s), {report['device']}, "
        f"{report['threads']} thread(s)",
        f"correlation  {_describe_similarity(report)}",
        f"Jacobian     {determinant['min']:.2f} to {determinant['max']:.2f}, "
        f"{describe_folding(report['folding_count'], report['folding_fraction'])} in the fixed image",
        *_describe_extras(report),
        "seconds      " + ", ".join(f"{name} {value:.2f}" for name, value in times.items()),
        *[
            f"{key:<13}{side} image: {report[side][key]}"
            for key in ("placement", "intensities")
            for side in SIDES
            if key in report[side]
        ],
        *[f"warning      {text}" for text in report["warnings"]],
        "written      " + f"{Path(files[0]).parent}: " + ", ".join(Path(file).name for file in files),
    ]
    return "\n".join(lines)


def _describe_similarity(report: dict[str, Any]) -> str:
    """Say how alike the images were at each stage that there was."""
    stages = {"before": "as scanned", "initial": "at the start", "affine": "affine", "after": "deformed"}
    if report["initial"] == "center":
        stages["initial"] = "centred"
    if report["kind"] == "rigid":
        stages["affine"] = "rigid"
    if not report["dense_displacement_mm"]["max"]:
        del stages["after"]
    return ", ".join(f"{report['similarity'][stage]:.3f} {name}" for stage, name in stages.items())


def _describe_extras(report: dict[str, Any]) -> list[str]:
    """Lines on a chosen model, on refinement and on the inverse, where they were asked for."""
    chosen = report["model_chosen"]
    lines = [] if chosen["name"] == report["model"] else [f"networks     {chosen['name']}: {chosen['why']}"]
    for level in report.get("refinement", ()):
        before, after = level["similarity"]
        lines.append(
            f"refinement   {level['iterations']} iterations at {min(level['spacing_mm']):g} mm, "
            f"{report['similarity_chosen']['name']} {before:.4f} to {after:.4f}"
        )
    if "inverse_consistency_mm" in report:
        told = report["inverse_consistency_mm"]
        lines.append(
            f"inverse      brings mapped points back to {told['mean']:.3f} mm (mean), "
            f"{told['p99_9']:.3f} mm (99.9th percentile)"
        )
    return lines


def _check_overview(options: argparse.Namespace) -> None:
    """Refuse to promise a picture that cannot be drawn."""
    if not options.no_overview and importlib.util.find_spec("matplotlib") is None:
        raise RegistrationError(
            "overview.png needs matplotlib, which is not installed: install it or give --no-overview"
        )
