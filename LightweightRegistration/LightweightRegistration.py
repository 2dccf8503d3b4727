"""The Slicer module Lightweight Registration: module, widget, logic and test. See LightweightRegistrationLib."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import slicer
import vtk
from LightweightRegistrationLib import sample, torch_setup
from LightweightRegistrationLib.background import Worker, close_shared, shared_worker
from LightweightRegistrationLib.file_logic import FileLogic
from LightweightRegistrationLib.jobs import Job, Settings
from LightweightRegistrationLib.library import library_folder
from LightweightRegistrationLib.node_warping import WarpNodeJob
from LightweightRegistrationLib.outputs import Outputs
from LightweightRegistrationLib.parameters import LightweightRegistrationParameterNode
from LightweightRegistrationLib.registration_job import RegistrationJob
from LightweightRegistrationLib.self_test import LightweightRegistrationTest  # noqa: F401 Slicer looks for it here
from LightweightRegistrationLib.sequences import SequenceJob
from slicer.i18n import tr as _
from slicer.i18n import translate
from slicer.ScriptedLoadableModule import (
    ScriptedLoadableModule,
    ScriptedLoadableModuleLogic,
    ScriptedLoadableModuleWidget,
)
from slicer.util import VTKObservationMixin


class LightweightRegistration(ScriptedLoadableModule):
    """The module's title, category and help. Slicer creates it at start."""

    def __init__(self, parent: Any):
        ScriptedLoadableModule.__init__(self, parent)
        parent.title = _("Lightweight Registration")
        parent.categories = [translate("qSlicerAbstractCoreModule", "Registration")]
        parent.dependencies = []
        parent.contributors = ["The Lightweight Registration developers"]
        parent.helpText = _(
            "Deformable registration of one 3D scan to another in about a second on a laptop CPU. Choose a fixed and a "
            "moving volume and press Apply. The README of the extension links to a tutorial."
        )
        parent.acknowledgementText = _(
            "The method is the light student of M. Q. Tran et al., Light-weight Deformable Registration using "
            "Adversarial Learning with Distilling Knowledge (arXiv 2110.01293)."
        )
        slicer.app.connect("startupCompleted()", registerSampleData)


def registerSampleData() -> None:
    """Register the bundled pair with the module Sample Data. Slicer calls it after start."""
    sample.register_with_sample_data(Path(__file__).parent / "Resources" / "Icons")


