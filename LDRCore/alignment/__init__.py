"""Rigid and affine alignment of two images of any anatomy and contrast, without a network: objective, optimiser, starts."""
