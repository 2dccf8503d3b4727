"""Reads volume and mask nodes as arrays in world coordinates, and checks that they can be registered."""

from __future__ import annotations

from collections.abc import Generator, Iterator
from dataclasses import dataclass

import numpy as np
import slicer
import vtk
from vtk.util import numpy_support

from .background import chunks
from .module_errors import InputError

BINARY = "Binary labelmap"  # a representation of segments
MIN_VOXELS = 4  # along each axis, as LDRCore
MASK_VOXELS_A_STEP = 8_000_000  # of a segmentation: each step also costs a pass over all of it


@dataclass(frozen=True)
class WorldImage:
    """The voxels of a volume node and where they lie in world coordinates.

    Attributes:
        values: (k, j, i), a view of the node's voxels.
        to_world: 4x4, voxel (i, j, k) -> RAS mm in world coordinates, the parent transform included.
    """

    values: np.ndarray
    to_world: np.ndarray

    @property
    def spacing_mm(self) -> np.ndarray:
        """Return the voxel spacing along i, j, k in mm."""
        return np.linalg.norm(self.to_world[:3, :3], axis=0)

    def corners(self) -> np.ndarray:
        """Return the centres of the corner voxels, (8, 3) world RAS mm."""
        last = np.array(self.values.shape[::-1]) - 1
        indices = np.array([[last[axis] * (n >> axis & 1) for axis in range(3)] for n in range(8)])
        return indices @ self.to_world[:3, :3].T + self.to_world[:3, 3]


def array_of(matrix: vtk.vtkMatrix4x4) -> np.ndarray:
    """Convert a VTK matrix to an array (4, 4)."""
    return np.array([[matrix.GetElement(r, c) for c in range(4)] for r in range(4)])


def matrix_of(values: np.ndarray) -> vtk.vtkMatrix4x4:
    """Convert an array (4, 4) to a VTK matrix."""
    matrix = vtk.vtkMatrix4x4()
    for r in range(4):
        for c in range(4):
            matrix.SetElement(r, c, float(values[r, c]))
    return matrix


def new_image(shape: tuple[int, ...], dtype: np.dtype) -> tuple[vtk.vtkImageData, np.ndarray]:
    """Create image data to fill.

    Args:
        shape: (k, j, i), or (k, j, i, components).
        dtype: of a voxel.

    Returns:
        The image data and a view of its voxels, whose values are arbitrary.
    """
    image = vtk.vtkImageData()
    image.SetDimensions(*shape[2::-1])
    image.AllocateScalars(numpy_support.get_vtk_array_type(dtype), shape[3] if len(shape) > 3 else 1)
    return image, numpy_support.vtk_to_numpy(image.GetPointData().GetScalars()).reshape(shape)


def parents(node: slicer.vtkMRMLTransformableNode | None) -> list[slicer.vtkMRMLTransformNode]:
    """Return the transforms that a node is under, the closest first."""
    found: list[slicer.vtkMRMLTransformNode] = []
    while node is not None and (node := node.GetParentTransformNode()) is not None:
        found.append(node)
    return found


def parent_to_world(node: slicer.vtkMRMLTransformableNode, role: str) -> np.ndarray:
    """Return the 4x4 (RAS mm, node's own frame -> world) of all parent transforms of a node.

    Raises:
        InputError: one of them is not linear.
    """
    parent = node.GetParentTransformNode()
    if parent is None:
        return np.eye(4)
    if not parent.IsTransformToWorldLinear():
        raise InputError(
            f"the {role} must not be under a non-linear transform, got '{node.GetName()}' under '{parent.GetName()}': "
            "harden that transform, or take the node out of it first"
        )
    matrix = vtk.vtkMatrix4x4()
    parent.GetMatrixTransformToWorld(matrix)
    return array_of(matrix)


def read_volume(
    node: slicer.vtkMRMLVolumeNode, role: str, ignored: slicer.vtkMRMLTransformNode | None = None
) -> WorldImage:
    """Read a volume in world coordinates.

    Args:
        node: a scalar volume.
        role: the name of the input in messages ("fixed volume").
        ignored: a parent transform that counts as absent: the output of an earlier run, which the volume was put under.

    Raises:
        InputError: the volume is missing, not scalar, empty, too small, constant, or under a non-linear transform.
    """
    if node is None:
        raise InputError(f"a {role} must be chosen, got none")
    name = f"'{node.GetName()}'"
    if not node.IsA("vtkMRMLScalarVolumeNode"):
        raise InputError(f"the {role} must be a scalar volume, got {name}, a {node.GetNodeTagName()} node")
    data = node.GetImageData()
    if data is None or min(data.GetDimensions()) < 1 or data.GetPointData().GetScalars() is None:
        raise InputError(f"the {role} must hold voxels, got {name}, which is empty")
    count = data.GetNumberOfScalarComponents()
    if count != 1:
        raise InputError(
            f"the {role} must hold one value a voxel, got {name} with {count} (colour, vectors or a 4D series): "
            "pick one component, or load a series as a sequence and use the section Sequence"
        )
    if min(data.GetDimensions()) < MIN_VOXELS:
        raise InputError(
            f"the {role} must have at least {MIN_VOXELS} voxels along every axis, got {name} with "
            f"{' x '.join(map(str, data.GetDimensions()))}"
        )
    values = slicer.util.arrayFromVolume(node)
    first = values[0, 0, 0]
    if not any((part != first).any() for part in chunks(values)):  # the range of all voxels would take long
        raise InputError(f"the {role} must show something, got {name}, where every voxel is {first:g}")
    if ignored is not None and node.GetParentTransformNode() is ignored:
        return WorldImage(values, voxel_to_local(node))
    return WorldImage(values, parent_to_world(node, role) @ voxel_to_local(node))


