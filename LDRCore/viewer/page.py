"""The viewer's page: one file with NiiVue, the volumes and nothing that asks a network."""

from __future__ import annotations

import base64
import html
import importlib.util
import json
import re
from pathlib import Path

from LDRCore.errors import RegistrationError
from LDRCore.io import page_template
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
    scripts = [_inline(niivue_script()), (folder / "view.js").read_text(encoding="utf-8")]
    parts = {
        "TITLE": html.escape(result.title),
        "FACTS": "".join(f"<li>{html.escape(line)}</li>" for line in result.facts),
        "NIIVUE": scripts[0],
        "SCRIPT": scripts[1],
        "SETTINGS": json.dumps({"jacobian_range": JACOBIAN_RANGE}),
        "VOLUMES": "\n".join(
            f'<script type="text/plain" id="volume-{name}">{base64.b64encode(data).decode()}</script>'
            for name, data in result.volumes.items()
        ),
    }
    return page_template.fill(folder / "view.html", parts, scripts)


def _inline(script: str) -> str:
    """Return a script that an HTML page can hold: what would end or begin a script there is written otherwise."""
    return re.sub(r"<(?=/script|script|!--)", r"\\x3c", script, flags=re.IGNORECASE)
