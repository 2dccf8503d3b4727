"""Rigid and affine alignment of images of any anatomy and contrast, without a network: see `search`."""
