"""`ldr`: registration from the command line.

Nothing heavy is imported before a command runs. Input that cannot be used ends with one sentence on stderr, exit code
2, and nothing written.
"""

from __future__ import annotations

import importlib
import json
import os
import re
import signal
import sys
from collections.abc import Sequence
from contextlib import suppress

from LDRCore.cli.output import CommandOutput
from LDRCore.cli.parser import UsageError, build_parser
from LDRCore.cpu import memory, waiting
from LDRCore.errors import RegistrationError

DONE, FAILED, USAGE_ERROR, INTERRUPTED = 0, 1, 2, 130  # exit codes


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command.

    Args:
        arguments: as typed after `ldr`; those of the process by default.

    Returns:
        The exit code: 0 done, 2 unusable input, 1 anything else.
    """
    typed = list(sys.argv[1:] if arguments is None else arguments)
    try:
        options = build_parser().parse_args(typed)
    except UsageError as error:
        sys.exit(_refuse(str(error), "--json" in typed))
    try:
        command = importlib.import_module(f"LDRCore.cli.{options.command}")
        output: CommandOutput = command.run(options)
    except RegistrationError as error:
        return _refuse(f"ldr {options.command}: {error}", options.json)
    except (MemoryError, RuntimeError) as error:
        if not isinstance(error, MemoryError) and not re.search(r"alloc|memory", str(error)):
            raise
        return _refuse(f"ldr {options.command}: the images must fit into memory, got too little of it", options.json)
    except ModuleNotFoundError as error:
        print(f"ldr {options.command}: the package {error.name} must be installed (see ldr doctor)", file=sys.stderr)
        return FAILED
    except ImportError as error:
        return _refuse(f"ldr {options.command}: a package must load, got {error} (too little memory?)", options.json)
    except KeyboardInterrupt:
        print("interrupted; no output was left incomplete", file=sys.stderr)
        return INTERRUPTED
    try:
        print(json.dumps(output.data, indent=1) if options.json else output.text, flush=True)
    except BrokenPipeError:  # the reader (head, less) needs no more
        sys.stderr.close()
    if output.after is not None:
        with suppress(KeyboardInterrupt):
            output.after()
    if output.data.get("interrupted"):
        return INTERRUPTED
    return FAILED if output.data.get("problems") else DONE


def _refuse(sentence: str, as_json: bool) -> int:
    """Print the sentence on stderr, and with --json as an object; return the exit code."""
    if as_json:
        print(json.dumps({"error": sentence.partition(": ")[2]}))
    print(sentence, file=sys.stderr)
    return USAGE_ERROR


def script() -> int:
    """Run `ldr` as a program, which may set what a library must not.

    One registration a process does not earn back the second that loading numba takes; workers of a list of pairs may,
    and learn that nobody asked for this.
    """
    if "LDR_NUMBA" not in os.environ:
        os.environ |= {"LDR_NUMBA": "0", "LDR_NUMBA_DEFAULT": "1"}
    waiting.limit_spinning()
    memory.keep_freed_blocks()
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # as Ctrl-C: what is half written is removed
    return main()
