"""`ldr`: registration from the command line.

Nothing heavy is imported before a command runs. Input that cannot be used ends with one sentence on stderr, exit code
2, and nothing written.
"""

from __future__ import annotations

import importlib
import json
import os
import sys
from collections.abc import Sequence

from LDRCore.cli.parser import build_parser
from LDRCore.cpu import memory
from LDRCore.errors import RegistrationError

USAGE_ERROR = 2


def main(arguments: Sequence[str] | None = None) -> int:
    """Run `ldr` and return its exit code: 0 done, 2 unusable input, 1 anything else."""
    options = build_parser().parse_args(arguments)
    try:
        command = importlib.import_module(f"LDRCore.cli.{options.command}")
        result, text = command.run(options)
    except RegistrationError as error:
        if options.json:
            print(json.dumps({"error": str(error)}))
        print(f"ldr {options.command}: {error}", file=sys.stderr)
        return USAGE_ERROR
    except ModuleNotFoundError as error:
        print(f"ldr {options.command}: the package {error.name} must be installed (see ldr doctor)", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("interrupted; nothing was written", file=sys.stderr)
        return 130
    try:
        print(json.dumps(result, indent=1) if options.json else text, flush=True)
    except BrokenPipeError:  # the reader (head, less) has seen enough
        sys.stderr.close()
    return int(bool(result.get("problems"))) if options.command in ("doctor", "evaluate") else 0


def script() -> int:
    """Run `ldr` as a program, which may set what a library must not.

    One registration a process does not earn back the second that loading numba takes. GNU OpenMP's threads, torch's
    among them, otherwise stay busy for milliseconds waiting for work; the variable is read when torch is imported.
    """
    os.environ.setdefault("LDR_NUMBA", "0")
    if "OMP_WAIT_POLICY" not in os.environ:
        os.environ.setdefault("GOMP_SPINCOUNT", "10000")
    memory.keep_freed_blocks()
    return main()
