"""Warps other nodes through a registration transform: volumes, labelmaps, segmentations, markups and models.

The direction "to fixed" warps what belongs to the moving scan onto the fixed one, "to moving" the other way. The worker
process resamples images onto the grid of the target volume (labels by nearest neighbour); points are transformed here.
"""

from __future__ import annotations

from collections.abc import Generator
from dataclasses import dataclass
from typing import Any

import numpy as np
import slicer
import vtk
from vtk.util import numpy_support

from .background import Worker
from .jobs import Job, transform_request, volume_request
from .module_errors import InputError
from .outputs import copy_window_level, displayed_range, fill_volume, new_node, prepare_display
from .transform_nodes import read_transform
from .volume_nodes import (
    BINARY,
    MIN_VOXELS,
    WorldImage,
    array_of,
    matrix_of,
    parent_to_world,
    read_volume,
    voxel_to_local,
)

DIRECTIONS = ("to fixed", "to moving")


def registered_volumes(
    transform: slicer.vtkMRMLTransformNode,
) -> tuple[slicer.vtkMRMLVolumeNode, slicer.vtkMRMLVolumeNode]:
    """Return the fixed and the moving volume that a transform was computed from.

    Raises:
        InputError: there is no transform, or one of its volumes is not recorded or not in the scene.
    """
    if transform is None:
        raise InputError("a transform must be chosen, got none: register two volumes first")
    nodes = [
        transform.GetNodeReference(role)
        for role in (transform.GetFixedNodeReferenceRole(), transform.GetMovingNodeReferenceRole())
    ]
    for node, role in zip(nodes, ("fixed", "moving"), strict=True):
        if node is None:
            raise InputError(
                f"the transform must know its {role} volume, got '{transform.GetName()}', whose {role} volume is not "
                "in the scene"
            )
    return nodes[0], nodes[1]


class WarpNodeJob(Job):
    """Warps one node through a transform."""

    def __init__(
        self, worker: Worker, node: slicer.vtkMRMLNode, transform: slicer.vtkMRMLTransformNode, direction: str
    ):
        """Store the arguments; `start` reads the nodes.

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
        """Check the node; `poll` goes on with sending it. Points and surfaces are transformed at once.

        Raises:
            InputError: the node cannot be warped.
        """
        if self._direction not in DIRECTIONS:
            raise InputError(f"direction must be one of {DIRECTIONS}, got {self._direction!r}")
        fixed, moving = registered_volumes(self._transform)
        self._target = fixed if self._direction == "to fixed" else moving
        node = self._node
        if node is None:
            raise InputError("something to bring along must be chosen, got none")
        if node.IsA("vtkMRMLVolumeNode"):
            nearest = node.IsA("vtkMRMLLabelMapVolumeNode")
            item = (_read_labelmap(node) if nearest else read_volume(node, "volume", self._transform)), nearest
            self._steps = self._sending([item], fixed)
        elif node.IsA("vtkMRMLSegmentationNode"):
            self._layers = read_layers(node)
            self._steps = self._sending([(layer.image, True) for layer in self._layers], fixed)
        else:
            self.outputs = warp_points(node, self._transform, self._direction, self._name())
            self.finished = True

    def on_done(self, event: dict[str, Any]) -> Generator[None, None, None]:
        """Create the warped node."""
        images = []
        for name in event["items"]:
            images.append((yield from self._read_image(name)))
        self._check_inputs()
        if self._layers:
            self.outputs = self._create_segmentation(images)
            return
        (image,) = images
        new = new_node(self._node.GetClassName(), self._name())
        prepare_display(new, *displayed_range(self._node))
        copy_window_level(self._node, new)
        self.outputs = fill_volume(new, image, self._target)

    def _name(self) -> str:
        return f"{self._node.GetName()} on {self._target.GetName()}"

    def _sending(
        self, items: list[tuple[WorldImage, bool]], fixed: slicer.vtkMRMLVolumeNode
    ) -> Generator[None, None, None]:
        target = read_volume(self._target, "volume to resample to", self._transform)
        fixed_image = read_volume(fixed, "fixed volume", self._transform)
        self._inputs = [self._node, self._target]
        read = yield from read_transform(self._transform, fixed_image)
        transform, arrays = transform_request(read, "transform.npy")
        item_requests = []
        for n, (image, nearest) in enumerate(items):
            arrays[f"item{n}.npy"] = image.values
            interpolation = "nearest" if nearest else "linear"
            item_requests.append({**volume_request(image, f"item{n}.npy"), "interpolation": interpolation})
        request = {
            "do": "warp",
            "transform": transform,
            "inverse": self._direction == "to moving",
            "fixed": volume_request(fixed_image, ""),
            "reference": volume_request(target, ""),
            "items": item_requests,
        }
        self.send(request, arrays)

    def _create_segmentation(self, images: list[vtk.vtkImageData]) -> slicer.vtkMRMLSegmentationNode:
        new = new_node("vtkMRMLSegmentationNode", self._name())
        new.SetAndObserveTransformNodeID(self._target.GetTransformNodeID())
        new.SetReferenceImageGeometryParameterFromVolumeNode(self._target)
        source, target = self._node.GetSegmentation(), new.GetSegmentation()
        target.SetSourceRepresentationName(BINARY)
        warped = {}
        for layer, image in zip(self._layers, images, strict=True):
            data = slicer.vtkOrientedImageData()
            data.ShallowCopy(image)
            data.SetGeometryFromImageToWorldMatrix(matrix_of(voxel_to_local(self._target)))
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
        image: the labelmap in world coordinates.
        segments: label value by segment id.
    """

    image: WorldImage
    segments: dict[str, int]


