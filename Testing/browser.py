"""A headless Chromium for tests of pages: Debian's, driven by playwright. Tests are skipped where one is missing."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

PROGRAMS = ("chromium-headless-shell", "chromium", "chromium-browser", "google-chrome")
WITHOUT_GPU = ["--use-angle=swiftshader", "--enable-unsafe-swiftshader", "--ignore-gpu-blocklist"]


@contextmanager
def open_browser() -> Iterator[Any]:
    """A browser of playwright, or a skipped test."""
    sync_api = pytest.importorskip("playwright.sync_api", reason="needs playwright (make test installs it)")
    program = next((path for path in map(shutil.which, PROGRAMS) if path), None)
    if program is None:
        pytest.skip("needs a headless Chromium (apt-get install chromium-headless-shell)")
    with sync_api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=program, args=["--no-sandbox", *WITHOUT_GPU])
        try:
            yield browser
        finally:
            browser.close()


class Watched:
    """A page that notes what it asks for and what goes wrong in it.

    Attributes:
        page: playwright's.
        requests: addresses that left the page.
        errors: of scripts, and of rules that it broke.
    """

    def __init__(self, browser: Any, **options: Any) -> None:
        self.page = browser.new_page(viewport={"width": 1200, "height": 800}, **options)
        self.requests: list[str] = []
        self.errors: list[str] = []
        self.page.on("request", lambda request: self.requests.append(request.url))
        self.page.on("pageerror", lambda error: self.errors.append(str(error)))
        self.page.on("console", lambda message: message.type == "error" and self.errors.append(message.text))

    def open(self, address: Path | str) -> Any:
        """Open a file or an address."""
        self.page.goto(address.as_uri() if isinstance(address, Path) else address)
        return self.page
