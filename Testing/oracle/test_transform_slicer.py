"""Transforms that 3D Slicer reads and writes, by its own storage node (slicer-core), against ours."""

from __future__ import annotations

import numpy as np
import pytest
import SimpleITK as sitk
from test_transform_programs import AFFINE, FIXED, apart_mm, field_transform, mapped_by, voxel_points, whole

from LDRCore import RegistrationError, geometry
from LDRCore.cli import chain
from LDRCore.io import transforms

slicer = pytest.importorskip("slicer")

SPLINE_MM = 0.05  # Slicer interpolates a grid by cubics, ITK linearly; at voxels they agree to a little less
EXACT_MM = 1e-3
RAS = np.array([-1.0, -1.0, 1.0])
SCENE = slicer.vtkMRMLScene()


def load(path) -> object:
    """A transform node as Slicer reads it."""
    storage = slicer.vtkMRMLTransformStorageNode()
    storage.SetFileName(str(path))
    node = slicer.vtkMRMLTransformNode()
    SCENE.AddNode(node)
    assert storage.ReadData(node)
    return node


def save(node: object, path) -> None:
    storage = slicer.vtkMRMLTransformStorageNode()
    SCENE.AddNode(storage)
    storage.SetFileName(str(path))
    assert storage.WriteData(node)


def mapped_in_slicer(node: object, points: np.ndarray) -> np.ndarray:
    """Points of the fixed image, LPS, as the node brings them to the moving one."""
    from_parent = node.GetTransformFromParent()
    return np.array([from_parent.TransformPoint(point) for point in (points * RAS).tolist()]) * RAS


@pytest.mark.parametrize("name", ["t.h5", "t.tfm", "t.nrrd", "t.nii.gz"])
def test_slicer_reads_what_we_write(tmp_path, name):
    points = voxel_points(FIXED)
    transforms.write(whole(), tmp_path / name, "slicer", fixed=FIXED)
    assert apart_mm(mapped_in_slicer(load(tmp_path / name), points), mapped_by(whole(), points)) < SPLINE_MM
    transforms.write(geometry.affine_transform(AFFINE), tmp_path / "a.h5", "slicer")
    exact = points @ AFFINE[:3, :3].T + AFFINE[:3, 3]
    assert apart_mm(mapped_in_slicer(load(tmp_path / "a.h5"), points), exact) < EXACT_MM


@pytest.mark.parametrize("name", ["t.h5", "t.nrrd", "t.nii.gz"])
def test_what_slicer_writes_of_a_grid(tmp_path, name):
    points = voxel_points(FIXED)
    transforms.write(field_transform(FIXED), tmp_path / "ours.nrrd", "slicer", fixed=FIXED)
    save(load(tmp_path / "ours.nrrd"), tmp_path / name)
    again = transforms.read_transform(tmp_path / name)
    assert apart_mm(mapped_by(again, points), mapped_by(field_transform(FIXED), points)) < EXACT_MM


def test_an_inverted_grid_of_slicer_says_so(tmp_path):
    """The file holds the forward field, marked "modeling": ",inverse" gives that field, without it none is read."""
    points = voxel_points(FIXED)
    transforms.write(field_transform(FIXED), tmp_path / "ours.nrrd", "slicer", fixed=FIXED)
    node = load(tmp_path / "ours.nrrd")
    node.Inverse()
    save(node, tmp_path / "inverted.nrrd")
    with pytest.raises(RegistrationError, match="got a modeling transform"):
        transforms.read_transform(tmp_path / "inverted.nrrd")
    made = chain.read_chain([f"{tmp_path / 'inverted.nrrd'},inverse"])
    assert apart_mm(mapped_by(made, points), mapped_by(field_transform(FIXED), points)) < EXACT_MM
    assert sitk.DisplacementFieldTransform(made).GetDisplacementField().GetSize() == FIXED.GetSize()
