"""Displacements: warping, composing, inverting, resampling on the fixed grid."""
