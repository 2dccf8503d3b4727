"""Starts, feeds, polls and ends the process of worker.py. Knows neither Slicer nor torch.

Polling needs no thread: in Slicer the main thread holds Python's lock while its event loop waits, so a Python thread
would hardly run. One process serves one run after another, so only the first pays for importing torch.
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
from pathlib import Path
from typing import Any

import numpy as np

WORKER = Path(__file__).with_name("worker.py")
LOG_LINES = 12


def python_command() -> list[str]:
    """Slicer's Python interpreter, or the one that runs this where there is no Slicer."""
    return [shutil.which("PythonSlicer") or sys.executable]


class Run:
    """One request under way.

    Attributes:
        folder: where its arrays and events lie, until `finish`.
    """

    def __init__(self, worker: Worker, folder: Path):
        self._worker = worker
        self.folder = folder
        self._read = 0
        self._ended = False

    def poll(self) -> list[dict[str, Any]]:
        """Events since the last call. After "done" or "error" there are no more.

        A process that ended without either is reported as {"event": "error", "kind": "died", "code": ..., "log": ...}.
        """
        if self._ended:
            return []
        code = self._worker.exit_code()  # asked first, so that nothing it wrote before it ended is missed
        path = self.folder / "events.jsonl"
        fresh = b""
        if path.exists():
            with path.open("rb") as stream:
                stream.seek(self._read)
                fresh = stream.read()
        whole = fresh[: fresh.rfind(b"\n") + 1]
        self._read += len(whole)
        events = [json.loads(line) for line in whole.decode("utf-8").splitlines()]
        if code is not None and not any(e["event"] in ("done", "error") for e in events):
            events.append({"event": "error", "kind": "died", "code": code, "log": self._worker.log()})
        self._ended = any(e["event"] in ("done", "error") for e in events)
        return events

    def load(self, name: str) -> np.ndarray:
        """An array that the process left."""
        return np.load(self.folder / name)

    def cancel(self) -> None:
        """End the process at once; the next run starts a new one."""
        self._ended = True
        self._worker.close()

    def finish(self) -> None:
        """Remove the arrays."""
        self._ended = True
        shutil.rmtree(self.folder, ignore_errors=True)


class Worker:
    """The process. Starting a run starts it if it is not there."""

    def __init__(self, core_folder: Path, temporary: str | None = None, command: list[str] | None = None):
        """Nothing is started yet.

        Args:
            core_folder: the folder that holds LDRCore.
            temporary: where the arrays may be kept meanwhile; the system's place by default.
            command: the interpreter, with options; `python_command()` by default.
        """
        self._core, self._temporary, self._command = core_folder, temporary, command
        self._process: subprocess.Popen[bytes] | None = None
        self._session: Path | None = None
        self._count = 0
        self._warm: dict[str, Any] | None = None

    def start(self, request: dict[str, Any], arrays: dict[str, np.ndarray]) -> Run:
        """Write the arrays (name.npy by name) and send the request.

        Raises:
            OSError: no room for the arrays, or the interpreter cannot be started.
        """
        if self.exit_code() is not None:
            self._launch()
        assert self._session is not None
        self._count += 1
        folder = self._session / f"run{self._count}"
        folder.mkdir()
        try:
            for name, values in arrays.items():
                np.save(folder / name, values)
            self._send({**request, "folder": str(folder)})
        except BaseException:
            shutil.rmtree(folder, ignore_errors=True)
            raise
        return Run(self, folder)

    def warm_up(self, how: dict[str, Any]) -> None:
        """Let the process import torch and load a model; returns at once. A run that comes meanwhile waits its turn.

        Args:
            how: model, device and threads, as in a request; where the process is ready for these nothing happens.

        Raises:
            OSError: the interpreter cannot be started.
        """
        if self.exit_code() is not None:
            self._launch()
        elif how == self._warm:
            return
        self._send({**how, "do": "warm up"})
        self._warm = how

    def _send(self, request: dict[str, Any]) -> None:
        assert self._process is not None
        assert self._process.stdin is not None
        self._process.stdin.write((json.dumps(request) + "\n").encode())
        self._process.stdin.flush()

    def exit_code(self) -> int | None:
        """None while the process runs; its exit code, or 0 if it was never started."""
        return 0 if self._process is None else self._process.poll()

    def log(self) -> str:
        """The last lines that the process printed."""
        path = self._session / "log.txt" if self._session else None
        if path is None or not path.exists():
            return ""
        return "\n".join(path.read_text(encoding="utf-8", errors="replace").splitlines()[-LOG_LINES:])

    def close(self) -> None:
        """End the process and remove everything it kept."""
        process, self._process = self._process, None
        if process is not None:
            if self._session is not None:  # reaches the interpreter behind a launcher, too
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
        self._warm = None
        self._session = Path(tempfile.mkdtemp(prefix="LightweightRegistration-", dir=self._temporary))
        (self._session / "wanted").touch()
        own = {"creationflags": subprocess.CREATE_NO_WINDOW} if os.name == "nt" else {"start_new_session": True}
        with (self._session / "log.txt").open("wb") as log:
            self._process = subprocess.Popen(
                [*(self._command or python_command()), str(WORKER), str(self._session), str(self._core)],
                stdin=subprocess.PIPE,
                stdout=log,
                stderr=subprocess.STDOUT,
                **own,
            )


def _kill(process: subprocess.Popen[bytes]) -> None:
    """End a process and, where groups are known, what it started."""
    if os.name == "nt":
        process.kill()
        return
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)


_shared: list[Worker] = []


def shared_worker(core_folder: Path, temporary: str | None) -> Worker:
    """The one process of this application, made when first asked for and closed at exit."""
    if not _shared:
        _shared.append(Worker(core_folder, temporary))
        atexit.register(close_shared)
    return _shared[0]


def close_shared() -> None:
    """End the shared process if there is one; the next run starts it anew."""
    for worker in _shared:
        worker.close()
