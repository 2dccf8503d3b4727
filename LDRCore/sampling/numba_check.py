"""Whether the compiled loops can be used in this process; numba is imported only where it will not end the process."""

from __future__ import annotations

import functools
import importlib.util
import logging
import os
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import numpy as np
import torch

from LDRCore.sampling import torch_cpu

VARIABLE = "LDR_NUMBA"
TARGET_VARIABLES = ("NUMBA_CPU_NAME", "NUMBA_CPU_FEATURES")


@functools.lru_cache(maxsize=1)
def load() -> ModuleType | None:
    """Return `numba_loops` after a test, or None: without numba, where it is forbidden, or where it fails.

    A failure is logged, once.
    """
    if os.environ.get(VARIABLE) == "0":
        return None
    try:
        if any(os.environ.get(name) for name in TARGET_VARIABLES):
            _test_in_a_process_of_its_own()
        from LDRCore.sampling import numba_loops, numba_support

        numba_support.self_test()
    except ModuleNotFoundError as error:
        if error.name != "numba":
            _log(error)
        return None
    except Exception as error:  # an optional package must not break a registration, whatever is wrong with it
        _log(error)
        return None
    return numba_loops


def _log(error: Exception) -> None:
    reason = str(error).strip().splitlines() or [type(error).__name__]
    logging.getLogger("LDRCore").warning("numba is not used (%s): torch samples instead", reason[0])


def _test_in_a_process_of_its_own() -> None:
    """Run every loop once elsewhere: code for another processor ends its process, some already in the compiler.

    Raises:
        RuntimeError: the loops do not run for the processor that the environment names.
        ModuleNotFoundError: there is no numba.
    """
    if importlib.util.find_spec("numba") is None:
        raise ModuleNotFoundError("No module named 'numba'", name="numba")
    command = [sys.executable, "-c", f"from {__name__} import test_every_loop; test_every_loop()"]
    paths = os.pathsep.join([str(Path(__file__).parents[2]), *filter(None, [os.environ.get("PYTHONPATH")])])
    done = subprocess.run(
        command,
        env={**os.environ, "PYTHONPATH": paths},
        stdin=subprocess.DEVNULL,
        capture_output=True,
        check=False,
    )
    if done.returncode:
        raise RuntimeError(f"code for the processor that {' or '.join(TARGET_VARIABLES)} names does not run here")


def test_every_loop() -> None:
    """Compile and run every loop, with rows that are long enough for all vector instructions.

    Raises:
        RuntimeError: the values are not those of `torch_cpu`.
    """
    from LDRCore.sampling import numba_loops

    generator = torch.Generator("cpu").manual_seed(0)
    shape = 4, 5, 300
    image, displacement, points, field = (
        torch.rand(size, generator=generator, dtype=torch.float32, device="cpu")
        for size in ((1, *shape), (3, *shape), (3, 1000), (3, 3, 4, 150))
    )
    parallel = np.diag([0.5, 0.6, 0.5, 1.0])
    oblique = parallel + 0.1 * np.eye(4, k=1)
    for padding in ("zeros", "border", "half"):
        for name, *arguments in (
            ("at_points", image, 3 * points, padding),
            ("displaced", image, displacement, padding),
            ("displaced", displacement, displacement, "border"),
            ("slabs", image[0], shape, np.eye(4), None, None, padding, 2.0, None, None),
            ("slabs", image[0], shape, np.eye(4), field, parallel, padding, 2.0, None, None),
            ("slabs", image[0], shape, np.eye(4), field, oblique, padding, 2.0, None, None),
        ):
            values, expected = (getattr(backend, name)(*arguments) for backend in (numba_loops, torch_cpu))
            if name == "slabs":
                values, expected = (torch.cat([part for _, part in slabs]) for slabs in (values, expected))
            if not float((values - expected).abs().mean()) < 1e-2:
                raise RuntimeError(f"the compiled loop {name} gives other values than torch")
