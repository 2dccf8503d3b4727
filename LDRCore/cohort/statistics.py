"""Mean and standard deviation over a cohort's results on one atlas, a volume at a time."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

import numpy as np
import SimpleITK as sitk

from LDRCore import geometry
from LDRCore.cohort.settings import FILES
from LDRCore.cohort.store import PAIRS
from LDRCore.errors import RegistrationError
from LDRCore.io import images
from LDRCore.io.writing import write_file, write_image

FOLDER = "statistics"
_GRID_MM = 0.01  # grids whose corners differ by less are the same
SMALLEST_DETERMINANT = 0.01  # what folds counts as this: its logarithm is not known


class RunningMoments:
    """Mean and standard deviation of volumes that come one after the other, by Welford's method.

    >>> moments = RunningMoments()
    >>> for value in (1.0, 2.0, 6.0):
    ...     moments.add(np.array([value]))
    >>> moments.mean.tolist(), moments.std().round(4).tolist()
    ([3.0], [2.6458])
    """

    def __init__(self) -> None:
        self.count = 0
        self.mean = np.zeros(0)
        self._squares = np.zeros(0)

    def add(self, values: np.ndarray) -> None:
        """Take in one volume, slice by slice, so that only mean and squares are held beside it."""
        if not self.count:
            self.mean = np.zeros(values.shape)
            self._squares = np.zeros(values.shape)
        self.count += 1
        for new, mean, squares in zip(values, self.mean.reshape(values.shape), self._squares, strict=True):
            difference = new - mean
            step = difference / self.count
            mean += step
            squares += difference * (difference - step)

    def std(self) -> np.ndarray:
        """Return the standard deviation of the sample (divided by n - 1); zeros for one volume."""
        return np.sqrt(self._squares / max(self.count - 1, 1))


def write_statistics(
    out: Path, names: Sequence[str], progress: Callable[[float, str], None] | None = None
) -> list[str]:
    """Write `statistics/`: mean and std of warped images and of log Jacobian determinants, and what they are of.

    Args:
        out: folder of a cohort with the outputs warped and jacobian.
        names: of its finished pairs, all onto one atlas.
        progress: called with the fraction done.

    Returns:
        Paths of the files.

    Raises:
        RegistrationError: no pair is finished, grids differ, or the files cannot be written.
    """
    if not names:
        raise RegistrationError("statistics need a finished pair, got none")
    written = []
    for number, (output, title) in enumerate((("warped", "warped"), ("jacobian", "log_jacobian"))):
        moments, grid = RunningMoments(), None
        for done, image in enumerate(_volumes(out, names, output)):
            grid = grid or _empty_like(image)
            _check_grid(image, grid, names[done])
            values = sitk.GetArrayViewFromImage(image)
            moments.add(np.log(np.maximum(values, SMALLEST_DETERMINANT)) if output == "jacobian" else values)
            if progress is not None:
                progress((number + (done + 1) / len(names)) / 2, f"statistics of {title}")
        for kind, array in (("mean", moments.mean), ("std", moments.std())):
            image = sitk.GetImageFromArray(array.astype(np.float32))
            image.CopyInformation(grid)
            path = out / FOLDER / f"{title}_{kind}.nii.gz"
            write_file(path, lambda part, image=image: write_image(image, part))  # type: ignore[misc]
            written.append(str(path))
    path = out / FOLDER / "pairs.json"
    facts = {"n": len(names), "smallest_determinant": SMALLEST_DETERMINANT, "pairs": list(names)}
    text = json.dumps(facts, indent=1) + "\n"
    write_file(path, lambda part: part.write_text(text, encoding="utf-8"))
    return [*written, str(path)]


def _volumes(out: Path, names: Iterable[str], output: str) -> Iterable[sitk.Image]:
    for name in names:
        yield images.read(out / PAIRS / name / FILES[output], f"{output} of {name}")


def _empty_like(image: sitk.Image) -> sitk.Image:
    grid = sitk.Image(image.GetSize(), sitk.sitkUInt8)
    grid.CopyInformation(image)
    return grid


def _check_grid(image: sitk.Image, grid: sitk.Image, name: str) -> None:
    same = image.GetSize() == grid.GetSize()
    if not same or np.abs(geometry.corners_lps(image) - geometry.corners_lps(grid)).max() > _GRID_MM:
        raise RegistrationError(f"statistics need results on one grid, got another of {name}")
