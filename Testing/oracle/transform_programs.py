"""What other programs do with transform files: run in the Python that LDR_PEER_PYTHON names, one task a call.

    python transform_programs.py TASK FOLDER

A task reads fixed.nii.gz, moving.nii.gz, points.npy (N, 3, LPS mm, fixed space) and files that the test wrote, and
writes mapped.npy (LPS mm), an image, or a transform file of its program. Nothing here imports LDRCore.
"""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import numpy as np

FLIP = np.array([-1.0, -1.0, 1.0])


def main(task: str, folder: Path) -> None:
    """Run one task; exit code 3 where its package is missing."""
    try:
        TASKS[task](folder)
    except ModuleNotFoundError as error:
        print(f"{error.name} is not installed")
        sys.exit(3)


def points(folder: Path) -> np.ndarray:
    return np.load(folder / "points.npy")


def save(folder: Path, mapped_lps: np.ndarray) -> None:
    np.save(folder / "mapped.npy", np.asarray(mapped_lps, dtype=float))


def ants_maps(folder: Path, files: list[str]) -> None:
    """ANTs' own point map; the first of the list applies first."""
    import ants
    import pandas

    frame = pandas.DataFrame(points(folder), columns=["x", "y", "z"])
    mapped = ants.apply_transforms_to_points(3, frame, [str(folder / f) for f in files])
    save(folder, mapped[["x", "y", "z"]].to_numpy())


def ants_registers(folder: Path) -> None:
    """Write ANTs' pair, map points through it and warp the moving image."""
    import shutil

    import ants

    fixed, moving = (ants.image_read(str(folder / f"{side}.nii.gz")) for side in ("fixed", "moving"))
    made = ants.registration(fixed, moving, "SyN", syn_metric="meansquares", reg_iterations=(20, 10), random_seed=1)
    for file in made["fwdtransforms"]:
        shutil.copy(file, folder / ("warp.nii.gz" if file.endswith(".nii.gz") else "affine.mat"))
    for file in made["invtransforms"]:
        if file.endswith(".nii.gz"):
            shutil.copy(file, folder / "inverse_warp.nii.gz")
    ants_maps(folder, ["warp.nii.gz", "affine.mat"])
    warped = ants.apply_transforms(fixed, moving, made["fwdtransforms"])
    ants.image_write(warped, str(folder / "warped.nii.gz"))


def greedy(arguments: str, folder: Path) -> None:
    import os

    from picsl_greedy import Greedy3D

    os.chdir(folder)
    Greedy3D().execute(arguments)


def greedy_reslices(folder: Path) -> None:
    """Warp the moving image through our matrix after our warp."""
    greedy("-d 3 -rf fixed.nii.gz -rm moving.nii.gz warped.nii.gz -r warp.nii.gz affine.mat", folder)


def greedy_registers(folder: Path) -> None:
    greedy("-d 3 -a -m SSD -i fixed.nii.gz moving.nii.gz -o affine.mat -n 40x20 -ia-identity", folder)
    greedy(
        "-d 3 -m SSD -i fixed.nii.gz moving.nii.gz -it affine.mat -o warp.nii.gz -n 40x20 -oinv inverse.nii.gz", folder
    )
    greedy_reslices(folder)


def nitransforms_maps(folder: Path) -> None:
    """Map points through transform.x5."""
    from nitransforms.io import x5
    from nitransforms.linear import from_x5 as linear
    from nitransforms.nonlinear import from_x5 as nonlinear

    nodes = x5.from_filename(folder / "transform.x5")
    made = (linear if nodes[0].type == "linear" else nonlinear)(nodes)
    save(folder, made.map(points(folder) * FLIP) * FLIP)


def nitransforms_writes(folder: Path) -> None:
    """Write linear.x5 and dense.x5 (of field.npy, RAS mm on the fixed grid); map points through both."""
    import nibabel
    from nitransforms.io import x5
    from nitransforms.linear import Affine
    from nitransforms.nonlinear import DenseFieldTransform

    fixed = nibabel.load(folder / "fixed.nii.gz")
    affine = Affine(np.load(folder / "matrix.npy"), reference=fixed)
    affine.to_filename(folder / "linear.x5", fmt="X5")
    dense = DenseFieldTransform(np.load(folder / "field.npy"), is_deltas=True, reference=fixed)
    x5.to_filename(folder / "dense.x5", [dense.to_x5()])
    ras = points(folder) * FLIP
    np.save(folder / "linear.npy", affine.map(ras) * FLIP)
    np.save(folder / "dense.npy", dense.map(ras) * FLIP)


