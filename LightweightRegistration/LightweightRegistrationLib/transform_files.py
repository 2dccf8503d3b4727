"""Jobs that write a registration transform to a file of another program, and read one from such a file."""

from __future__ import annotations

import os
from collections.abc import Generator
from pathlib import Path
from typing import Any

import slicer

from . import outputs, volume_nodes
from .background import Worker
from .jobs import Job, transform_request, volume_request
from .node_warping import registered_volumes
from .transform_nodes import read_transform

AUTO = "auto"  # the format that a file's content or name tells


# by name: title, suffixes of files that hold a linear transform only, and of those that hold any; those of
# `LDRCore.io.transforms.FORMATS`, which only the worker process imports
FORMATS = {
    "itk": ("ITK", (".mat", ".xfm"), (".h5", ".hdf5", ".tfm", ".txt", ".nii", ".nii.gz", ".nrrd", ".mha")),
    "slicer": ("3D Slicer", (".mat",), (".h5", ".tfm", ".nrrd", ".nii.gz", ".nii")),
    "ants": ("ANTs", (".mat",), (".nii.gz", ".nii", ".h5")),
    "elastix": ("elastix", (), (".txt",)),
    "fsl": ("FSL", (".mat", ".txt"), (".nii.gz", ".nii")),
    "spm": ("SPM", (), (".nii", ".nii.gz")),
    "freesurfer": ("FreeSurfer", (".lta",), (".mgz", ".mgh")),
    "afni": ("AFNI", (".1d",), (".nii.gz", ".nii")),
    "niftyreg": ("NiftyReg", (".txt",), (".nii.gz", ".nii")),
    "greedy": ("greedy", (".mat", ".txt"), (".nii.gz", ".nii")),
    "dipy": ("DIPY", (), (".nii.gz", ".nii")),
    "dicom": ("DICOM", (), (".dcm",)),
    "x5": ("X5", (), (".x5",)),
    "convexadam": ("convexAdam", (), (".nii.gz", ".nii", ".npy")),
    "voxelmorph": ("voxelmorph", (), (".npy", ".nii.gz", ".nii")),
}
BY_NAME = (".h5", ".tfm", ".nrrd", ".mha")  # suffixes of files whose name tells the format


def suffixes_of(name: str, *, linear: bool) -> tuple[str, ...]:
    """Return the suffixes of files that a transform can be written to, the usual one first."""
    if name == AUTO:
        return BY_NAME
    _title, of_matrices, of_all = FORMATS[name]
    return (*of_matrices, *of_all) if linear else of_all


class SaveTransformJob(Job):
    """Writes a transform node to a file; `outputs` is its path."""

    def __init__(
        self, worker: Worker, transform: slicer.vtkMRMLTransformNode, path: str | os.PathLike[str], format_name: str
    ):
        """Store the arguments; `start` reads the transform.

        Args:
            worker: the process.
            transform: the transform node of a registration.
            path: of the file.
            format_name: a name in `FORMATS`, or `AUTO`.
        """
        super().__init__(worker)
        self._transform, self._path, self._format = transform, Path(path).absolute(), format_name

    def start(self) -> None:
        """Check the transform; `poll` goes on with sending it.

        Raises:
            InputError: its volumes are not known.
        """
        self._inputs = [*registered_volumes(self._transform), self._transform]
        self._steps = self._sending()

    def _sending(self) -> Generator[None, None, None]:
        self.set_progress(0.0, "writing the transform")
        fixed, moving = (
            volume_nodes.read_volume(node, f"{role} volume", self._transform)
            for node, role in zip(self._inputs, ("fixed", "moving"), strict=False)
        )
        read = yield from read_transform(self._transform, fixed)
        transform, arrays = transform_request(read, "transform.npy")
        request = {
            "do": "write transform",
            "transform": transform,
            "path": str(self._path),
            "format": self._format,
            "fixed": volume_request(fixed, ""),
            "moving": volume_request(moving, ""),
        }
        self._check_inputs()
        self.send(request, arrays)

    def on_done(self, event: dict[str, Any]) -> Generator[None, None, None]:
        """Return the path."""
        self.outputs = self._path
        yield


class LoadTransformJob(Job):
    """Reads a file as a new transform node, fixed points -> moving points, from parent."""

    def __init__(self, worker: Worker, path: str | os.PathLike[str], format_name: str):
        """Store the arguments, as those of `SaveTransformJob`."""
        super().__init__(worker)
        self._path, self._format = Path(path).absolute(), format_name

    def start(self, fixed: slicer.vtkMRMLVolumeNode, moving: slicer.vtkMRMLVolumeNode) -> None:
        """Send the request.

        Raises:
            InputError: the volumes cannot be used: many formats count in their voxels.
        """
        self._inputs = [fixed, moving]
        self.set_progress(0.0, "reading the transform")
        images = {
            role: volume_nodes.read_volume(node, f"{role} volume")
            for role, node in zip(("fixed", "moving"), self._inputs, strict=True)
        }
        described = {role: volume_request(image, "") for role, image in images.items()}
        self.send({"do": "read transform", "path": str(self._path), "format": self._format, **described}, {})

    def on_done(self, event: dict[str, Any]) -> Generator[None, None, None]:
        """Create the node."""
        transform = yield from self._read_transform(event["transform"])
        self._check_inputs()
        node = outputs.new_node("vtkMRMLTransformNode", self._path.name.partition(".")[0])
        node.SetAndObserveTransformFromParent(transform)
        outputs.record_roles(node, *self._inputs)
        self.outputs = node
