"""Creates and fills output nodes. Runs on the main thread, after the worker process is done."""

from __future__ import annotations

import json
from collections.abc import Generator
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import slicer
import vtk

from .volume_nodes import matrix_of, new_image, voxel_to_local

REPORT_ATTRIBUTE = "LightweightRegistration.Report"
MADE_ATTRIBUTE = "LightweightRegistration.Made"  # the node's own id: a clone has another one
JACOBIAN_WINDOW = (0.5, 2.0)
NAMES = {
    "warped": "{moving} warped to {fixed}",
    "transform": "{moving} to {fixed}",
    "jacobian": "Jacobian of {moving} to {fixed}",
    "inverse": "{fixed} to {moving} (inverse)",
}
CLASSES = {
    "warped": "vtkMRMLScalarVolumeNode",
    "transform": "vtkMRMLTransformNode",
    "jacobian": "vtkMRMLScalarVolumeNode",
    "inverse": "vtkMRMLTransformNode",
}


@dataclass
class Outputs:
    """The output nodes of a registration; None for an output that was not requested.

    Attributes:
        warped: the moving volume on the fixed volume's grid.
        transform: fixed points -> moving points, from parent: a moving node under it is shown in the fixed space.
        jacobian: Jacobian determinant on the fixed grid: 1 is no volume change, 0 or less is folding.
        inverse: moving points -> fixed points: a fixed node under it is shown in the moving space.
        report: similarity before and after, folding, seconds, device, model, versions, warnings.
    """

    warped: slicer.vtkMRMLScalarVolumeNode | None = None
    transform: slicer.vtkMRMLTransformNode | None = None
    jacobian: slicer.vtkMRMLScalarVolumeNode | None = None
    inverse: slicer.vtkMRMLTransformNode | None = None
    report: dict[str, Any] = field(default_factory=dict)


def output_name(output: str, fixed: slicer.vtkMRMLNode | None, moving: slicer.vtkMRMLNode | None) -> str:
    """Return the name of a new output node."""
    names = [node.GetName() if node is not None else role for node, role in ((fixed, "fixed"), (moving, "moving"))]
    return NAMES[output].format(fixed=names[0], moving=names[1])


def new_node(class_name: str, name: str) -> slicer.vtkMRMLNode:
    """Add a node with a unique name."""
    return slicer.mrmlScene.AddNewNodeByClass(class_name, slicer.mrmlScene.GenerateUniqueName(name))


def new_temporary_node(class_name: str, name: str) -> slicer.vtkMRMLNode:
    """Add a node that is neither listed in selectors nor saved with the scene."""
    node = slicer.mrmlScene.CreateNodeByClass(class_name)
    node.UnRegister(None)
    node.SetName(slicer.mrmlScene.GenerateUniqueName(name))
    node.SetHideFromEditors(True)
    node.SetSaveWithScene(False)
    return slicer.mrmlScene.AddNode(node)


def remove_node(node: slicer.vtkMRMLNode | None) -> None:
    """Remove a node with its display nodes (a legend is one, too), if they are still in the scene."""
    if node is None or not slicer.mrmlScene.IsNodePresent(node):
        return
    count = node.GetNumberOfDisplayNodes() if node.IsA("vtkMRMLDisplayableNode") else 0
    displays = [node.GetNthDisplayNode(n) for n in range(count)]
    slicer.mrmlScene.RemoveNode(node)
    for display in displays:
        if display is not None and slicer.mrmlScene.IsNodePresent(display):
            slicer.mrmlScene.RemoveNode(display)


def fill_volume(
    node: slicer.vtkMRMLVolumeNode, voxels: np.ndarray | vtk.vtkImageData, like: slicer.vtkMRMLVolumeNode
) -> slicer.vtkMRMLVolumeNode:
    """Set a volume's voxels, and its grid and parent transform to those of another volume.

    Args:
        node: the volume; the image data that it has is replaced, not changed.
        voxels: (k, j, i) values, which are copied, or image data.
        like: the other volume.
    """
    if isinstance(voxels, np.ndarray):
        drawn = np.float64 if voxels.dtype in (np.int64, np.uint64) else voxels.dtype  # Slicer does not draw these
        image, view = new_image(voxels.shape, np.dtype(drawn))
        view[...] = voxels
        voxels = image
    with slicer.util.NodeModify(node):
        node.SetIJKToRASMatrix(matrix_of(voxel_to_local(like)))
        node.SetAndObserveImageData(voxels)
        node.SetAndObserveTransformNodeID(like.GetTransformNodeID())
    if node.GetDisplayNode() is None:
        node.CreateDefaultDisplayNodes()
    return node


def same_size(first: slicer.vtkMRMLVolumeNode, second: slicer.vtkMRMLVolumeNode) -> bool:
    """Return whether two volumes hold as many voxels along each axis."""
    images = first.GetImageData(), second.GetImageData()
    return None not in images and images[0].GetDimensions() == images[1].GetDimensions()


def prepare_display(node: slicer.vtkMRMLVolumeNode, window_min: float, window_max: float) -> None:
    """Give a volume a display with a fixed window before its voxels arrive: an automatic one costs seconds."""
    if node.GetDisplayNode() is None:
        node.CreateDefaultDisplayNodes()
    display = node.GetDisplayNode()
    if display is not None and display.IsA("vtkMRMLScalarVolumeDisplayNode"):
        with slicer.util.NodeModify(display):
            display.SetAutoWindowLevel(False)
            display.SetWindowLevelMinMax(window_min, window_max)


def displayed_range(volume: slicer.vtkMRMLVolumeNode) -> tuple[float, float]:
    """Return the values that are displayed black and white."""
    display = volume.GetDisplayNode()
    if display is not None and display.IsA("vtkMRMLScalarVolumeDisplayNode"):
        return display.GetWindowLevelMin(), display.GetWindowLevelMax()
    return volume.GetImageData().GetScalarRange()