class LightweightRegistrationLogic(FileLogic, ScriptedLoadableModuleLogic):
    """Registers volume nodes, from the panel, the Python console or scripts.

    A worker process computes; it keeps torch and the model loaded between calls. Methods whose name begins with `start`
    return a job to poll; the others wait for the result and process the application's events meanwhile.
    """

    def __init__(self, worker: Worker | None = None):
        """Store a worker process that replaces the application's shared one (for tests)."""
        ScriptedLoadableModuleLogic.__init__(self)
        self._worker = worker

    def getParameterNode(self) -> LightweightRegistrationParameterNode:
        """Return the panel's parameters in this scene."""
        return LightweightRegistrationParameterNode(super().getParameterNode())

    @property
    def worker(self) -> Worker:
        """The worker process; it is started by the first run."""
        if self._worker is None:
            self._worker = shared_worker(library_folder(), slicer.app.temporaryPath)
        return self._worker

    def register(
        self,
        fixedNode: slicer.vtkMRMLScalarVolumeNode,
        movingNode: slicer.vtkMRMLScalarVolumeNode,
        cascades: int | None = None,
        *,
        progress: Callable[[float, str], None] | None = None,
        **options: Any,
    ) -> Outputs:
        """Register the moving volume to the fixed volume and wait for the result.

        Args:
            fixedNode, movingNode: scalar volumes, each possibly under linear transforms.
            cascades: number of dense networks, 0 to the model's maximum; None for all.
            progress: called with (fraction done, next step).
            options: see `startRegistration`.

        Returns:
            Outputs: the nodes `warped`, `transform`, `jacobian`, `inverse` (None if not requested) and the `report`.

        Raises:
            InputError: the input cannot be registered, or torch is missing; one sentence, the scene is unchanged.
        """
        return self.wait(self.startRegistration(fixedNode, movingNode, cascades, **options), progress)

    def startRegistration(
        self,
        fixedNode: slicer.vtkMRMLScalarVolumeNode,
        movingNode: slicer.vtkMRMLScalarVolumeNode,
        cascades: int | None = None,
        *,
        kind: str = "deformable",
        model: str = Settings.model,
        fixedMask: slicer.vtkMRMLDisplayableNode | None = None,
        movingMask: slicer.vtkMRMLDisplayableNode | None = None,
        initialTransform: slicer.vtkMRMLTransformNode | None = None,
        prealignment: str = "centre",
        refine: str | None = "fast",
        refinementSteps: int = 0,
        similarity: str = "auto",
        device: str = "auto",
        threads: int = 0,
        keepFiles: bool = False,
        warped: bool | slicer.vtkMRMLNode | None = True,
        transform: bool | slicer.vtkMRMLNode | None = True,
        jacobian: bool | slicer.vtkMRMLNode | None = True,
        inverse: bool | slicer.vtkMRMLNode | None = False,
        onField: Callable[[Any], None] | None = None,
        onEnd: Callable[[], None] | None = None,
    ) -> RegistrationJob:
        """Start a registration and return the job to poll.

        Args:
            fixedNode, movingNode, cascades: see `register`.
            kind: "deformable", "affine" (12 parameters) or "rigid" (rotation and translation); the last two do not
                deform, so `cascades`, `refine`, `refinementSteps` and `similarity` do not count.
            model: a name of the bundled models, "any" (chosen by the images), "none" (no network), or a path to a .pt
                file with its card. The report's `model_chosen` says which networks ran and why.
            fixedMask, movingMask: segmentation or labelmap; voxels outside do not influence the registration.
            initialTransform: aligns the moving volume roughly when the volume is put under it.
            prealignment: "centre" (align the centroids of the contents, then affine), "affine" (from the scanner
                coordinates or the initial transform) or "none".
            refine: instance optimisation after the networks: None (the panel's Fast: what the model needs), "none",
                "fast" (Accurate) or "best".
            refinementSteps: iterations of it at each of two resolutions, 0 for those of `refine`.
            similarity: what it makes larger: "auto", "local-ncc" or "mind"; see `LDRCore.register`.
            device: "auto", "cpu" or "cuda".
            threads: CPU threads, 0 for all.
            keepFiles: keep what is exchanged with the worker process; `kept` of the job names the folder.
            warped, transform, jacobian, inverse: True for a new node, a node to fill, or False for none.
            onField: called with a coarse displacement field before the outputs are computed.
            onEnd: called when the job ends in any way, before outputs are created.
        """
        torch_setup.ensure_torch()
        settings = Settings(model, cascades, prealignment, refine, refinementSteps, similarity, device, threads, kind)
        job = RegistrationJob(
            self.worker,
            settings,
            initial=initialTransform,
            fixed_mask=fixedMask,
            moving_mask=movingMask,
            wanted={"warped": warped, "transform": transform, "jacobian": jacobian, "inverse": inverse},
            on_early=onField,
            on_end=onEnd,
            keep_files=keepFiles,
        )
        job.start(fixedNode, movingNode)
        return job

    def warmUp(self, model: str = Settings.model, device: str = "auto", threads: int = 0) -> None:
        """Start the worker process and let it import torch and load a model; does nothing without torch.

        Without it, the first registration waits for these.
        """
        if torch_setup.is_usable():
            with contextlib.suppress(OSError):  # the registration itself reports it
                self.worker.warm_up({"model": model, "device": device, "threads": threads})

    def bringAlong(
        self,
        node: slicer.vtkMRMLNode,
        transformNode: slicer.vtkMRMLTransformNode,
        direction: str = "to fixed",
    ) -> slicer.vtkMRMLNode:
        """Warp another volume, labelmap, segmentation, markups or model through a registration, as a new node.

        Args:
            node: the node to warp; it is not changed.
            transformNode: the transform of a registration.
            direction: "to fixed" for what belongs to the moving scan, "to moving" for what belongs to the fixed one.

        Raises:
            InputError: the node cannot be warped.
        """
        return self.wait(self.startBringingAlong(node, transformNode, direction))

    def startBringingAlong(
        self, node: slicer.vtkMRMLNode, transformNode: slicer.vtkMRMLTransformNode, direction: str = "to fixed"
    ) -> WarpNodeJob:
        """Start what `bringAlong` does and return the job to poll."""
        torch_setup.ensure_torch()
        job = WarpNodeJob(self.worker, node, transformNode, direction)
        job.start()
        return job

    def registerSequence(
        self,
        fixedNode: slicer.vtkMRMLScalarVolumeNode,
        sequenceNode: slicer.vtkMRMLSequenceNode,
        cascades: int | None = None,
        *,
        progress: Callable[[float, str], None] | None = None,
        **options: Any,
    ) -> dict[str, Any]:
        """Register every frame of a sequence to one fixed volume.

        Returns:
            {"warped": sequence of volumes, "transforms": sequence of transforms, "browser": browser node of both,
            "reports": list}.

        Raises:
            InputError: a frame cannot be registered; the scene is unchanged.
        """
        return self.wait(self.startSequence(fixedNode, sequenceNode, cascades, **options), progress)

    def startSequence(
        self,
        fixedNode: slicer.vtkMRMLScalarVolumeNode,
        sequenceNode: slicer.vtkMRMLSequenceNode,
        cascades: int | None = None,
        *,
        initialTransform: slicer.vtkMRMLTransformNode | None = None,
        refinementSteps: int = 0,
        keepFiles: bool = False,
        **options: Any,
    ) -> SequenceJob:
        """Start what `registerSequence` does and return the job to poll.

        Options: `kind` to `threads` of `startRegistration`, without masks.
        """
        torch_setup.ensure_torch()
        settings = Settings(cascades=cascades, refine_steps=refinementSteps, **options)
        job = SequenceJob(self.worker, settings, initial=initialTransform, keep_files=keepFiles)
        job.start(fixedNode, sequenceNode)
        return job

    def wait(self, job: Job, progress: Callable[[float, str], None] | None = None) -> Any:
        """Wait for a job and return its outputs; the application's events are processed meanwhile."""
        reported = (0.0, "")

        def whileWaiting() -> None:
            nonlocal reported
            current = (job.fraction, job.message)
            if progress is not None and current != reported:
                reported = current
                progress(*current)
            slicer.app.processEvents()
            time.sleep(0.02)

        try:
            return job.wait(whileWaiting)
        finally:
            job.cancel()  # acts only if the job still runs: after an interrupt in the console


