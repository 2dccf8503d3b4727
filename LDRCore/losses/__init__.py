"""Loss terms of a registration: similarity, regularity and supervision. Torch only.

Every loss returns a scalar to be minimised, averaged over the batch. Displacements are (B, 3, D, H, W) in voxels of
their grid; derivatives of a displacement are therefore unitless and do not depend on the resolution.
"""

from __future__ import annotations

from LDRCore.losses.regularity import affine_determinant, affine_orthogonality, folding_penalty, smoothness
from LDRCore.losses.similarity import correlation, correlation_coefficient, local_ncc
from LDRCore.losses.supervision import distillation, label_overlap

__all__ = [
    "affine_determinant",
    "affine_orthogonality",
    "correlation",
    "correlation_coefficient",
    "distillation",
    "folding_penalty",
    "label_overlap",
    "local_ncc",
    "smoothness",
]