def fslpy_maps(folder: Path) -> None:
    """Map points through FLIRT's flirt.mat, the warp warp.nii.gz and the coefficients coefficients.nii.gz."""
    from fsl.data.image import Image
    from fsl.transform import affine, fnirt

    source, reference = Image(str(folder / "moving.nii.gz")), Image(str(folder / "fixed.nii.gz"))
    ras = points(folder) * FLIP
    if (folder / "flirt.mat").exists():
        flirt = np.loadtxt(folder / "flirt.mat")
        to_source = affine.concat(
            source.getAffine("fsl", "world"), affine.invert(flirt), reference.getAffine("world", "fsl")
        )
        np.save(folder / "flirt.npy", affine.transform(ras, to_source) * FLIP)
    for name in ("warp", "absolute", "coefficients"):
        if (folder / f"{name}.nii.gz").exists():
            made = fnirt.readFnirt(str(folder / f"{name}.nii.gz"), source, reference)
            np.save(folder / f"{name}.npy", made.transform(ras, "world", "world") * FLIP)


def fslpy_writes(folder: Path) -> None:
    """Write coefficients.nii.gz of knots.npy (FSL's mm) with an initial matrix; map points through them."""
    import nibabel

    fixed = nibabel.load(folder / "fixed.nii.gz")
    knots = np.load(folder / "knots.npy")
    image = nibabel.Nifti1Image(knots.astype(np.float32), None)
    image.header["intent_code"] = 2007
    image.header["intent_p1"], image.header["intent_p2"], image.header["intent_p3"] = fixed.header.get_zooms()[:3]
    spacing = [4, 5, 3, 1]
    image.header.set_zooms(spacing)
    image.set_sform(np.load(folder / "matrix.npy"), 1)
    placed = np.diag(spacing).astype(float)
    placed[:3, 3] = fixed.shape[:3]
    image.set_qform(placed, 1)
    image.update_header()
    nibabel.save(image, folder / "coefficients.nii.gz")
    fslpy_maps(folder)


def surfa_maps(folder: Path) -> None:
    """Map points through transform.lta, and give our warp.mgz as coordinates in voxels of the moving image."""
    import surfa

    np.fromstring = lambda data, dtype: np.frombuffer(data, dtype).copy()  # surfa 0.6.3 needs numpy's former behaviour
    if (folder / "transform.lta").exists():
        made = surfa.load_affine(str(folder / "transform.lta")).convert(space="world")
        moved = np.linalg.inv(made.matrix) @ np.c_[points(folder) * FLIP, np.ones(len(points(folder)))].T
        save(folder, moved[:3].T * FLIP)
    if (folder / "warp.mgz").exists():
        warp = surfa.load_warp(str(folder / "warp.mgz"))
        for number, name in enumerate(("abs_crs", "disp_crs", "abs_ras", "disp_ras")):
            one = warp.convert(format=number)
            np.save(folder / f"{name}.npy", np.asarray(one.data))
            one.save(str(folder / f"{name}.mgz"))


def surfa_writes(folder: Path) -> None:
    """Write voxels.lta of matrix.npy (RAS, moving -> fixed) between voxels."""
    import surfa

    sides = {side: surfa.load_volume(str(folder / f"{side}.nii.gz")) for side in ("fixed", "moving")}
    made = surfa.Affine(np.load(folder / "matrix.npy"), source=sides["moving"], target=sides["fixed"], space="world")
    made.convert(space="vox").save(str(folder / "voxels.lta"))


def dipy_maps(folder: Path) -> None:
    """Warp the moving image by our mapping.nii.gz, and map points through it."""
    import nibabel
    from dipy.align import read_mapping

    sides = [nibabel.load(folder / f"{side}.nii.gz") for side in ("fixed", "moving")]
    mapping = read_mapping(str(folder / "mapping.nii.gz"), sides[1], sides[0])  # what transform() pulls comes first
    warped = mapping.transform(np.asarray(sides[1].get_fdata()))
    nibabel.save(nibabel.Nifti1Image(warped, sides[0].affine), folder / "warped.nii.gz")


