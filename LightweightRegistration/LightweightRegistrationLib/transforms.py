"""Transform nodes <-> displacement fields.

A field here is what SimpleITK calls a displacement field: vectors in mm LPS that take a point of the fixed volume to
its point of the moving volume, on a grid with an LPS origin, a spacing and a direction. A transform node holds the same
as an oriented grid in RAS, from parent.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import slicer
import vtk
from vtk.util import numpy_support

from .volumes import Picture, array_of, matrix_of

LPS = np.diag([-1.0, -1.0, 1.0, 1.0])  # RAS <-> LPS


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
    """Make a transform node hold a field: general transform, from parent, oriented grid."""
    to_ras = LPS @ field.to_lps
    spacing = np.linalg.norm(to_ras[:3, :3], axis=0)
    direction = np.eye(4)
    direction[:3, :3] = to_ras[:3, :3] / spacing
    vectors = field.vectors.reshape(-1, 3) * LPS.diagonal()[:3].astype(field.vectors.dtype)
    grid = vtk.vtkImageData()
    grid.SetDimensions(*field.vectors.shape[2::-1])
    grid.SetSpacing(*spacing)
    grid.SetOrigin(*to_ras[:3, 3])
    grid.GetPointData().SetScalars(numpy_support.numpy_to_vtk(vectors, deep=True))
    transform = slicer.vtkOrientedGridTransform()
    transform.SetDisplacementGridData(grid)
    transform.SetGridDirectionMatrix(matrix_of(direction))
    node.SetAndObserveTransformFromParent(transform)


def linear_from_world(node: slicer.vtkMRMLTransformNode) -> np.ndarray | None:
    """The 4x4 (RAS mm, world -> node's own side: fixed -> moving points) of a linear transform node, None otherwise."""
    if not node.IsTransformToWorldLinear():
        return None
    matrix = vtk.vtkMatrix4x4()
    node.GetMatrixTransformFromWorld(matrix)
    return array_of(matrix)


def sampled(node: slicer.vtkMRMLTransformNode, fixed: Picture) -> Field:
    """A transform node as a field on the fixed volume's own grid, exact at its voxels.

    Works for every kind of transform (grids, B-splines, thin plates, composites, hardened chains).
    """
    general = vtk.vtkGeneralTransform()
    slicer.vtkMRMLTransformNode.GetTransformBetweenNodes(None, node, general)  # from world
    k, j, i = fixed.values.shape
    index = np.stack(np.meshgrid(np.arange(k), np.arange(j), np.arange(i), indexing="ij"), -1)[..., ::-1].reshape(-1, 3)
    points = index @ fixed.to_world[:3, :3].T + fixed.to_world[:3, 3]
    source = vtk.vtkPoints()
    source.SetData(numpy_support.numpy_to_vtk(points, deep=True))
    target = vtk.vtkPoints()
    target.SetDataTypeToDouble()
    general.TransformPoints(source, target)
    moved = numpy_support.vtk_to_numpy(target.GetData())
    vectors = (moved - points) * LPS.diagonal()[:3]
    return Field(vectors.reshape(k, j, i, 3), LPS @ fixed.to_world)


def own_grid(node: slicer.vtkMRMLTransformNode) -> Field | None:
    """The field of a node that holds one linearly interpolated grid from parent (as `write_field` makes), else None."""
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
    vectors = numpy_support.vtk_to_numpy(grid.GetPointData().GetScalars()) * LPS.diagonal()[:3]
    return Field(vectors.reshape(*grid.GetDimensions()[::-1], 3), LPS @ to_ras)


def for_worker(node: slicer.vtkMRMLTransformNode, fixed: Picture) -> np.ndarray | Field:
    """A transform node (fixed -> moving points) as the worker takes it: 4x4 in LPS if it is linear, a field if not."""
    matrix = linear_from_world(node)
    if matrix is not None:
        return LPS @ matrix @ LPS
    return own_grid(node) or sampled(node, fixed)
