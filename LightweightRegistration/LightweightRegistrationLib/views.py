"""The slice views: overlay and fade, deformation grid, Jacobian colours and legend, folding contours, early view.

Works on MRML nodes alone, so it draws the same with the application and without.
"""

from __future__ import annotations

import numpy as np
import slicer
import vtk

from .outputs import copy_grey_levels, fill_volume, new_node
from .transforms import Field, write_field
from .volumes import Picture, matrix_of, picture

COLOURS_TAG = "LightweightRegistrationJacobianColours"
# shrinking blue, unchanged near white, growing red: readable with red-green blindness
DIVERGING = ((0.02, 0.19, 0.58), (0.26, 0.58, 0.82), (0.97, 0.97, 0.97), (0.95, 0.55, 0.30), (0.65, 0.05, 0.10))
FOLDING_COLOUR = (1.0, 0.0, 1.0)
GRID_COLOUR = (1.0, 0.85, 0.2)
CHECKER_MM = 25.0


def composites() -> list[slicer.vtkMRMLSliceCompositeNode]:
    """What each slice view shows."""
    return slicer.util.getNodesByClass("vtkMRMLSliceCompositeNode")


def show(
    background: slicer.vtkMRMLVolumeNode | None, foreground: slicer.vtkMRMLVolumeNode | None, opacity: float
) -> None:
    """Put two volumes over each other in every slice view.

    A view that showed another background is moved so that all of the new one is visible; one that showed this one
    already stays where the user is looking.

    Args:
        background, foreground: volumes, None for an empty layer.
        opacity: of the foreground, 0 to 1.
    """
    fit = background is not None and any(c.GetBackgroundVolumeID() != background.GetID() for c in composites())
    for composite in composites():
        with slicer.util.NodeModify(composite):
            composite.SetBackgroundVolumeID(background.GetID() if background is not None else None)
            composite.SetForegroundVolumeID(foreground.GetID() if foreground is not None else None)
            composite.SetForegroundOpacity(opacity)
    if fit:
        fit_views()


def fit_views() -> None:
    """Make all of the background visible in every slice view."""
    logics = slicer.app.applicationLogic().GetSliceLogics()
    for n in range(logics.GetNumberOfItems() if logics is not None else 0):
        logics.GetItemAsObject(n).FitSliceToBackground()


def set_opacity(opacity: float) -> None:
    """Fade between background (0) and foreground (1) in every slice view."""
    for composite in composites():
        composite.SetForegroundOpacity(opacity)


# Deformation grid


def show_grid(
    transform: slicer.vtkMRMLTransformNode | None,
    region: slicer.vtkMRMLVolumeNode | None,
    visible: bool,
    spacing_mm: float,
) -> None:
    """Draw the deformation grid of a transform over the slices of a volume, or stop drawing it."""
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
    """The grid's own colours tell the length of the displacement, which is mostly how the patient lay."""
    function = vtk.vtkColorTransferFunction()
    for length_mm in (0.0, 1000.0):
        function.AddRGBPoint(length_mm, *colour)
    return function


# Jacobian map


def jacobian_colours() -> slicer.vtkMRMLProceduralColorNode:
    """The diverging colours of the Jacobian map, made once in a scene; `paint_jacobian` sets their range."""
    node = slicer.mrmlScene.GetSingletonNode(COLOURS_TAG, "vtkMRMLProceduralColorNode")
    if node is None:
        node = slicer.mrmlScene.CreateNodeByClass("vtkMRMLProceduralColorNode")
        node.UnRegister(None)
        node.SetSingletonTag(COLOURS_TAG)
        node.SetName("Jacobian (blue shrinks, red grows)")
        node.SetAttribute("Category", "Registration")
        node = slicer.mrmlScene.AddNode(node)
    return node


