"""The panel: what its buttons and selectors do. Reads and writes the parameter node; the work is done by jobs."""

from __future__ import annotations

import json
import logging
import time
from typing import Any, NamedTuple

import qt
import slicer
from slicer.i18n import tr as _

from . import outputs, report_text, sample, session_log, slice_display, torch_setup
from .job_runner import JobRunner
from .library import library_module
from .machine import memory_bytes, without_torch
from .others_list import OthersList
from .panel_display import PanelDisplay
from .panel_files import PanelFiles
from .parameters import Direction, Kind, LightweightRegistrationParameterNode

PREPARE_SETTING = "LightweightRegistration/PrepareEarly"
PREPARE_FROM_BYTES = 8e9  # of memory: the process takes 0.4 to 0.85 GB
# by output (a name of `outputs.NAMES`): the parameter that says whether it is wanted, and that of its node
WANTED_PARAMETERS = {
    "warped": "wantWarped",
    "transform": "wantTransform",
    "jacobian": "wantJacobian",
    "inverse": "keepInverse",
}
NODE_PARAMETERS = {
    "warped": "warpedVolume",
    "transform": "transform",
    "jacobian": "jacobianMap",
    "inverse": "inverseTransform",
}


class VolumePair(NamedTuple):
    """The volumes that are chosen as inputs."""

    fixed: slicer.vtkMRMLScalarVolumeNode | None
    moving: slicer.vtkMRMLScalarVolumeNode | None


class WarmUpOptions(NamedTuple):
    """What the registration process was last prepared for."""

    pair: VolumePair
    model: str
    device: str
    threads: int


