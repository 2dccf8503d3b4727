"""What is computed for display alone: checkerboard, Jacobian map without its background, outline of folding voxels."""

from __future__ import annotations

from collections.abc import Generator

import numpy as np
import slicer

from .outputs import displayed_range, fill_volume, new_node, prepare_display
from .volume_nodes import BINARY, matrix_of, new_image, voxel_to_local

FOLDING_COLOUR = (1.0, 0.0, 1.0)
CHECKER_MM = 25.0
FOREGROUND_LEVEL = 0.15  # of the range of intensities, as LDRCore
RANGE_VOXELS = 100_000  # that the range is measured on
COARSE_VOXELS = 1_000_000  # of the grid on which holes are closed
LARGEST = 1e30  # of a shown value


def checkerboard(
    fixed: slicer.vtkMRMLVolumeNode, warped: slicer.vtkMRMLVolumeNode, node: slicer.vtkMRMLScalarVolumeNode
) -> Generator[None, None, None]:
    """Fill a node with a checkerboard of two volumes, a slab in each step.

    Cubes of 25 mm alternate, each with its own volume's window and level.

    Args:
        fixed, warped: volumes on one grid.
        node: of `new_temporary_node`; it is shown empty first.
    """
    sources = [(slicer.util.arrayFromVolume(volume), displayed_range(volume)) for volume in (fixed, warped)]
    shape = sources[0][0].shape
    image, board = new_image(shape, np.dtype(np.uint8))
    prepare_display(node, 0, 255)
    spacing = np.array(fixed.GetSpacing())[::-1]
    k, j, i = (np.floor(np.arange(n) * s / CHECKER_MM).astype(int) for n, s in zip(shape, spacing, strict=True))
    in_plane = j[:, None] + i[None, :]
    for slab in range(shape[0]):
        grey = [_displayed_grey(values[slab], window) for values, window in sources]
        board[slab] = np.where((in_plane + k[slab]) % 2 == 1, grey[1], grey[0])
        yield
    fill_volume(node, image, fixed)


def _displayed_grey(values: np.ndarray, window: tuple[float, float]) -> np.ndarray:
    """Scale values to 0..255 as they are displayed."""
    low, high = window
    scale = np.float32(255.0 / max(high - low, 1e-6))
    return np.clip((values.astype(np.float32) - np.float32(low)) * scale, 0, 255).astype(np.uint8)


# Jacobian map


def jacobian_within_content(
    fixed: slicer.vtkMRMLVolumeNode,
    jacobian: slicer.vtkMRMLScalarVolumeNode,
    node: slicer.vtkMRMLScalarVolumeNode,
) -> Generator[None, None, None]:
    """Fill a node with a Jacobian map that is transparent outside the fixed volume's content, a slab in each step.

    Args:
        fixed, jacobian: volumes on one grid.
        node: of `outputs.new_temporary_node`; voxels outside the content become NaN.
    """
    source, values = slicer.util.arrayFromVolume(jacobian), slicer.util.arrayFromVolume(fixed)
    image, shown = new_image(source.shape, np.dtype(np.float32))
    prepare_display(node, 0.5, 2.0)
    display = node.GetDisplayNode()
    with slicer.util.NodeModify(display):
        display.SetAutoThreshold(False)
        display.SetThreshold(-LARGEST, LARGEST)  # NaN lies outside and is transparent
        display.SetApplyThreshold(True)
    for target, plane, inside in zip(shown, source, content(values), strict=True):
        target[...] = np.where(inside, plane, np.nan)
        yield
    fill_volume(node, image, jacobian)


