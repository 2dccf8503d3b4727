"""Evaluates pairs in a process of its own, so that one on which it dies (out of memory, a crash) costs one row."""

from __future__ import annotations

import multiprocessing
import signal
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess
from typing import Any

from LDRCore.errors import RegistrationError
from LDRCore.evaluation.pairs import EvaluationOptions, PairFiles, evaluate_pair


class PairProcess:
    """A process that evaluates one pair after the other, started when first needed and anew where it died."""

    def __init__(self) -> None:
        self._process: BaseProcess | None = None
        self._connection: Connection | None = None

    def __enter__(self) -> PairProcess:
        return self

    def __exit__(self, *_: object) -> None:
        self._end()

    def __call__(self, files: PairFiles, options: EvaluationOptions) -> dict[str, Any]:
        """See `pairs.evaluate_pair`.

        Raises:
            RegistrationError: the pair's own; or the process ended.
        """
        if self._process is None or self._connection is None:
            context = multiprocessing.get_context("spawn")
            self._connection, other = context.Pipe()
            self._process = context.Process(target=_serve, args=(other,), daemon=True)
            self._process.start()
            other.close()
        process, connection = self._process, self._connection
        try:
            connection.send((files, options))
            result, message = connection.recv()
        except (EOFError, ConnectionError):
            process.join()
            self._end()
            raise RegistrationError(
                f"the process that evaluated the pair ended (exit code {process.exitcode}): out of memory, or a crash "
                "of a library"
            ) from None
        if message:
            raise RegistrationError(message)
        evaluated: dict[str, Any] = result
        return evaluated

    def _end(self) -> None:
        if self._connection is not None:
            self._connection.close()
        if self._process is not None:
            self._process.kill()
            self._process.join()
        self._process = self._connection = None


def _serve(connection: Connection) -> None:
    """Evaluate what comes until nothing more does; Ctrl-C is for the process that asks."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    while True:
        try:
            files, options = connection.recv()
        except EOFError:
            return
        try:
            answer = evaluate_pair(files, options), ""
        except RegistrationError as error:
            answer = {}, str(error)
        connection.send(answer)
