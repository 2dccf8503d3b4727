"""Slice views: layers and opacity, deformation grid, Jacobian colours and legend, early view.

Needs only MRML nodes, so that it draws the same with the application and without.
"""

from __future__ import annotations

import numpy as np
import slicer
import vtk

from .outputs import copy_window_level, new_temporary_node, prepare_display, remove_node
from .transform_nodes import Field, write_field
from .volume_nodes import matrix_of, read_volume

COLOURS_TAG = "LightweightRegistrationJacobianColours"
# shrinking blue, unchanged near white, growing red: readable with red-green blindness
DIVERGING = ((0.02, 0.19, 0.58), (0.26, 0.58, 0.82), (0.97, 0.97, 0.97), (0.95, 0.55, 0.30), (0.65, 0.05, 0.10))
GRID_COLOUR = (1.0, 0.85, 0.2)


def slice_composites() -> list[slicer.vtkMRMLSliceCompositeNode]:
    """Return the composite nodes, which hold the layers of the slice views."""
    return slicer.util.getNodesByClass("vtkMRMLSliceCompositeNode")


def show_layers(
    background: slicer.vtkMRMLVolumeNode | None, foreground: slicer.vtkMRMLVolumeNode | None, opacity: float
) -> None:
    """Show two volumes as background and foreground of every slice view.

    The views are fitted to the background if one of them showed another volume; otherwise they keep their position.

    Args:
        background, foreground: volumes, None for an empty layer.
        opacity: of the foreground, 0 to 1.
    """
    fit = background is not None and any(c.GetBackgroundVolumeID() != background.GetID() for c in slice_composites())
    for composite in slice_composites():
        with slicer.util.NodeModify(composite):
            composite.SetBackgroundVolumeID(background.GetID() if background is not None else None)
            composite.SetForegroundVolumeID(foreground.GetID() if foreground is not None else None)
            composite.SetForegroundOpacity(opacity)
    if fit:
        fit_views()


def slice_logics() -> list[slicer.vtkMRMLSliceLogic]:
    """Return the logics of the slice views."""
    logics = slicer.app.applicationLogic().GetSliceLogics()
    return [logics.GetItemAsObject(n) for n in range(logics.GetNumberOfItems() if logics is not None else 0)]


def fit_views() -> None:
    """Fit every slice view to its background."""
    for logic in slice_logics():
        logic.FitSliceToBackground()


def set_opacity(opacity: float) -> None:
    """Fade between background (0) and foreground (1) in every slice view."""
    for composite in slice_composites():
        composite.SetForegroundOpacity(opacity)


# Deformation grid


def show_grid(
    transform: slicer.vtkMRMLTransformNode | None,
    region: slicer.vtkMRMLVolumeNode | None,
    visible: bool,
    spacing_mm: float,
) -> None:
    """Show or hide the deformation grid of a transform on the slices of a volume."""
    if transform is None:
        return
    if visible and transform.GetDisplayNode() is None:
        transform.CreateDefaultDisplayNodes()
    display = transform.GetDisplayNode()
    if display is None:
        return
    with slicer.util.NodeModify(display):
        display.SetVisualizationMode(display.VIS_MODE_GRID)
        display.SetAndObserveRegionNode(region)
        display.SetGridSpacingMm(spacing_mm)
        display.SetGridResolutionMm(max(1.0, spacing_mm / 4))
        display.SetColorMap(_one_colour(GRID_COLOUR))
        display.SetVisibility(visible)
        display.SetVisibility2D(visible)
        display.SetVisibility3D(False)


def _one_colour(colour: tuple[float, float, float]) -> vtk.vtkColorTransferFunction:
    """Return a colour map of one colour. Slicer's own shows the length of displacements, most of which is position."""
    function = vtk.vtkColorTransferFunction()
    for length_mm in (0.0, 1000.0):
        function.AddRGBPoint(length_mm, *colour)
    return function


# Jacobian map


def jacobian_colours() -> slicer.vtkMRMLProceduralColorNode:
    """Return the scene's diverging colour node for Jacobian maps; `color_jacobian` sets its range."""
    node = slicer.mrmlScene.GetSingletonNode(COLOURS_TAG, "vtkMRMLProceduralColorNode")
    if node is None:
        node = slicer.mrmlScene.CreateNodeByClass("vtkMRMLProceduralColorNode")
        node.UnRegister(None)
        node.SetSingletonTag(COLOURS_TAG)
        node.SetName("Jacobian (blue shrinks, red grows)")
        node.SetAttribute("Category", "Registration")
        node = slicer.mrmlScene.AddNode(node)
    return node