def content(values: np.ndarray) -> Generator[np.ndarray, None, None]:
    """Find what is not background in a scan, with holes closed: (j, i) bool for each slice.

    A voxel counts if it is bright, or if bright voxels lie on both sides of it along all three axes; single bright
    voxels in the background do not count.

    Args:
        values: (k, j, i).
    """
    sample = values.reshape(-1)[:: max(1, values.size // RANGE_VOXELS) | 1].astype(np.float32)
    low, top = np.percentile(sample, (1.0, 99.9))
    bright = sample[sample > low + 0.1 * (top - low)]
    level = low + FOREGROUND_LEVEL * ((np.percentile(bright, 99.0) if bright.size else top) - low)
    step = int(np.ceil((values.size / COARSE_VOXELS) ** (1 / 3)))
    coarse = _box_mean(values[::step, ::step, ::step] > level) > 0.5
    enclosed = np.logical_and.reduce([_between(coarse, axis) for axis in range(3)])
    near = _box_mean(enclosed) > 0
    j, i = (np.arange(n) // step for n in values.shape[1:])
    for k, plane in enumerate(values):
        yield enclosed[k // step][np.ix_(j, i)] | (plane > level) & near[k // step][np.ix_(j, i)]


def _box_mean(mask: np.ndarray) -> np.ndarray:
    """Return the mean over 3 x 3 x 3 voxels; there is nothing outside."""
    mean = mask.astype(np.float32)
    for axis in range(3):
        padded = np.pad(mean, [(1, 1) if axis == n else (0, 0) for n in range(3)])
        parts = [np.take(padded, np.arange(mask.shape[axis]) + shift, axis) for shift in range(3)]
        mean = (parts[0] + parts[1] + parts[2]) / 3
    return mean


def _between(mask: np.ndarray, axis: int) -> np.ndarray:
    """Return where something is set on both sides along an axis, or there."""
    before = np.maximum.accumulate(mask, axis)
    return before & np.flip(np.maximum.accumulate(np.flip(mask, axis), axis), axis)


# Folding


def folding_contours(
    jacobian: slicer.vtkMRMLScalarVolumeNode | None, visible: bool
) -> slicer.vtkMRMLSegmentationNode | None:
    """Show or hide an outline of the voxels whose Jacobian determinant is 0 or less.

    Returns:
        The segmentation of these voxels, None where nothing folds or it was never shown.
    """
    if jacobian is None:
        return None
    node = jacobian.GetNodeReference("LightweightRegistrationFolding")
    if not visible:
        if node is not None and node.GetDisplayNode() is not None:
            node.GetDisplayNode().SetVisibility(False)
        return node
    if node is None or node.GetSegmentation().GetMTime() < jacobian.GetImageData().GetMTime():
        node = _outline_folding(jacobian, node)
    if node is not None:
        node.GetDisplayNode().SetVisibility(True)
    return node


def _outline_folding(
    jacobian: slicer.vtkMRMLScalarVolumeNode, node: slicer.vtkMRMLSegmentationNode | None
) -> slicer.vtkMRMLSegmentationNode | None:
    """Fill the segmentation of a map's folding voxels; without any, there is none."""
    values = slicer.util.arrayFromVolume(jacobian)
    slices = [k for k, plane in enumerate(values) if (plane <= 0).any()]  # plane by plane: memory for all costs more
    if not slices:
        if node is not None:
            slicer.mrmlScene.RemoveNode(node)
        return None
    if node is None:
        node = new_node("vtkMRMLSegmentationNode", f"{jacobian.GetName()} folding")
        node.CreateDefaultDisplayNodes()
        jacobian.SetNodeReferenceID("LightweightRegistrationFolding", node.GetID())
    folds = values[slices[0] : slices[-1] + 1] <= 0
    box = tuple(slice(np.flatnonzero(f)[0], np.flatnonzero(f)[-1] + 1) for f in _projections(folds))
    to_local = voxel_to_local(jacobian)
    to_local[:3, 3] = (to_local @ [box[2].start, box[1].start, slices[0], 1])[:3]
    image, labels = new_image(folds[box].shape, np.dtype(np.uint8))
    labels[...] = folds[box]
    data = slicer.vtkOrientedImageData()
    data.ShallowCopy(image)
    data.SetGeometryFromImageToWorldMatrix(matrix_of(to_local))
    segment = slicer.vtkSegment()
    segment.SetName("Folding")
    segment.SetColor(*FOLDING_COLOUR)
    segment.AddRepresentation(BINARY, data)  # importing a labelmap node takes a second where the box is large
    node.GetSegmentation().RemoveAllSegments()
    node.GetSegmentation().SetSourceRepresentationName(BINARY)
    node.GetSegmentation().AddSegment(segment)
    node.SetAndObserveTransformNodeID(jacobian.GetTransformNodeID())
    display = node.GetDisplayNode()
    display.SetVisibility2DFill(False)
    display.SetVisibility2DOutline(True)
    display.SetSliceIntersectionThickness(2)
    return node


def _projections(mask: np.ndarray) -> list[np.ndarray]:
    """Return along each axis where anything is set."""
    return [mask.any(axis=tuple(other for other in range(3) if other != axis)) for axis in range(3)]
