"""Displacement fields as the Learn2Reg challenge expects them. SimpleITK and numpy only.

A submission is one file a pair, disp_FFFF_MMMM.nii.gz with the case numbers of the fixed and the moving image: a 4D
array (X, Y, Z, 3) over the fixed image's voxels, along the axes of the stored file, whose vectors say in voxels how far
the corresponding point of the moving image's array is away: ``warped[i] = moving[i + disp[i]]``. It is a statement
about arrays: orientation, spacing and origin of both images are part of the numbers.
"""

from __future__ import annotations

import os
import re
from pathlib import Path

import numpy as np
import SimpleITK as sitk

from LDRCore import geometry
from LDRCore.errors import RegistrationError

_CASE = re.compile(r"_(\d{4})_(\d{4})\.nii(\.gz)?$")


def submission_name(fixed_name: str, moving_name: str) -> str:
    """File name of a pair's field, from the challenge's image names ("OASIS_0438_0000.nii.gz": case, modality).

    Modalities are named only where they are neither equal nor 0000 and 0001.

    Raises:
        RegistrationError: a name does not end in _CASE_MODALITY.nii.gz.
    """
    parts = []
    for name in (fixed_name, moving_name):
        match = _CASE.search(name)
        if match is None:
            raise RegistrationError(
                "a Learn2Reg submission needs images named ..._CCCC_MMMM.nii.gz (case and modality, four digits each), "
                f"got {os.path.basename(name)}"
            )
        parts.append(match.groups()[:2])
    (fixed, first), (moving, second) = parts
    if first == second or (first, second) == ("0000", "0001"):
        return f"disp_{fixed}_{moving}.nii.gz"
    return f"disp_{fixed}_{first}_{moving}_{second}.nii.gz"


def displacement_in_voxels(transform: sitk.Transform, fixed: sitk.Image, moving: sitk.Image) -> np.ndarray:
    """The transform as (X, Y, Z, 3) float32: index in the moving image minus index in the fixed image, axes x, y, z."""
    field = geometry.displacement_field_image(transform, fixed)
    mapped = geometry.points_lps(fixed) + sitk.GetArrayFromImage(field)  # (D, H, W, 3), LPS mm
    back = np.linalg.inv(geometry.index_to_lps(moving))
    index = mapped @ back[:3, :3].T + back[:3, 3]  # tensor order (k, j, i)
    own = np.stack(np.meshgrid(*[np.arange(n) for n in index.shape[:3]], indexing="ij"), -1)
    difference = (index - own)[..., ::-1].astype(np.float32)  # components x, y, z
    return np.ascontiguousarray(difference.transpose(2, 1, 0, 3))


def write_submission(path: str | os.PathLike[str], displacement_vox: np.ndarray, fixed: sitk.Image) -> None:
    """Write (X, Y, Z, 3) as a 4D NIfTI file that lies where the fixed image does.

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
    sitk.WriteImage(sitk.JoinSeries(components), os.fspath(path), useCompression=True)
