"""Runs other registration programs, one pair at a time in a process (and if need be a Python) of their own.

    PEER_PYTHON Training/evaluation/peers.py METHOD --fixed F.nii.gz --moving M.nii.gz --out FOLDER --threads N
    PEER_PYTHON Training/evaluation/peers.py METHOD --check

This file stands alone: it imports only the program it runs, numpy and SimpleITK, because the packages conflict with
each other and may live in another virtual environment. It writes FOLDER/result.json:

    stages     what is applied to a fixed point, in this order: [{"kind": "itk" | "ras-matrix", "file": name}, ...]
    seconds    the registration alone, images in memory (elastix: what its log counts), with its own affine
    initial    the affine start, by name
    versions   of what ran

"itk" is any transform file or displacement field image that ITK reads, "ras-matrix" a 4x4 text file in RAS mm.
"""

from __future__ import annotations

import argparse
import importlib
import importlib.metadata
import json
import os
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path

GREEDY_AFFINE = "greedy affine (NCC 4x4x4, image centres)"
ELASTIX_COMMON = """
(FixedInternalImagePixelType "float")
(MovingInternalImagePixelType "float")
(UseDirectionCosines "true")
(Registration "MultiResolutionRegistration")
(FixedImagePyramid "FixedSmoothingImagePyramid")
(MovingImagePyramid "MovingSmoothingImagePyramid")
(Interpolator "BSplineInterpolator")
(BSplineInterpolationOrder 1)
(ResampleInterpolator "FinalBSplineInterpolator")
(Resampler "DefaultResampler")
(Metric "AdvancedMattesMutualInformation")
(NumberOfHistogramBins 32)
(Optimizer "AdaptiveStochasticGradientDescent")
(AutomaticParameterEstimation "true")
(ASGDParameterEstimationMethod "DisplacementDistribution")
(ImageSampler "RandomCoordinate")
(NewSamplesEveryIteration "true")
(NumberOfSpatialSamples 2048)
(HowToCombineTransforms "Compose")
(NumberOfResolutions 4)
(RandomSeed 1)
(WriteResultImage "false")
(ResultImageFormat "mha")
"""
ELASTIX_AFFINE = f"""{ELASTIX_COMMON}
(Transform "AffineTransform")
(AutomaticScalesEstimation "true")
(AutomaticTransformInitialization "true")
(AutomaticTransformInitializationMethod "CenterOfGravity")
(MaximumNumberOfIterations 500)
"""
ELASTIX_BSPLINE = f"""{ELASTIX_COMMON}
(Transform "BSplineTransform")
(FinalGridSpacingInPhysicalUnits 8)
(MaximumNumberOfIterations 500)
"""


GREEDY_AFFINE_STEP = "-m NCC 4x4x4 -n 100x50x10 -ia-image-centers -a -dof 12"
GREEDY_STEPS = {  # windows of 5 voxels and its own smoothing; and settings tuned on other subjects of IXI
    "greedy": "-m NCC 2x2x2 -n 100x50x10 -wp 0",
    "greedy-tuned": "-m NCC 1x1x1 -n 100x50x10 -s 0.9vox 0.4vox -wp 0",
}
SETTINGS = {  # everything that determines a result; a row that was made with other settings is computed again
    "ants-affine": "Affine, seed 1",
    "ants-syn": "SyN, seed 1",
    "greedy-affine": GREEDY_AFFINE_STEP,
    **{name: f"{GREEDY_AFFINE_STEP} | {step}" for name, step in GREEDY_STEPS.items()},
    "convexadam": f"{GREEDY_AFFINE_STEP} | convex_adam_pt defaults, float32",
    "elastix-affine": ELASTIX_AFFINE,
    "elastix-bspline": ELASTIX_AFFINE + ELASTIX_BSPLINE,
}


class MissingError(Exception):
    """A package or program that a method needs is not installed."""


def _package(module: str, distribution: str) -> str:
    """Return the version of an installed package, after importing it: only that proves that it runs."""
    try:
        importlib.import_module(module)
        return importlib.metadata.version(distribution)
    except ImportError as error:
        raise MissingError(f"package {distribution} is missing ({error})") from None


def _ants(kind: str, a: argparse.Namespace) -> dict:
    os.environ["ANTS_RANDOM_SEED"] = "1"  # the argument random_seed alone does not make two runs equal
    version = _package("ants", "antspyx")
    import ants

    fixed, moving = (ants.image_read(str(p), pixeltype="float") for p in (a.fixed, a.moving))
    began = time.perf_counter()
    done = ants.registration(fixed, moving, type_of_transform=kind, outprefix=str(a.out / "ants_"))
    seconds = time.perf_counter() - began
    return {  # ANTs lists what is applied last first; points go through in the order of the list
        "stages": [{"kind": "itk", "file": Path(f).name} for f in done["fwdtransforms"]],
        "seconds": seconds,
        "initial": "ANTs centres of mass" if kind == "Affine" else "ANTs affine (part of SyN)",
        "versions": {"antspyx": version},
    }


