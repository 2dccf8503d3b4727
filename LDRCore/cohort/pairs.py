"""The pairs of a cohort: read from a CSV, made from a pattern of files, or given as dictionaries."""

from __future__ import annotations

import csv
import glob
import io
import os
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, fields
from itertools import zip_longest
from pathlib import Path, PurePosixPath

from LDRCore.errors import RegistrationError
from LDRCore.io.files import read_text

IMAGE_SUFFIXES = (".nii.gz", ".nii", ".nrrd", ".nhdr", ".mha", ".mhd", ".img.gz", ".img", ".hdr", ".gipl", ".vtk")
_LONGEST_NAME = 200  # characters of a part of a name; file systems allow 255 bytes
_PART = re.compile(r"[\w][\w.+=@ -]*", re.ASCII)
_ADDRESS = re.compile(r"[a-z][a-z0-9+.-]+://", re.IGNORECASE)
_RESERVED = re.compile(r"(con|prn|aux|nul|com\d|lpt\d)(\..*)?", re.IGNORECASE)  # no names of files on Windows
_EXISTS_FOR_BOTH = ("labels", "landmarks")


@dataclass(frozen=True)
class CohortPair:
    """One pair: paths, absolute, empty where there is none.

    Attributes:
        name: of the pair's folder below the output; parts divided by "/".
        fixed, moving: images.
        fixed_mask, moving_mask: images > 0 inside.
        fixed_labels, moving_labels: segmentations; those of the moving image alone can be warped, both give Dice.
        fixed_landmarks, moving_landmarks: points in the same order; both are needed.
        initial: "center", "none" or a transform; empty: as the options of the whole cohort say.
    """

    name: str
    fixed: str
    moving: str
    fixed_mask: str = ""
    moving_mask: str = ""
    fixed_labels: str = ""
    moving_labels: str = ""
    fixed_landmarks: str = ""
    moving_landmarks: str = ""
    initial: str = ""


COLUMNS = tuple(field.name for field in fields(CohortPair))
_WORDS = ("center", "none")  # values of `initial` that are no path


def read_cohort(path: Path) -> list[CohortPair]:
    """Read pairs from a CSV with the columns fixed and moving and any others of `CohortPair`.

    Cells are divided by commas, semicolons or tabs, as the titles are. Lines without a cell and lines that begin with #
    are passed over.

    Args:
        path: of the CSV; paths in it are relative to its folder. Without a column name, a pair is named after its
            moving image, or after both where that is not unique.

    Raises:
        RegistrationError: missing file, missing or unknown column, a line with too many cells, no pair, a name that
            comes twice or cannot be a folder's.
    """
    text = read_text(path, "the list of pairs", "CSV file")
    titles = next((line for line in text.splitlines() if line.strip() and not line.startswith("#")), "")
    delimiter = next((character for character in ",;\t" if character in titles), ",")
    reader = csv.reader(io.StringIO(text, newline=""), delimiter=delimiter, skipinitialspace=True)
    try:
        lines = [(reader.line_num, [cell.strip() for cell in row]) for row in reader]
    except csv.Error as error:
        raise RegistrationError(f"the list of pairs must be a CSV file, got {path} ({error})") from None
    lines = [(number, row) for number, row in lines if any(row) and not row[0].startswith("#")]
    columns = [title.lower() for title in lines[0][1]] if lines else []
    while columns and not columns[-1]:
        columns.pop()  # spreadsheets write empty columns
    _check_columns(columns, str(path))
    rows = []
    for number, row in lines[1:]:
        if any(row[len(columns) :]):
            raise RegistrationError(f"{path} must have {len(columns)} cells in every line, got more in line {number}")
        rows.append(dict(zip_longest(columns, row[: len(columns)], fillvalue="")))
    return make_pairs(rows, folder=path.parent, source=str(path))


def _check_columns(columns: Sequence[str], source: str) -> None:
    missing = [name for name in ("fixed", "moving") if name not in columns]
    unknown = [name for name in columns if name not in COLUMNS]
    if missing:
        wrong = f"no {missing[0]} in {','.join(columns)!r}"
    elif unknown:
        wrong = repr(unknown[0]) if unknown[0] else "one without a title"
    elif len(set(columns)) != len(columns):
        wrong = "one of them twice"
    else:
        return
    raise RegistrationError(
        f"{source} must have the columns fixed, moving and any of {', '.join(COLUMNS[3:])}, name, got {wrong}"
    )


