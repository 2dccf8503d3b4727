"""The list of nodes that can be brought along, with a check box each."""

from __future__ import annotations

from typing import Any

import qt
import slicer

CLASSES = (
    "vtkMRMLScalarVolumeNode",
    "vtkMRMLLabelMapVolumeNode",
    "vtkMRMLSegmentationNode",
    "vtkMRMLMarkupsNode",
    "vtkMRMLModelNode",
)


class OthersList:
    """Shows in a list widget what the scene holds beside a registration's own volumes."""

    def __init__(self, widget: Any):
        """Store a QListWidget."""
        self._widget = widget
        self._shown: list[tuple[str, str]] = []

    def update(self, without: set[slicer.vtkMRMLNode | None]) -> None:
        """List the nodes of the scene that can be warped, but for some; check marks stay."""
        without_ids = {node.GetID() for node in without if node is not None}
        nodes = [node for name in CLASSES for node in slicer.util.getNodesByClass(name) if _can_be_warped(node)]
        wanted = {node.GetID(): node.GetName() for node in nodes if node.GetID() not in without_ids}
        if list(wanted.items()) == self._shown:
            return
        checked = {node.GetID() for node in self.checked()}
        self._shown = list(wanted.items())
        self._widget.clear()
        for node_id, name in self._shown:
            item = qt.QListWidgetItem(name)
            item.setCheckState(qt.Qt.Checked if node_id in checked else qt.Qt.Unchecked)
            self._widget.addItem(item)

    def checked(self) -> list[slicer.vtkMRMLNode]:
        """Return the checked nodes that are still in the scene."""
        ids = [node_id for n, (node_id, _) in enumerate(self._shown) if self._state(n) == qt.Qt.Checked]
        return [node for node in map(slicer.mrmlScene.GetNodeByID, ids) if node is not None]

    def uncheck(self, node: slicer.vtkMRMLNode) -> None:
        """Take away the check mark of a node."""
        for n, (node_id, _) in enumerate(self._shown):
            if node_id == node.GetID():
                self._widget.item(n).setCheckState(qt.Qt.Unchecked)

    def _state(self, row: int) -> Any:
        return self._widget.item(row).checkState()


def _can_be_warped(node: slicer.vtkMRMLNode) -> bool:
    if node.GetHideFromEditors():
        return False
    return not node.IsA("vtkMRMLMarkupsNode") or bool(node.CanApplyNonLinearTransforms())
