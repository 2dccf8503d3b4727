"""Converts transform nodes to displacement fields and back.

A field is a displacement field as in SimpleITK: vectors in mm LPS from points of the fixed volume to points of the
moving volume, on a grid with an LPS origin, a spacing and a direction. A transform node holds the same field as an
oriented grid in RAS, from parent.
"""

from __future__ import annotations

from collections.abc import Generator
from dataclasses import dataclass

import numpy as np
import slicer
import vtk
from vtk.util import numpy_support

from .background import chunks
from .volume_nodes import WorldImage, array_of, matrix_of, new_image

LPS = np.diag([-1.0, -1.0, 1.0, 1.0])  # RAS <-> LPS
SIGNS = (-1.0, -1.0, 1.0)  # of a vector, RAS <-> LPS
POINTS_A_STEP = 20_000  # transformed at once: some milliseconds


@dataclass(frozen=True)
class Field:
    """A displacement field in LPS.

    Attributes:
        vectors: (k, j, i, 3) mm (x, y, z), fixed -> moving.
        to_lps: 4x4, voxel (i, j, k) -> LPS mm.
    """

    vectors: np.ndarray
    to_lps: np.ndarray


def write_field(node: slicer.vtkMRMLTransformNode, field: Field) -> None:
    """Write a field to a transform node as an oriented grid transform, from parent."""
    transform, vectors = new_grid(field.to_lps, field.vectors.shape, field.vectors.dtype)
    np.multiply(field.vectors, np.array(SIGNS, vectors.dtype), out=vectors)
    node.SetAndObserveTransformFromParent(transform)


def new_grid(
    to_lps: np.ndarray, shape: tuple[int, ...], dtype: np.dtype
) -> tuple[slicer.vtkOrientedGridTransform, np.ndarray]:
    """Create an oriented grid transform to fill.

    Args:
        to_lps: 4x4, voxel (i, j, k) -> LPS mm.
        shape: (k, j, i, 3).
        dtype: float32 or float64.

    Returns:
        The transform, and its vectors in RAS mm, to be filled.
    """
    to_ras = LPS @ to_lps
    spacing = np.linalg.norm(to_ras[:3, :3], axis=0)
    direction = np.eye(4)
    direction[:3, :3] = to_ras[:3, :3] / spacing
    grid, vectors = new_image(shape, dtype)
    grid.SetSpacing(*spacing)
    grid.SetOrigin(*to_ras[:3, 3])
    transform = slicer.vtkOrientedGridTransform()
    transform.SetDisplacementGridData(grid)
    transform.SetGridDirectionMatrix(matrix_of(direction))
    return transform, vectors


def read_linear(node: slicer.vtkMRMLTransformNode) -> np.ndarray | None:
    """Return the 4x4 of a linear transform node (RAS mm, from world: fixed points -> moving points), else None."""
    if not node.IsTransformToWorldLinear():
        return None
    matrix = vtk.vtkMatrix4x4()
    node.GetMatrixTransformFromWorld(matrix)
    return array_of(matrix)


def sample_on_grid(node: slicer.vtkMRMLTransformNode, fixed: WorldImage) -> Generator[None, None, Field]:
    """Sample a transform node as a field on the fixed volume's grid, exact at its voxels, some rows in each step.

    Works for every kind of transform: grids, B-splines, thin plates, composites.
    """
    general = vtk.vtkGeneralTransform()
    slicer.vtkMRMLTransformNode.GetTransformBetweenNodes(None, node, general)  # from world
    k, j, i = fixed.values.shape
    columns, rows = np.meshgrid(np.arange(i), np.arange(j))
    in_plane = np.stack((columns, rows, np.zeros_like(rows), np.ones_like(rows)), -1).reshape(-1, 4)
    from_plane = fixed.to_world[:3]
    points = in_plane @ from_plane.T  # of the first slice
    vectors = np.empty((k, j * i, 3), np.float32)
    for slice_index in range(k):
        for first in range(0, j * i, POINTS_A_STEP):
            part = slice(first, first + POINTS_A_STEP)
            here = points[part] + slice_index * from_plane[:, 2]
            source = vtk.vtkPoints()
            source.SetData(numpy_support.numpy_to_vtk(here, deep=True))
            target = vtk.vtkPoints()
            target.SetDataTypeToDouble()
            general.TransformPoints(source, target)
            vectors[slice_index, part] = (numpy_support.vtk_to_numpy(target.GetData()) - here) * SIGNS
            yield
    return Field(vectors.reshape(k, j, i, 3), LPS @ fixed.to_world)


def read_displacement_grid(node: slicer.vtkMRMLTransformNode) -> Generator[None, None, Field | None]:
    """Read the field of a node that holds one linearly interpolated grid from parent, as `write_field` makes it.

    Returns:
        None for every other node.
    """
    if node.GetParentTransformNode() is not None:
        return None
    transform = node.GetTransformFromParentAs("vtkOrientedGridTransform", False, True)
    if transform is None or transform.GetInverseFlag() or transform.GetDisplacementGrid() is None:
        return None
    if (transform.GetDisplacementScale(), transform.GetDisplacementShift()) != (1.0, 0.0):
        return None
    if transform.GetInterpolationMode() != vtk.VTK_GRID_LINEAR:
        return None
    grid = transform.GetDisplacementGrid()
    direction = transform.GetGridDirectionMatrix()
    to_ras = np.eye(4) if direction is None else array_of(direction)
    to_ras[:3, :3] = to_ras[:3, :3] * np.array(grid.GetSpacing())
    to_ras[:3, 3] = grid.GetOrigin()
    in_ras = numpy_support.vtk_to_numpy(grid.GetPointData().GetScalars()).reshape(*grid.GetDimensions()[::-1], 3)
    vectors = np.empty_like(in_ras)
    for source, target in zip(chunks(in_ras), chunks(vectors), strict=True):
        np.multiply(source, np.array(SIGNS, source.dtype), out=target)
        yield
    return Field(vectors, LPS @ to_ras)


def read_transform(node: slicer.vtkMRMLTransformNode, fixed: WorldImage) -> Generator[None, None, np.ndarray | Field]:
    """Read a transform node (fixed points -> moving points), in steps: a 4x4 in LPS if it is linear, else a field."""
    matrix = read_linear(node)
    if matrix is not None:
        return LPS @ matrix @ LPS
    field = yield from read_displacement_grid(node)
    if field is None:
        field = yield from sample_on_grid(node, fixed)
    return field