def dipy_registers(folder: Path) -> None:
    """Write mapping.nii.gz of a registration and warp the moving image by it."""
    import nibabel
    from dipy.align import syn_registration, write_mapping
    from dipy.align.metrics import SSDMetric  # noqa: F401

    sides = [nibabel.load(folder / f"{side}.nii.gz") for side in ("fixed", "moving")]
    warped, mapping = syn_registration(
        sides[1].get_fdata(), sides[0].get_fdata(), moving_affine=sides[1].affine, static_affine=sides[0].affine,
        step_length=0.25, metric="SSD", dim=3, level_iters=[10, 10],
    )  # fmt: skip
    write_mapping(mapping, str(folder / "mapping.nii.gz"))
    warped = mapping.transform(sides[1].get_fdata())
    nibabel.save(nibabel.Nifti1Image(warped, sides[0].affine), folder / "warped.nii.gz")


def dicom_parses(folder: Path) -> None:
    """Let pydicomrt parse and check registration.dcm; save its grid and placement."""
    from pydicom import dcmread
    from pydicomrt.reg import check, parser

    dataset = dcmread(folder / "registration.dcm")
    (made,) = parser.get_deformable_registrations(dataset)
    grid = made["DeformableRegistrationGrid"]
    np.savez(
        folder / "parsed.npz",
        vectors=grid["VectorGridData"],
        position=np.array([float(v) for v in grid["ImagePositionPatient"]]),
        orientation=np.array([float(v) for v in grid["ImageOrientationPatient"]]),
        resolution=np.array([float(v) for v in grid["GridResolution"]]),
        before=np.array(made["PreDeformationMatrixRegistration"]),
        after=np.array(made["PostDeformationMatrixRegistration"]),
        source=str(made["SourceFrameOfReferenceUID"]),
        registered=str(dataset.FrameOfReferenceUID),
        checked=str(check.check_deformable_reg_iod(dataset)),
    )


def plastimatch_writes(folder: Path) -> None:
    """Write a Deformable Spatial Registration of field.mha between the DICOM folders fixed and moving."""
    import plastimatch  # noqa: F401

    program = Path(sys.executable).with_name("plastimatch")
    subprocess.run(
        [program, "xf-convert", "--input", "field.mha", "--fixed-rcs", "fixed_dicom", "--moving-rcs", "moving_dicom",
         "--output-dicom", "out_dicom"], cwd=folder, check=True, capture_output=True,
    )  # fmt: skip


def convexadam_registers(folder: Path) -> None:
    """Register blocks.npy's two arrays, which differ by a shift, and write disp.nii.gz as the program does."""
    import nibabel
    import torch
    from convexAdam.convex_adam_MIND import convex_adam_pt

    fixed, moving = np.load(folder / "blocks.npy")
    shifts = convex_adam_pt(
        torch.from_numpy(fixed), torch.from_numpy(moving), dtype=torch.float32, device=torch.device("cpu"),
        grid_sp=4, disp_hw=3, selected_niter=80, lambda_weight=0.2,
    )  # fmt: skip
    nibabel.save(nibabel.Nifti1Image(shifts, nibabel.load(folder / "fixed.nii.gz").affine), folder / "disp.nii.gz")


def voxelmorph_warps(folder: Path) -> None:
    """Warp the moving array by our field.npy, as voxelmorph pulls."""
    import torch
    import voxelmorph
    from voxelmorph.nn.functional import spatial_transform

    assert voxelmorph.__version__
    moving = torch.from_numpy(np.load(folder / "moving.npy"))[None]
    warped = spatial_transform(moving, torch.from_numpy(np.load(folder / "field.npy")))
    np.save(folder / "warped.npy", warped[0].numpy())


TASKS = {
    "ants-affine-warp": lambda folder: ants_maps(folder, ["warp.nii.gz", "affine.mat"]),
    "ants-composite": lambda folder: ants_maps(folder, ["transform.h5"]),
    "ants-warp": lambda folder: ants_maps(folder, ["warp.nii.gz"]),
    "ants-registers": ants_registers,
    "greedy-reslices": greedy_reslices,
    "greedy-registers": greedy_registers,
    "nitransforms-maps": nitransforms_maps,
    "nitransforms-writes": nitransforms_writes,
    "fslpy-maps": fslpy_maps,
    "fslpy-writes": fslpy_writes,
    "surfa-maps": surfa_maps,
    "surfa-writes": surfa_writes,
    "dipy-maps": dipy_maps,
    "dipy-registers": dipy_registers,
    "dicom-parses": dicom_parses,
    "plastimatch-writes": plastimatch_writes,
    "convexadam-registers": convexadam_registers,
    "voxelmorph-warps": voxelmorph_warps,
}

if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]))
