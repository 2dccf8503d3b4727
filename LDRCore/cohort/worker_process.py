"""A worker process of a cohort: takes pairs as lines of JSON, returns a line for each.

Three threads: one reads the files of the next pair while this one is computed, one writes the outputs of the last.
Started by `pool`. It ends at once where its parent is gone.
"""

from __future__ import annotations

import json
import os
import queue
import signal
import sys
import threading
from pathlib import Path
from typing import Any

from LDRCore.cohort.pairs import CohortPair
from LDRCore.cohort.settings import CohortSettings

_RELEASE = 8  # pairs after which freed memory goes back to the system


def main() -> None:
    """Work until there is nothing more to do."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent decides what an interruption means
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)  # what libraries print is no answer
    first = json.loads(sys.stdin.readline())
    settings, out = CohortSettings.from_dict(first["settings"]), Path(first["out"])
    answer = _Answers(answers)
    try:
        _prepare_process(int(first["threads"]))
        from LDRCore.cohort import perform
        from LDRCore.cpu import memory
        from LDRCore.pipeline.model import load_model
        from LDRCore.pipeline.options import resolve_device

        load_model(settings.options["model"], resolve_device(settings.options["device"]))
    except Exception as error:
        answer({"refused": f"{type(error).__name__}: {error}"})
        return
    answer({"ready": os.getpid()})

    to_compute: queue.Queue[Any] = queue.Queue(1)
    to_write: queue.Queue[Any] = queue.Queue(1)
    fixed_images = perform.FixedImages()

    def read() -> None:
        for line in sys.stdin:
            task = json.loads(line)
            if task is None:
                to_compute.put(None)
                return
            try:
                loaded = perform.load_pair(CohortPair(**task["pair"]), settings, fixed_images)
                to_compute.put((task["number"], loaded))
            except Exception as error:
                answer({"number": task["number"], "row": {"error": perform.sentence_of(error)}})
        os._exit(1)  # the parent is gone, without saying that all is done

    def write() -> None:
        while (item := to_write.get()) is not None:
            number, registered = item
            try:
                row = perform.write_pair(registered, settings, out)
            except Exception as error:
                row = {"error": perform.sentence_of(error), "unwritten": True}
            answer({"number": number, "row": row, "peak_bytes": memory.peak_bytes() or 0})
            del item, registered

    threads = [threading.Thread(target=target, daemon=True) for target in (read, write)]
    for thread in threads:
        thread.start()
    count = 0
    while (item := to_compute.get()) is not None:
        count += 1
        if count % _RELEASE == 0:
            memory.release_freed_blocks()
        number, loaded = item
        try:
            to_write.put((number, perform.register_pair(loaded, settings)))
        except Exception as error:
            answer({"number": number, "row": {"error": perform.sentence_of(error)}})
        del item, loaded
    to_write.put(None)
    for thread in threads:  # one that still frees its last pair when Python ends takes the process down
        thread.join()


class _Answers:
    """Sends lines to the parent, from several threads."""

    def __init__(self, stream: Any) -> None:
        self._stream, self._lock = stream, threading.Lock()

    def __call__(self, message: dict[str, Any]) -> None:
        with self._lock:
            try:
                self._stream.write(json.dumps(message) + "\n")
                self._stream.flush()
            except OSError:
                os._exit(1)  # the parent is gone


def _prepare_process(threads: int) -> None:
    """Set threads and memory before the first image."""
    import SimpleITK as sitk
    import torch

    from LDRCore.cpu import memory

    memory.keep_freed_blocks()
    torch.set_num_threads(threads)
    sitk.ProcessObject.SetGlobalDefaultNumberOfThreads(threads)


if __name__ == "__main__":
    main()
