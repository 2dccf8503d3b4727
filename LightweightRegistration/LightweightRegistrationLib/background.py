"""Starts, feeds, polls and ends the process of worker.py. Needs neither Slicer nor torch.

Events are polled, without a thread: in Slicer the main thread holds Python's lock while its event loop waits, so a
Python thread would hardly run. One process serves all runs, so only the first one waits for the import of torch.
"""

from __future__ import annotations

import atexit
import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

WORKER = Path(__file__).with_name("worker.py")
LOG_LINES = 12
PREFIX = "LightweightRegistration-"  # of session folders
KEPT_PREFIX = "LightweightRegistrationFiles-"  # of the folders of runs whose files are kept
STALE_S = 3600.0
CHUNK_BYTES = 16_000_000  # written or read at once: some milliseconds
TURN_S = 0.02  # of the main thread's time in one turn of the event loop
KILLED = (-9, 137)  # exit codes after SIGKILL: seen directly, and through a shell
NO_MEMORY = (0xC0000017, 0xC000012D)  # Windows: STATUS_NO_MEMORY, STATUS_COMMITMENT_LIMIT


def python_command() -> list[str]:
    """Return the command of Slicer's Python interpreter, or of the current one outside Slicer."""
    return [shutil.which("PythonSlicer") or sys.executable]


def take_turn(steps: Iterator[Any]) -> bool:
    """Do some of the steps, for one turn of the event loop; return whether they are all done."""
    end = time.monotonic() + TURN_S
    while next(steps, "done") != "done":
        if time.monotonic() >= end:
            return False
    return True


def write_array(path: Path, values: np.ndarray) -> Iterator[None]:
    """Write an .npy file, a chunk for each step."""
    header = {"descr": np.lib.format.dtype_to_descr(values.dtype), "fortran_order": False, "shape": values.shape}
    with path.open("wb") as stream:
        np.lib.format.write_array_header_1_0(stream, header)
        for rows in chunks(values):
            stream.write(np.ascontiguousarray(rows).data)
            yield


def read_array(path: Path, allocate: Callable[[tuple[int, ...], np.dtype], np.ndarray]) -> Iterator[np.ndarray]:
    """Read an .npy file into an array, a chunk for each step; yields the rows that were read.

    Args:
        path: written by `write_array` or by numpy, not in Fortran order.
        allocate: takes the shape and the type, and returns the contiguous array to fill.
    """
    with path.open("rb") as stream:
        np.lib.format.read_magic(stream)
        shape, _fortran, dtype = np.lib.format.read_array_header_1_0(stream)
        for rows in chunks(allocate(shape, dtype)):
            stream.readinto(rows.reshape(-1).view(np.uint8).data)
            yield rows


