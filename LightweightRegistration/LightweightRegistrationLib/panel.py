"""The panel: what its buttons and selectors do. Reads and writes the parameter node; the work is done by jobs."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import qt
import slicer
from slicer.i18n import tr as _

from . import outputs, results, sample, views
from .core import InputError, MemoryNeededError, core
from .jobs import Job
from .parameters import Direction, LightweightRegistrationParameterNode, Overlay
from .transforms import Field

POLL_MS = 40
FLICKER_MS = 500
# parameter of a wanted output, of its node, and its name in `outputs.NAMES`
OUTPUTS = (
    ("wantWarped", "warpedVolume", "warped"),
    ("wantTransform", "transform", "transform"),
    ("wantJacobian", "jacobianMap", "jacobian"),
    ("keepInverse", "inverseTransform", "inverse"),
)


class Panel:
    """Behaviour of the widgets of LightweightRegistration.ui.

    Attributes:
        job: what is under way, or None.
    """

    def __init__(self, ui: Any, logic: Any):
        """Connect the widgets; `setParameters` brings them to life."""
        self.ui, self.logic = ui, logic
        self.job: Job | None = None
        self._parameters: LightweightRegistrationParameterNode | None = None
        self._pair: tuple[Any, Any] = (None, None)
        self._shown: tuple[Any, ...] = ()
        self._checkerboard: slicer.vtkMRMLScalarVolumeNode | None = None
        self._early: views.EarlyView | None = None
        self._finish: Callable[[Any], None] = lambda made: None
        self._began = 0.0
        self._expected: tuple[Any, ...] = ()
        self._poll = self._timer(POLL_MS, self.onPoll)
        self._flicker = self._timer(FLICKER_MS, self.onFlickerTick)
        for name in core("models.weights").list_models():
            ui.modelComboBox.addItem(name)
        ui.applyButton.clicked.connect(self.onApply)
        ui.tryItButton.clicked.connect(self.onTryIt)
        ui.modelComboBox.currentIndexChanged.connect(self.onModel)
        ui.flickerButton.toggled.connect(self.onFlicker)
        ui.copyButton.clicked.connect(self.onCopy)
        ui.otherButton.clicked.connect(self.onOther)
        ui.sequenceButton.clicked.connect(self.onSequence)

    @staticmethod
    def _timer(milliseconds: int, slot: Callable[[], None]) -> Any:
        timer = qt.QTimer()
        timer.setInterval(milliseconds)
        timer.timeout.connect(slot)
        return timer

    def setParameters(self, parameters: LightweightRegistrationParameterNode | None) -> None:
        """Show another scene's choices, or none while a scene is being closed."""
        self._parameters = parameters
        if parameters is None:
            self.cancel()
            self.ui.flickerButton.checked = False
            self._checkerboard = None
            return
        self._pair = (parameters.fixedVolume, parameters.movingVolume)
        self._shown = self._view()
        self._tell("")
        self.update()

    def takePair(self) -> None:
        """The volumes and outputs that come next belong together: a scene was loaded."""
        self._pair = (None, None)

    def close(self) -> None:
        """Stop everything; the application or the module goes away."""
        self.cancel()
        self._flicker.stop()

    # following the parameters

    def update(self) -> None:
        """Bring the panel in line with the parameters and the scene."""
        p, ui = self._parameters, self.ui
        if p is None:
            return
        self._forget_outputs_of_another_pair(p)
        self._show_model(p)
        for want, node, output in OUTPUTS:
            selector = getattr(ui, f"{node}Selector", None)
            if selector is not None:
                name = outputs.speaking_name(output, p.fixedVolume, p.movingVolume)
                selector.noneDisplay = _("New: {name}").format(name=name)
                selector.baseName = name
                selector.enabled = getattr(p, want)
        running, missing = self.job is not None, self.missing()
        ui.applyButton.text = _("Cancel") if running else missing or _("Apply")
        ui.applyButton.enabled = running or not missing
        ui.applyButton.toolTip = (
            _("Stop; nothing is changed") if running else missing or _("Register moving onto fixed")
        )
        ui.progressBar.visible = running
        ui.tryItButton.visible = slicer.mrmlScene.GetNumberOfNodesByClass("vtkMRMLScalarVolumeNode") == 0
        ui.otherButton.enabled = not running and p.other is not None and p.transform is not None
        ui.otherButton.toolTip = (
            "" if p.transform is not None else _("Register first, or choose a transform in Outputs")
        )
        ui.sequenceButton.enabled = not running and p.sequence is not None and p.fixedVolume is not None
        ui.sequenceButton.toolTip = "" if p.fixedVolume is not None else _("Choose the fixed volume in Inputs")
        ui.flickerButton.enabled = self._overlay(p) is not None
        shown = results.rows(outputs.report_of(p.transform, p.warpedVolume, p.jacobianMap))
        ui.resultsLabel.text = results.as_html(shown) or _("No result yet.")
        ui.copyButton.enabled = bool(shown)
        if not running and not missing:
            self._warm_up(p)
        self._update_views()

    def missing(self) -> str:
        """What must be chosen before Apply, empty when nothing is missing."""
        p = self._parameters
        if p.fixedVolume is None or p.movingVolume is None:
            roles = [r for r, n in ((_("fixed"), p.fixedVolume), (_("moving"), p.movingVolume)) if n is None]
            return _("Choose a {roles} volume").format(roles=_(" and a ").join(roles))
        if p.fixedVolume is p.movingVolume:
            return _("Choose two different volumes")
        if not any(getattr(p, want) for want, _node, _output in OUTPUTS):
            return _("Choose at least one output")
        return ""

    def _warm_up(self, p: LightweightRegistrationParameterNode) -> None:
        """Apply may be pressed at any moment: start the process, once for every choice that it would be pressed for."""
        how = self._how()
        choice = (p.fixedVolume, p.movingVolume, how["model"], how["device"], how["threads"])
        if choice != self._expected:
            self._expected = choice
            self.logic.warmUp(*choice[2:])

    def _forget_outputs_of_another_pair(self, p: LightweightRegistrationParameterNode) -> None:
        """Outputs of the pair before must not be overwritten with those of another one."""
        before, self._pair = self._pair, (p.fixedVolume, p.movingVolume)
        if self._pair == before or None in before:
            return
        for _want, node, _output in OUTPUTS:
            if outputs.report_of(getattr(p, node)):
                setattr(p, node, None)

    def _show_model(self, p: LightweightRegistrationParameterNode) -> None:
        ui = self.ui
        try:
            card = core("models.weights").model_info(p.model)
        except ValueError:  # a scene from an installation with another model
            p.model = ui.modelComboBox.itemText(0)
            return
        index = ui.modelComboBox.findText(card["name"])
        if index != ui.modelComboBox.currentIndex:
            ui.modelComboBox.currentIndex = index
        most = card["architecture"]["cascades"]
        ui.cascadesSlider.maximum = most
        if p.cascades > most:
            p.cascades = most
        ui.modelCardLabel.text = results.card_text(card)

    # the slice views

    def _view(self) -> tuple[Any, ...]:
        p = self._parameters
        chosen = (p.overlay, p.fade, p.showGrid, p.gridSpacing, p.jacobianRange, p.showFolding)
        return (*chosen, p.fixedVolume, p.movingVolume, p.warpedVolume, p.transform, p.jacobianMap)

    def _update_views(self) -> None:
        """Draw when something that is drawn was changed, not merely because the panel was opened."""
        view = self._view()
        if view == self._shown or self.job is not None:
            return
        before, self._shown = self._shown, view
        if before[6:] == view[6:]:  # a display choice, not another node
            self.draw(before)

    def _overlay(self, p: LightweightRegistrationParameterNode) -> slicer.vtkMRMLVolumeNode | None:
        """The volume that lies over the fixed one."""
        if p.overlay is Overlay.moving or (p.overlay is Overlay.warped and p.warpedVolume is None):
            return p.movingVolume
        return {
            Overlay.warped: p.warpedVolume,
            Overlay.jacobian: p.jacobianMap,
            Overlay.checkerboard: self._checkerboard or p.warpedVolume,
        }.get(p.overlay)

    def draw(self, before: tuple[Any, ...] = ()) -> None:
        """Show the chosen overlay, grid, colours and contours in the slice views.

        Args:
            before: what was shown; with only the fade changed, only the fade is set.
        """
        p = self._parameters
        if before and before[0] == p.overlay and before[2:] == self._view()[2:]:
            views.set_opacity(p.fade)
            return
        if p.overlay is Overlay.checkerboard and p.warpedVolume is not None and p.fixedVolume is not None:
            self._checkerboard = views.checkerboard(p.fixedVolume, p.warpedVolume, self._checkerboard)
        elif self._checkerboard is not None:
            views.remove(self._checkerboard)
            self._checkerboard = None
        opacity = 1.0 if self._checkerboard is not None else p.fade
        views.show(p.fixedVolume, self._overlay(p), opacity)
        views.show_grid(p.transform, p.fixedVolume, p.showGrid, p.gridSpacing)
        if p.jacobianMap is not None:
            views.paint_jacobian(p.jacobianMap, p.jacobianRange)
        views.show_legend(p.jacobianMap, p.overlay is Overlay.jacobian)
        folding = views.folding_contours(p.jacobianMap, p.showFolding)
        if p.showFolding and p.jacobianMap is not None and folding is None:
            self._tell(_("Nothing folds: there is no voxel to outline."))

    def onFlicker(self, on: bool) -> None:
        """Start or stop alternating between the fixed volume and the overlay."""
        if on:
            self._flicker.start()
        else:
            self._flicker.stop()
            if self._parameters is not None:
                views.set_opacity(self._parameters.fade)

    def onFlickerTick(self) -> None:
        """Show the other one."""
        opacities = [composite.GetForegroundOpacity() for composite in views.composites()]
        views.set_opacity(0.0 if opacities and opacities[0] > 0.5 else 1.0)

    # buttons

    def onModel(self, *_picked: Any) -> None:
        """Another model was picked."""
        if self._parameters is not None and self.ui.modelComboBox.currentText:
            self._parameters.model = self.ui.modelComboBox.currentText

    def onTryIt(self, *_clicked: Any) -> None:
        """Load the sample pair and choose it."""
        try:
            pair = sample.load_pair()
        except InputError as error:
            self._refuse(error)
            return
        self._parameters.fixedVolume, self._parameters.movingVolume = pair["fixed"], pair["moving"]
        views.show(pair["fixed"], pair["moving"], self._parameters.fade)
        self._tell(_("Two brains of different people: press Apply."))

    def onCopy(self, *_clicked: Any) -> None:
        """Put the results on the clipboard."""
        p = self._parameters
        shown = results.rows(outputs.report_of(p.transform, p.warpedVolume, p.jacobianMap))
        qt.QApplication.clipboard().setText(results.as_text(shown))
        self._tell(_("The results are on the clipboard."))

    def onApply(self, *_clicked: Any) -> None:
        """Register, or cancel what is under way."""
        if self.job is not None:
            self.cancel()
            self._tell(_("Cancelled; nothing was changed."))
            return
        p = self._parameters
        fixed, moving, used = p.fixedVolume, p.movingVolume, p.transform
        wanted = {output: (getattr(p, node) or True) if getattr(p, want) else False for want, node, output in OUTPUTS}
        self._start(
            lambda: self.logic.startRegistration(
                fixed,
                moving,
                p.cascades,
                fixedMask=p.fixedMask,
                movingMask=p.movingMask,
                onField=lambda field: self._show_early(fixed, moving, field, used),
                onEnd=self._remove_early,
                **wanted,
                **self._how(),
            ),
            lambda made: self._registered(made, fixed, moving),
        )

    def onOther(self, *_clicked: Any) -> None:
        """Bring another node along."""
        p = self._parameters
        direction = "to fixed" if p.direction is Direction.to_fixed else "to moving"
        self._start(
            lambda: self.logic.startBringingAlong(p.other, p.transform, direction),
            lambda made: self._tell(_("Created “{name}”.").format(name=made.GetName())),
        )

    def onSequence(self, *_clicked: Any) -> None:
        """Register every frame of the sequence."""
        p = self._parameters
        self._start(
            lambda: self.logic.startSequence(p.fixedVolume, p.sequence, p.cascades, **self._how()),
            lambda made: self._tell(
                _("Created “{name}” with {count} frames: play it in the module Sequences.").format(
                    name=made["warped"].GetName(), count=made["warped"].GetNumberOfDataNodes()
                )
            ),
        )

    def _how(self) -> dict[str, Any]:
        p = self._parameters
        return {
            "model": p.model,
            "initialTransform": p.initialTransform,
            "prealignment": p.prealignment.name,
            "refinementSteps": p.refinementSteps,
            "device": p.device.name,
            "threads": p.threads,
        }

    # jobs

    def _start(self, start: Callable[[], Job], finish: Callable[[Any], None]) -> None:
        self.ui.flickerButton.checked = False
        self._tell(_("Starting"))
        try:
            job = start()
        except InputError as error:
            self._refuse(error)
            return
        self.job, self._finish, self._began = job, finish, time.monotonic()
        self.ui.progressBar.value = 0
        self.update()
        self._poll.start()
        self.onPoll()

    def onPoll(self) -> None:
        """Take what the job has to tell; called by the timer."""
        job = self.job
        if job is None:
            return
        try:
            finished = job.poll()
        except InputError as error:
            self._leave()
            self._refuse(error)
            return
        self.ui.progressBar.value = round(100 * job.fraction)
        self._tell(results.sentence(job.message).removesuffix(".") if job.message else "")
        if finished:
            self._leave()
            if job.outputs is not None:
                self._finish(job.outputs)

    def cancel(self) -> None:
        """Stop what is under way, if anything is; the scene is as before."""
        job = self.job
        self._leave()
        if job is not None:
            job.cancel()
            self._expected = ()  # the process is gone
            self.update()

    def _leave(self) -> None:
        self._poll.stop()
        self.job = None
        self.update()

    def _registered(
        self, made: outputs.Outputs, fixed: slicer.vtkMRMLVolumeNode, moving: slicer.vtkMRMLVolumeNode
    ) -> None:
        p, seconds = self._parameters, time.monotonic() - self._began
        self._tell(_("Done in {seconds:.1f} s.").format(seconds=seconds))
        if (p.fixedVolume, p.movingVolume) != (fixed, moving):  # others were chosen meanwhile
            return
        with slicer.util.NodeModify(p):
            for _want, node, output in OUTPUTS:
                if getattr(made, output) is not None:
                    setattr(p, node, getattr(made, output))
        if made.warped is None and made.transform is not None and moving.GetParentTransformNode() is None:
            moving.SetAndObserveTransformNodeID(made.transform.GetID())  # shows the result without a copy
        self._shown = self._view()
        self.draw()
        self.update()

    def _refuse(self, error: InputError) -> None:
        """Say what is wrong; offer fewer cascades where memory was too small."""
        text = results.sentence(str(error))
        self._tell(text)
        fewer = error.fewer_cascades if isinstance(error, MemoryNeededError) else None
        if fewer is None:
            slicer.util.errorDisplay(text)
            return
        question = _("Try again with {cascades}?").format(cascades=results.counted(fewer, _("cascade"), _("cascades")))
        if slicer.util.confirmYesNoDisplay(f"{text}\n\n{question}"):
            self._parameters.cascades = fewer
            self.onApply()

    def _show_early(self, fixed: Any, moving: Any, field: Field, used: Any) -> None:
        self._early = views.EarlyView(fixed, moving, field, self._parameters.fade, ignored=used)

    def _remove_early(self) -> None:
        early, self._early = self._early, None
        if early is not None:
            early.remove()

    def _tell(self, text: str) -> None:
        self.ui.statusLabel.text = text