def pairs_of_pattern(fixed: str, pattern: str) -> list[CohortPair]:
    """Return a pair for each file that a pattern matches, all onto one fixed image.

    Args:
        fixed: path of the atlas.
        pattern: as of the shell; `**` stands for any folders.

    Raises:
        RegistrationError: nothing matches.
    """
    matching = sorted(glob.glob(pattern, recursive=True))
    if not matching:
        raise RegistrationError(f"the pattern of moving images must match files, got none for {pattern}")
    return make_pairs([{"fixed": fixed, "moving": path} for path in matching], source=pattern)


def make_pairs(
    rows: Iterable[Mapping[str, str]], *, folder: Path | None = None, source: str = "the list of pairs"
) -> list[CohortPair]:
    """Check rows and make pairs of them.

    Args:
        rows: {column: cell}; columns of `CohortPair`.
        folder: that paths are relative to; None: the current one.
        source: what the rows are to the user, for messages.

    Raises:
        RegistrationError: see `read_cohort`.
    """
    base = os.path.abspath(folder or ".")
    cleaned: list[dict[str, str]] = []
    for number, row in enumerate(rows, 1):
        _check_columns(list(row), source)
        cells = {column: os.fspath(cell or "").strip() for column, cell in row.items()}
        if not cells["fixed"] or not cells["moving"]:
            raise RegistrationError(f"{source} must name a fixed and a moving image in every row, got row {number}")
        for kind in _EXISTS_FOR_BOTH:
            given = [bool(cells.get(f"{side}_{kind}")) for side in ("fixed", "moving")]
            if given[0] != given[1] and not (kind == "labels" and given[1]):
                raise RegistrationError(f"{kind} must be given for both images or for none, got row {number}")
        address = next((cell for cell in cells.values() if _ADDRESS.match(cell)), None)
        if address is not None:
            raise RegistrationError(f"{source} must name files of this machine, got {address!r} in row {number}")
        cleaned.append({column: _absolute(base, column, cell) for column, cell in cells.items()})
    if not cleaned:
        raise RegistrationError(f"{source} must hold a pair, got none")
    names = _names(cleaned)
    _check_names(names, source)
    return [CohortPair(**(cells | {"name": name})) for cells, name in zip(cleaned, names, strict=True)]


def _absolute(base: str, column: str, cell: str) -> str:
    if not cell or column == "name" or (column == "initial" and cell in _WORDS):
        return cell
    return os.path.normpath(os.path.join(base, os.path.expanduser(cell)))


def stem(path: str) -> str:
    """Return the name of an image without its folder and suffix.

    >>> stem("scans/sub-01.nii.gz")
    'sub-01'
    """
    name = PurePosixPath(path.replace("\\", "/")).name
    suffix = next((s for s in IMAGE_SUFFIXES if name.lower().endswith(s)), "")
    return name[: len(name) - len(suffix)] if suffix else name


def _names(rows: Sequence[Mapping[str, str]]) -> list[str]:
    """Return the given names, and for rows without one the moving image's, or both images' where that is not unique."""
    by_moving = [re.sub(r"[^\w.+=@-]", "_", stem(row["moving"]), flags=re.ASCII).lstrip(".-+=@") for row in rows]
    if len(set(by_moving)) != len(by_moving):
        fixed = (re.sub(r"[^\w.+=@-]", "_", stem(row["fixed"]), flags=re.ASCII).lstrip(".-+=@") for row in rows)
        by_moving = [f"{moving}--{atlas}" for moving, atlas in zip(by_moving, fixed, strict=True)]
    return [row.get("name") or name for row, name in zip(rows, by_moving, strict=True)]


def _check_names(names: Sequence[str], source: str) -> None:
    """Refuse names that cannot be folders, come twice (also but for case), or lie inside one another."""
    seen: dict[str, int] = {}  # {name: its row}
    for number, name in enumerate(names, 1):
        parts = name.split("/")
        if not all(
            _PART.fullmatch(part) and len(part) <= _LONGEST_NAME and part[-1] not in ". " and not _RESERVED.match(part)
            for part in parts
        ):
            raise RegistrationError(
                f"a pair's name must be a folder's (letters a to z, digits, . _ - and /), got {name!r} in {source}"
            )
        if name.lower() in seen:
            raise RegistrationError(
                f"every pair must have a name of its own, got {name!r} in rows {seen[name.lower()]} and {number} of "
                f"{source}: remove one of them, or give a column name"
            )
        seen[name.lower()] = number
    for name in names:
        parts = name.lower().split("/")
        outer = next((o for n in range(1, len(parts)) if (o := "/".join(parts[:n])) in seen), None)
        if outer is not None:
            raise RegistrationError(
                f"a pair's folder must not lie in another's, got {name!r} and {names[seen[outer] - 1]!r} in {source}"
            )
