"""Runs tasks in worker processes: a system that crashes its process costs one row, no more."""

from __future__ import annotations

import multiprocessing
import os
import signal
import sys
import traceback
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from multiprocessing.connection import Connection, wait
from typing import Any

from LDRCore.errors import RegistrationError
from Training.evaluation.config import DataSet, System
from Training.evaluation.datasets import Loaded, Pair
from Training.evaluation.systems import Place

_MESSAGE_LENGTH = 300


@dataclass(frozen=True)
class Task:
    """One row to compute: a system on a pair, scored by `measures` (none: only timed)."""

    data: DataSet
    pair: Pair
    system: System
    place: Place
    measures: tuple[str, ...]


def _limit_threads(threads: int) -> None:
    """Set the number of threads, before anything heavy is imported in this process."""
    for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "ITK_GLOBAL_DEFAULT_NUMBER_OF_THREADS"):
        os.environ[name] = str(threads)


def perform(task: Task, cache: dict[Any, Loaded]) -> dict[str, Any]:
    """Compute one row; an error goes into its `message`."""
    from LDRCore.evaluation import scoring
    from Training.evaluation import datasets, memory, systems

    try:
        key = (task.data, task.pair)
        if key not in cache:
            cache.clear()
            cache[key] = datasets.load(task.data, task.pair)
        outcome = systems.run(task.system, cache[key], task.place)
        row: dict[str, Any] = {
            "status": "done",
            "seconds": round(outcome.seconds, 4),
            "seconds_io": round(outcome.seconds_io, 4),
            "peak_mb": outcome.peak_mb and round(outcome.peak_mb, 1),
            "process_mb": round(memory.peak_mb() or 0.0, 1),
            "initial": outcome.initial,
            "versions": outcome.versions,
        }
        if task.measures:
            truth = cache[key].truth
            row |= scoring.score(outcome.transform, truth, measures=task.measures, protocol=task.data.protocol)
    except Exception as error:  # whatever a system does wrong belongs into its row
        return {"status": "failed", "message": _one_line(error)}
    return row


def _one_line(error: Exception) -> str:
    if not isinstance(error, RegistrationError):
        traceback.print_exc(file=sys.stderr)
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    text = lines[-1] if lines else type(error).__name__
    return (text if isinstance(error, RegistrationError) else f"{type(error).__name__}: {text}")[:_MESSAGE_LENGTH]


def _work(connection: Connection, threads: int) -> None:
    """Take tasks and return rows until the process is ended."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent decides what an interruption means
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that a program started by a system is ended as well
    _limit_threads(threads)
    import SimpleITK as sitk
    import torch

    torch.set_num_threads(threads)
    sitk.ProcessObject.SetGlobalDefaultNumberOfThreads(threads)
    cache: dict[Any, Loaded] = {}
    try:
        while True:
            connection.send(perform(connection.recv(), cache))
    except (EOFError, OSError):  # the parent is gone
        return


class _Worker:
    def __init__(self, threads: int) -> None:
        context = multiprocessing.get_context("spawn")
        self.connection, other = context.Pipe()
        self.process = context.Process(target=_work, args=(other, threads), daemon=True)
        self.process.start()
        other.close()
        self.number = -1

    def give(self, number: int, task: Task) -> None:
        self.number = number
        self.connection.send(task)

    def stop(self) -> None:
        self.process.terminate()
        self.process.join()
        self.connection.close()


def run_all(tasks: Sequence[Task], workers: int, threads: int) -> Iterator[tuple[int, dict[str, Any]]]:
    """Yield (task number, row) of all tasks as they finish.

    A worker process that dies leaves a failed row and is replaced. Stopping the iteration ends the workers.
    """
    pool = [_Worker(threads) for _ in range(min(workers, len(tasks)))]
    try:
        waiting = list(range(len(tasks)))[::-1]
        busy: list[_Worker] = []
        for worker in pool:
            number = waiting.pop()
            worker.give(number, tasks[number])
            busy.append(worker)
        while busy:
            ready = wait([w.connection for w in busy])
            for worker in [w for w in busy if w.connection in ready]:
                number = worker.number
                try:
                    row = worker.connection.recv()
                except (EOFError, ConnectionResetError):
                    worker.process.join()
                    row = {"status": "failed", "message": f"its process ended with code {worker.process.exitcode}"}
                    busy.remove(worker)
                    pool.remove(worker)
                    worker = _Worker(threads)
                    pool.append(worker)
                    busy.append(worker)
                if waiting:
                    following = waiting.pop()
                    worker.give(following, tasks[following])
                else:
                    busy.remove(worker)
                yield number, row
    finally:
        for worker in pool:
            worker.stop()