def _greedy_engine(a: argparse.Namespace) -> tuple:
    version = _package("picsl_greedy", "picsl_greedy")
    import SimpleITK as sitk
    from picsl_greedy import Greedy3D

    fixed, moving = (sitk.ReadImage(str(p), sitk.sitkFloat32) for p in (a.fixed, a.moving))
    return Greedy3D(), fixed, moving, version


def _greedy_affine_matrix(engine, fixed, moving, threads: int):
    engine.execute(
        f"-d 3 -threads {threads} {GREEDY_AFFINE_STEP} -i fixed moving -o affine",
        fixed=fixed,
        moving=moving,
        affine=None,
    )
    return engine["affine"]


def _greedy(step: str, a: argparse.Namespace) -> dict:
    import numpy as np

    engine, fixed, moving, version = _greedy_engine(a)
    began = time.perf_counter()
    np.savetxt(a.out / "affine.txt", _greedy_affine_matrix(engine, fixed, moving, a.threads))
    stages = [{"kind": "ras-matrix", "file": "affine.txt"}]
    if step:
        start = a.out / "affine.txt"
        engine.execute(
            f"-d 3 -threads {a.threads} {step} -i fixed moving -it {start} -o warp",
            fixed=fixed,
            moving=moving,
            warp=None,
        )
        stages.insert(0, {"kind": "itk", "file": "warp.nii.gz"})
    seconds = time.perf_counter() - began
    if step:
        _write_field(engine["warp"], a.out / "warp.nii.gz")
    initial = GREEDY_AFFINE if step else "image centres"
    return {"stages": stages, "seconds": seconds, "initial": initial, "versions": {"picsl_greedy": version}}


def _write_field(field, path: Path) -> None:
    import SimpleITK as sitk

    sitk.WriteImage(sitk.Cast(field, sitk.sitkVectorFloat32), str(path))


def _convexadam(a: argparse.Namespace) -> dict:
    versions = {"convexAdam": _package("convexAdam", "convexAdam")}
    engine, fixed, moving, versions["picsl_greedy"] = _greedy_engine(a)
    import numpy as np
    import SimpleITK as sitk
    import torch
    from convexAdam.convex_adam_MIND import convex_adam_pt

    torch.set_num_threads(a.threads)
    began = time.perf_counter()
    matrix = _greedy_affine_matrix(engine, fixed, moving, a.threads)
    flip = np.diag([-1.0, -1.0, 1.0, 1.0])
    lps = flip @ matrix @ flip
    affine = sitk.AffineTransform(3)
    affine.SetMatrix(lps[:3, :3].ravel().tolist())
    affine.SetTranslation(lps[:3, 3].tolist())
    low = float(sitk.GetArrayViewFromImage(moving).min())
    aligned = sitk.Resample(moving, fixed, affine, sitk.sitkLinear, low)
    arrays = [torch.from_numpy(sitk.GetArrayFromImage(i)) for i in (fixed, aligned)]
    displacement_vox = convex_adam_pt(
        *arrays, dtype=torch.float32, device=torch.device("cpu")
    )  # voxels along array axes
    seconds = time.perf_counter() - began
    to_mm = np.array(fixed.GetDirection()).reshape(3, 3) * np.array(fixed.GetSpacing())
    field = sitk.GetImageFromArray(displacement_vox[..., ::-1] @ to_mm.T, isVector=True)
    field.CopyInformation(fixed)
    _write_field(field, a.out / "warp.nii.gz")
    np.savetxt(a.out / "affine.txt", matrix)
    stages = [{"kind": "itk", "file": "warp.nii.gz"}, {"kind": "ras-matrix", "file": "affine.txt"}]
    return {"stages": stages, "seconds": seconds, "initial": GREEDY_AFFINE, "versions": versions}


def _elastix_program() -> tuple[str, str, str]:
    """Return (elastix, transformix, version), empty strings where the program is not installed."""
    programs = [shutil.which(p) for p in ("elastix", "transformix")]
    if not all(programs):
        return "", "", ""
    printed = subprocess.run([programs[0], "--version"], capture_output=True, text=True, check=True).stdout
    return str(programs[0]), str(programs[1]), printed.strip().removeprefix("elastix version: ")


