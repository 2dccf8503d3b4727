"""Runs the panel's jobs: starts and polls one, shows its progress, and shows every error that anything ends with."""

from __future__ import annotations

import contextlib
import logging
import time
import traceback
from collections.abc import Callable
from typing import Any

import qt
import slicer
from slicer.i18n import tr as _

from . import report_text, session_log
from .jobs import Job
from .module_errors import CancelledError, InputError, MemoryNeededError

POLL_MS = 40


class JobRunner:
    """What `panel.Panel` does with jobs.

    Attributes:
        ui: the widgets of LightweightRegistration.ui by name.
        job: what is under way, or None.
        failed: whether the last action ended with an error.
    """

    def __init__(self, ui: Any):
        """Store the widgets."""
        self.ui = ui
        self.job: Job | None = None
        self.failed = False
        self._start: Callable[[], Job] | None = None
        self._onFinished: Callable[[Any], None] = lambda made: None
        self._startTime_s = 0.0
        self._pollTimer = qt.QTimer()
        self._pollTimer.setInterval(POLL_MS)
        self._pollTimer.timeout.connect(self._shown(self.onPollTimer))

    # overridden by the panel

    def updateGUIFromParameterNode(self) -> None:
        """Bring the panel in line with the parameters, the scene and the job."""

    def onProcessEnded(self) -> None:
        """The worker process was ended."""

    def setCascades(self, cascades: int) -> None:
        """Choose another number of cascades."""

    # jobs

    def _startJob(self, start: Callable[[], Job], onFinished: Callable[[Any], None]) -> None:
        """Start a job and poll it.

        Args:
            start: reads the choices of the panel; called again where memory was too small and fewer are offered.
            onFinished: takes the outputs.
        """
        self._start, self._onFinished, self.failed = start, onFinished, False
        self.ui.flickerButton.checked = False
        self.showStatus(_("Starting"))
        job = start()
        self.job, self._startTime_s = job, time.monotonic()
        self.ui.progressBar.value = 0
        self.updateGUIFromParameterNode()
        self._pollTimer.start()
        self.onPollTimer()

    def _shown(self, action: Callable[..., None]) -> Callable[..., None]:
        """Return an action that shows every error that it ends with: Qt's event loop would hide it."""

        def act(*arguments: Any) -> None:
            try:
                action(*arguments)
            except Exception as error:
                with contextlib.suppress(Exception):  # the first error is the one to show
                    self.cancel()
                self.showError(error)

        return act

    def onPollTimer(self) -> None:
        """Show the job's progress, and its outputs when it is finished."""
        job = self.job
        if job is None:
            return
        finished = job.poll()
        self.ui.progressBar.value = round(100 * job.fraction)
        self.showStatus(report_text.sentence(job.message).removesuffix(".") if job.message else "")
        if finished:
            self._endJob()
            if job.outputs is not None:
                self._onFinished(job.outputs)
            if job.kept:
                text = _("{status} Files are in {folders}.")
                self.showStatus(text.format(status=self.ui.statusLabel.text, folders=", ".join(map(str, job.kept))))

    def cancel(self) -> None:
        """Stop what is under way, if anything is; the scene is as before."""
        job = self.job
        self._pollTimer.stop()
        self.job = None
        if job is not None and not job.finished:
            job.cancel()
            self.onProcessEnded()
        self.updateGUIFromParameterNode()

    def _endJob(self) -> None:
        """Stop polling and let the buttons act again."""
        self._pollTimer.stop()
        self.job = None
        self.updateGUIFromParameterNode()

    def showError(self, error: Exception) -> None:
        """Say what is wrong; offer fewer cascades where memory was too small."""
        if isinstance(error, CancelledError):
            session_log.write("cancelled")
            self.showStatus(_("Cancelled; nothing was changed."))
            return
        self.failed = True
        self.ui.verdictLabel.visible = False  # it is about an earlier result
        details = "".join(traceback.format_exception(error))
        if isinstance(error, InputError):
            text, details = report_text.sentence(str(error)), error.details
        elif isinstance(error, MemoryError):
            text = _("Slicer needs more memory than it could have: close other programs and try again.")
        else:
            text = _("Something went wrong that should not: {kind}: {message}. Please report it.")
            text = text.format(kind=type(error).__name__, message=error)
        self.showStatus(text)
        logging.error("Lightweight Registration: %s\n%s", text, details)
        session_log.write(f"error: {text}\n{details}")
        fewer = error.fewer_cascades if isinstance(error, MemoryNeededError) else None
        if fewer is None:
            slicer.util.errorDisplay(text, detailedText=details)
            return
        cascades = report_text.counted(fewer, _("cascade"), _("cascades"))
        question = _("Try again with {cascades}?").format(cascades=cascades)
        if slicer.util.confirmYesNoDisplay(f"{text}\n\n{question}"):
            self.setCascades(fewer)
            self._shown(self._startJob)(self._start, self._onFinished)

    def showStatus(self, text: str) -> None:
        """Show one sentence under the Apply button."""
        self.ui.statusLabel.text = text