def chunks(values: np.ndarray) -> Iterator[np.ndarray]:
    """Views of an array, some of its first axis each."""
    step = max(1, CHUNK_BYTES * len(values) // max(1, values.nbytes))
    for first in range(0, len(values), step):
        yield values[first : first + step]


def suggests_lack_of_memory(code: int) -> bool:
    """Return whether a process that said nothing may have been ended by the system because memory ran out."""
    return code in KILLED or code & 0xFFFFFFFF in NO_MEMORY


class Run:
    """One request that the process works on.

    Attributes:
        folder: holds its arrays and events, until `finish`.
    """

    def __init__(self, worker: Worker, folder: Path, sending: Iterator[None]):
        self._worker, self._process = worker, worker.process
        self._sending: Iterator[None] | None = sending
        self.folder = folder
        self._bytes_read = 0
        self._ended = False

    def poll(self) -> list[dict[str, Any]]:
        """Send more of the request, or return the events since the last call.

        After "done" or "error" there are no more.

        A process that ended without either is reported as {"event": "error", "kind": "died", "code": ..., "log": ...},
        one that was ended here, because another run was cancelled, as {"event": "error", "kind": "cancelled"}.
        """
        if self._ended:
            return []
        if self._worker.process is not self._process:
            self._ended = True
            return [{"event": "error", "kind": "cancelled"}]
        if self._sending is not None:
            if take_turn(self._sending):
                self._sending = None
            return []
        code = self._worker.exit_code()  # before reading, so that no event written before the end is missed
        path = self.folder / "events.jsonl"
        new = b""
        if path.exists():
            with path.open("rb") as stream:
                stream.seek(self._bytes_read)
                new = stream.read()
        complete = new[: new.rfind(b"\n") + 1]
        self._bytes_read += len(complete)
        events = [json.loads(line) for line in complete.decode("utf-8").splitlines()]
        if code is not None and not any(e["event"] in ("done", "error") for e in events):
            events.append({"event": "error", "kind": "died", "code": code, "log": self._worker.log()})
        self._ended = any(e["event"] in ("done", "error") for e in events)
        return events

    def load(self, name: str) -> np.ndarray:
        """Load an array that the process wrote."""
        return np.load(self.folder / name)

    def read(self, name: str, allocate: Callable[[tuple[int, ...], np.dtype], np.ndarray]) -> Iterator[np.ndarray]:
        """Read an array that the process wrote, in chunks; see `read_array`."""
        return read_array(self.folder / name, allocate)

    def cancel(self) -> None:
        """End the process if it still works on this run; the next run starts a new one."""
        ended, self._ended = self._ended, True
        if not ended:
            self._worker.close()

    def finish(self, keep: bool = False) -> Path | None:
        """Remove the run's files.

        Args:
            keep: move them out of the session's folder instead, with the process's log.

        Returns:
            The folder of the files that were kept; None without any.
        """
        self._ended, self._sending = True, None
        kept = self._keep() if keep and self.folder.exists() else None
        shutil.rmtree(self.folder, ignore_errors=True)
        return kept

    def _keep(self) -> Path | None:
        session = self.folder.parent
        with contextlib.suppress(OSError):  # a full disk must not spoil the result
            kept = Path(tempfile.mkdtemp(prefix=time.strftime(f"{KEPT_PREFIX}%Y%m%d-%H%M%S-"), dir=session.parent))
            for file in self.folder.iterdir():
                shutil.move(file, kept)
            shutil.copy(session / "log.txt", kept)
            return kept
        return None


class Worker:
    """The worker process. It is started with the first run or by `warm_up`."""

    def __init__(self, library_folder: Path, temporary: str | None = None, command: list[str] | None = None):
        """Store the arguments; the process is started later.

        Args:
            library_folder: the folder that holds LDRCore.
            temporary: the folder for arrays and events; the system's temporary folder by default.
            command: the interpreter, with options; `python_command()` by default.
        """
        self._library_folder, self._temporary, self._command = library_folder, temporary, command
        self.process: subprocess.Popen[bytes] | None = None
        self._session: Path | None = None
        self._count = 0
        self._warm_options: dict[str, Any] | None = None

    def start(self, request: dict[str, Any], arrays: dict[str, np.ndarray]) -> Run:
        """Begin to write the arrays (name.npy by name) and to send the request; `Run.poll` goes on with it.

        Raises:
            OSError: the interpreter cannot be started. `Run.poll` raises it where an array cannot be written.
        """
        if self.exit_code() is not None or self._session is None or not self._session.exists():
            self._launch()
        assert self._session is not None
        self._count += 1
        folder = self._session / f"run{self._count}"
        folder.mkdir()
        return Run(self, folder, self._sending(folder, request, arrays))

    def _sending(self, folder: Path, request: dict[str, Any], arrays: dict[str, np.ndarray]) -> Iterator[None]:
        for name, values in arrays.items():
            yield from write_array(folder / name, values)
        request = {**request, "folder": str(folder)}
        (folder / "request.json").write_text(json.dumps(request), encoding="utf-8")
        self._send(request)

    def warm_up(self, options: dict[str, Any]) -> None:
        """Let the process import torch and load a model; returns at once. A run that is started meanwhile is queued.

        Args:
            options: model, device and threads, as in a request; nothing happens if the process is ready for these.

        Raises:
            OSError: the interpreter cannot be started.
        """
        if self.exit_code() is not None:
            self._launch()
        elif options == self._warm_options:
            return
        self._send({**options, "do": "warm up"})
        self._warm_options = options

    def _send(self, request: dict[str, Any]) -> None:
        assert self.process is not None
        assert self.process.stdin is not None
        self.process.stdin.write((json.dumps(request) + "\n").encode())
        self.process.stdin.flush()

    def exit_code(self) -> int | None:
        """Return None while the process runs, its exit code after that, and 0 before it is started."""
        return 0 if self.process is None else self.process.poll()

    def log(self) -> str:
        """Return the last lines that the process printed."""
        path = self._session / "log.txt" if self._session else None
        if path is None or not path.exists():
            return ""
        return "\n".join(path.read_text(encoding="utf-8", errors="replace").splitlines()[-LOG_LINES:])

    def close(self) -> None:
        """End the process and remove its files."""
        process, self.process = self.process, None
        if process is not None:
            if self._session is not None:  # ends the interpreter behind a launcher, too
                (self._session / "wanted").unlink(missing_ok=True)
            _kill(process)
            process.wait()
            if process.stdin is not None:
                process.stdin.close()
        session, self._session = self._session, None
        if session is not None:
            shutil.rmtree(session, ignore_errors=True)

    def _launch(self) -> None:
        self.close()
        self._warm_options = None
        temporary = Path(self._temporary or tempfile.gettempdir())
        remove_stale_sessions(temporary)
        self._session = Path(tempfile.mkdtemp(prefix=PREFIX, dir=temporary))
        (self._session / "wanted").touch()
        options = {"creationflags": subprocess.CREATE_NO_WINDOW} if os.name == "nt" else {"start_new_session": True}
        with (self._session / "log.txt").open("wb") as log:
            self.process = subprocess.Popen(
                [*(self._command or python_command()), str(WORKER), str(self._session), str(self._library_folder)],
                stdin=subprocess.PIPE,
                stdout=log,
                stderr=subprocess.STDOUT,
                **options,
            )


def remove_stale_sessions(temporary: Path) -> None:
    """Remove the folders of processes that ended without removing theirs; a living one touches a file in its own."""
    for session in temporary.glob(f"{PREFIX}*"):
        with contextlib.suppress(OSError):
            wanted = session / "wanted"
            if time.time() - (wanted if wanted.exists() else session).stat().st_mtime > STALE_S:
                shutil.rmtree(session, ignore_errors=True)


def _kill(process: subprocess.Popen[bytes]) -> None:
    """Kill a process and its children: Slicer's Python is the child of a launcher."""
    if os.name == "nt":
        command = ["taskkill", "/F", "/T", "/PID", str(process.pid)]
        with contextlib.suppress(OSError):  # without that program the worker's own watch ends it
            subprocess.run(command, capture_output=True, creationflags=subprocess.CREATE_NO_WINDOW, check=False)
        process.kill()
        return
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)


_shared: list[Worker] = []


def shared_worker(library_folder: Path, temporary: str | None) -> Worker:
    """Return the one worker of this application; it is closed at exit."""
    if not _shared:
        _shared.append(Worker(library_folder, temporary))
        atexit.register(close_shared)
    return _shared[0]


def close_shared() -> None:
    """End the shared process if it runs; the next run starts a new one."""
    for worker in _shared:
        worker.close()
