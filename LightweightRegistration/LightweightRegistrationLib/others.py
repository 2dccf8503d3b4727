"""Bringing along what belongs to one of the two scans: other volumes, labelmaps, segmentations, markups, models.

"to fixed" takes what belongs to the moving scan onto the fixed one, "to moving" the other way. Images are resampled in
the other process (labels by nearest neighbour) onto the grid of the scan they go to; points are moved at once.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import slicer
import vtk
from vtk.util import numpy_support

from .background import Worker
from .core import InputError
from .jobs import Job, described, transform_request
from .outputs import copy_grey_levels, fill_volume, new_node
from .transforms import for_worker
from .volumes import Picture, array_of, matrix_of, parent_to_world, picture, voxel_to_local

DIRECTIONS = ("to fixed", "to moving")
BINARY = "Binary labelmap"


def ends_of(transform: slicer.vtkMRMLTransformNode) -> tuple[slicer.vtkMRMLVolumeNode, slicer.vtkMRMLVolumeNode]:
    """The fixed and the moving volume that a transform was computed from.

    Raises:
        InputError: no transform, or it does not know them or they were removed.
    """
    if transform is None:
        raise InputError("a transform must be chosen, got none: register two volumes first")
    found = [
        transform.GetNodeReference(role)
        for role in (transform.GetFixedNodeReferenceRole(), transform.GetMovingNodeReferenceRole())
    ]
    for node, role in zip(found, ("fixed", "moving"), strict=True):
        if node is None:
            raise InputError(
                f"the transform must know its {role} volume, got '{transform.GetName()}', whose {role} volume is not "
                "in the scene"
            )
    return found[0], found[1]


class OtherJob(Job):
    """One node brought along through a transform."""

    def __init__(
        self, worker: Worker, node: slicer.vtkMRMLNode, transform: slicer.vtkMRMLTransformNode, direction: str
    ):
        """Nothing is started yet.

        Args:
            worker: the process.
            node: scalar volume, labelmap, segmentation, markups or model.
            transform: the transform node of a registration.
            direction: "to fixed" for what belongs to the moving volume, "to moving" for what belongs to the fixed one.
        """
        super().__init__(worker)
        self._node, self._transform, self._direction = node, transform, direction
        self._target: slicer.vtkMRMLVolumeNode | None = None
        self._layers: list[Layer] = []

    def start(self) -> None:
        """Check, and start; points and surfaces are done at once.

        Raises:
            InputError: a node that cannot be brought along.
        """
        if self._direction not in DIRECTIONS:
            raise InputError(f"direction must be one of {DIRECTIONS}, got {self._direction!r}")
        fixed, moving = ends_of(self._transform)
        self._target = fixed if self._direction == "to fixed" else moving
        node = self._node
        if node is None:
            raise InputError("something to bring along must be chosen, got none")
        if node.IsA("vtkMRMLVolumeNode"):
            nearest = node.IsA("vtkMRMLLabelMapVolumeNode")
            item = (_label_picture(node) if nearest else picture(node, "volume", self._transform)), nearest
            self._send([item], fixed)
        elif node.IsA("vtkMRMLSegmentationNode"):
            self._layers = layers_of(node)
            self._send([(layer.picture, True) for layer in self._layers], fixed)
        else:
            self.outputs = moved_points(node, self._transform, self._direction, self._name())
            self.finished = True

    def done(self, event: dict[str, Any]) -> None:
        """Create the new node."""
        arrays = [self._array(name) for name in event["items"]]
        self._end()
        if self._layers:
            self.outputs = self._segmentation(arrays)
            return
        new = new_node(self._node.GetClassName(), self._name())
        fill_volume(new, arrays[0], self._target)
        copy_grey_levels(self._node, new)
        self.outputs = new

    def _name(self) -> str:
        return f"{self._node.GetName()} on {self._target.GetName()}"

    def _send(self, items: list[tuple[Picture, bool]], fixed: slicer.vtkMRMLVolumeNode) -> None:
        target = picture(self._target, "volume to resample to", self._transform)
        fixed_picture = picture(fixed, "fixed volume", self._transform)
        self._inputs = [self._node, self._target]
        transform, arrays = transform_request(for_worker(self._transform, fixed_picture), "transform.npy")
        described_items = []
        for n, (shown, nearest) in enumerate(items):
            arrays[f"item{n}.npy"] = shown.values
            how = {"interpolation": "nearest" if nearest else "linear"}
            described_items.append({**described(shown, f"item{n}.npy"), **how})
        request = {
            "do": "warp",
            "transform": transform,
            "inverse": self._direction == "to moving",
            "fixed": described(fixed_picture, ""),
            "reference": described(target, ""),
            "items": described_items,
        }
        self.send(request, arrays)

    def _segmentation(self, arrays: list[np.ndarray]) -> slicer.vtkMRMLSegmentationNode:
        new = new_node("vtkMRMLSegmentationNode", self._name())
        new.SetAndObserveTransformNodeID(self._target.GetTransformNodeID())
        new.SetReferenceImageGeometryParameterFromVolumeNode(self._target)
        source, target = self._node.GetSegmentation(), new.GetSegmentation()
        target.SetSourceRepresentationName(BINARY)
        warped = {}
        for layer, values in zip(self._layers, arrays, strict=True):
            data = oriented_image(values, voxel_to_local(self._target))
            warped.update(dict.fromkeys(layer.segments, data))
        ids = vtk.vtkStringArray()
        source.GetSegmentIDs(ids)
        for n in range(ids.GetNumberOfValues()):
            name = ids.GetValue(n)
            if name not in warped:
                continue
            segment = slicer.vtkSegment()
            segment.DeepCopyMetadata(source.GetSegment(name))
            segment.SetLabelValue(self._layer_value(name))
            segment.AddRepresentation(BINARY, warped[name])
            target.AddSegment(segment, name)
        new.CreateDefaultDisplayNodes()
        return new

    def _layer_value(self, segment: str) -> int:
        return next(layer.segments[segment] for layer in self._layers if segment in layer.segments)


@dataclass(frozen=True)
class Layer:
    """Segments that share one labelmap.

    Attributes:
        picture: the labelmap in world coordinates.
        segments: label value by segment id.
    """

    picture: Picture
    segments: dict[str, int]


def layers_of(node: slicer.vtkMRMLSegmentationNode) -> list[Layer]:
    """The labelmaps of a segmentation; surfaces are converted in a copy.

    Raises:
        InputError: nothing segmented, or a non-linear parent transform.
    """
    world = parent_to_world(node, "segmentation")
    segmentation = node.GetSegmentation()
    if segmentation.GetNumberOfSegments() and not segmentation.ContainsRepresentation(BINARY):
        copy = slicer.vtkSegmentation()
        copy.DeepCopy(segmentation)
        copy.CreateRepresentation(BINARY)
        segmentation = copy
    layers = []
    for n in range(segmentation.GetNumberOfLayers(BINARY)):
        data = segmentation.GetLayerDataObject(n, BINARY)
        if data is None or data.GetPointData().GetScalars() is None or min(data.GetDimensions()) < 1:
            continue
        matrix = vtk.vtkMatrix4x4()
        data.GetImageToWorldMatrix(matrix)
        start = np.eye(4)
        start[:3, 3] = data.GetExtent()[::2]
        values = numpy_support.vtk_to_numpy(data.GetPointData().GetScalars()).reshape(data.GetDimensions()[::-1])
        values, start = _at_least(values, start)
        ids = segmentation.GetSegmentIDsForLayer(n, BINARY)
        segments = {name: segmentation.GetSegment(name).GetLabelValue() for name in ids}
        layers.append(Layer(Picture(values, world @ array_of(matrix) @ start), segments))
    if not layers:
        raise InputError(f"the segmentation must hold a segment, got '{node.GetName()}' without any voxel")
    return layers


def _at_least(values: np.ndarray, start: np.ndarray, count: int = 4) -> tuple[np.ndarray, np.ndarray]:
    """Room around a small labelmap: resampling takes no image of fewer than `count` voxels along an axis."""
    room = [max(0, count - n) for n in values.shape]
    shift = np.eye(4)
    shift[:3, 3] = [-(r // 2) for r in room[::-1]]
    return np.pad(values, [(r // 2, r - r // 2) for r in room]), start @ shift


def _label_picture(node: slicer.vtkMRMLLabelMapVolumeNode) -> Picture:
    if node.GetImageData() is None or min(node.GetImageData().GetDimensions()) < 1:
        raise InputError(f"the labelmap must hold voxels, got '{node.GetName()}', which is empty")
    values, start = _at_least(slicer.util.arrayFromVolume(node), np.eye(4))
    return Picture(values, parent_to_world(node, "labelmap") @ voxel_to_local(node) @ start)


def oriented_image(values: np.ndarray, to_local: np.ndarray) -> slicer.vtkOrientedImageData:
    """(k, j, i) labels as what segments hold."""
    data = slicer.vtkOrientedImageData()
    data.SetDimensions(*values.shape[::-1])
    scalars = numpy_support.numpy_to_vtk(np.ascontiguousarray(values).ravel(), deep=True)
    data.GetPointData().SetScalars(scalars)
    data.SetGeometryFromImageToWorldMatrix(matrix_of(to_local))
    return data


def moved_points(
    node: slicer.vtkMRMLTransformableNode, transform: slicer.vtkMRMLTransformNode, direction: str, name: str
) -> slicer.vtkMRMLTransformableNode:
    """A copy of markups or of a model, moved through a transform.

    Raises:
        InputError: a node that cannot be bent.
    """
    if not node.IsA("vtkMRMLTransformableNode") or not node.CanApplyNonLinearTransforms():
        raise InputError(
            f"only volumes, segmentations, markups of points and models can be brought along, got '{node.GetName()}', "
            f"a {node.GetNodeTagName()} node"
        )
    copy = new_node(node.GetClassName(), name)
    own_name = copy.GetName()
    copy.Copy(node)
    copy.SetName(own_name)
    copy.HardenTransform()
    general = vtk.vtkGeneralTransform()
    to_world = (transform, None) if direction == "to fixed" else (None, transform)
    slicer.vtkMRMLTransformNode.GetTransformBetweenNodes(*to_world, general)
    copy.ApplyTransform(general)
    if copy.GetNumberOfDisplayNodes() == 0 or copy.GetDisplayNode() is node.GetDisplayNode():
        copy.RemoveNodeReferenceIDs(copy.GetDisplayNodeReferenceRole())
        copy.CreateDefaultDisplayNodes()
    return copy
