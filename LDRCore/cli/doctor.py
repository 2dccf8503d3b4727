"""What this installation has and lacks, for `ldr doctor`."""

from __future__ import annotations

import argparse
import importlib.util
import platform
from typing import Any

from LDRCore import __version__
from LDRCore.cli.files import Outcome
from LDRCore.errors import RegistrationError


def examine() -> tuple[dict[str, Any], list[str]]:
    """(facts, problems): what is installed, and one sentence for each thing that would not work."""
    import numpy
    import SimpleITK

    problems = []
    facts: dict[str, Any] = {
        "ldr": __version__,
        "python": platform.python_version(),
        "numpy": numpy.__version__,
        "SimpleITK": SimpleITK.Version_VersionString(),
    }
    if importlib.util.find_spec("torch") is None:
        problems.append("torch is not installed: nothing can be registered without it")
        return facts, problems
    import torch

    from LDRCore import sampling
    from LDRCore.cpu import precision
    from LDRCore.models import weights

    facts["torch"] = torch.__version__
    facts["sampling"] = (
        "compiled loops (numba)" if sampling.backend_name() == "numba" else "torch alone (slower: no numba)"
    )
    facts["threads"] = torch.get_num_threads()
    facts["gpu"] = torch.cuda.get_device_name(0) if torch.cuda.is_available() else "none (the CPU is used)"
    try:
        used = precision.of_convolutions("cuda" if torch.cuda.is_available() else "cpu")
        facts["precision of convolutions"] = str(used).removeprefix("torch.")
    except RegistrationError as error:
        problems.append(str(error))
    names = weights.list_models()
    for name in names:
        try:
            weights.verify(name)
            facts[f"model {name}"] = "whole (sha256 agrees with its card)"
        except RegistrationError as error:
            problems.append(str(error))
    if not names:
        problems.append("no model ships with this installation")
    if importlib.util.find_spec("matplotlib") is None:
        problems.append("matplotlib is not installed: overview.png cannot be drawn (use --no-overview)")
    return facts, problems


def run(options: argparse.Namespace) -> Outcome:
    """Check the installation."""
    facts, problems = examine()
    lines = [f"{name:<14} {value}" for name, value in facts.items()]
    lines += [f"PROBLEM        {problem}" for problem in problems] or ["all well"]
    return {"facts": facts, "problems": problems}, "\n".join(lines)
