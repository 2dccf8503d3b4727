"""Light-weight deformable registration: `register(fixed, moving)` and what belongs to it.

The one convention, used everywhere in this package:

- A displacement tensor is (B, 3, D, H, W); component c points along tensor axis c, in voxels of the grid it lives on.
- Warping pulls: ``warped(x) = moving(x + u(x))``. Corner voxels of two resolutions coincide (align_corners=True).
- "First u1, then u2" composes to ``u(x) = u2(x) + u1(x + u2(x))``.
- Outside the tensors everything is physical: millimetres, LPS axes (as DICOM and SimpleITK), and a transform maps
  points of the fixed image to points of the moving image. Names carry units and frames: `_mm`, `_vox`, `_lps`, `_s`.

Importing this package imports neither torch nor SimpleITK; the first use of a name below does. It never imports
slicer, vtk or qt.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

if TYPE_CHECKING:
    from LDRCore.cohort.runner import register_many as register_many
    from LDRCore.errors import RegistrationError as RegistrationError
    from LDRCore.models.weights import list_models as list_models
    from LDRCore.models.weights import model_info as model_info
    from LDRCore.pipeline.model import load_model as load_model
    from LDRCore.registration import register as register
    from LDRCore.registration import transform_points as transform_points
    from LDRCore.registration import warp_image as warp_image
    from LDRCore.result import RegistrationResult as RegistrationResult

_HOME = {
    "RegistrationError": "LDRCore.errors",
    "RegistrationResult": "LDRCore.result",
    "register": "LDRCore.registration",
    "register_many": "LDRCore.cohort.runner",
    "transform_points": "LDRCore.registration",
    "warp_image": "LDRCore.registration",
    "list_models": "LDRCore.models.weights",
    "load_model": "LDRCore.pipeline.model",
    "model_info": "LDRCore.models.weights",
}

__all__ = ["__version__", *_HOME]


def __getattr__(name: str) -> Any:
    """Import a public name on first use."""
    if name not in _HOME:
        raise AttributeError(f"module 'LDRCore' has no attribute {name!r}")
    return getattr(importlib.import_module(_HOME[name]), name)


def __dir__() -> list[str]:
    return sorted(__all__)
