"""The panel's sections that work on files: Transform files (save, load) and Batch (a list of pairs)."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import ctk
import qt
import slicer
from slicer.i18n import tr as _

from . import report_text, session_log
from .jobs import Job
from .parameters import LightweightRegistrationParameterNode
from .transform_files import AUTO, FORMATS, suffixes_of
from .transform_nodes import read_linear


def file_name(text: str) -> str:
    """Return a name without the characters that files must not have on some system; DICOM's names of series do."""
    return re.sub(r'[<>:"/\\|?*\x00-\x1f]', "_", text)


class PanelFiles:
    """Behaviour of the widgets under Transform files and Batch.

    Attributes:
        page: the page of the last batch's results, None before one.
    """

    def __init__(
        self,
        ui: Any,
        logic: Any,
        showStatus: Callable[[str], None],
        startJob: Callable[[Callable[[], Job], Callable[[Any], None]], None],
        registrationOptions: Callable[[], dict[str, Any]],
    ):
        """Fill the widgets; the panel connects them.

        Args:
            ui: the widgets of LightweightRegistration.ui by name.
            logic: the module's logic.
            showStatus: shows one sentence in the panel.
            startJob: starts a job and polls it; the second argument takes its outputs.
            registrationOptions: returns the options that are chosen in the panel.
        """
        self.ui, self.logic, self.showStatus, self._startJob = ui, logic, showStatus, startJob
        self._registrationOptions = registrationOptions
        self._folder = ""  # of the last file
        self.page: Path | None = None
        self._parameterNode: LightweightRegistrationParameterNode | None = None
        ui.formatComboBox.addItem(_("Automatic (by the file)"), AUTO)
        for name, (title, *_suffixes) in FORMATS.items():
            ui.formatComboBox.addItem(title, name)
        ui.batchListEdit.filters = ctk.ctkPathLineEdit.Files
        ui.batchListEdit.nameFilters = ["CSV (*.csv)"]
        for edit in (ui.batchFixedEdit, ui.batchMovingEdit, ui.batchOutputEdit):
            edit.filters = ctk.ctkPathLineEdit.Dirs

    def setParameterNode(self, parameterNode: LightweightRegistrationParameterNode | None) -> None:
        """Follow another parameter node, or none while the scene is being closed."""
        self._parameterNode = parameterNode

    def updateFromParameterNode(self, *, running: bool) -> None:
        """Enable the buttons that can act.

        Args:
            running: a job is under way.
        """
        ui, p = self.ui, self._parameterNode
        ui.saveTransformButton.enabled = not running and p.transform is not None
        ui.saveTransformButton.toolTip = (
            _("Write the transform for another program")
            if p.transform is not None
            else _("Register first, or choose a transform in Outputs")
        )
        chosen = p.fixedVolume is not None and p.movingVolume is not None
        ui.loadTransformButton.enabled = not running and chosen
        ui.loadTransformButton.toolTip = (
            _("Begin at a transform that another program computed for these two volumes")
            if chosen
            else _("Choose both volumes in Inputs")
        )
        ui.batchButton.enabled = not running
        ui.pageButton.enabled = self.page is not None

    def _format(self) -> str:
        return str(self.ui.formatComboBox.itemData(self.ui.formatComboBox.currentIndex))

    # transform files

    def onSaveTransformButton(self, *_clicked: Any) -> None:
        """Ask for a file, and write the transform to it."""
        node, name = self._parameterNode.transform, self._format()
        suffixes = suffixes_of(name, linear=read_linear(node) is not None)
        title = self.ui.formatComboBox.currentText
        proposed = str(Path(self._folder) / f"{file_name(node.GetName())}{suffixes[0]}")
        pattern = f"{title} ({' '.join(f'*{suffix}' for suffix in suffixes)})"
        chosen = qt.QFileDialog.getSaveFileName(None, _("Save transform as"), proposed, pattern)
        if not chosen:
            return
        path = Path(chosen)
        if not path.name.lower().endswith(suffixes) and not path.suffix:  # the dialog adds none
            path = path.with_name(path.name + suffixes[0])
            question = _("“{name}” exists. Replace it?").format(name=path.name)
            if path.exists() and not slicer.util.confirmYesNoDisplay(question):
                return
        self._folder = str(path.parent)
        session_log.write(f"Save transform as {name}")
        self._startJob(
            lambda: self.logic.startSavingTransform(node, path, name),
            lambda written: self.showStatus(_("Wrote {path}.").format(path=written)),
        )

    def onLoadTransformButton(self, *_clicked: Any) -> None:
        """Ask for a file, and choose its transform as the initial one."""
        p, name = self._parameterNode, self._format()
        chosen = qt.QFileDialog.getOpenFileName(None, _("Initial transform"), self._folder)
        if not chosen:
            return
        self._folder = str(Path(chosen).parent)
        session_log.write(f"Load transform as {name}")

        def onFinished(node: slicer.vtkMRMLTransformNode) -> None:
            p.initialTransform = node
            self.showStatus(_("“{name}” is the initial transform now.").format(name=node.GetName()))

        self._startJob(
            lambda: self.logic.startLoadingTransform(chosen, p.fixedVolume, p.movingVolume, name), onFinished
        )

    # batch

    def onBatchButton(self, *_clicked: Any) -> None:
        """Register every pair of the list, or of the two folders."""
        ui = self.ui
        folders = (ui.batchFixedEdit.currentPath, ui.batchMovingEdit.currentPath)
        table, folder = ui.batchListEdit.currentPath, ui.batchOutputEdit.currentPath
        pairs = table or (folders if all(folders) else None)
        if table and any(folders):
            self.showStatus(_("Choose a list or two folders, not both."))
        elif not pairs:
            self.showStatus(_("Choose a list of pairs, or a folder of fixed and one of moving images."))
        elif not folder:
            self.showStatus(_("Choose a folder for the results."))
        else:
            options = self._registrationOptions()
            del options["initialTransform"], options["keepFiles"]
            session_log.write(f"Batch: {options}")
            self._startJob(lambda: self.logic.startBatch(pairs, folder, **options), self._onBatchFinished)

    def _onBatchFinished(self, summary: dict[str, Any]) -> None:
        session_log.write(f"batch: {summary['done']} done, {summary['failed']} failed, {summary['seconds']} s")
        self.page = Path(summary["page"])
        text = _("{done} registered. The page to judge them is {path}.")
        if summary["failed"]:
            text = _("{done} registered, {failed} failed: {problem}. The page to judge them is {path}.")
        problem = summary["problems"][0] if summary["problems"] else ""
        pairs = report_text.counted(summary["done"], _("pair"), _("pairs"))
        self.showStatus(text.format(done=pairs, failed=summary["failed"], problem=problem, path=self.page))
        self.ui.pageButton.enabled = True

    def onPageButton(self, *_clicked: Any) -> None:
        """Open the page of the last batch with the browser."""
        qt.QDesktopServices.openUrl(qt.QUrl.fromLocalFile(str(self.page)))