def voxel_to_local(node: slicer.vtkMRMLVolumeNode) -> np.ndarray:
    """Return the 4x4 voxel (i, j, k) -> RAS mm of a volume without its parent transforms."""
    matrix = vtk.vtkMatrix4x4()
    node.GetIJKToRASMatrix(matrix)
    return array_of(matrix)


def check_pair(
    fixed: slicer.vtkMRMLVolumeNode,
    moving: slicer.vtkMRMLVolumeNode,
    ignored: slicer.vtkMRMLTransformNode | None = None,
) -> dict[str, WorldImage]:
    """Read both volumes as {"fixed": image, "moving": image}.

    Raises:
        InputError: as `read_volume`, or both are the same volume.
    """
    if fixed is not None and fixed is moving:
        raise InputError(f"fixed and moving must be two different volumes, got '{fixed.GetName()}' twice")
    return {"fixed": read_volume(fixed, "fixed volume"), "moving": read_volume(moving, "moving volume", ignored)}


def check_overlap(fixed: WorldImage, moving: WorldImage, moving_to_fixed: np.ndarray) -> None:
    """Check that the bounding boxes of two volumes overlap, as they must when they are not centred first.

    Args:
        fixed, moving: the volumes.
        moving_to_fixed: 4x4 in RAS mm, the initial transform of the moving volume.

    Raises:
        InputError: there is a gap between the two boxes along a world axis.
    """
    boxes = []
    for corners in (fixed.corners(), moving.corners() @ moving_to_fixed[:3, :3].T + moving_to_fixed[:3, 3]):
        boxes.append((corners.min(0), corners.max(0)))
    gap = np.maximum(boxes[0][0], boxes[1][0]) - np.minimum(boxes[0][1], boxes[1][1])
    if gap.max() > 0:
        raise InputError(
            f"the volumes must overlap when they are not centred first, got a gap of {gap.max():.0f} mm between them: "
            "set Pre-alignment to 'Centre the contents first', or give an initial transform"
        )


def mask(
    node: slicer.vtkMRMLDisplayableNode, volume: slicer.vtkMRMLVolumeNode, reference: WorldImage, role: str
) -> Generator[None, None, np.ndarray]:
    """Read a segmentation, labelmap or ROI as (k, j, i) uint8 on the grid of its volume, 1 inside, a slab in each step.

    A segmentation is resampled onto that grid (all its segments together); a labelmap must lie on it.

    Args:
        node: segmentation, labelmap or ROI.
        volume, reference: the volume that the mask belongs to, and its voxels.
        role: "fixed mask" or "moving mask".

    Raises:
        InputError: another kind of node, another grid, a non-linear parent transform, or nothing inside.
    """
    if node.IsA("vtkMRMLSegmentationNode"):
        slabs = _segmentation_on(node, reference, role)
    elif node.IsA("vtkMRMLLabelMapVolumeNode"):
        slabs = _labelmap_on(node, reference, volume.GetName(), role)
    elif node.IsA("vtkMRMLMarkupsROINode"):
        slabs = _roi_on(node, reference, role)
    else:
        raise InputError(f"the {role} must be a segmentation, a labelmap or a ROI, got '{node.GetName()}'")
    inside, first, found = np.empty(reference.values.shape, np.uint8), 0, False
    for slab in slabs:
        inside[first : first + len(slab)] = slab
        first, found = first + len(slab), found or bool(slab.any())
        yield
    if not found:
        raise InputError(
            f"the {role} must cover some of '{volume.GetName()}', got '{node.GetName()}', which is empty there"
        )
    return inside


