"""The arguments of `ldr`. Nothing heavy is imported here, so that `ldr --help` is instant."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from LDRCore import __version__


def build_parser() -> argparse.ArgumentParser:
    """Return the parser of all commands; the command's name is `command` of what it parses."""
    parser = argparse.ArgumentParser(
        prog="ldr",
        description="Light-weight deformable registration: align a moving scan to a fixed scan in about a second.",
    )
    parser.add_argument("--version", action="version", version=f"ldr {__version__}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")

    def command(name: str, text: str, **extra: Any) -> argparse.ArgumentParser:
        sub = commands.add_parser(name, help=text, description=text[0].upper() + text[1:] + ".", **extra)
        sub.add_argument("--json", action="store_true", help="print one JSON object instead of text")
        return sub

    def model_options(sub: argparse.ArgumentParser) -> None:
        sub.add_argument(
            "--model", default="brain-t1-small", help="a name from `ldr models`, or a .pt file (default brain-t1-small)"
        )
        sub.add_argument("--cascades", type=int, default=3, help="dense cascades, 1 to the model's maximum (default 3)")
        sub.add_argument("--refine", type=int, default=0, help="steps of instance optimisation afterwards (default 0)")
        sub.add_argument("--device", default="auto", help="auto, cpu, cuda ... (default auto)")

    def registration_options(sub: argparse.ArgumentParser) -> None:
        model_options(sub)
        sub.add_argument("--overwrite", action="store_true", help="replace an earlier result in the output folder")
        sub.add_argument("--no-overview", action="store_true", help="do not draw overview.png")

    sub = command("demo", "register the bundled pair of brains and show what came out")
    sub.add_argument("--out", type=Path, default=Path("demo-output"), help="folder (default demo-output)")
    registration_options(sub)

    sub = command("register", "register a moving image to a fixed image and write everything into a folder")
    sub.add_argument("fixed", help="fixed image: NIfTI, NRRD, MetaImage ..., or a folder with one DICOM series")
    sub.add_argument("moving", help="moving image, likewise")
    sub.add_argument("--out", type=Path, required=True, help="folder for the results")
    registration_options(sub)
    sub.add_argument("--no-affine", action="store_true", help="skip the affine stage (images are aligned already)")
    sub.add_argument(
        "--initial",
        default="center",
        help="center: bring the contents together; none: trust the scanner coordinates; or a transform file "
        "fixed -> moving (default center)",
    )
    sub.add_argument("--fixed-mask", help="image > 0 where the fixed image may drive the result")
    sub.add_argument("--moving-mask", help="the same for the moving image")
    sub.add_argument("--inverse", action="store_true", help="also write inverse_transform.h5")

    sub = command("warp", "bring another image or a segmentation of the moving patient onto the fixed grid")
    sub.add_argument("image", help="what to warp, in the moving image's space")
    sub.add_argument("--transform", required=True, help="transform.h5, or a displacement field image")
    sub.add_argument("--reference", required=True, help="image whose grid the result shall have (the fixed image)")
    sub.add_argument("--out", type=Path, required=True, help="image file to write")
    sub.add_argument("--nearest", action="store_true", help="for segmentations: keep label values")
    sub.add_argument("--overwrite", action="store_true", help="replace an existing file")

    sub = command(
        "points",
        "map landmarks: transform.h5 takes fixed points to moving points, inverse_transform.h5 the other way",
    )
    sub.add_argument("points", type=Path, help="CSV with three columns x,y,z in mm (a header line is allowed)")
    sub.add_argument("--transform", required=True, help="transform.h5 or inverse_transform.h5")
    sub.add_argument("--out", type=Path, required=True, help="CSV to write")
    sub.add_argument("--ras", action="store_true", help="coordinates are RAS (3D Slicer's display) instead of LPS")
    sub.add_argument("--overwrite", action="store_true", help="replace an existing file")

    sub = command("invert", "invert a transform: moving -> fixed, with the residual it leaves")
    sub.add_argument("transform", help="transform.h5, or a displacement field image")
    sub.add_argument("--reference", required=True, help="the fixed image, where the transform is defined")
    sub.add_argument("--out", type=Path, required=True, help="transform file to write (.h5)")
    sub.add_argument("--overwrite", action="store_true", help="replace an existing file")

    sub = command("jacobian", "map the local volume change of a transform and count folding voxels")
    sub.add_argument("transform", help="transform.h5, or a displacement field image")
    sub.add_argument("--reference", required=True, help="image whose grid the map shall have (the fixed image)")
    sub.add_argument("--out", type=Path, help="image file to write")
    sub.add_argument("--overwrite", action="store_true", help="replace an existing file")

    sub = command("evaluate", "register pairs, or take given transforms, and measure them with labels and landmarks")
    sub.add_argument("fixed", nargs="?", help="fixed image (one pair; for several see --pairs)")
    sub.add_argument("moving", nargs="?", help="moving image")
    sub.add_argument(
        "--pairs",
        type=Path,
        help="CSV with the columns fixed, moving and any of fixed_labels, moving_labels, fixed_landmarks, "
        "moving_landmarks, transform; paths are relative to the CSV",
    )
    sub.add_argument("--fixed-labels", help="segmentation of the fixed image")
    sub.add_argument("--moving-labels", help="segmentation of the moving image")
    sub.add_argument("--fixed-landmarks", help="CSV x,y,z of points in the fixed image")
    sub.add_argument("--moving-landmarks", help="CSV of the same points in the moving image, in the same order")
    sub.add_argument("--frame", default="lps", help="of landmarks: lps, ras (mm), or voxel (index x,y,z; default lps)")
    sub.add_argument("--transform", help="measure this transform or displacement field instead of registering")
    sub.add_argument(
        "--protocol",
        default="nearest",
        help="nearest, or linear-threshold: every label as a mask, warped linearly (default nearest)",
    )
    sub.add_argument("--no-surface", action="store_true", help="skip surface distances (HD95, mean)")
    sub.add_argument("--out", type=Path, help="CSV to write, one row a pair")
    sub.add_argument(
        "--learn2reg", type=Path, metavar="FOLDER", help="also write disp_FFFF_MMMM.nii.gz as Learn2Reg expects them"
    )
    sub.add_argument("--overwrite", action="store_true", help="replace existing files")
    model_options(sub)

    sub = command("models", "list the models that ship and what every network costs, or show one model's card")
    sub.add_argument("name", nargs="?", help="a model: show its card (data, licence, recipe, results)")
    command("doctor", "check this installation and say what is missing")
    return parser
