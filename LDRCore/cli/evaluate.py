"""`ldr evaluate`: measure one pair or a list of pairs with labels and landmarks."""

from __future__ import annotations

import argparse
import csv
from dataclasses import astuple, fields
from pathlib import Path
from typing import Any

import SimpleITK as sitk

from LDRCore.cli import chain
from LDRCore.cli.files import check_output_file
from LDRCore.cli.output import CommandOutput, describe_folding, progress_bar
from LDRCore.cli.register import model_keywords
from LDRCore.errors import RegistrationError
from LDRCore.evaluation.pairs import NUMBERS, SEPARATOR, EvaluationOptions, PairFiles, evaluate_pairs, read_pairs
from LDRCore.evaluation.process import PairProcess
from LDRCore.io.files import check_not_input, check_writable
from LDRCore.io.writing import write_file
from LDRCore.pipeline.options import Options


def run(options: argparse.Namespace) -> CommandOutput:
    """Measure one pair or a list of pairs."""
    pairs = choose_pairs(options)
    check_options(options, pairs)
    settings = EvaluationOptions(
        model=model_keywords(options),
        frame=options.frame,
        protocol=options.protocol,
        surface=not options.no_surface,
        learn2reg_folder=options.learn2reg,
        overwrite=options.overwrite,
        read=_read_chain,
    )
    progress = progress_bar(options)
    if options.pairs is None:
        evaluation = evaluate_pairs(pairs, settings, keep_going=False, progress=progress)
    else:
        with PairProcess() as process:
            evaluation = evaluate_pairs(pairs, settings, progress=progress, evaluate=process)
    if options.out is not None:
        write_file(options.out, lambda path: write_table(path, evaluation))
    return CommandOutput(evaluation, describe_evaluation(evaluation))


def _read_chain(text: str, fixed: sitk.Image, moving: sitk.Image) -> sitk.Transform:
    """Read the transforms of one cell."""
    return chain.read_chain(text.split(SEPARATOR), fixed, moving)


def choose_pairs(options: argparse.Namespace) -> list[PairFiles]:
    """Return the pairs that the command line names: one, or those of a CSV.

    Raises:
        RegistrationError: neither or both, or a list that cannot be used.
    """
    if (options.pairs is None) == (options.fixed is None) or (options.fixed is None) != (options.moving is None):
        raise RegistrationError("evaluate takes either a fixed and a moving image or --pairs CSV, got neither or both")
    given = {field.name: getattr(options, field.name) or "" for field in fields(PairFiles)}
    given["transform"] = SEPARATOR.join(options.transform or ())
    if options.pairs is None:
        return [PairFiles(**given)]
    extra = [name.replace("_", "-") for name, path in given.items() if path]
    if extra:
        raise RegistrationError(f"with --pairs the columns of the CSV name the files, got also --{extra[0]}")
    return read_pairs(options.pairs)


def check_options(options: argparse.Namespace, pairs: list[PairFiles]) -> None:
    """Check outputs and the model's options once, before the first of many pairs.

    Raises:
        RegistrationError: an output that cannot be written, or an option that cannot be.
    """
    inputs = [options.pairs, *(path for files in pairs for path in astuple(files))]
    inputs += [path for files in pairs for path in chain.paths(files.transform.split(SEPARATOR))]
    if options.out is not None:
        check_output_file(options.out, options.overwrite, inputs)
    if options.learn2reg is not None:
        if options.learn2reg.exists() and not options.learn2reg.is_dir():
            raise RegistrationError(f"the output must be a folder, got the file {options.learn2reg}")
        check_writable(options.learn2reg)
        check_not_input(options.learn2reg.glob("disp_*"), inputs)
    Options(affine=True, initial="center", inverse=False, **model_keywords(options))


def write_table(path: Path, evaluation: dict[str, Any]) -> None:
    """Write a CSV with a row for each pair.

    Columns: files, error, the numbers after registration, Dice and landmark error before and with the affine part.
    """
    earlier = [(stage, number) for stage in ("before", "affine") for number in ("dice_mean", "tre_mm")]
    with path.open("w", newline="", encoding="utf-8") as stream:
        writer = csv.writer(stream)
        writer.writerow(["fixed", "moving", "error", *NUMBERS, *(f"{number}_{stage}" for stage, number in earlier)])
        for pair in evaluation["pairs"]:
            row = [pair["fixed"], pair["moving"], pair.get("error", "")]
            row += [_cell(pair.get("after", {}).get(number)) for number in NUMBERS]
            row += [_cell(pair.get(stage, {}).get(number)) for stage, number in earlier]
            writer.writerow(row)


def _cell(value: float | None) -> str:
    return "" if value is None else f"{value:.6g}"


def describe_evaluation(evaluation: dict[str, Any]) -> str:
    """Describe an evaluation for a person: a line for each pair, then means."""
    lines = [_describe_pair(pair) for pair in evaluation["pairs"]]
    summary = evaluation["summary"]
    if summary:
        most = max(statistics["n"] for statistics in summary.values())
        lines.append(f"mean and std over {most} pairs:" if most > 1 else "of one pair:")
        lines += [
            f"  {name:<26}{s['mean']:.5g}" + (f" +- {s['std']:.3g}" if s["n"] > 1 else "")
            for name, s in summary.items()
        ]
    return "\n".join(lines)


def _describe_pair(pair: dict[str, Any]) -> str:
    head = f"{Path(pair['fixed']).name} <- {Path(pair['moving']).name}"
    if "error" in pair:
        return f"{head}: FAILED: {pair['error']}"
    parts = []
    for number, title, digits in (("dice_mean", "Dice", 3), ("tre_mm", "landmark error mm", 2)):
        values = {stage: pair.get(stage, {}).get(number) for stage in ("before", "affine", "after")}
        known = [f"{value:.{digits}f} {stage}" for stage, value in values.items() if value is not None]
        if known:
            parts.append(f"{title} " + ", ".join(known))
    parts.append(describe_folding(pair["after"]["folding_count"], pair["after"]["folding_fraction"]))
    return f"{head}: " + "; ".join(parts)
