"""The job that registers a list of pairs of files into one folder; the scene is not touched."""

from __future__ import annotations

import os
from collections.abc import Generator, Mapping, Sequence
from pathlib import Path
from typing import Any

from .background import Worker
from .jobs import Job, Settings
from .module_errors import InputError

Pairs = (
    str
    | os.PathLike[str]
    | tuple[str | os.PathLike[str], str | os.PathLike[str]]
    | Sequence[Mapping[str, str | os.PathLike[str]]]
)


class BatchJob(Job):
    """Registers many pairs in the worker process; `outputs` is LDRCore's summary, with the path of the `page`.

    What was finished before an error or a cancellation stays; the same job goes on from there.
    """

    resumable = True

    def __init__(self, worker: Worker, settings: Settings):
        """Store the worker process and the options of every registration."""
        super().__init__(worker)
        self._settings = settings

    def start(self, pairs: Pairs, folder: str | os.PathLike[str]) -> None:
        """Send the request.

        Args:
            pairs: path of a CSV with the columns fixed and moving; or (folder of fixed images, folder of moving
                images), whose files of the same name are pairs, or all of the second with the only one of the first;
                or rows {"fixed": path, "moving": path}.
            folder: for results; created if needed.

        Raises:
            InputError: no list or no folder, or options that align nothing. `poll` raises it for what is wrong with the
                list or the folders.
        """
        self._settings.check_that_it_aligns()
        if not pairs or not os.fspath(folder):
            raise InputError("a list of pairs and a folder for results must be chosen, got none")
        options = {key: value for key, value in self._settings.options().items() if value is not None}
        request: dict[str, Any] = {
            "do": "register many",
            "options": {**options, "initial": self._settings.initial},
            "out": str(Path(folder).absolute()),
            "workers": self._settings.threads or None,
        }
        if isinstance(pairs, (str, os.PathLike)):
            request["list"] = str(Path(pairs).absolute())
        elif isinstance(pairs, tuple):
            request["folders"] = [str(Path(one).absolute()) for one in pairs]
        else:
            request["rows"] = [{column: os.fspath(cell) for column, cell in row.items()} for row in pairs]
        self.set_progress(0.0, "starting")
        self.send(request, {})

    def on_done(self, event: dict[str, Any]) -> Generator[None, None, None]:
        """Return the summary."""
        self.outputs = event["summary"]
        yield