def color_jacobian(volume: slicer.vtkMRMLScalarVolumeNode, factor: float) -> None:
    """Colour a Jacobian map from 1 / factor (blue) over 1 (white) to factor (red), evenly in its logarithm."""
    if volume.GetDisplayNode() is None:
        volume.CreateDefaultDisplayNodes()
    colours, display = jacobian_colours(), volume.GetDisplayNode()
    low, high = 1.0 / factor, factor
    function = vtk.vtkDiscretizableColorTransferFunction()
    exponents, anchors = np.linspace(-1, 1, 33), np.linspace(-1, 1, len(DIVERGING))
    channels = [np.interp(exponents, anchors, channel) for channel in np.transpose(DIVERGING)]
    for position, *colour in zip(factor**exponents, *channels, strict=True):
        function.AddRGBPoint(position, *colour)
    colours.SetAndObserveColorTransferFunction(function)
    with slicer.util.NodeModify(display):
        display.SetAndObserveColorNodeID(colours.GetID())
        display.SetAutoWindowLevel(False)
        display.SetWindowLevelMinMax(low, high)
        display.SetInterpolate(True)


def show_legend(volume: slicer.vtkMRMLScalarVolumeNode | None, visible: bool) -> None:
    """Show or hide the colour legend of a Jacobian map, in one slice view."""
    if volume is None:
        return
    logic = slicer.vtkSlicerColorLogic
    legend = logic.GetColorLegendDisplayNode(volume)
    if legend is None:
        if not visible:
            return
        legend = logic.AddDefaultColorLegendDisplayNode(volume)
        legend.SetTitleText("Volume\nchange")
        legend.SetNumberOfLabels(4)  # 0.5, 1, 1.5, 2
        legend.SetLabelFormat("%.2f")
        legend.GetLabelTextProperty().SetFontSize(14)
        legend.GetTitleTextProperty().SetFontSize(14)
        legend.SetSize(0.14, 0.5)
        legend.SetPosition(0.98, 0.5)
        views = [logic.GetSliceNode() for logic in slice_logics()]
        views.sort(key=lambda view: view.GetOrientation() != "Axial")  # where a head leaves the sides free
        for view in views[:1]:
            legend.AddViewNodeID(view.GetID())
    legend.SetVisibility(visible)


# Early view


class EarlyView:
    """Shows the moving volume under a coarse transform while the outputs are still being computed.

    Slicer resamples only the slices on screen. The moving volume's node is not changed: a temporary node that shares
    its voxels is shown instead, and `remove` restores the views.
    """

    def __init__(
        self,
        fixed: slicer.vtkMRMLVolumeNode,
        moving: slicer.vtkMRMLVolumeNode,
        field: Field,
        opacity: float,
        ignored: slicer.vtkMRMLTransformNode | None = None,
    ):
        """Show it.

        Args:
            fixed, moving: the inputs of the registration.
            field: the coarse transform.
            opacity: of the foreground, 0 to 1.
            ignored: a parent transform of the moving volume that counts as absent.
        """
        self._before = [
            (node, node.GetBackgroundVolumeID(), node.GetForegroundVolumeID(), node.GetForegroundOpacity())
            for node in slice_composites()
        ]
        self.transform = self.volume = None
        try:
            self._show(fixed, moving, field, opacity, ignored)
        except BaseException:
            self.remove()
            raise

    def _show(
        self,
        fixed: slicer.vtkMRMLVolumeNode,
        moving: slicer.vtkMRMLVolumeNode,
        field: Field,
        opacity: float,
        ignored: slicer.vtkMRMLTransformNode | None,
    ) -> None:
        image = read_volume(moving, "moving volume", ignored)
        self.transform = new_temporary_node("vtkMRMLTransformNode", "Early transform")
        write_field(self.transform, field)
        self.volume = new_temporary_node("vtkMRMLScalarVolumeNode", f"{moving.GetName()} (early view)")
        self.volume.SetIJKToRASMatrix(matrix_of(image.to_world))
        prepare_display(self.volume, 0.0, 1.0)
        copy_window_level(moving, self.volume)
        self.volume.SetAndObserveImageData(moving.GetImageData())
        self.volume.SetAndObserveTransformNodeID(self.transform.GetID())
        show_layers(fixed, self.volume, opacity)

    def remove(self) -> None:
        """Remove the temporary nodes and restore the views; the scene may have been closed meanwhile."""
        scene = slicer.mrmlScene
        for composite, background, foreground, opacity in self._before:
            if not scene.IsNodePresent(composite):
                continue
            with slicer.util.NodeModify(composite):
                composite.SetBackgroundVolumeID(background)
                composite.SetForegroundVolumeID(foreground)
                composite.SetForegroundOpacity(opacity)
        self._before = []
        for node in (self.volume, self.transform):
            remove_node(node)
        self.volume = self.transform = None
