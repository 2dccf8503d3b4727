"""`RegistrationResult`: the outputs of a registration, and its folder of files. SimpleITK and numpy only."""

from __future__ import annotations

import dataclasses
import functools
import json
import os
import time
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import SimpleITK as sitk

from LDRCore import geometry
from LDRCore.errors import RegistrationError
from LDRCore.io import files, writing
from LDRCore.io.quiet import silent_libraries
from LDRCore.io.transforms import RESULT_NAMES

RESULT_FILES = (
    "warped.nii.gz",
    "transform.h5",
    "displacement_field.nii.gz",
    "jacobian_determinant.nii.gz",
    "report.json",
)
FILE_SUFFIXES = (".nii", ".gz", ".nrrd", ".mha", ".mhd", ".h5", ".tfm", ".png", ".csv", ".json")  # of no folder
EXTRA_FILES = ("inverse_transform.h5", "overview.png", *RESULT_NAMES)  # of some results


@dataclasses.dataclass
class RegistrationResult:
    """The outputs of a registration.

    Attributes:
        warped: the moving image on the fixed image's grid, in the moving image's pixel type, sampled once.
        transform: fixed points -> moving points (LPS mm): an affine map applied after a dense displacement, in one
            composite transform; for kind "affine" an affine transform, for "rigid" one of 6 parameters.
            `sitk.Resample(moving, fixed, transform)` gives `warped`.
        affine: the affine part alone, fixed -> moving.
        inverse_transform: moving points -> fixed points, or None unless it was asked for.
        facts: what `report` holds beside the folding.
        compute_jacobian: computes the values of `jacobian_determinant`; None: from `transform`.
        measure_jacobian: computes `geometry.summarise_jacobian` of these without holding all; None: from the image.
    """

    warped: sitk.Image
    transform: sitk.Transform
    affine: sitk.Transform
    inverse_transform: sitk.Transform | None
    facts: dict[str, Any] = dataclasses.field(repr=False)
    compute_jacobian: Callable[[], np.ndarray] | None = dataclasses.field(default=None, repr=False)
    measure_jacobian: Callable[[], dict[str, Any]] | None = dataclasses.field(default=None, repr=False)

    @functools.cached_property
    def report(self) -> dict[str, Any]:
        """Times in seconds per stage, similarity before and after, folding, model, versions, warnings.

        Folding and the range of the Jacobian determinant, at every voxel of the fixed image, are measured when the
        report is first asked for.
        """
        if self.measure_jacobian is None or "jacobian_determinant" in self.__dict__:
            return self.facts | geometry.summarise_jacobian([sitk.GetArrayViewFromImage(self.jacobian_determinant)])
        return self.facts | self.measure_jacobian()

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
        jacobian_determinant.nii.gz, report.json. They appear together, in one step, after each was checked to be whole.
        The report's seconds then count the writing, with what is computed only for it.

        Args:
            folder: created if needed. Other files in it stay.
            overwrite: replace an earlier result, all of its files; otherwise its presence is an error.
            extra: called with the folder in which the files are written, to add some that shall appear with them. It
                may change the report.

        Raises:
            RegistrationError: the folder cannot be written or replaced, or holds an earlier result and `overwrite` is
                false.
        """
        if not isinstance(folder, (str, os.PathLike)):
            raise RegistrationError(f"the output folder must be a path, got {type(folder).__name__}")
        target, began_s = Path(folder), time.perf_counter()
        check_output_folder(target, overwrite=overwrite)
        images: dict[str, Callable[[], sitk.Image]] = {
            "displacement_field.nii.gz": lambda: self.displacement_field,
            "jacobian_determinant.nii.gz": lambda: self.jacobian_determinant,
            "warped.nii.gz": lambda: self.warped,
        }
        try:
            with files.complete_folder(target, (*RESULT_FILES, *EXTRA_FILES)) as new, silent_libraries():
                with ThreadPoolExecutor() as pool:  # compressing takes most of the time, on one core a file
                    writes = [
                        pool.submit(lambda name, image: writing.write_image(image(), new / name), name, image)
                        for name, image in images.items()
                    ]
                    writing.write_transform(self.transform, new / "transform.h5")
                    if self.inverse_transform is not None:
                        writing.write_transform(self.inverse_transform, new / "inverse_transform.h5")
                    if extra is not None:
                        extra(new)
                    for write in writes:
                        write.result()
                report = self.report
                if "times_s" in self.facts:
                    write_s = round(time.perf_counter() - began_s, 4)
                    times = self.facts["times_s"]
                    report["times_s"] = times | {"write": write_s, "total": round(times["total"] + write_s, 4)}
                (new / "report.json").write_text(
                    json.dumps(report, indent=1, default=np.generic.item) + "\n", encoding="utf-8"
                )
                names = sorted(file.name for file in new.iterdir())
        except (OSError, RuntimeError) as error:
            raise files.describe_failure(target, error) from None
        return [target / name for name in names]


def check_output_folder(folder: Path, *, overwrite: bool = False, inputs: Iterable[object] = ()) -> None:
    """Refuse a folder for a result before any work is done for it.

    Args:
        folder: need not exist.
        overwrite: an earlier result may be replaced.
        inputs: paths that are read, and anything else.

    Raises:
        RegistrationError: it is a file or has the name of one, cannot be written or replaced, holds an earlier result
            and `overwrite` is false, or a file that is read.
    """
    own = (*RESULT_FILES, *EXTRA_FILES)
    if folder.exists() and not folder.is_dir():
        raise RegistrationError(f"the output must be a folder, got the file {folder}")
    if not folder.exists() and folder.name.lower().endswith(FILE_SUFFIXES):
        raise RegistrationError(f"the output must be a folder, got {folder}, the name of a file")
    files.check_replaceable(folder, own)
    files.check_writable(folder)
    if folder.exists():
        files.check_writable(folder.resolve().parent)
    taken = [name for name in own if (folder / name).exists()]
    if taken and not overwrite:
        raise RegistrationError(
            f"the output folder must not hold an earlier result (or overwrite must be set), got {folder} "
            f"with {taken[0]}"
        )
    files.check_not_input((folder / name for name in taken), inputs)
