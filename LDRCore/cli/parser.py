"""The arguments of every `ldr` command. Nothing heavy is imported here, so that `ldr --help` is instant."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import Any, NoReturn

from LDRCore import __version__
from LDRCore.models.weights import DEFAULT

TRANSFORM_HELP = (
    "a transform file of any program, PATH[,FORMAT][,inverse]: transform.h5, or one of ANTs, elastix, SPM ...; FORMAT "
    "only where the content does not tell"
)
FORMAT_HELP = (
    "ants, elastix, fsl, afni, spm, niftyreg, greedy, slicer, dipy, x5, itk, freesurfer, convexadam, voxelmorph or "
    "dicom (default: by the content)"
)


class UsageError(Exception):
    """Arguments that cannot be used."""


def output_path(text: str) -> Path:
    """Return a path to write to; an empty one is refused."""
    if not text.strip():
        raise argparse.ArgumentTypeError("it must be a name, got an empty one")
    return Path(text)


class OneLineParser(argparse.ArgumentParser):
    """A parser that refuses arguments with one sentence, without its usage in front."""

    def error(self, message: str) -> NoReturn:
        """Raise the sentence."""
        raise UsageError(f"{self.prog}: {message} (see {self.prog} --help)")


def build_parser() -> argparse.ArgumentParser:
    """Return the parser of all commands; the command's name is `command` of what it parses."""
    parser = OneLineParser(
        prog="ldr",
        description="Light-weight deformable registration: align a moving scan to a fixed scan in about a second.",
    )
    parser.add_argument("--version", action="version", version=f"ldr {__version__}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for name, (summary, add_arguments) in COMMANDS.items():
        command = commands.add_parser(name, help=summary, description=f"{summary[0].upper()}{summary[1:]}.")
        command.add_argument("--json", action="store_true", help="print one JSON object instead of text")
        add_arguments(command)
    return parser


def _add_demo(command: argparse.ArgumentParser) -> None:
    command.add_argument("--out", type=output_path, default=Path("demo-output"), help="folder (default demo-output)")
    _add_model_options(command)
    _add_no_overview(command)


def _add_register(command: argparse.ArgumentParser) -> None:
    command.add_argument(
        "fixed", nargs="?", help="fixed image: NIfTI, NRRD, MetaImage ..., or a folder with one DICOM series"
    )
    command.add_argument("moving", nargs="?", help="moving image, likewise")
    command.add_argument("--out", type=output_path, required=True, help="folder for the results")
    _add_model_options(command)
    _add_overwrite(command, "replace an earlier result in the output folder")
    _add_no_overview(command)
    command.add_argument("--no-affine", action="store_true", help="skip the affine stage (images are aligned already)")
    command.add_argument(
        "--initial",
        action="append",
        help="center: bring the contents together; none: trust the scanner coordinates; or transform files "
        "fixed -> moving, PATH[,FORMAT][,inverse], the option given again for each of a chain (default center)",
    )
    command.add_argument("--fixed-mask", help="image > 0 where the fixed image may drive the result")
    command.add_argument("--moving-mask", help="the same for the moving image")
    command.add_argument("--inverse", action="store_true", help="also write inverse_transform.h5")
    command.add_argument(
        "--open", action="store_true", help="show the result in the browser (see ldr view), or a list's page"
    )
    command.add_argument(
        "--write",
        default="",
        metavar="FORMATS",
        help="also write the transform for these programs, e.g. ants,fsl,spm,x5,dicom (transform_ants.nii.gz ...)",
    )
    _add_list(command.add_argument_group("many pairs, instead of a fixed and a moving image (see docs/cohorts.md)"))


def _add_list(group: argparse._ArgumentGroup) -> None:
    group.add_argument(
        "--pairs",
        type=Path,
        metavar="CSV",
        help="list with the columns fixed, moving and any of fixed_mask, moving_mask, fixed_labels, moving_labels, "
        "fixed_landmarks, moving_landmarks, initial, name; paths are relative to the CSV",
    )
    group.add_argument("--fixed", dest="atlas", metavar="ATLAS", help="fixed image of every pair (with --moving)")
    group.add_argument("--moving", dest="pattern", metavar="'GLOB'", help="pattern of moving images, in quotes")
    group.add_argument(
        "--outputs",
        metavar="NAMES",
        help="what to write of each pair, divided by commas: warped, transform, inverse, jacobian, displacement, "
        "labels, picture (default warped,transform)",
    )
    group.add_argument("--workers", type=int, help="processes (default: one a core, as memory allows)")
    group.add_argument("--threads", type=int, help="threads of each process (default 1)")
    group.add_argument("--scheduler", metavar="ADDRESS", help="tcp://host:port of a Dask scheduler that shall do it")
    group.add_argument("--frame", default="lps", help="of landmarks: lps, ras (mm) or voxel (default lps)")
    group.add_argument(
        "--statistics", action="store_true", help="also mean and std of warped images and log Jacobians on the atlas"
    )


def _add_warp(command: argparse.ArgumentParser) -> None:
    command.add_argument("image", help="what to warp, in the moving image's space")
    _add_transforms(command)
    _add_reference(command, "image whose grid the result shall have (the fixed image)")
    _add_output_file(command, "image file to write")
    command.add_argument(
        "--interpolation",
        choices=("linear", "nearest", "cubic", "label-gaussian", "label-majority", "auto"),
        default="linear",
        help="nearest keeps the values of segmentations, the label kinds do so with smoother borders (by Gaussian or "
        "linear weights of each label); auto: nearest for what looks like a segmentation (default linear)",
    )
    command.add_argument(
        "--nearest",
        nargs="?",
        const="nearest",
        choices=("nearest", "auto"),
        help="the same as --interpolation nearest; --nearest auto: as --interpolation auto",
    )


def _add_points(command: argparse.ArgumentParser) -> None:
    command.add_argument(
        "points",
        type=Path,
        help="CSV with three columns in mm, or with named columns x,y,z and others; .fcsv, .mrk.json",
    )
    _add_transforms(command)
    command.add_argument("--reference", help="the fixed image, for transforms that count in its voxels (FSL ...)")
    _add_moving(command)
    _add_output_file(command, "CSV to write")
    command.add_argument("--ras", action="store_true", help="coordinates are RAS (3D Slicer's display) instead of LPS")


def _add_convert(command: argparse.ArgumentParser) -> None:
    command.add_argument("transforms", nargs="+", metavar="IN", help=TRANSFORM_HELP)
    command.add_argument("out", type=output_path, metavar="OUT", help="file to write")
    command.add_argument("--reference", help="the fixed image: the grid of fields that are written")
    command.add_argument("--moving", help="the moving image, for formats that count in its voxels")
    command.add_argument("--from", dest="from_format", default="auto", metavar="FORMAT", help=FORMAT_HELP)
    command.add_argument("--to", default="auto", metavar="FORMAT", help="of OUT, likewise (default: by its name)")
    _add_overwrite(command, "replace an existing file")


def _add_invert(command: argparse.ArgumentParser) -> None:
    _add_transform(command, "transform")
    _add_reference(command, "the fixed image, where the transform is defined")
    _add_moving(command)
    _add_output_file(command, "transform file to write (.h5)")


def _add_jacobian(command: argparse.ArgumentParser) -> None:
    _add_transform(command, "transform")
    _add_reference(command, "image whose grid the map shall have (the fixed image)")
    _add_moving(command)
    _add_output_file(command, "image file to write", required=False)


def _add_evaluate(command: argparse.ArgumentParser) -> None:
    command.add_argument("fixed", nargs="?", help="fixed image (one pair; for several see --pairs)")
    command.add_argument("moving", nargs="?", help="moving image")
    command.add_argument(
        "--pairs",
        type=Path,
        help="CSV with the columns fixed, moving and any of fixed_labels, moving_labels, fixed_landmarks, "
        "moving_landmarks, transform; paths are relative to the CSV",
    )
    command.add_argument("--fixed-labels", help="segmentation of the fixed image")
    command.add_argument("--moving-labels", help="segmentation of the moving image")
    command.add_argument("--fixed-landmarks", help="CSV x,y,z of points in the fixed image")
    command.add_argument("--moving-landmarks", help="CSV of the same points in the moving image, in the same order")
    command.add_argument(
        "--frame", default="lps", help="of landmarks: lps, ras (mm), or voxel (index x,y,z; default lps)"
    )
    command.add_argument(
        "--transform",
        "-t",
        action="append",
        help=f"measure this instead of registering: {TRANSFORM_HELP}; may be given several times (in a CSV: A;B)",
    )
    command.add_argument(
        "--protocol",
        default="nearest",
        help="nearest, or linear-threshold: every label as a mask, warped linearly (default nearest)",
    )
    command.add_argument("--no-surface", action="store_true", help="skip surface distances (HD95, mean)")
    _add_output_file(command, "CSV to write, one row a pair", required=False)
    command.add_argument(
        "--learn2reg",
        type=output_path,
        metavar="FOLDER",
        help="also write disp_FFFF_MMMM.nii.gz as Learn2Reg expects them",
    )
    _add_model_options(command)


def _add_view(command: argparse.ArgumentParser) -> None:
    command.add_argument("result", type=Path, help="a folder that ldr register wrote, or of one pair of a list")
    command.add_argument("--fixed", help="the fixed image, where it is not where the report says")
    command.add_argument("--moving", help="the moving image, likewise")
    command.add_argument("--save", type=output_path, metavar="PAGE", help="write one .html file instead of showing it")
    command.add_argument("--no-browser", action="store_true", help="print the address, open no browser")
    _add_overwrite(command, "replace an existing file")


def _add_models(command: argparse.ArgumentParser) -> None:
    command.add_argument("name", nargs="?", help="a model: show its card (data, licence, recipe, results)")


def _add_doctor(command: argparse.ArgumentParser) -> None:
    """`ldr doctor` takes no arguments of its own."""


def _add_model_options(command: argparse.ArgumentParser) -> None:
    command.add_argument(
        "--kind",
        default="deformable",
        help="kind of alignment: rigid, affine or deformable (default deformable)",
    )
    command.add_argument(
        "--model",
        default=DEFAULT,
        help="a name from `ldr models`, a .pt file, none: no network, for any anatomy, or any: the same with the "
        f"networks that the images fit, if there are any (default {DEFAULT})",
    )
    command.add_argument("--cascades", type=int, help="dense cascades, 0 to the model's maximum (default: all)")
    command.add_argument(
        "--refine",
        help="instance optimisation afterwards: none, fast, best, or a number of iterations (default none; fast with "
        "the models any and none)",
    )
    command.add_argument(
        "--refine-spacing",
        default="working",
        help="voxels that it ends at: working (about 2 mm), or native: the fixed image's own (default working)",
    )
    command.add_argument(
        "--similarity",
        default="auto",
        help="what it makes larger: local-ncc, mind (unlike contrasts), or auto: by the intensities (default auto)",
    )
    command.add_argument("--device", default="auto", help="auto, cpu, cuda ... (default auto)")


def _add_transform(command: argparse.ArgumentParser, name: str, **extra: Any) -> None:
    command.add_argument(name, nargs="+", help=TRANSFORM_HELP, **extra)


def _add_transforms(command: argparse.ArgumentParser) -> None:
    command.add_argument(
        "--transform",
        "-t",
        action="append",
        required=True,
        help=f"{TRANSFORM_HELP}; may be given several times, in the order in which a point goes through them (as in "
        "ANTs)",
    )


def _add_moving(command: argparse.ArgumentParser) -> None:
    command.add_argument("--moving", help="the moving image, for transforms that count in its voxels (FSL ...)")


def _add_reference(command: argparse.ArgumentParser, text: str) -> None:
    command.add_argument("--reference", required=True, help=text)


def _add_output_file(command: argparse.ArgumentParser, text: str, *, required: bool = True) -> None:
    command.add_argument("--out", type=output_path, required=required, help=text)
    _add_overwrite(command, "replace an existing file")


def _add_overwrite(command: argparse.ArgumentParser, text: str) -> None:
    command.add_argument("--overwrite", action="store_true", help=text)


def _add_no_overview(command: argparse.ArgumentParser) -> None:
    command.add_argument("--no-overview", action="store_true", help="do not draw overview.png")


COMMANDS: dict[str, tuple[str, Callable[[argparse.ArgumentParser], None]]] = {
    "demo": ("register the bundled pair of brains and score the result", _add_demo),
    "register": ("register a moving image to a fixed image and write everything into a folder", _add_register),
    "warp": ("bring another image or a segmentation of the moving patient onto the fixed grid", _add_warp),
    "points": (
        "map landmarks: transform.h5 takes fixed points to moving points, inverse_transform.h5 the other way",
        _add_points,
    ),
    "convert": ("write transforms of one program as the file of another, or a chain of them as one file", _add_convert),
    "invert": ("invert a transform: moving -> fixed, with the residual it leaves", _add_invert),
    "jacobian": ("map the local volume change of a transform and count folding voxels", _add_jacobian),
    "evaluate": (
        "register pairs, or take given transforms, and measure them with labels and landmarks",
        _add_evaluate,
    ),
    "view": ("show a result in the browser: slices, before and after, Jacobian, deformation grid", _add_view),
    "models": ("list the models that ship and what every network costs, or show one model's card", _add_models),
    "doctor": ("check this installation and say what is missing", _add_doctor),
}
