"""`RegistrationResult`: the outputs of a registration, and its folder of files. SimpleITK and numpy only."""

from __future__ import annotations

import dataclasses
import functools
import json
import os
import shutil
import tempfile
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import SimpleITK as sitk

from LDRCore import geometry
from LDRCore.errors import RegistrationError

RESULT_FILES = (
    "warped.nii.gz",
    "transform.h5",
    "displacement_field.nii.gz",
    "jacobian_determinant.nii.gz",
    "report.json",
)


@dataclasses.dataclass
class RegistrationResult:
    """The outputs of a registration.

    Attributes:
        warped: the moving image on the fixed image's grid, in the moving image's pixel type, sampled once.
        transform: fixed points -> moving points (LPS mm): an affine map applied after a dense displacement, in one
            composite transform. `sitk.Resample(moving, fixed, transform)` gives `warped`.
        affine: the affine part alone, fixed -> moving.
        inverse_transform: moving points -> fixed points, or None unless it was asked for.
        report: times in seconds per stage, similarity before and after, folding, model, versions, warnings.
        compute_jacobian: computes the values of `jacobian_determinant`; None: from `transform`.
    """

    warped: sitk.Image
    transform: sitk.Transform
    affine: sitk.Transform
    inverse_transform: sitk.Transform | None
    report: dict[str, Any]
    compute_jacobian: Callable[[], np.ndarray] | None = dataclasses.field(default=None, repr=False)

    @functools.cached_property
    def displacement_field(self) -> sitk.Image:
        """``T(x) - x`` in mm LPS on the fixed image's grid, float32 vectors (computed when first asked for)."""
        return geometry.displacement_field_image(self.transform, self.warped)

    @functools.cached_property
    def jacobian_determinant(self) -> sitk.Image:
        """det(dT/dx) on the fixed image's grid, float32; right on oblique grids (computed when first asked for)."""
        if self.compute_jacobian is None:
            return geometry.jacobian_determinant_image(self.displacement_field)
        image = sitk.GetImageFromArray(self.compute_jacobian())
        image.CopyInformation(self.warped)
        return image

    def save(
        self, folder: str | os.PathLike[str], *, overwrite: bool = False, extra: Callable[[Path], None] | None = None
    ) -> list[Path]:
        """Write the result into a folder, complete or not at all.

        Files: warped.nii.gz, transform.h5 (and inverse_transform.h5), displacement_field.nii.gz,
        jacobian_determinant.nii.gz, report.json. Everything is written under a temporary name beside the folder
        first and moved when complete.

        Args:
            folder: created if needed.
            overwrite: replace files of these names; otherwise their presence is an error.
            extra: called with the temporary folder, to add files that shall appear together with the others.

        Raises:
            RegistrationError: the folder cannot be written, or holds such files and `overwrite` is false.
        """
        target = Path(folder)
        check_output_folder(target, overwrite=overwrite)
        target.parent.mkdir(parents=True, exist_ok=True)
        part = Path(tempfile.mkdtemp(prefix=f".{target.name}.", suffix=".part", dir=target.parent))
        try:
            with ThreadPoolExecutor() as pool:  # compressing takes most of the time, on one core a file
                writes = [
                    pool.submit(sitk.WriteImage, image(), str(part / name), True)
                    for name, image in (
                        ("displacement_field.nii.gz", lambda: self.displacement_field),
                        ("jacobian_determinant.nii.gz", lambda: self.jacobian_determinant),
                        ("warped.nii.gz", lambda: self.warped),
                    )
                ]
                sitk.WriteTransform(self.transform, str(part / "transform.h5"))
                if self.inverse_transform is not None:
                    sitk.WriteTransform(self.inverse_transform, str(part / "inverse_transform.h5"))
                (part / "report.json").write_text(json.dumps(self.report, indent=1) + "\n", encoding="utf-8")
                if extra is not None:
                    extra(part)
                for write in writes:
                    write.result()
            target.mkdir(exist_ok=True)
            written = []
            for file in sorted(part.iterdir()):
                os.replace(file, target / file.name)
                written.append(target / file.name)
            return written
        except (OSError, RuntimeError) as error:
            raise RegistrationError(f"the output folder must be writable, got {target} ({error})") from None
        finally:
            shutil.rmtree(part, ignore_errors=True)


def check_output_folder(folder: Path, *, overwrite: bool = False) -> None:
    """Refuse an output folder before any work is done for it.

    Raises:
        RegistrationError: it is a file, cannot be written, or holds an earlier result and `overwrite` is false.
    """
    if folder.exists() and not folder.is_dir():
        raise RegistrationError(f"the output must be a folder, got the file {folder}")
    existing = folder.resolve()
    while not existing.exists():
        existing = existing.parent
    for parent in {existing, folder.resolve().parent} if folder.exists() else {existing}:
        try:
            with tempfile.TemporaryFile(dir=parent):
                pass
        except OSError as error:
            raise RegistrationError(f"the output folder must be writable, got {folder} ({error.strerror})") from None
    if folder.exists() and not overwrite:
        taken = [name for name in (*RESULT_FILES, "overview.png") if (folder / name).exists()]
        if taken:
            raise RegistrationError(
                f"the output folder must not hold an earlier result (or overwrite must be set), got {folder} "
                f"with {taken[0]}"
            )
