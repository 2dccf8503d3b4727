"""`ldr doctor`: say what this installation has and lacks."""

from __future__ import annotations

import argparse
import importlib.util
import os
import platform
from typing import Any

from LDRCore import __version__
from LDRCore.cli.output import CommandOutput
from LDRCore.errors import RegistrationError

NEEDED = ("numpy", "SimpleITK", "torch")  # nothing can be registered without these
EXTRAS = {  # of pyproject.toml: packages, and what needs them
    "view": (("ipyniivue",), "ldr view, --open"),
    "transforms": (("h5py", "pydicom"), "transform files of X5 and DICOM"),
    "cluster": (("dask", "distributed"), "lists of pairs on several machines"),
}


def run(options: argparse.Namespace) -> CommandOutput:
    """Check the installation."""
    facts, problems = examine()
    lines = [f"{name:<14} {value}" for name, value in facts.items()]
    lines += [f"PROBLEM        {problem}" for problem in problems] or ["all well"]
    return CommandOutput({"facts": facts, "problems": problems}, "\n".join(lines))


def examine() -> tuple[dict[str, Any], list[str]]:
    """Look at packages, hardware and models.

    Returns:
        facts: {name: what is installed}.
        problems: one sentence for each thing that would not work.
    """
    facts: dict[str, Any] = {"ldr": __version__, "python": platform.python_version()}
    problems = [
        f"{name} is not installed: nothing can be registered without it"
        for name in NEEDED
        if importlib.util.find_spec(name) is None
    ]
    if not problems:
        _examine_packages(facts, problems)
        _examine_models(facts, problems)
    for extra, (packages, use) in EXTRAS.items():
        missing = any(importlib.util.find_spec(package) is None for package in packages)
        facts[f"extra {extra}"] = f"not installed: pip install 'LDRCore[{extra}]' ({use})" if missing else "installed"
    if importlib.util.find_spec("matplotlib") is None:
        problems.append("matplotlib is not installed: overview.png cannot be drawn (use --no-overview)")
    return facts, problems


def _examine_packages(facts: dict[str, Any], problems: list[str]) -> None:
    import numpy
    import SimpleITK
    import torch

    from LDRCore import sampling
    from LDRCore.cpu import precision

    has_gpu = torch.cuda.is_available()
    facts["numpy"] = numpy.__version__
    facts["SimpleITK"] = SimpleITK.Version_VersionString()
    facts["torch"] = torch.__version__
    facts["sampling"] = "compiled loops (numba)" if sampling.backend_name() == "numba" else _without_numba()
    facts["threads"] = torch.get_num_threads()
    facts["gpu"] = torch.cuda.get_device_name(0) if has_gpu else "none (the CPU is used)"
    try:
        dtype = precision.of_convolutions("cuda" if has_gpu else "cpu")
        facts["precision of convolutions"] = str(dtype).removeprefix("torch.")
    except RegistrationError as error:
        problems.append(str(error))


def _without_numba() -> str:
    """Say why sampling does without numba."""
    from LDRCore.sampling.numba_check import VARIABLE

    if importlib.util.find_spec("numba") is None:
        return "torch alone (slower: numba is not installed)"
    if os.environ.get(VARIABLE) == "0":
        return f"torch alone (numba is switched off: {VARIABLE}=0, which ldr sets where nothing else is set)"
    return "torch alone (slower: numba is installed but does not work)"


def _examine_models(facts: dict[str, Any], problems: list[str]) -> None:
    from LDRCore.models import weights

    names = weights.list_models()
    for name in names:
        try:
            weights.verify(name)
            facts[f"model {name}"] = "whole (sha256 agrees with its card)"
        except RegistrationError as error:
            problems.append(str(error))
    if not names:
        problems.append("no model ships with this installation")