def paint_jacobian(volume: slicer.vtkMRMLScalarVolumeNode, reach: float) -> None:
    """Colour a Jacobian map from 1 - reach (blue) over 1 (white) to 1 + reach (red)."""
    if volume.GetDisplayNode() is None:
        volume.CreateDefaultDisplayNodes()
    colours, display = jacobian_colours(), volume.GetDisplayNode()
    low, high = 1.0 - reach, 1.0 + reach
    function = vtk.vtkDiscretizableColorTransferFunction()
    for position, colour in zip(np.linspace(low, high, len(DIVERGING)), DIVERGING, strict=True):
        function.AddRGBPoint(position, *colour)
    colours.SetAndObserveColorTransferFunction(function)
    with slicer.util.NodeModify(display):
        display.SetAndObserveColorNodeID(colours.GetID())
        display.SetAutoWindowLevel(False)
        display.SetWindowLevelMinMax(low, high)
        display.SetInterpolate(True)


def show_legend(volume: slicer.vtkMRMLScalarVolumeNode | None, visible: bool) -> None:
    """Draw the colour legend of a Jacobian map in the slice views that show it."""
    if volume is None:
        return
    logic = slicer.vtkSlicerColorLogic
    legend = logic.GetColorLegendDisplayNode(volume)
    if legend is None:
        if not visible:
            return
        legend = logic.AddDefaultColorLegendDisplayNode(volume)
        legend.SetTitleText("Volume change\n(Jacobian)")
        legend.SetNumberOfLabels(5)
        legend.SetLabelFormat("%.2f")
        legend.GetLabelTextProperty().SetFontSize(14)
        legend.GetTitleTextProperty().SetFontSize(14)
        legend.SetSize(0.14, 0.5)
        legend.SetPosition(0.96, 0.5)
    legend.SetVisibility(visible)


def folding_contours(
    jacobian: slicer.vtkMRMLScalarVolumeNode | None, visible: bool
) -> slicer.vtkMRMLSegmentationNode | None:
    """Outline the voxels whose Jacobian determinant is 0 or less, or hide the outline.

    Returns:
        The segmentation that draws it, None where nothing folds or it was never drawn.
    """
    if jacobian is None:
        return None
    node = jacobian.GetNodeReference("LightweightRegistrationFolding")
    if not visible:
        if node is not None and node.GetDisplayNode() is not None:
            node.GetDisplayNode().SetVisibility(False)
        return node
    folds = slicer.util.arrayFromVolume(jacobian) <= 0
    if not folds.any():
        if node is not None:
            slicer.mrmlScene.RemoveNode(node)
        return None
    if node is None:
        node = new_node("vtkMRMLSegmentationNode", f"{jacobian.GetName()} folding")
        node.CreateDefaultDisplayNodes()
        jacobian.SetNodeReferenceID("LightweightRegistrationFolding", node.GetID())
    labels = slicer.vtkMRMLLabelMapVolumeNode()
    slicer.mrmlScene.AddNode(labels)
    try:
        fill_volume(labels, folds.astype(np.uint8), jacobian)
        node.GetSegmentation().RemoveAllSegments()
        slicer.vtkSlicerSegmentationsModuleLogic.ImportLabelmapToSegmentationNode(labels, node)
    finally:
        slicer.mrmlScene.RemoveNode(labels)
    node.SetAndObserveTransformNodeID(jacobian.GetTransformNodeID())
    segment = node.GetSegmentation().GetNthSegment(0)
    segment.SetName("Folding")
    segment.SetColor(*FOLDING_COLOUR)
    display = node.GetDisplayNode()
    display.SetVisibility(True)
    display.SetVisibility2DFill(False)
    display.SetVisibility2DOutline(True)
    display.SetSliceIntersectionThickness(2)
    return node


# Checkerboard


