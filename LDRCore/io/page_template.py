"""HTML pages that are one file: a template with its parts filled in, which runs its own scripts and no others."""

from __future__ import annotations

import base64
import hashlib
import re
from collections.abc import Mapping, Sequence
from pathlib import Path


def fill(template: Path, parts: Mapping[str, str], scripts: Sequence[str]) -> str:
    """Return the text of a page.

    Args:
        template: path of a file in which @NAME@ stands for a part. @STYLE_HASH@ and @SCRIPT_HASHES@ belong in its
            content security policy: by them a browser knows the one style of the template, and the scripts.
        parts: {NAME: text}.
        scripts: the parts that are scripts.
    """
    text = template.read_text(encoding="utf-8")
    style = text.partition("<style>")[2].partition("</style>")[0]
    every = {
        **parts,
        "STYLE_HASH": _hash(style),
        "SCRIPT_HASHES": " ".join(f"'sha256-{_hash(script)}'" for script in scripts),
    }
    pieces = re.split(r"@([A-Z_]+)@", text)
    return "".join(every[piece] if k % 2 else piece for k, piece in enumerate(pieces))


def _hash(text: str) -> str:
    return base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()
