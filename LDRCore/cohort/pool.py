"""Worker processes on this machine: pairs go out, rows come back; a process that dies takes no other pair with it."""

from __future__ import annotations

import dataclasses
import json
import os
import queue
import subprocess
import sys
import threading
from collections import deque
from collections.abc import Iterable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

from LDRCore.cohort.pairs import CohortPair
from LDRCore.cohort.settings import CohortSettings
from LDRCore.errors import RegistrationError

NUMBA_DEFAULT = "LDR_NUMBA_DEFAULT"  # set by `ldr` where it was `ldr` that set LDR_NUMBA
COMMAND = [sys.executable, "-m", "LDRCore.cohort.worker_process"]
_WAIT_S = 0.5  # an interruption is noticed after so long on Windows
_AHEAD = 3  # pairs that a worker has at once: one is read, one computed, one written
_LIBRARY_THREADS = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "NUMBA_NUM_THREADS", "ITK_GLOBAL_DEFAULT_NUMBER_OF_THREADS")


@dataclasses.dataclass(frozen=True)
class Answer:
    """What came of a pair.

    Attributes:
        number: of the pair.
        row: of the table; `error` where it failed, `unwritten` where its outputs could not be written.
        peak_bytes: memory of the process so far; 0 where it is not known.
    """

    number: int
    row: dict[str, Any]
    peak_bytes: int = 0


class _Worker:
    """One process, its pairs at work, and a thread that hands its lines on."""

    def __init__(self, first: dict[str, Any], environment: dict[str, str], inbox: queue.Queue[Any]) -> None:
        self.process = subprocess.Popen(
            COMMAND,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env=environment,
            encoding="utf-8",
        )
        self.pairs: list[int] = []
        self.ready = False
        self.give(first)
        threading.Thread(target=self._listen, args=(inbox,), daemon=True).start()

    def _listen(self, inbox: queue.Queue[Any]) -> None:
        stream = self.process.stdout
        if stream is not None:
            for line in stream:
                with suppress(ValueError):  # a line that the process was killed in
                    inbox.put((self, json.loads(line)))
        self.process.wait()
        inbox.put((self, None))

    def give(self, message: Any) -> None:
        """Send a message; a process that is gone is noticed elsewhere."""
        stream = self.process.stdin
        if stream is not None:
            with suppress(OSError):
                stream.write(json.dumps(message) + "\n")
                stream.flush()

    def kill(self) -> None:
        """End the process now."""
        self.process.kill()
        self.process.wait()


class Pool:
    """Runs pairs in worker processes.

    Args:
        settings, out: of the cohort.
        workers: how many processes.
        threads: of each.
        compiled: use compiled sampling, which takes seconds to load and saves a part of every pair.
    """

    def __init__(self, settings: CohortSettings, out: Path, workers: int, threads: int, *, compiled: bool) -> None:
        self._first = {"settings": settings.as_dict(), "out": os.path.abspath(out), "threads": threads}
        self._environment = _environment(threads, compiled)
        self._size = workers
        self._inbox: queue.Queue[Any] = queue.Queue()

    def run(self, pairs: Iterable[tuple[int, CohortPair]]) -> Iterator[Answer]:
        """Yield the answer of every pair as it comes.

        Where a process dies, the pairs that it had are run once more, each alone in a process; the one that takes that
        down as well has failed. Closing the iterator ends the processes.

        Raises:
            RegistrationError: no worker can be started.
        """
        waiting = iter(pairs)
        known: dict[int, CohortPair] = {}  # at work or to be run again
        suspects: deque[int] = deque()  # were in a process that died
        alone: dict[int, _Worker] = {}
        workers: list[_Worker] = []
        exhausted = False

        def feed(worker: _Worker) -> None:
            nonlocal exhausted
            if suspects and not worker.pairs:
                number = suspects.popleft()
                alone[number] = worker
                worker.pairs.append(number)
                worker.give({"number": number, "pair": dataclasses.asdict(known[number])})
                return
            while len(worker.pairs) < _AHEAD and not suspects and worker not in alone.values():
                following = None if exhausted else next(waiting, None)
                if following is None:
                    exhausted = True
                    return
                number, pair = following
                known[number] = pair
                worker.pairs.append(number)
                worker.give({"number": number, "pair": dataclasses.asdict(pair)})

        try:
            workers += [_Worker(self._first, self._environment, self._inbox) for _ in range(self._size)]
            never_ready = 0
            for worker in workers:
                feed(worker)
            while known:
                try:
                    worker, message = self._inbox.get(timeout=_WAIT_S)
                except queue.Empty:
                    continue
                if message is None:  # it died
                    if worker not in workers:
                        continue
                    workers.remove(worker)
                    never_ready = 0 if worker.ready else never_ready + 1
                    if never_ready > self._size:
                        raise RegistrationError(
                            f"a worker process must start, got exit code {worker.process.returncode} each time"
                        )
                    for number in worker.pairs:
                        if alone.pop(number, None) is not None and worker.ready:
                            del known[number]
                            yield Answer(number, {"error": _died(worker.process.returncode)})
                        else:
                            suspects.append(number)
                    if known or not exhausted:
                        workers.append(_Worker(self._first, self._environment, self._inbox))
                elif "refused" in message:
                    raise RegistrationError(f"a worker process must start, got {message['refused']}")
                elif "ready" in message:
                    worker.ready, never_ready = True, 0
                else:
                    number = message["number"]
                    worker.pairs.remove(number)
                    alone.pop(number, None)
                    del known[number]
                    yield Answer(number, message["row"], message.get("peak_bytes", 0))
                for one in workers:
                    feed(one)
            for worker in workers:
                worker.give(None)
            for worker in workers:
                worker.process.wait()
        finally:
            for worker in workers:
                worker.kill()


def _died(code: int) -> str:
    how = f"signal {-code}" if code < 0 else f"exit code {code}"
    return f"the pair must leave its process alive, got {how} in two processes (too little memory?)"


def _environment(threads: int, compiled: bool) -> dict[str, str]:
    """Return the variables of a worker; they count when torch and numba are imported."""
    environment = dict(os.environ)
    environment |= dict.fromkeys(_LIBRARY_THREADS, str(threads))
    chosen = NUMBA_DEFAULT not in environment and "LDR_NUMBA" in environment  # by the user
    if not chosen:
        environment["LDR_NUMBA"] = "1" if compiled else "0"
    environment["PYTHONPATH"] = os.pathsep.join(path for path in sys.path if path)
    return environment