def copy_window_level(source: slicer.vtkMRMLVolumeNode, target: slicer.vtkMRMLVolumeNode) -> None:
    """Display a volume with another one's window, level and colours, so that the two can be compared."""
    source_display, display = source.GetDisplayNode(), target.GetDisplayNode()
    if source_display is None or display is None:
        return
    with slicer.util.NodeModify(display):
        display.SetAndObserveColorNodeID(source_display.GetColorNodeID())
        if all(node.IsA("vtkMRMLScalarVolumeDisplayNode") for node in (source_display, display)):  # not so for labels
            display.SetAutoWindowLevel(False)
            display.SetWindowLevel(source_display.GetWindow(), source_display.GetLevel())


def create(
    wanted: dict[str, bool | slicer.vtkMRMLNode | None],
    data: dict[str, vtk.vtkImageData | vtk.vtkAbstractTransform],
    fixed: slicer.vtkMRMLVolumeNode,
    moving: slicer.vtkMRMLVolumeNode,
    report: dict[str, Any],
) -> Generator[None, None, Outputs]:
    """Fill the given output nodes and create the others that are wanted, one in each step: all of them, or none.

    Args:
        wanted: by output: a node to fill, True for a new one, None or False for none.
        data: by output: image data on the fixed grid, or a transform from parent.
        fixed, moving: the inputs, for names, grids and roles.
        report: written to every output node, so that it is saved in the scene.
    """
    outputs, new, filled = Outputs(report=report), [], []
    try:
        for output, want in wanted.items():
            if not want:
                continue
            if want is True:
                want = new_node(CLASSES[output], output_name(output, fixed, moving))
                new.append(want)
            else:
                filled.append(Content(want))
            if CLASSES[output] == "vtkMRMLTransformNode":
                take_out_of_parent(want, output, report)
                want.SetAndObserveTransformFromParent(data[output])
                record_roles(want, *((moving, fixed) if output == "inverse" else (fixed, moving)))
            else:
                prepare_display(want, *JACOBIAN_WINDOW)
                if output == "warped":
                    copy_window_level(moving, want)
                fill_volume(want, data[output], fixed)
            write_report(want, report)
            want.SetAttribute(MADE_ATTRIBUTE, want.GetID())
            setattr(outputs, output, want)
            yield
    except BaseException:
        for node in new:
            remove_node(node)
        for content in filled:
            content.restore()
        raise
    return outputs


def take_out_of_parent(node: slicer.vtkMRMLTransformNode, output: str, report: dict[str, Any]) -> None:
    """Make a transform node one of the world, as the fixed and moving points are; the report says so."""
    parent = node.GetParentTransformNode()
    if parent is not None:
        node.SetAndObserveTransformNodeID(None)
        text = f"'{node.GetName()}' was taken out of '{parent.GetName()}': under it the {output} would be wrong"
        report["warnings"] = [*report.get("warnings", []), text]


class Content:
    """What a node holds that a run fills, so that it can be given back."""

    def __init__(self, node: slicer.vtkMRMLNode):
        """Remember it, without a copy: filling replaces the data of a node by new ones."""
        self._node, self._parent = node, node.GetTransformNodeID()
        self._attributes = {name: node.GetAttribute(name) for name in (REPORT_ATTRIBUTE, MADE_ATTRIBUTE)}
        self._is_volume = node.IsA("vtkMRMLVolumeNode")
        self._data = node.GetImageData() if self._is_volume else node.GetTransformFromParent()
        self._matrix = matrix_of(voxel_to_local(node)) if self._is_volume else None

    def restore(self) -> None:
        """Give it back."""
        with slicer.util.NodeModify(self._node):
            if self._is_volume:
                self._node.SetIJKToRASMatrix(self._matrix)
                self._node.SetAndObserveImageData(self._data)
            else:
                self._node.SetAndObserveTransformFromParent(self._data)
            self._node.SetAndObserveTransformNodeID(self._parent)
            for name, value in self._attributes.items():
                self._node.SetAttribute(name, value)


def may_be_filled(node: slicer.vtkMRMLNode) -> bool:
    """Return whether filling a node loses nothing of the user's: this module made it, or it is empty."""
    if node.GetAttribute(MADE_ATTRIBUTE) == node.GetID():
        return True
    if node.IsA("vtkMRMLVolumeNode"):
        return node.GetImageData() is None
    matrix = vtk.vtkMatrix4x4()
    return bool(node.GetMatrixTransformToParent(matrix)) and matrix.IsIdentity()


def record_roles(
    transform: slicer.vtkMRMLTransformNode, fixed: slicer.vtkMRMLVolumeNode, moving: slicer.vtkMRMLVolumeNode
) -> None:
    """Record on a transform node which volumes it was computed from."""
    transform.SetNodeReferenceID(transform.GetFixedNodeReferenceRole(), fixed.GetID())
    transform.SetNodeReferenceID(transform.GetMovingNodeReferenceRole(), moving.GetID())


def write_report(node: slicer.vtkMRMLNode, report: dict[str, Any]) -> None:
    """Write the report to an attribute of a node, which is saved with the scene."""
    node.SetAttribute(REPORT_ATTRIBUTE, json.dumps(report))


def read_report(*nodes: slicer.vtkMRMLNode | None) -> dict[str, Any]:
    """Return the report of the first of the nodes that has one, else an empty dictionary."""
    for node in nodes:
        text = node.GetAttribute(REPORT_ATTRIBUTE) if node is not None else None
        if text:
            try:
                return json.loads(text)
            except ValueError:
                continue
    return {}
