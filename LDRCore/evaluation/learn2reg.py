"""Displacement fields as the Learn2Reg challenge expects them. SimpleITK and numpy only.

A submission is one file for each pair, disp_FFFF_MMMM.nii.gz with the case numbers of the fixed and the moving image: a
4D array (X, Y, Z, 3) over the fixed image's voxels, along the axes of the stored file. Its vectors are displacements in
voxels of the moving image's array: ``warped[i] = moving[i + disp[i]]``. It speaks of arrays alone: the orientation,
spacing and origin of both images are part of the numbers.
"""

from __future__ import annotations

import os
import re
from pathlib import Path

import numpy as np
import SimpleITK as sitk

from LDRCore import geometry
from LDRCore.errors import RegistrationError
from LDRCore.io.writing import write_file, write_image

_CASE_AND_MODALITY = re.compile(r"_(\d{4})_(\d{4})\.nii(\.gz)?$")


def submission_name(fixed_name: str, moving_name: str) -> str:
    """Name the file of a pair's field after the challenge's image names.

    Modalities are named only where they are neither equal nor 0000 and 0001.

    >>> submission_name("OASIS_0438_0000.nii.gz", "OASIS_0439_0000.nii.gz")
    'disp_0438_0439.nii.gz'

    Args:
        fixed_name, moving_name: names or paths that end in _CASE_MODALITY.nii.gz.

    Raises:
        RegistrationError: a name does not.
    """
    parts = []
    for name in (fixed_name, moving_name):
        match = _CASE_AND_MODALITY.search(name)
        if match is None:
            raise RegistrationError(
                "a Learn2Reg submission needs images named ..._CCCC_MMMM.nii.gz (case and modality, four digits each), "
                f"got {os.path.basename(name)}"
            )
        parts.append(match.groups()[:2])
    (fixed_case, fixed_modality), (moving_case, moving_modality) = parts
    if fixed_modality == moving_modality or (fixed_modality, moving_modality) == ("0000", "0001"):
        return f"disp_{fixed_case}_{moving_case}.nii.gz"
    return f"disp_{fixed_case}_{fixed_modality}_{moving_case}_{moving_modality}.nii.gz"


def displacement_in_voxels(transform: sitk.Transform, fixed: sitk.Image, moving: sitk.Image) -> np.ndarray:
    """Express a transform as the challenge does: index in the moving image minus index in the fixed image.

    Args:
        transform: fixed -> moving, LPS mm.
        fixed, moving: the images between which it maps.

    Returns:
        (X, Y, Z, 3) float32, voxels, components along the stored axes x, y, z.
    """
    field = geometry.displacement_field_image(transform, fixed)
    mapped_lps = geometry.points_lps(fixed) + sitk.GetArrayFromImage(field)  # (D, H, W, 3)
    moving_index_from_lps = np.linalg.inv(geometry.index_to_lps(moving))
    moving_index = mapped_lps @ moving_index_from_lps[:3, :3].T + moving_index_from_lps[:3, 3]  # tensor order (k, j, i)
    fixed_index = np.stack(np.meshgrid(*[np.arange(n) for n in moving_index.shape[:3]], indexing="ij"), -1)
    displacement = (moving_index - fixed_index)[..., ::-1].astype(np.float32)  # components x, y, z
    return np.ascontiguousarray(displacement.transpose(2, 1, 0, 3))


def write_submission(path: str | os.PathLike[str], displacement_vox: np.ndarray, fixed: sitk.Image) -> None:
    """Write a field as a 4D NIfTI file with the fixed image's geometry, complete or not at all.

    Args:
        path: .nii or .nii.gz; its folder exists.
        displacement_vox: (X, Y, Z, 3), as from `displacement_in_voxels`.
        fixed: the fixed image.

    Raises:
        RegistrationError: another shape than the fixed image's, or a name that is not .nii or .nii.gz.
    """
    if displacement_vox.shape != (*fixed.GetSize(), 3):
        raise RegistrationError(
            f"a submission must have the fixed image's shape {(*fixed.GetSize(), 3)}, got {displacement_vox.shape}"
        )
    if not Path(path).name.endswith((".nii", ".nii.gz")):
        raise RegistrationError(f"a submission must be written as .nii.gz, got {Path(path).name}")
    components = []
    for c in range(3):
        image = sitk.GetImageFromArray(np.ascontiguousarray(displacement_vox[..., c].transpose(2, 1, 0)))
        image.CopyInformation(fixed)
        components.append(image)
    write_file(Path(path), lambda file: write_image(sitk.JoinSeries(components), file))
