"""The panel's parameters, which are saved in the scene."""

from __future__ import annotations

import enum
from typing import Annotated

from slicer import (
    vtkMRMLLabelMapVolumeNode,
    vtkMRMLMarkupsROINode,
    vtkMRMLScalarVolumeNode,
    vtkMRMLSegmentationNode,
    vtkMRMLSequenceNode,
    vtkMRMLTransformNode,
)
from slicer.parameterNodeWrapper import WithinRange, parameterNodeWrapper

from .jobs import Settings


class Labelled(enum.Enum):
    """A choice in a combo box; the value is its label."""

    def label(self) -> str:
        """Return the text of the choice."""
        return self.value


class Kind(Labelled):
    """What the transform may do; the names are those of `LDRCore.register`."""

    rigid = "Rigid: turn and shift"
    affine = "Affine: also scale and shear"
    deformable = "Deformable"


class Prealignment(Labelled):
    """Where the alignment begins; the names are those of `jobs.PREALIGNMENTS`."""

    centre = "Centre the contents first"
    affine = "From where they are"
    none = "None: they are aligned already"


class Quality(Labelled):
    """How long the displacement of the pair is optimised after the networks; `refine` is LDRCore's name for it."""

    fast = "Fast"
    accurate = "Accurate"
    best = "Best: slowest"

    @property
    def refine(self) -> str | None:
        """Return the value of `refine` in `LDRCore.register`; None leaves it to the model, which may need it."""
        return {"fast": None, "accurate": "fast", "best": "best"}[self.name]


class Similarity(Labelled):
    """What the optimisation makes larger; the names are those of LDRCore, with underscores."""

    auto = "Automatic"
    local_ncc = "Local correlation (same contrast)"
    mind = "Self-similarity, MIND (unlike contrasts)"


class Device(Labelled):
    """The processor that computes."""

    auto = "Automatic (GPU if there is one)"
    cpu = "CPU"
    cuda = "GPU (CUDA)"


class Overlay(Labelled):
    """The volume that is shown over the fixed one in the slice views."""

    warped = "Warped volume"
    moving = "Moving volume as it was"
    checkerboard = "Checkerboard of fixed and warped"
    jacobian = "Jacobian map (colours)"
    nothing = "Nothing"


class Direction(Labelled):
    """The scan that nodes belong to: they are warped to the other one."""

    to_fixed = "moving scan"
    to_moving = "fixed scan"


@parameterNodeWrapper
class LightweightRegistrationParameterNode:
    """The panel's parameters. A wanted output without a node gets a new one on Apply."""

    fixedVolume: vtkMRMLScalarVolumeNode
    movingVolume: vtkMRMLScalarVolumeNode
    fixedMask: vtkMRMLSegmentationNode | vtkMRMLLabelMapVolumeNode | vtkMRMLMarkupsROINode | None
    movingMask: vtkMRMLSegmentationNode | vtkMRMLLabelMapVolumeNode | vtkMRMLMarkupsROINode | None
    initialTransform: vtkMRMLTransformNode

    model: str = Settings.model
    kind: Kind = Kind.deformable
    quality: Quality = Quality.accurate
    cascades: Annotated[int, WithinRange(1, 10)] = 10  # every one: the panel lowers it to what the model has

    wantWarped: bool = True
    wantTransform: bool = True
    wantJacobian: bool = False
    warpedVolume: vtkMRMLScalarVolumeNode
    transform: vtkMRMLTransformNode
    jacobianMap: vtkMRMLScalarVolumeNode
    inverseTransform: vtkMRMLTransformNode

    overlay: Overlay = Overlay.warped
    fade: Annotated[float, WithinRange(0.0, 1.0)] = 0.5
    showGrid: bool = False
    gridSpacing: Annotated[float, WithinRange(2.0, 50.0)] = 10.0
    jacobianFactor: Annotated[float, WithinRange(1.1, 5.0)] = 2.0
    showFolding: bool = False

    prealignment: Prealignment = Prealignment.centre
    refinementSteps: Annotated[int, WithinRange(0, 500)] = 0
    similarity: Similarity = Similarity.auto
    device: Device = Device.auto
    threads: Annotated[int, WithinRange(0, 256)] = 0
    keepInverse: bool = False
    keepFiles: bool = False

    direction: Direction = Direction.to_fixed
    sequence: vtkMRMLSequenceNode