def checkerboard(
    fixed: slicer.vtkMRMLVolumeNode, warped: slicer.vtkMRMLVolumeNode, node: slicer.vtkMRMLScalarVolumeNode | None
) -> slicer.vtkMRMLScalarVolumeNode:
    """Fixed and warped in turn in cubes of 25 mm, each in the grey levels that it is shown with.

    Args:
        fixed, warped: volumes on one grid.
        node: an earlier checkerboard to fill again.
    """
    shown = [_grey(volume) for volume in (fixed, warped)]
    spacing = np.array(fixed.GetSpacing())[::-1]
    cubes = [np.floor(np.arange(n) * s / CHECKER_MM).astype(int) for n, s in zip(shown[0].shape, spacing, strict=True)]
    turn = (cubes[0][:, None, None] + cubes[1][None, :, None] + cubes[2][None, None, :]) % 2 == 1
    values = np.where(turn, shown[1], shown[0])
    if node is None:
        node = temporary("vtkMRMLScalarVolumeNode", "Checkerboard")
    fill_volume(node, values, fixed)
    display = node.GetDisplayNode()
    display.SetAutoWindowLevel(False)
    display.SetWindowLevelMinMax(0, 255)
    return node


def _grey(volume: slicer.vtkMRMLVolumeNode) -> np.ndarray:
    display = volume.GetDisplayNode()
    low, high = display.GetWindowLevelMin(), display.GetWindowLevelMax()
    values = slicer.util.arrayFromVolume(volume).astype(np.float32)
    return np.clip((values - low) * (255.0 / max(high - low, 1e-6)), 0, 255).astype(np.uint8)


def temporary(class_name: str, name: str) -> slicer.vtkMRMLNode:
    """A node that is neither listed in selectors nor saved with the scene."""
    node = slicer.mrmlScene.CreateNodeByClass(class_name)
    node.UnRegister(None)
    node.SetName(slicer.mrmlScene.GenerateUniqueName(name))
    node.SetHideFromEditors(True)
    node.SetSaveWithScene(False)
    return slicer.mrmlScene.AddNode(node)


def remove(node: slicer.vtkMRMLNode | None) -> None:
    """Remove a temporary node with its display node, if they are still in the scene."""
    if node is None or not slicer.mrmlScene.IsNodePresent(node):
        return
    display = node.GetDisplayNode()
    slicer.mrmlScene.RemoveNode(node)
    if display is not None and slicer.mrmlScene.IsNodePresent(display):
        slicer.mrmlScene.RemoveNode(display)


# Early view


class EarlyView:
    """The moving volume under a coarse transform, shown while the outputs are still being computed.

    Slicer then reslices only the slices that are shown. The moving volume's node is not touched: a hidden node that
    shares its voxels is shown in its place, and `remove` leaves the views as they were.
    """

    def __init__(
        self,
        fixed: slicer.vtkMRMLVolumeNode,
        moving: slicer.vtkMRMLVolumeNode,
        field: Field,
        opacity: float,
        ignored: slicer.vtkMRMLTransformNode | None = None,
    ):
        """Show it. For `ignored` see `volumes.picture`."""
        self._before = [
            (c, c.GetBackgroundVolumeID(), c.GetForegroundVolumeID(), c.GetForegroundOpacity()) for c in composites()
        ]
        shown: Picture = picture(moving, "moving volume", ignored)
        self.transform = temporary("vtkMRMLTransformNode", "Early transform")
        write_field(self.transform, field)
        self.volume = temporary("vtkMRMLScalarVolumeNode", f"{moving.GetName()} (early view)")
        self.volume.SetIJKToRASMatrix(matrix_of(shown.to_world))
        self.volume.SetAndObserveImageData(moving.GetImageData())
        self.volume.CreateDefaultDisplayNodes()
        copy_grey_levels(moving, self.volume)
        self.volume.SetAndObserveTransformNodeID(self.transform.GetID())
        show(fixed, self.volume, opacity)

    def remove(self) -> None:
        """Remove the hidden nodes and show what was shown before. Also when the scene was closed meanwhile."""
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
            remove(node)
        self.volume = self.transform = None
