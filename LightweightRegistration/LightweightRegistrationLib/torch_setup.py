"""Installs torch into Slicer's Python through the PyTorch extension: when a run needs it, and after asking."""

from __future__ import annotations

import importlib
import importlib.metadata
import importlib.util
import re

from .machine import without_torch
from .module_errors import InputError

OLDEST_TORCH = (2, 6)
REQUIREMENT = ">=" + ".".join(map(str, OLDEST_TORCH))


def torch_version() -> tuple[int, ...] | None:
    """Return the version (major, minor) of the installed torch, None without one. Does not import torch."""
    importlib.invalidate_caches()
    if importlib.util.find_spec("torch") is None:
        return None
    try:
        text = importlib.metadata.version("torch")
    except importlib.metadata.PackageNotFoundError:
        return None
    return tuple(int(n) for n in re.findall(r"\d+", text.split("+")[0])[:2])


def is_usable() -> bool:
    """Return whether a torch that is new enough is installed. Does not import it."""
    version = torch_version()
    return version is not None and version >= OLDEST_TORCH


def ensure_torch() -> None:
    """Return when torch can be used; otherwise offer to install it through the PyTorch extension.

    Raises:
        InputError: the extension is missing, the user declined, the installation failed or Slicer must be restarted.
    """
    if is_usable():
        return
    version = torch_version()
    if without_torch():
        raise InputError(without_torch())
    if importlib.util.find_spec("PyTorchUtils") is None:
        raise InputError(
            "registration needs the extension PyTorch, which is not installed: install 'PyTorch' in the Extensions "
            "Manager, restart Slicer and press Apply again"
        )
    if version is not None:
        raise InputError(
            f"registration needs torch {REQUIREMENT}, got {'.'.join(map(str, version))}: uninstall it in the module "
            "PyTorch Utils, restart Slicer and press Apply again"
        )
    import PyTorchUtils

    try:
        torch = PyTorchUtils.PyTorchUtilsLogic().installTorch(askConfirmation=True, torchVersionRequirement=REQUIREMENT)
    except Exception as error:
        raise InputError(
            f"torch must be installable by the extension PyTorch, got: {error}: restart Slicer and try again, or "
            "install it in the module PyTorch Utils"
        ) from None
    if torch is None:
        raise InputError("registration needs torch, and its installation was declined: press Apply again to install it")
    if not is_usable():
        raise InputError("torch was installed but cannot be used yet: restart Slicer and press Apply again")
