"""How threads wait for one another. Standard library only."""

from __future__ import annotations

import os

_SPINS = "3000"  # turns of a waiting loop; by default some 300,000


def limit_spinning() -> None:
    """Let threads of GNU OpenMP, torch's among them on Linux, sleep soon while they wait for one another.

    By default they go on looking for milliseconds, which delays the very thread they wait for when anything else runs:
    with one other busy process on two cores a registration took 4.6 s instead of 0.4 s; on idle cores it takes some 3 %
    longer than with 10,000 turns. The variable is read when torch is imported, and counts for the whole process, so
    only programs of our own set it; a script sets it in its environment. A policy that the user chose (OMP_WAIT_POLICY)
    stays.
    """
    if "OMP_WAIT_POLICY" not in os.environ:
        os.environ.setdefault("GOMP_SPINCOUNT", _SPINS)
