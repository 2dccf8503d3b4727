"""The bundled pair of brains: two people, scanned obliquely with different voxel sizes. Nothing is downloaded."""

from __future__ import annotations

from pathlib import Path

import slicer

from .library import library_folder
from .module_errors import InputError

NAMES = {"fixed": "Brain A", "moving": "Brain B"}
SAMPLE_NAME = "Registration pair: two brains (T1)"
CATEGORY = "Registration"


def folder() -> Path:
    """Return the folder of the pair."""
    return library_folder() / "LDRCore" / "bundled" / "demo"


def load(file: str, name: str, class_name: str = "vtkMRMLScalarVolumeNode") -> slicer.vtkMRMLVolumeNode:
    """Load one of the pair's images as a new node.

    Args:
        file: "fixed", "moving", "fixed_labels" or "moving_labels".
        name: of the node.
        class_name: vtkMRMLLabelMapVolumeNode for labels.

    Raises:
        InputError: the file is missing.
    """
    path = folder() / f"{file}.nii.gz"
    if not path.is_file():
        raise InputError(f"the sample pair must lie in {folder()}, got no {path.name}: install the extension again")
    node = slicer.mrmlScene.AddNewNodeByClass(class_name, slicer.mrmlScene.GenerateUniqueName(name))
    storage = slicer.vtkMRMLVolumeArchetypeStorageNode()
    storage.SetFileName(str(path))
    if not storage.ReadData(node):
        slicer.mrmlScene.RemoveNode(node)
        raise InputError(f"the sample image must be readable, got {path}")
    node.CreateDefaultDisplayNodes()
    return node


def load_pair() -> dict[str, slicer.vtkMRMLVolumeNode]:
    """Load the pair as {"fixed": node, "moving": node}."""
    return {name: load(name, title) for name, title in NAMES.items()}


def register_with_sample_data(icons: Path) -> None:
    """Register the pair with the module Sample Data.

    Args:
        icons: the folder with the thumbnail.
    """
    import SampleData

    SampleData.SampleDataLogic.registerCustomSampleDataSource(
        category=CATEGORY,
        sampleName=SAMPLE_NAME,
        uris=[(folder() / f"{name}.nii.gz").as_uri() for name in NAMES],
        fileNames=[f"LightweightRegistration-{name}.nii.gz" for name in NAMES],
        nodeNames=list(NAMES.values()),
        thumbnailFileName=str(icons / "LightweightRegistrationSample.png"),
    )
