"""Checkpoints on disk: NAME.pt, the last one of a run, and beside it NAME.best.pt, that of the best validation."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from LDRCore.models import weights
from Training.config import ConfigError


def save_atomically(state: Any, path: Path) -> None:
    """Write a checkpoint under a temporary name and rename it.

    Raises:
        OSError: no room on the disk; the file that was there before is untouched.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(path.name + ".part")
    try:
        torch.save(state, part)
        part.replace(path)
    except (OSError, RuntimeError) as error:
        part.unlink(missing_ok=True)
        raise OSError(f"no checkpoint could be written to {path} ({error}); the one before is untouched") from None


def best_path(out: Path) -> Path:
    """Return where the best checkpoint of a run lies, beside the last one at `out`."""
    return out.with_suffix(".best.pt")


def is_checkpoint(source: str) -> bool:
    """Whether a user's text names a checkpoint of a run; otherwise a model (a name, or a file with a card)."""
    path = Path(source)
    model = source in weights.list_models() or path.suffix == ".json" or path.with_suffix(".json").exists()
    return not model and (path.suffix == ".pt" or path.is_file())


def read_checkpoint(path: Path) -> dict[str, Any]:
    """Read a checkpoint of a run; no code in it can run.

    Raises:
        ConfigError: it is missing or unreadable.
    """
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError:
        raise ConfigError(f"a checkpoint must exist, got no file {path}") from None
    except Exception as error:
        raise ConfigError(f"a checkpoint must be readable, got {path} ({type(error).__name__})") from None
