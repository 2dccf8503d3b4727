"""Text files of 4x4 or 3x4 matrices."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from LDRCore.errors import RegistrationError
from LDRCore.io.files import read_text


def numbers_of(text: str) -> list[float] | None:
    """Return the numbers of a text without its comments (#), None where it holds anything else."""
    words = " ".join(line.partition("#")[0] for line in text.splitlines()).replace(",", " ").split()
    try:
        return [float(word) for word in words]
    except ValueError:
        return None


def is_square(text: str) -> bool:
    """Return whether a text is a 4x4 matrix and nothing else."""
    numbers = numbers_of(text)
    return numbers is not None and len(numbers) == 16 and numbers[12:] == [0, 0, 0, 1]


def read_matrix(path: Path, name: str) -> np.ndarray:
    """Read a text of 16 numbers, or of 12 without the last row, as a 4x4.

    Raises:
        RegistrationError: anything else.
    """
    numbers = numbers_of(read_text(path, name, "text file of a matrix"))
    if numbers is None or len(numbers) not in (12, 16):
        got = "other text" if numbers is None else f"{len(numbers)} numbers"
        raise RegistrationError(f"{name} must be a matrix of 12 or 16 numbers, got {got} in {path}")
    matrix = np.array([*numbers[:12], 0, 0, 0, 1]).reshape(4, 4)
    if len(numbers) == 16 and not np.allclose(numbers[12:], [0, 0, 0, 1]):
        raise RegistrationError(f"{name} must have the last row 0 0 0 1, got {numbers[12:]} in {path}")
    if not np.isfinite(matrix).all():
        raise RegistrationError(f"{name} must hold only finite values, got {numbers} in {path}")
    return matrix


def write_matrix(path: Path, matrix: np.ndarray) -> None:
    """Write a 4x4 as four lines of text."""
    lines = (" ".join(f"{value:.10f}" if abs(value) < 1e5 else f"{value:.10g}" for value in row) for row in matrix)
    path.write_text("\n".join(lines) + "\n", encoding="ascii")