def _labelmap_on(
    node: slicer.vtkMRMLLabelMapVolumeNode, reference: WorldImage, name: str, role: str
) -> Iterator[np.ndarray]:
    if node.GetImageData() is None:
        raise InputError(f"the {role} must hold voxels, got '{node.GetName()}', which is empty")
    values = slicer.util.arrayFromVolume(node)
    to_world = parent_to_world(node, role) @ voxel_to_local(node)
    last = np.append(np.array(reference.values.shape[::-1]) - 1, 1.0)
    off_mm = max(np.abs((to_world - reference.to_world) @ p).max() for p in (np.array([0, 0, 0, 1.0]), last))
    if values.shape != reference.values.shape or off_mm > 0.01:
        sizes = [" x ".join(map(str, shape[::-1])) for shape in (reference.values.shape, values.shape)]
        more = " at another place" if values.shape == reference.values.shape else ""
        raise InputError(
            f"the {role} must lie on the grid of '{name}' ({sizes[0]} voxels), got '{node.GetName()}' ({sizes[1]} "
            f"voxels{more}): use a segmentation, which is resampled, or resample the labelmap"
        )
    yield from (rows != 0 for rows in chunks(values))


def _segmentation_on(node: slicer.vtkMRMLSegmentationNode, reference: WorldImage, role: str) -> Iterator[np.ndarray]:
    segmentation = node.GetSegmentation()
    if segmentation.GetNumberOfSegments() == 0:
        raise InputError(f"the {role} must hold a segment, got '{node.GetName()}' without any")
    if _is_nonlinear(node.GetParentTransformNode()) or not segmentation.ContainsRepresentation(BINARY):
        node = _in_world_with_labelmaps(node, reference)
        segmentation = node.GetSegmentation()
    # The volume's grid in the segmentation's own frame. CreateOrientedImageDataFromVolumeNode gives another grid where
    # both nodes have parents: it does not see that the transform between them is linear.
    node_from_index = np.linalg.inv(parent_to_world(node, role)) @ reference.to_world
    ids = vtk.vtkStringArray()
    segmentation.GetSegmentIDs(ids)
    depth, height, width = reference.values.shape
    thickness = max(1, MASK_VOXELS_A_STEP // (height * width))
    for first in range(0, depth, thickness):
        shape = (min(thickness, depth - first), height, width)
        shift = np.eye(4)
        shift[2, 3] = first
        geometry, merged = slicer.vtkOrientedImageData(), slicer.vtkOrientedImageData()
        geometry.SetDimensions(*shape[::-1])
        geometry.SetGeometryFromImageToWorldMatrix(matrix_of(node_from_index @ shift))
        node.GenerateMergedLabelmapForAllSegments(
            merged, slicer.vtkSegmentation.EXTENT_REFERENCE_GEOMETRY, geometry, ids
        )
        scalars = merged.GetPointData().GetScalars()
        nothing = scalars is None or merged.GetDimensions() != geometry.GetDimensions()
        yield np.zeros(shape, bool) if nothing else numpy_support.vtk_to_numpy(scalars).reshape(shape) != 0


def _roi_on(node: slicer.vtkMRMLMarkupsROINode, reference: WorldImage, role: str) -> Iterator[np.ndarray]:
    parent_to_world(node, role)  # refuses non-linear transforms
    roi_from_index = np.linalg.inv(array_of(node.GetObjectToWorldMatrix())) @ reference.to_world
    half = np.array(node.GetSize()) / 2
    j, i = np.ogrid[tuple(slice(n) for n in reference.values.shape[1:])]
    for k in range(reference.values.shape[0]):
        inside = np.ones(reference.values.shape[1:], bool)
        for (by_i, by_j, by_k, offset), length in zip(roi_from_index[:3], half, strict=True):
            inside &= np.abs((by_i * i + (by_k * k + offset)) + by_j * j) <= length
        yield inside[None]


def _is_nonlinear(transform: slicer.vtkMRMLTransformNode | None) -> bool:
    return transform is not None and not transform.IsTransformToWorldLinear()


def _in_world_with_labelmaps(
    node: slicer.vtkMRMLSegmentationNode, reference: WorldImage
) -> slicer.vtkMRMLSegmentationNode:
    """Copy a segmentation into world coordinates, outside the scene, and convert its surfaces to labelmaps.

    Args:
        node: may be under transforms of any kind.
        reference: a grid of the resolution that the labelmaps shall have.
    """
    copy = slicer.vtkMRMLSegmentationNode()
    copy.CopyContent(node)
    if node.GetParentTransformNode() is not None:
        world_from_node = vtk.vtkGeneralTransform()
        slicer.vtkMRMLTransformNode.GetTransformBetweenNodes(node.GetParentTransformNode(), None, world_from_node)
        copy.ApplyTransform(world_from_node)
    segmentation = copy.GetSegmentation()
    if not segmentation.ContainsRepresentation(BINARY):
        geometry = slicer.vtkOrientedImageData()
        geometry.SetDimensions(*reference.values.shape[::-1])
        geometry.SetGeometryFromImageToWorldMatrix(matrix_of(reference.to_world))
        text = slicer.vtkSegmentationConverter.SerializeImageGeometry(geometry)
        segmentation.SetConversionParameter("Reference image geometry", text)
        segmentation.CreateRepresentation(BINARY)
    return copy