class Panel(JobRunner):
    """Behaviour of the widgets of LightweightRegistration.ui.

    Attributes:
        display: the section Display and the slice views.
        files: the sections Transform files and Batch.
    """

    def __init__(self, ui: Any, logic: Any):
        """Connect the widgets; `setParameterNode` makes them act."""
        super().__init__(ui)
        self.logic = logic
        self.display = PanelDisplay(ui, self.showStatus, self._shown)
        self.files = PanelFiles(ui, logic, self.showStatus, self._startJob, self._registrationOptions)
        self.others = OthersList(ui.othersList)
        self._parameterNode: LightweightRegistrationParameterNode | None = None
        self._pair = VolumePair(None, None)
        self._preparedFor: WarmUpOptions | None = None
        self._maxCascades = 0  # of the model; 0 without networks
        self._mostCascades = 0  # of the last model that had some
        default = memory_bytes() >= PREPARE_FROM_BYTES
        ui.prepareCheckBox.checked = slicer.util.settingsValue(PREPARE_SETTING, default, converter=slicer.util.toBool)
        ui.prepareCheckBox.toggled.connect(self.onPrepareToggled)
        self._titles = library_module("models.weights").model_titles()
        for name, title in self._titles.items():
            ui.modelComboBox.addItem(title, name)
        ui.modelComboBox.currentIndexChanged.connect(self.onModelChanged)
        ui.applyButton.clicked.connect(self._shown(self.onApplyButton))
        ui.tryItButton.clicked.connect(self._shown(self.onTryItButton))
        ui.logButton.clicked.connect(self._shown(self.onLogButton))
        ui.copyButton.clicked.connect(self._shown(self.onCopyButton))
        ui.otherButton.clicked.connect(self._shown(self.onBringAlongButton))
        ui.sequenceButton.clicked.connect(self._shown(self.onSequenceButton))
        ui.saveTransformButton.clicked.connect(self._shown(self.files.onSaveTransformButton))
        ui.loadTransformButton.clicked.connect(self._shown(self.files.onLoadTransformButton))
        ui.batchButton.clicked.connect(self._shown(self.files.onBatchButton))
        ui.pageButton.clicked.connect(self._shown(self.files.onPageButton))

    def setParameterNode(self, parameterNode: LightweightRegistrationParameterNode | None) -> None:
        """Show another scene's parameters, or none while a scene is being closed."""
        self._parameterNode = parameterNode
        if parameterNode is None:
            self.cancel()
        self.display.setParameterNode(parameterNode)
        self.files.setParameterNode(parameterNode)
        if parameterNode is None:
            return
        self._pair, self.failed = VolumePair(parameterNode.fixedVolume, parameterNode.movingVolume), False
        self.showStatus(report_text.sentence(without_torch()) if without_torch() else "")
        self.updateGUIFromParameterNode()

    def forgetPair(self) -> None:
        """A scene is loaded: its outputs belong to its own volumes, whichever were chosen before."""
        self._pair = VolumePair(None, None)

    def close(self) -> None:
        """Stop everything; the application or the module goes away."""
        self.cancel()
        self.display.close()

    # from the parameter node to the widgets

    def updateGUIFromParameterNode(self) -> None:
        """Bring the panel in line with the parameters and the scene."""
        p = self._parameterNode
        if p is None:
            return
        self._clearOutputsOfAnotherPair(p)
        self._updateModel(p)
        self._updateOutputSelectors(p)
        missing = self.missingInput()
        self._updateButtons(p, missing)
        self.others.update({p.fixedVolume, p.movingVolume, *(getattr(p, name) for name in NODE_PARAMETERS.values())})
        self._updateResults()
        if self.job is None and not missing:
            self._warmUp(p)
        self.display.updateFromParameterNode(running=self.job is not None)
        self.files.updateFromParameterNode(running=self.job is not None)

    def missingInput(self) -> str:
        """What must be chosen before Apply, empty when nothing is missing."""
        p = self._parameterNode
        if without_torch() and not torch_setup.is_usable():
            return _("This computer cannot run it")
        if p.fixedVolume is None or p.movingVolume is None:
            roles = [r for r, n in ((_("fixed"), p.fixedVolume), (_("moving"), p.movingVolume)) if n is None]
            return _("Choose a {roles} volume").format(roles=_(" and a ").join(roles))
        if p.fixedVolume is p.movingVolume:
            return _("Choose two different volumes")
        if not any(getattr(p, name) for name in WANTED_PARAMETERS.values()):
            return _("Choose at least one output")
        return ""

    def _clearOutputsOfAnotherPair(self, p: LightweightRegistrationParameterNode) -> None:
        """Deselect outputs of the pair before, so that the next run does not overwrite them."""
        before, self._pair = self._pair, VolumePair(p.fixedVolume, p.movingVolume)
        if self._pair == before or None in before:
            return
        for name in NODE_PARAMETERS.values():
            if outputs.read_report(getattr(p, name)):
                setattr(p, name, None)

    def _updateModel(self, p: LightweightRegistrationParameterNode) -> None:
        ui = self.ui
        try:
            card = library_module("models.weights").model_info(p.model)
        except ValueError:  # a scene from an installation with another model
            p.model = ui.modelComboBox.itemData(0)
            return
        index = ui.modelComboBox.findData(card["name"])
        if index != ui.modelComboBox.currentIndex:
            ui.modelComboBox.currentIndex = index
        self._maxCascades = card["architecture"]["cascades"]
        if self._maxCascades:  # otherwise the number stays, for another model
            self._mostCascades = self._maxCascades
            ui.cascadesSlider.maximum = self._maxCascades
            if p.cascades > self._maxCascades:
                p.cascades = self._maxCascades
        ui.modelCardLabel.text = report_text.card_text(card)
        for widget in (ui.qualityComboBox, ui.refinementSpinBox, ui.similarityComboBox):
            widget.enabled = p.kind is Kind.deformable
        ui.cascadesSlider.enabled = p.kind is Kind.deformable and self._maxCascades > 0

    def _updateOutputSelectors(self, p: LightweightRegistrationParameterNode) -> None:
        for output, parameter in NODE_PARAMETERS.items():
            selector = getattr(self.ui, f"{parameter}Selector", None)
            if selector is not None:
                name = outputs.output_name(output, p.fixedVolume, p.movingVolume)
                selector.baseName = name  # not noneDisplay: that makes Slicer's selector pick the first node
                selector.enabled = getattr(p, WANTED_PARAMETERS[output])

    def _updateButtons(self, p: LightweightRegistrationParameterNode, missing: str) -> None:
        ui, running = self.ui, self.job is not None
        ui.applyButton.text = _("Cancel") if running else missing or _("Apply")
        ui.applyButton.enabled = running or not missing
        ui.applyButton.toolTip = (
            _("Stop; nothing is changed") if running else missing or _("Register moving onto fixed")
        )
        ui.progressBar.visible = running
        ui.tryItButton.visible = slicer.mrmlScene.GetNumberOfNodesByClass("vtkMRMLScalarVolumeNode") == 0
        ui.otherButton.enabled = not running and p.transform is not None
        ui.otherButton.toolTip = (
            "" if p.transform is not None else _("Register first, or choose a transform in Outputs")
        )
        ui.sequenceButton.enabled = not running and p.sequence is not None and p.fixedVolume is not None
        ui.sequenceButton.toolTip = "" if p.fixedVolume is not None else _("Choose the fixed volume in Inputs")

    def _updateResults(self) -> None:
        report = self._report()
        rows = report_text.rows(report, self._titles)
        verdict = report_text.verdict_as_html(report)
        self.ui.verdictLabel.text = verdict
        self.ui.verdictLabel.visible = bool(verdict) and self.job is None and not self.failed
        self.ui.resultsLabel.text = report_text.as_html(rows) or _("No result yet.")
        self.ui.copyButton.enabled = bool(rows)

    def _report(self) -> dict[str, Any]:
        p = self._parameterNode
        return outputs.read_report(p.transform, p.warpedVolume, p.jacobianMap)

    def _warmUp(self, p: LightweightRegistrationParameterNode) -> None:
        """Start the registration process before Apply is pressed, once for each choice that needs another start."""
        if not self.ui.prepareCheckBox.checked:
            return
        options = WarmUpOptions(VolumePair(p.fixedVolume, p.movingVolume), p.model, p.device.name, p.threads)
        if options != self._preparedFor:
            self._preparedFor = options
            self.logic.warmUp(options.model, options.device, options.threads)

    def onPrepareToggled(self, on: bool) -> None:
        """Keep the choice in the application's settings."""
        qt.QSettings().setValue(PREPARE_SETTING, on)

    # buttons

    def onModelChanged(self, *_index: Any) -> None:
        """Another model was picked."""
        name = self.ui.modelComboBox.itemData(self.ui.modelComboBox.currentIndex)
        p = self._parameterNode
        if p is None or not name or name == p.model:
            return
        every = p.cascades >= self._mostCascades
        p.model = name  # clips the number of cascades
        self.updateGUIFromParameterNode()
        if every and self._maxCascades:
            p.cascades = self._maxCascades

    def onTryItButton(self, *_clicked: Any) -> None:
        """Load the sample pair and choose it."""
        pair = sample.load_pair()
        p = self._parameterNode
        p.fixedVolume, p.movingVolume = pair["fixed"], pair["moving"]
        slice_display.show_layers(pair["fixed"], pair["moving"], p.fade)
        self.showStatus(_("Two brains of different people: press Apply."))

    def onCopyButton(self, *_clicked: Any) -> None:
        """Put the results on the clipboard."""
        qt.QApplication.clipboard().setText(report_text.as_text(report_text.rows(self._report(), self._titles)))
        self.showStatus(_("The results are on the clipboard."))

    def onLogButton(self, *_clicked: Any) -> None:
        """Open the log with the program that the system has for text."""
        log = session_log.path()
        qt.QDesktopServices.openUrl(qt.QUrl.fromLocalFile(str(log)))
        self.showStatus(_("The log is {path}.").format(path=log))

    def onApplyButton(self, *_clicked: Any) -> None:
        """Register, or cancel what is under way."""
        if self.job is not None:
            resumable = self.job.resumable
            self.cancel()
            stays = _("Cancelled; what is finished stays.")
            self.showStatus(stays if resumable else _("Cancelled; nothing was changed."))
            return
        p = self._parameterNode
        if not self._confirmReplacing(p):
            self.showStatus(_("Choose other outputs, or “New”."))
            return
        fixed, moving, previous_transform = p.fixedVolume, p.movingVolume, p.transform
        session_log.write(f"Apply: {self._describeRun(p)}")
        wanted = {
            output: (getattr(p, NODE_PARAMETERS[output]) or True) if getattr(p, parameter) else False
            for output, parameter in WANTED_PARAMETERS.items()
        }
        self._startJob(
            lambda: self.logic.startRegistration(
                fixed,
                moving,
                fixedMask=p.fixedMask,
                movingMask=p.movingMask,
                onField=lambda field: self.display.showEarlyView(fixed, moving, field, previous_transform),
                onEnd=self.display.removeEarlyView,
                **wanted,
                **self._registrationOptions(),
            ),
            lambda made: self._onRegistered(made, VolumePair(fixed, moving)),
        )

    def _describeRun(self, p: LightweightRegistrationParameterNode) -> str:
        """Say what is to be registered, without names of volumes, which may be those of patients."""
        volumes = [
            f"{node.GetImageData().GetDimensions()} of {[round(mm, 3) for mm in node.GetSpacing()]} mm"
            for node in (p.fixedVolume, p.movingVolume)
            if node.GetImageData() is not None
        ]
        options = {key: value for key, value in self._registrationOptions().items() if key != "initialTransform"}
        masks = [name for name in ("fixedMask", "movingMask", "initialTransform") if getattr(p, name) is not None]
        return f"{slicer.app.applicationVersion}, {', '.join(volumes)}, {options}, with {masks}"

    def _confirmReplacing(self, p: LightweightRegistrationParameterNode) -> bool:
        """Ask before outputs replace what the user made or loaded; return whether to go on."""
        chosen = [getattr(p, NODE_PARAMETERS[name]) for name, wanted in WANTED_PARAMETERS.items() if getattr(p, wanted)]
        names = [f"“{node.GetName()}”" for node in chosen if node is not None and not outputs.may_be_filled(node)]
        if not names:
            return True
        question = _("Apply will replace what {names} holds, which was not made here. Replace it?")
        return slicer.util.confirmYesNoDisplay(question.format(names=_(" and ").join(names)))

    def onBringAlongButton(self, *_clicked: Any) -> None:
        """Warp the nodes that are checked under Apply also to, one after another."""
        nodes = self.others.checked()
        if not nodes:
            self.showStatus(_("Check what to bring along."))
            return
        self._bringAlong(nodes, [])

    def _bringAlong(self, nodes: list[slicer.vtkMRMLNode], made: list[slicer.vtkMRMLNode]) -> None:
        p = self._parameterNode
        direction = "to fixed" if p.direction is Direction.to_fixed else "to moving"

        def onFinished(node: slicer.vtkMRMLNode) -> None:
            made.append(node)
            self.others.uncheck(nodes[0])
            if nodes[1:]:
                self._bringAlong(nodes[1:], made)
            else:
                names = _(", ").join(f"“{each.GetName()}”" for each in made)
                self.showStatus(_("Created {names}.").format(names=names))

        self._startJob(lambda: self.logic.startBringingAlong(nodes[0], p.transform, direction), onFinished)

    def onSequenceButton(self, *_clicked: Any) -> None:
        """Register every frame of the sequence."""
        p = self._parameterNode
        self._startJob(
            lambda: self.logic.startSequence(p.fixedVolume, p.sequence, **self._registrationOptions()),
            lambda made: self.showStatus(
                _("Created “{name}” with {count} frames: play it in the module Sequences.").format(
                    name=made["warped"].GetName(), count=made["warped"].GetNumberOfDataNodes()
                )
            ),
        )

    def _registrationOptions(self) -> dict[str, Any]:
        p = self._parameterNode
        return {
            "kind": p.kind.name,
            "model": p.model,
            "cascades": min(p.cascades, self._maxCascades),
            "initialTransform": p.initialTransform,
            "prealignment": p.prealignment.name,
            "refine": p.quality.refine,
            "refinementSteps": p.refinementSteps,
            "similarity": p.similarity.name.replace("_", "-"),
            "device": p.device.name,
            "threads": p.threads,
            "keepFiles": p.keepFiles,
        }

    def _onRegistered(self, made: outputs.Outputs, pair: VolumePair) -> None:
        p, seconds = self._parameterNode, time.monotonic() - self._startTime_s
        done = _("Done in {seconds:.1f} s.").format(seconds=seconds)
        self.showStatus(done)
        logging.info("Lightweight Registration: %s", json.dumps(made.report))  # Slicer keeps its log for error reports
        session_log.write(f"registered in {seconds:.1f} s: {json.dumps(made.report)}")
        if VolumePair(p.fixedVolume, p.movingVolume) != pair:  # others were chosen meanwhile
            return
        with slicer.util.NodeModify(p):
            for output, parameter in NODE_PARAMETERS.items():
                node = getattr(made, output)
                if node is not None or outputs.read_report(getattr(p, parameter)):  # which is of an earlier run
                    setattr(p, parameter, node)
        parent = pair.moving.GetParentTransformNode()
        if made.warped is None and made.transform is not None and parent is None:
            pair.moving.SetAndObserveTransformNodeID(made.transform.GetID())  # shows the result without a copy
        missing = self.display.updateSliceViews()
        if made.warped is None and made.transform is not None and parent not in (None, made.transform):
            missing = _("To see the result, put “{parent}” under “{transform}”.").format(
                parent=parent.GetName(), transform=made.transform.GetName()
            )
        self.showStatus(f"{done} {missing}".strip())
        self.updateGUIFromParameterNode()

    def onProcessEnded(self) -> None:
        """Forget what the process was prepared for: it is gone."""
        self._preparedFor = None

    def setCascades(self, cascades: int) -> None:
        """Choose another number of cascades."""
        self._parameterNode.cascades = cascades
