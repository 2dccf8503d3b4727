"""Slice views, rendered off screen with Slicer's own slice logic and displayable managers."""

from __future__ import annotations

import functools
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import slicer
import vtk
from vtk.util import numpy_support

MANAGERS = (
    "vtkMRMLVolumeGlyphSliceDisplayableManager",
    "vtkMRMLModelSliceDisplayableManager",
    "vtkMRMLTransformsDisplayableManager2D",
    "vtkMRMLSegmentationsDisplayableManager2D",
    "vtkMRMLMarkupsDisplayableManager",
    "vtkMRMLColorLegendDisplayableManager",
)
COLOURS = {"Red": "Axial", "Yellow": "Sagittal", "Green": "Coronal"}


@functools.cache
def can_render() -> str:
    """Empty if this machine can render off screen, the reason if not (asked in another process: VTK may abort)."""
    code = "import vtk; w = vtk.vtkRenderWindow(); w.SetOffScreenRendering(1); w.Render(); print(w.GetClassName())"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, encoding="utf-8", env=os.environ)
    if done.returncode == 0 and done.stdout.strip():
        return ""
    return f"VTK cannot render off screen here: {(done.stderr or done.stdout).strip()[-200:]}"


def add_views() -> None:
    """The three slice nodes of Slicer's layout; call after each `application.clear`."""
    scene = slicer.mrmlScene
    slicer.vtkMRMLSliceNode.AddDefaultSliceOrientationPresets(scene)
    logics = slicer.app.applicationLogic().GetSliceLogics()
    logics.RemoveAllItems()
    for name, orientation in COLOURS.items():
        node = scene.AddNewNodeByClass("vtkMRMLSliceNode", name)
        node.SetLayoutName(name)
        node.SetOrientation(orientation)
        logic = slicer.vtkMRMLSliceLogic()
        logic.SetMRMLApplicationLogic(slicer.app.applicationLogic())
        logic.SetMRMLScene(scene)
        logic.SetSliceNode(node)
        logics.AddItem(logic)


class SliceView:
    """One slice view with a picture."""

    def __init__(self, name: str, width: int = 400, height: int = 400):
        """A view of `add_views` by its name (Red, Yellow, Green)."""
        logics = slicer.app.applicationLogic().GetSliceLogics()
        found = [logics.GetItemAsObject(n) for n in range(logics.GetNumberOfItems())]
        self.logic = next(logic for logic in found if logic.GetSliceNode().GetLayoutName() == name)
        self.node = self.logic.GetSliceNode()
        self.renderer = vtk.vtkRenderer()
        self.window = vtk.vtkRenderWindow()
        self.window.SetOffScreenRendering(1)
        self.window.SetMultiSamples(0)
        self.window.SetSize(width, height)
        self.window.AddRenderer(self.renderer)
        self._interactor = vtk.vtkRenderWindowInteractor()
        self._interactor.SetRenderWindow(self.window)
        factory = slicer.vtkMRMLSliceViewDisplayableManagerFactory.GetInstance()
        factory.SetMRMLApplicationLogic(slicer.app.applicationLogic())
        for manager in MANAGERS:
            if not factory.IsDisplayableManagerRegistered(manager):
                factory.RegisterDisplayableManager(manager)
        self._group = factory.InstantiateDisplayableManagers(self.renderer)
        self._group.SetMRMLDisplayableNode(self.node)
        self.logic.SetDisplayableManagerGroup(self._group)
        self._mapper = vtk.vtkImageMapper()
        self._mapper.SetColorWindow(255)
        self._mapper.SetColorLevel(127.5)
        actor = vtk.vtkActor2D()
        actor.SetMapper(self._mapper)
        actor.GetProperty().SetDisplayLocationToBackground()
        self.renderer.AddViewProp(actor)
        self.node.SetDimensions(width, height, 1)

    def fit(self) -> None:
        """Make all of the background visible."""
        self.logic.FitSliceToBackground()

    def picture(self) -> np.ndarray:
        """(height, width, 3) uint8, the first row on top."""
        connection = self.logic.GetImageDataConnection()
        empty = connection is None or self.logic.GetSliceCompositeNode().GetBackgroundVolumeID() is None
        if empty:
            self._mapper.SetInputData(_black())
        else:
            self._mapper.SetInputConnection(connection)
        self.window.Render()
        grab = vtk.vtkWindowToImageFilter()
        grab.SetInput(self.window)
        grab.ReadFrontBufferOff()
        grab.Update()
        out = grab.GetOutput()
        values = numpy_support.vtk_to_numpy(out.GetPointData().GetScalars())
        return values.reshape(out.GetDimensions()[1], out.GetDimensions()[0], 3)[::-1].copy()

    def close(self) -> None:
        """Let go of the scene, before it is cleared."""
        self._group.SetMRMLDisplayableNode(None)
        self.window.Finalize()


def _black() -> Any:
    image = vtk.vtkImageData()
    image.SetDimensions(1, 1, 1)
    image.AllocateScalars(vtk.VTK_UNSIGNED_CHAR, 3)
    return image


def save(picture: np.ndarray, path: Path) -> None:
    """Write a picture as PNG."""
    from matplotlib import image

    image.imsave(path, picture)
