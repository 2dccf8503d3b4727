"""Creates and fills output nodes. Everything here runs on the main thread, after all arrays have arrived."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import slicer

from .transforms import Field, write_field
from .volumes import matrix_of, voxel_to_local

REPORT_ATTRIBUTE = "LightweightRegistration.Report"
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
    """What a registration left in the scene; None where it was not asked for.

    Attributes:
        warped: the moving volume on the fixed volume's grid.
        transform: fixed points -> moving points, from parent: a node under it moves from moving to fixed.
        jacobian: local volume change on the fixed grid; 1 is none, 0 or less is folding.
        inverse: the other way; a node under it moves from fixed to moving.
        report: similarity before and after, folding, seconds, device, model, versions, warnings.
    """

    warped: slicer.vtkMRMLScalarVolumeNode | None = None
    transform: slicer.vtkMRMLTransformNode | None = None
    jacobian: slicer.vtkMRMLScalarVolumeNode | None = None
    inverse: slicer.vtkMRMLTransformNode | None = None
    report: dict[str, Any] = field(default_factory=dict)


def speaking_name(output: str, fixed: slicer.vtkMRMLNode | None, moving: slicer.vtkMRMLNode | None) -> str:
    """The name that a new output node gets."""
    names = [node.GetName() if node is not None else role for node, role in ((fixed, "fixed"), (moving, "moving"))]
    return NAMES[output].format(fixed=names[0], moving=names[1])


def new_node(class_name: str, name: str) -> slicer.vtkMRMLNode:
    """A node with a name of its own."""
    return slicer.mrmlScene.AddNewNodeByClass(class_name, slicer.mrmlScene.GenerateUniqueName(name))


def fill_volume(
    node: slicer.vtkMRMLVolumeNode, values: np.ndarray, like: slicer.vtkMRMLVolumeNode
) -> slicer.vtkMRMLVolumeNode:
    """Voxels on another volume's grid, under the same parent transform."""
    if values.dtype in (np.int64, np.uint64):  # Slicer does not draw these
        values = values.astype(np.float64)
    with slicer.util.NodeModify(node):
        node.SetIJKToRASMatrix(matrix_of(voxel_to_local(like)))
        slicer.util.updateVolumeFromArray(node, values)
        node.SetAndObserveTransformNodeID(like.GetTransformNodeID())
    if node.GetDisplayNode() is None:
        node.CreateDefaultDisplayNodes()
    return node


def copy_grey_levels(source: slicer.vtkMRMLVolumeNode, target: slicer.vtkMRMLVolumeNode) -> None:
    """Show a volume with another one's window, level and colours, so that flickering compares like with like."""
    shown, display = source.GetDisplayNode(), target.GetDisplayNode()
    if shown is None or display is None:
        return
    with slicer.util.NodeModify(display):
        display.SetAndObserveColorNodeID(shown.GetColorNodeID())
        if all(node.IsA("vtkMRMLScalarVolumeDisplayNode") for node in (shown, display)):  # not so for labels
            display.SetAutoWindowLevel(False)
            display.SetWindowLevel(shown.GetWindow(), shown.GetLevel())


def create(
    wanted: dict[str, bool | slicer.vtkMRMLNode | None],
    arrays: dict[str, np.ndarray | Field],
    fixed: slicer.vtkMRMLVolumeNode,
    moving: slicer.vtkMRMLVolumeNode,
    report: dict[str, Any],
) -> Outputs:
    """Fill the nodes that were given and create those that were only asked for.

    Args:
        wanted: by output: a node to fill, True for a new one, None or False for none.
        arrays: by output: (k, j, i) values on the fixed grid, or a Field.
        fixed, moving: the inputs, for names, grids and roles.
        report: kept on every output node, so that it is saved in the scene.
    """
    outputs, new = Outputs(report=report), []
    try:
        for output, want in wanted.items():
            if not want:
                continue
            if want is True:
                want = new_node(CLASSES[output], speaking_name(output, fixed, moving))
                new.append(want)
            given = arrays[output]
            if isinstance(given, Field):
                write_field(want, given)
                record_roles(want, *((moving, fixed) if output == "inverse" else (fixed, moving)))
            else:
                fill_volume(want, given, fixed)
                if output == "warped":
                    copy_grey_levels(moving, want)
            keep_report(want, report)
            setattr(outputs, output, want)
    except BaseException:
        for node in new:
            slicer.mrmlScene.RemoveNode(node)
        raise
    return outputs


def record_roles(
    transform: slicer.vtkMRMLTransformNode, fixed: slicer.vtkMRMLVolumeNode, moving: slicer.vtkMRMLVolumeNode
) -> None:
    """Note on a transform node which volumes it was computed from."""
    transform.SetNodeReferenceID(transform.GetFixedNodeReferenceRole(), fixed.GetID())
    transform.SetNodeReferenceID(transform.GetMovingNodeReferenceRole(), moving.GetID())


def keep_report(node: slicer.vtkMRMLNode, report: dict[str, Any]) -> None:
    """Write the report on a node, so that it is saved with the scene."""
    node.SetAttribute(REPORT_ATTRIBUTE, json.dumps(report))


def report_of(*nodes: slicer.vtkMRMLNode | None) -> dict[str, Any]:
    """The report that the first of some output nodes carries, empty without one."""
    for node in nodes:
        text = node.GetAttribute(REPORT_ATTRIBUTE) if node is not None else None
        if text:
            try:
                return json.loads(text)
            except ValueError:
                continue
    return {}
