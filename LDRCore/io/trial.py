"""Tries out in a process of its own what may crash or never return, as HDF5's reader on some damaged files."""

from __future__ import annotations

import faulthandler
import os
import signal
import sys
import warnings
from collections.abc import Callable

CPU_LIMIT_S = 60  # of work; a healthy transform of a gigabyte takes a fraction


def works(function: Callable[[], object], limit_s: int = CPU_LIMIT_S) -> bool:
    """Call a function in a copy of this process, and say whether it came back with a result.

    What fails there (damaged files leave HDF5 in disorder even where they only raise) never happens here.

    On systems that cannot copy a process (Windows) nothing is tried.

    Args:
        function: its result is lost.
        limit_s: seconds of work after which the system ends the copy; what waits is not limited.
    """
    if sys.platform == "win32":
        return True
    import resource

    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # of copies of processes with threads: it takes no lock
        child = os.fork()
    if child == 0:
        try:
            faulthandler.disable()
            for number in (signal.SIGINT, signal.SIGTERM, signal.SIGXCPU):
                signal.signal(number, signal.SIG_DFL)
            resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
            resource.setrlimit(resource.RLIMIT_CPU, (limit_s, limit_s))
            function()
            os._exit(0)
        finally:
            os._exit(1)
    return os.waitpid(child, 0)[1] == 0
