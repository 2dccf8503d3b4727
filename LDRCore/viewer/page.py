"""The viewer's page: one file with NiiVue, the volumes and nothing that asks a network."""

from __future__ import annotations

import base64
import hashlib
import html
import importlib.util
import json
import re
from pathlib import Path

from LDRCore.errors import RegistrationError
from LDRCore.viewer.volumes import JACOBIAN_RANGE, ViewedResult

_CLASS = re.compile(r'"Creating new Niivue instance"\);.{0,200}?\bnew ([\w$]+)\(', re.DOTALL)
_EXPORT = re.compile(r"export\s*\{[^{}]*\};?\s*$")


def niivue_script() -> str:
    """Return NiiVue as a script that defines `Niivue`, from the installed package ipyniivue.

    The package's widget holds the library; its export is replaced by the name of the class.

    Raises:
        RegistrationError: the package is not installed, or has another form.
    """
    found = importlib.util.find_spec("ipyniivue")
    if found is None or found.origin is None:
        raise RegistrationError("the viewer needs NiiVue: pip install 'LDRCore[view]'")
    widget = Path(found.origin).parent / "static" / "widget.js"
    try:
        text = widget.read_text(encoding="utf-8")
    except OSError:
        text = ""
    name, export = _CLASS.search(text), _EXPORT.search(text)
    if name is None or export is None:
        raise RegistrationError(f"the viewer needs ipyniivue 2.4, got another form of {widget}")
    return text[: export.start()] + f"globalThis.Niivue={name[1]};"


def make_page(result: ViewedResult) -> str:
    """Return the page's text.

    Raises:
        RegistrationError: see `niivue_script`.
    """
    folder = Path(__file__).parent
    template = (folder / "view.html").read_text(encoding="utf-8")
    scripts = [_inline(niivue_script()), (folder / "view.js").read_text(encoding="utf-8")]
    style = template.partition("<style>")[2].partition("</style>")[0]
    parts = {
        "TITLE": html.escape(result.title),
        "FACTS": "".join(f"<li>{html.escape(line)}</li>" for line in result.facts),
        "STYLE_HASH": _hash(style),
        "SCRIPT_HASHES": " ".join(f"'sha256-{_hash(script)}'" for script in scripts),
        "NIIVUE": scripts[0],
        "SCRIPT": scripts[1],
        "SETTINGS": json.dumps({"jacobian_range": JACOBIAN_RANGE}),
        "VOLUMES": "\n".join(
            f'<script type="text/plain" id="volume-{name}">{base64.b64encode(data).decode()}</script>'
            for name, data in result.volumes.items()
        ),
    }
    pieces = re.split(r"@([A-Z_]+)@", template)
    return "".join(parts[piece] if k % 2 else piece for k, piece in enumerate(pieces))


def _inline(script: str) -> str:
    """Return a script that an HTML page can hold: what would end or begin a script there is written otherwise."""
    return re.sub(r"<(?=/script|script|!--)", r"\\x3c", script, flags=re.IGNORECASE)


def _hash(text: str) -> str:
    return base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()