def read_layers(node: slicer.vtkMRMLSegmentationNode) -> list[Layer]:
    """Read the labelmaps of a segmentation in world coordinates; surfaces are converted in a copy.

    Raises:
        InputError: no segment has voxels, or a parent transform is not linear.
    """
    world_from_local = parent_to_world(node, "segmentation")
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
        image_from_array = np.eye(4)  # indices: the extent need not start at 0
        image_from_array[:3, 3] = data.GetExtent()[::2]
        values = numpy_support.vtk_to_numpy(data.GetPointData().GetScalars()).reshape(data.GetDimensions()[::-1])
        values, image_from_array = _pad_to(values, image_from_array)
        ids = segmentation.GetSegmentIDsForLayer(n, BINARY)
        segments = {name: segmentation.GetSegment(name).GetLabelValue() for name in ids}
        to_world = world_from_local @ array_of(matrix) @ image_from_array
        layers.append(Layer(WorldImage(values, to_world), segments))
    if not layers:
        raise InputError(f"the segmentation must hold a segment, got '{node.GetName()}' without any voxel")
    return layers


def _pad_to(
    values: np.ndarray, image_from_array: np.ndarray, minimum: int = MIN_VOXELS
) -> tuple[np.ndarray, np.ndarray]:
    """Pad a small labelmap with zeros: resampling needs `minimum` voxels along every axis.

    Args:
        values: (k, j, i) labels.
        image_from_array: 4x4, index (i, j, k) of the array -> index of the image.
        minimum: voxels along each axis.
    """
    padding = [max(0, minimum - n) for n in values.shape]
    if not any(padding):
        return values, image_from_array
    shift = np.eye(4)
    shift[:3, 3] = [-(p // 2) for p in padding[::-1]]
    return np.pad(values, [(p // 2, p - p // 2) for p in padding]), image_from_array @ shift


def _read_labelmap(node: slicer.vtkMRMLLabelMapVolumeNode) -> WorldImage:
    if node.GetImageData() is None or min(node.GetImageData().GetDimensions()) < 1:
        raise InputError(f"the labelmap must hold voxels, got '{node.GetName()}', which is empty")
    values, image_from_array = _pad_to(slicer.util.arrayFromVolume(node), np.eye(4))
    return WorldImage(values, parent_to_world(node, "labelmap") @ voxel_to_local(node) @ image_from_array)


def warp_points(
    node: slicer.vtkMRMLTransformableNode, transform: slicer.vtkMRMLTransformNode, direction: str, name: str
) -> slicer.vtkMRMLTransformableNode:
    """Copy markups or a model and transform the copy's points.

    Raises:
        InputError: the node cannot be put through a non-linear transform.
    """
    if not node.IsA("vtkMRMLTransformableNode") or not node.CanApplyNonLinearTransforms():
        raise InputError(
            f"only volumes, segmentations, markups of points and models can be brought along, got '{node.GetName()}', "
            f"a {node.GetNodeTagName()} node"
        )
    copy = new_node(node.GetClassName(), name)
    copy.CopyContent(node)  # not Copy: it shares the original's storage node, and saving would write into its file
    copy.SetAndObserveTransformNodeID(node.GetTransformNodeID())
    copy.HardenTransform()
    general = vtk.vtkGeneralTransform()
    to_world = (transform, None) if direction == "to fixed" else (None, transform)
    slicer.vtkMRMLTransformNode.GetTransformBetweenNodes(*to_world, general)
    copy.ApplyTransform(general)
    copy.CreateDefaultDisplayNodes()
    if copy.GetDisplayNode() is not None and node.GetDisplayNode() is not None:
        copy.GetDisplayNode().CopyContent(node.GetDisplayNode())
    return copy
