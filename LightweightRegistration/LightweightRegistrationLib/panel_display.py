"""The panel's section Display: draws what is chosen there in the slice views, and the early view during a run."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import qt
import slicer
from slicer.i18n import tr as _

from . import outputs, overlays, slice_display
from .background import take_turn
from .parameters import LightweightRegistrationParameterNode, Overlay
from .transform_nodes import Field

FLICKER_MS = 500


class ViewState(NamedTuple):
    """The parameters that the slice views are drawn from, under their names in the parameter node."""

    overlay: Overlay
    fade: float
    showGrid: bool
    gridSpacing: float
    jacobianFactor: float
    showFolding: bool
    fixedVolume: slicer.vtkMRMLVolumeNode | None
    movingVolume: slicer.vtkMRMLVolumeNode | None
    warpedVolume: slicer.vtkMRMLVolumeNode | None
    transform: slicer.vtkMRMLTransformNode | None
    jacobianMap: slicer.vtkMRMLVolumeNode | None

    @classmethod
    def fromParameterNode(cls, parameterNode: LightweightRegistrationParameterNode) -> ViewState:
        """Read the current values."""
        return cls(*(getattr(parameterNode, name) for name in cls._fields))

    def hasNodesOf(self, other: ViewState) -> bool:
        """Whether both show the same nodes, so that only display choices may differ."""
        names = ("fixedVolume", "movingVolume", "warpedVolume", "transform", "jacobianMap")
        return all(getattr(self, name) is getattr(other, name) for name in names)

    def differsOnlyInFade(self, other: ViewState) -> bool:
        """Whether setting the opacity is enough to go from one to the other."""
        return self._replace(fade=other.fade) == other


class PanelDisplay:
    """Behaviour of the widgets under Display.

    Attributes:
        computed: the temporary volume of the checkerboard, or of the Jacobian's colours, while it is shown.
        earlyView: the preview of a run, or None.
        flickerTimer: alternates the layers while it runs.
    """

    def __init__(
        self,
        ui: Any,
        showStatus: Callable[[str], None],
        shown: Callable[[Callable[..., None]], Callable[..., None]],
    ):
        """Connect the widgets; `setParameterNode` makes them act.

        Args:
            ui: the widgets of LightweightRegistration.ui by name.
            showStatus: shows one sentence in the panel.
            shown: returns an action that shows every error that it ends with.
        """
        self.ui, self.showStatus = ui, showStatus
        self.computed: slicer.vtkMRMLScalarVolumeNode | None = None
        self._computedFor: tuple[Any, ...] | None = None
        self.earlyView: slice_display.EarlyView | None = None
        self._parameterNode: LightweightRegistrationParameterNode | None = None
        self._drawn: ViewState | None = None
        self._missing = ""  # what was said about the last display choice
        self.flickerTimer = qt.QTimer()
        self.flickerTimer.setInterval(FLICKER_MS)
        self.flickerTimer.timeout.connect(self.onFlickerTimer)
        ui.flickerButton.toggled.connect(self.onFlickerToggled)
        ui.beforeButton.toggled.connect(self.onBeforeToggled)
        self._drawing: Iterator[None] | None = None
        self._drawTimer = qt.QTimer()
        self._drawTimer.setInterval(0)
        self._drawTimer.timeout.connect(shown(self.onDrawTimer))

    def setParameterNode(self, parameterNode: LightweightRegistrationParameterNode | None) -> None:
        """Follow another parameter node, or none while the scene is being closed. The views stay as they are."""
        self._parameterNode = parameterNode
        self._stopDrawing()
        if parameterNode is None:
            self.ui.flickerButton.checked = False
            self.computed = self._computedFor = None
        else:
            self._drawn = ViewState.fromParameterNode(parameterNode)

    def updateFromParameterNode(self, *, running: bool) -> None:
        """Draw again where a display choice was changed; opening the panel or choosing a node draws nothing.

        Args:
            running: a job is under way: the views belong to it.
        """
        self.ui.flickerButton.enabled = self.overlayVolume() is not None
        if not self.ui.flickerButton.enabled:
            self.ui.flickerButton.checked = False  # it could not be stopped
        self.ui.beforeButton.visible = self._hasBefore() and not running
        state = ViewState.fromParameterNode(self._parameterNode)
        if state == self._drawn or running:
            return
        before, self._drawn = self._drawn, state
        if not state.hasNodesOf(before):
            return
        if state.differsOnlyInFade(before):
            slice_display.set_opacity(state.fade)
        else:
            said, self._missing = self._missing, self.updateSliceViews()
            if said or self._missing:
                self.showStatus(self._missing)

    def overlayVolume(self) -> slicer.vtkMRMLVolumeNode | None:
        """The volume that is shown over the fixed one."""
        p = self._parameterNode
        if p.overlay is Overlay.moving or (p.overlay is Overlay.warped and p.warpedVolume is None):
            return p.movingVolume
        return {
            Overlay.warped: p.warpedVolume,
            Overlay.jacobian: self.computed or p.jacobianMap,
            Overlay.checkerboard: self.computed or p.warpedVolume,
        }.get(p.overlay)

    def updateSliceViews(self) -> str:
        """Show the chosen overlay, grid, colours and contours in the slice views.

        Returns:
            One sentence about what is chosen and cannot be shown; empty without any.
        """
        p = self._parameterNode
        self.ui.beforeButton.checked = False
        self._drawn = ViewState.fromParameterNode(p)
        self._computeOverlay(p)
        slice_display.show_layers(p.fixedVolume, self.overlayVolume(), self._opacity())
        slice_display.show_grid(p.transform, p.fixedVolume, p.showGrid, p.gridSpacing)
        for volume in (p.jacobianMap, self.computed if p.overlay is Overlay.jacobian else None):
            if volume is not None:
                slice_display.color_jacobian(volume, p.jacobianFactor)
        if p.overlay is Overlay.jacobian:
            slice_display.show_legend(self.overlayVolume(), True)
        folding = overlays.folding_contours(p.jacobianMap, p.showFolding)
        if p.showFolding and p.jacobianMap is not None and folding is None:
            return _("Nothing folds: there is no voxel to outline.")
        return self._describeMissing(p)

    def _describeMissing(self, p: LightweightRegistrationParameterNode) -> str:
        """Say which output a display choice needs that is not there."""
        needed = {
            _("Jacobian map"): p.jacobianMap is None and (p.overlay is Overlay.jacobian or p.showFolding),
            _("warped volume"): p.warpedVolume is None and p.overlay is Overlay.checkerboard,
            _("transform"): p.transform is None and p.showGrid,
        }
        text = _("There is no {output} to show: check it under Outputs and press Apply.")
        return next((text.format(output=output) for output, is_missing in needed.items() if is_missing), "")

    def _computeOverlay(self, p: LightweightRegistrationParameterNode) -> None:
        """Begin to compute what the overlay needs, if it needs anything; other display choices compute nothing anew."""
        source = {Overlay.checkerboard: p.warpedVolume, Overlay.jacobian: p.jacobianMap}.get(p.overlay)
        if source is not None and (p.fixedVolume is None or not outputs.same_size(source, p.fixedVolume)):
            source = None
        wanted = (
            (p.overlay, *(volume.GetImageData().GetMTime() for volume in (source, p.fixedVolume))) if source else None
        )
        if wanted == self._computedFor:  # it is there, or on its way
            return
        self._stopDrawing()
        outputs.remove_node(self.computed)
        self.computed, self._computedFor = None, wanted
        if source is None:
            return
        self.computed = outputs.new_temporary_node("vtkMRMLScalarVolumeNode", p.overlay.value)
        draw = overlays.checkerboard if p.overlay is Overlay.checkerboard else overlays.jacobian_within_content
        self._drawing = draw(p.fixedVolume, source, self.computed)
        self._drawTimer.start()
        self.onDrawTimer()

    def _opacity(self) -> float:
        """The overlay's opacity: a checkerboard holds the fixed volume itself."""
        p = self._parameterNode
        return 1.0 if p.overlay is Overlay.checkerboard and self.computed is not None else p.fade

    @property
    def busy(self) -> bool:
        """Whether an overlay is still being drawn."""
        return self._drawing is not None

    def onDrawTimer(self) -> None:
        """Go on with drawing an overlay, for one turn of the event loop."""
        try:
            done = self._drawing is None or take_turn(self._drawing)
        except Exception:
            self._stopDrawing()
            raise
        if done:
            self._stopDrawing()

    def _stopDrawing(self) -> None:
        self._drawTimer.stop()
        self._drawing = None

    def _hasBefore(self) -> bool:
        """Whether there is a result beside the moving volume as it was."""
        p = self._parameterNode
        return p.warpedVolume is not None and p.movingVolume is not None

    def onBeforeToggled(self, on: bool) -> None:
        """Show the moving volume as it was instead of the overlay, or the overlay again."""
        self.ui.beforeButton.text = _("Show the result again") if on else _("Show before registration")
        if self._parameterNode is not None and self._hasBefore():
            p = self._parameterNode
            shown = p.movingVolume if on else self.overlayVolume()
            slice_display.show_layers(p.fixedVolume, shown, p.fade if on else self._opacity())

    def onFlickerToggled(self, on: bool) -> None:
        """Start or stop alternating between the fixed volume and the overlay."""
        if on:
            self.flickerTimer.start()
        else:
            self.flickerTimer.stop()
            if self._parameterNode is not None:
                slice_display.set_opacity(self._parameterNode.fade)

    def onFlickerTimer(self) -> None:
        """Show the other layer."""
        opacities = [composite.GetForegroundOpacity() for composite in slice_display.slice_composites()]
        slice_display.set_opacity(0.0 if opacities and opacities[0] > 0.5 else 1.0)

    def showEarlyView(
        self,
        fixed: slicer.vtkMRMLVolumeNode,
        moving: slicer.vtkMRMLVolumeNode,
        field: Field,
        ignored: slicer.vtkMRMLTransformNode | None,
    ) -> None:
        """Show the moving volume under a coarse field until `removeEarlyView`; see `slice_display.EarlyView`."""
        self.earlyView = slice_display.EarlyView(fixed, moving, field, self._parameterNode.fade, ignored=ignored)

    def removeEarlyView(self) -> None:
        """Show what was shown before the early view, if there is one."""
        early, self.earlyView = self.earlyView, None
        if early is not None:
            early.remove()

    def close(self) -> None:
        """Stop the timers."""
        self._stopDrawing()
        self.flickerTimer.stop()