def _elastix(deformable: bool, a: argparse.Namespace) -> dict:
    elastix, transformix, version = _elastix_program()
    texts = [ELASTIX_AFFINE] + ([ELASTIX_BSPLINE] if deformable else [])
    initial = "elastix affine (mutual information, centres of gravity)" if deformable else "centres of gravity"
    if not elastix:
        return {**_itk_elastix(texts, a), "initial": initial}
    files = []
    for number, text in enumerate(texts):
        files.append(a.out / f"parameters.{number}.txt")
        files[-1].write_text(text)
    command = [elastix, "-f", a.fixed, "-m", a.moving, "-out", a.out, "-threads", a.threads]
    for file in files:
        command += ["-p", file]
    _call(command)
    last = a.out / f"TransformParameters.{len(texts) - 1}.txt"
    _call([transformix, "-def", "all", "-tp", last, "-out", a.out, "-threads", a.threads])
    log = (a.out / "elastix.log").read_text(errors="replace")
    counted = re.findall(r"Time spent in resolution \d+ \(ITK initialization and iterating\): ([\d.]+)", log)
    field = next(p.name for p in (a.out / "deformationField.mha", a.out / "deformationField.mhd") if p.exists())
    return {
        "stages": [{"kind": "itk", "file": field}],
        "seconds": sum(map(float, counted)),
        "initial": initial,
        "versions": {"elastix": version},
    }


def _call(command: list) -> None:
    done = subprocess.run([str(c) for c in command], capture_output=True, text=True, check=False)
    if done.returncode:
        lines = [line for line in (done.stdout + done.stderr).splitlines() if line.strip()]
        raise RuntimeError(f"{Path(command[0]).name} ended with code {done.returncode}: {lines[-1] if lines else ''}")


def _itk_elastix(texts: list[str], a: argparse.Namespace) -> dict:
    try:
        version = _package("itk", "itk-elastix")
    except MissingError:
        raise MissingError("the program elastix and the package itk-elastix are missing") from None
    import itk

    fixed, moving = (itk.imread(str(p), itk.F) for p in (a.fixed, a.moving))
    parameters = itk.ParameterObject.New()
    for number, text in enumerate(texts):
        file = a.out / f"parameters.{number}.txt"
        file.write_text(text)
        parameters.AddParameterFile(str(file))
    began = time.perf_counter()
    _, transform_parameters = itk.elastix_registration_method(
        fixed, moving, parameter_object=parameters, number_of_threads=a.threads, log_to_console=False
    )
    seconds = time.perf_counter() - began
    field = itk.transformix_deformation_field(moving, transform_parameters)
    itk.imwrite(field, str(a.out / "deformationField.mha"))
    return {
        "stages": [{"kind": "itk", "file": "deformationField.mha"}],
        "seconds": seconds,
        "versions": {"itk-elastix": version},
    }


def _check_elastix() -> str:
    return _elastix_program()[2] or _package("itk", "itk-elastix")


METHODS = {
    "ants-affine": (lambda a: _ants("Affine", a), lambda: _package("ants", "antspyx")),
    "ants-syn": (lambda a: _ants("SyN", a), lambda: _package("ants", "antspyx")),
    "greedy-affine": (lambda a: _greedy("", a), lambda: _package("picsl_greedy", "picsl_greedy")),
    **{
        name: (lambda a, step=step: _greedy(step, a), lambda: _package("picsl_greedy", "picsl_greedy"))
        for name, step in GREEDY_STEPS.items()
    },
    "convexadam": (
        _convexadam,
        lambda: _package("picsl_greedy", "picsl_greedy") and _package("convexAdam", "convexAdam"),
    ),
    "elastix-affine": (lambda a: _elastix(False, a), _check_elastix),
    "elastix-bspline": (lambda a: _elastix(True, a), _check_elastix),
}


def main() -> int:
    """Run or check one method."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("method", choices=sorted(METHODS))
    parser.add_argument("--check", action="store_true", help="only say whether the method can run here")
    parser.add_argument("--fixed", type=Path)
    parser.add_argument("--moving", type=Path)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--threads", type=int, default=1)
    a = parser.parse_args()
    run, check = METHODS[a.method]
    try:
        if a.check:
            print(check())
            return 0
        if not (a.fixed and a.moving and a.out):
            parser.error("--fixed, --moving and --out are needed")
        a.out.mkdir(parents=True, exist_ok=True)
        (a.out / "result.json").write_text(json.dumps(run(a), indent=1))
    except MissingError as missing:
        print(missing, file=sys.stderr)
        return 3
    return 0


if __name__ == "__main__":
    sys.exit(main())