class LightweightRegistrationWidget(ScriptedLoadableModuleWidget, VTKObservationMixin):
    """Creates the widgets and follows the scene; LightweightRegistrationLib/panel.py holds their behaviour."""

    def __init__(self, parent: Any = None):
        self.logic: LightweightRegistrationLogic | None = None
        self.panel: Any = None
        self._parameterNode: LightweightRegistrationParameterNode | None = None
        self._guiTag: int | None = None
        VTKObservationMixin.__init__(self)
        ScriptedLoadableModuleWidget.__init__(self, parent)  # last: without a parent it calls setup

    def setup(self) -> None:
        """Create the widgets. Slicer calls it when the module is first opened. No torch, download or process here."""
        from LightweightRegistrationLib.panel import Panel

        ScriptedLoadableModuleWidget.setup(self)
        widget = slicer.util.loadUI(self.resourcePath("UI/LightweightRegistration.ui"))
        self.layout.addWidget(widget)
        self.ui = slicer.util.childWidgetVariables(widget)
        widget.setMRMLScene(slicer.mrmlScene)
        self.logic = LightweightRegistrationLogic()
        self.panel = Panel(self.ui, self.logic)
        scene = slicer.mrmlScene
        self.addObserver(scene, scene.StartCloseEvent, self.onSceneStartClose)
        self.addObserver(scene, scene.EndCloseEvent, self.onSceneEndClose)
        self.addObserver(scene, scene.StartImportEvent, self.onSceneStartImport)
        self.addObserver(scene, scene.EndImportEvent, self.onSceneEndImport)
        self.addObserver(scene, scene.NodeAddedEvent, self.onParameterNodeModified)
        self.addObserver(scene, scene.NodeAboutToBeRemovedEvent, self.onNodeAboutToBeRemoved)
        self.addObserver(scene, scene.NodeRemovedEvent, self.onParameterNodeModified)
        self.initializeParameterNode()

    def cleanup(self) -> None:
        """Called when the application closes or the module is reloaded."""
        self.setParameterNode(None)
        self.removeObservers()
        if self.panel is not None:
            self.panel.close()
        close_shared()

    def enter(self) -> None:
        """Called each time the user opens the module."""
        self.initializeParameterNode()

    def exit(self) -> None:
        """Called each time the user opens another module; a run continues."""

    def onSceneStartClose(self, *_: Any) -> None:
        """Called before the scene is closed: cancel the run and release the nodes."""
        self.setParameterNode(None)

    def onSceneEndClose(self, *_: Any) -> None:
        """Called after the scene was closed."""
        if getattr(self.parent, "isEntered", True):  # otherwise when the user comes back
            self.initializeParameterNode()

    def onSceneStartImport(self, *_: Any) -> None:
        """Called before a scene is loaded: selectors change one after another while its nodes arrive."""
        self.panel.forgetPair()

    def onSceneEndImport(self, *_: Any) -> None:
        """Called after a scene was loaded: its parameters and their nodes are present now."""
        if self._parameterNode is not None:
            self._parameterNode.Modified()  # the references were read before the nodes were there

    def initializeParameterNode(self) -> None:
        """Show the parameters of the current scene."""
        if self._parameterNode is None or not slicer.mrmlScene.IsNodePresent(self._parameterNode.parameterNode):
            self.setParameterNode(self.logic.getParameterNode())

    def setParameterNode(self, parameterNode: LightweightRegistrationParameterNode | None) -> None:
        """Connect the widgets to a parameter node, or to none."""
        if self._parameterNode is not None:
            self._parameterNode.disconnectGui(self._guiTag)
            self.removeObserver(self._parameterNode, vtk.vtkCommand.ModifiedEvent, self.onParameterNodeModified)
        self._parameterNode = parameterNode
        if parameterNode is not None:
            self._guiTag = parameterNode.connectGui(self.ui)
            self.addObserver(parameterNode, vtk.vtkCommand.ModifiedEvent, self.onParameterNodeModified)
        if self.panel is not None:
            self.panel.setParameterNode(parameterNode)

    @vtk.calldata_type(vtk.VTK_OBJECT)
    def onNodeAboutToBeRemoved(self, _caller: Any, _event: str, node: Any) -> None:
        """Called before a node is removed: Slicer's selectors go to a neighbour of a node that disappears."""
        if self._parameterNode is not None and not slicer.mrmlScene.IsBatchProcessing():
            for name in self._parameterNode.allParameters:
                if getattr(self._parameterNode, name) is node:
                    setattr(self._parameterNode, name, None)

    def onParameterNodeModified(self, *_: Any) -> None:
        """Called when a parameter or the scene was changed."""
        if self.panel is not None and not slicer.mrmlScene.IsBatchProcessing():
            self.panel.updateGUIFromParameterNode()
