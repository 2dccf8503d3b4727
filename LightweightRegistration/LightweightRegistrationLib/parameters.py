"""What the panel keeps in the scene, so that a saved scene brings every choice back."""

from __future__ import annotations

import enum
from typing import Annotated

from slicer import (
    vtkMRMLLabelMapVolumeNode,
    vtkMRMLMarkupsCurveNode,
    vtkMRMLMarkupsFiducialNode,
    vtkMRMLMarkupsLineNode,
    vtkMRMLModelNode,
    vtkMRMLScalarVolumeNode,
    vtkMRMLSegmentationNode,
    vtkMRMLSequenceNode,
    vtkMRMLTransformNode,
)
from slicer.parameterNodeWrapper import WithinRange, parameterNodeWrapper


class Labelled(enum.Enum):
    """A choice in a combo box: the value is what the user reads."""

    def label(self) -> str:
        """What the user reads."""
        return self.value


class Prealignment(Labelled):
    """How the volumes are brought near each other first; the names are those of `jobs.PREALIGNMENTS`."""

    centre = "Centre, then affine"
    affine = "Affine from where they are"
    none = "None: they are aligned already"


class Device(Labelled):
    """What computes."""

    auto = "Automatic (GPU if there is one)"
    cpu = "CPU"
    cuda = "GPU (CUDA)"


class Overlay(Labelled):
    """What lies over the fixed volume in the slice views."""

    warped = "Warped volume"
    moving = "Moving volume as it was"
    checkerboard = "Checkerboard of fixed and warped"
    jacobian = "Jacobian map (colours)"
    nothing = "Nothing"


class Direction(Labelled):
    """Which scan something belongs to, and where it goes."""

    to_fixed = "belongs to the moving scan: bring it to the fixed one"
    to_moving = "belongs to the fixed scan: bring it to the moving one"


@parameterNodeWrapper
class LightweightRegistrationParameterNode:
    """The panel's choices. Outputs that are wanted but not chosen are created on Apply."""

    fixedVolume: vtkMRMLScalarVolumeNode
    movingVolume: vtkMRMLScalarVolumeNode
    fixedMask: vtkMRMLSegmentationNode | vtkMRMLLabelMapVolumeNode | None
    movingMask: vtkMRMLSegmentationNode | vtkMRMLLabelMapVolumeNode | None
    initialTransform: vtkMRMLTransformNode

    model: str = "brain-t1-small"
    cascades: Annotated[int, WithinRange(1, 10)] = 3

    wantWarped: bool = True
    wantTransform: bool = True
    wantJacobian: bool = True
    warpedVolume: vtkMRMLScalarVolumeNode
    transform: vtkMRMLTransformNode
    jacobianMap: vtkMRMLScalarVolumeNode
    inverseTransform: vtkMRMLTransformNode

    overlay: Overlay = Overlay.warped
    fade: Annotated[float, WithinRange(0.0, 1.0)] = 0.5
    showGrid: bool = False
    gridSpacing: Annotated[float, WithinRange(2.0, 50.0)] = 10.0
    jacobianRange: Annotated[float, WithinRange(0.05, 2.0)] = 0.5
    showFolding: bool = False

    prealignment: Prealignment = Prealignment.centre
    refinementSteps: Annotated[int, WithinRange(0, 500)] = 0
    device: Device = Device.auto
    threads: Annotated[int, WithinRange(0, 256)] = 0
    keepInverse: bool = False

    other: (
        vtkMRMLScalarVolumeNode
        | vtkMRMLLabelMapVolumeNode
        | vtkMRMLSegmentationNode
        | vtkMRMLMarkupsFiducialNode
        | vtkMRMLMarkupsCurveNode
        | vtkMRMLMarkupsLineNode
        | vtkMRMLModelNode
        | None
    )
    direction: Direction = Direction.to_fixed
    sequence: vtkMRMLSequenceNode
