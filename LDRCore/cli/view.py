"""`ldr view`: show a result in the browser, or save the page."""

from __future__ import annotations

import argparse
import webbrowser

from LDRCore.cli.files import check_output_file
from LDRCore.cli.output import CommandOutput
from LDRCore.io.files import check_not_input
from LDRCore.io.writing import write_file
from LDRCore.viewer.page import make_page, niivue_script
from LDRCore.viewer.server import PageServer
from LDRCore.viewer.volumes import read_result


def run(options: argparse.Namespace) -> CommandOutput:
    """Show a result folder until Ctrl-C, or save its page as one file."""
    if options.save is not None:
        check_output_file(options.save, options.overwrite)
    niivue_script()  # where it is missing, that is said before anything is read
    result = read_result(options.result, options.fixed, options.moving)
    text = make_page(result)
    if options.save is not None:
        check_not_input([options.save], result.sources)
        write_file(options.save, lambda path: path.write_text(text, encoding="utf-8"))
        return CommandOutput({"file": str(options.save)}, f"written {options.save}")
    return serve(text, show=not options.no_browser)


def serve(text: str, *, show: bool = True) -> CommandOutput:
    """Return what tells the page's address, and then serves it until Ctrl-C."""
    server = PageServer(text)

    def until_interrupted() -> None:
        with server:
            if show:
                webbrowser.open(server.url)
            server.serve_forever()

    return CommandOutput({"url": server.url}, f"showing {server.url} (Ctrl-C ends)", until_interrupted)
