"""The light student with the layer sizes of the authors' release, which have the parameter counts of Table I."""

from __future__ import annotations

from LDRCore.models.voxelmorph import VoxelMorph


class LDRRelease(VoxelMorph):
    """VoxelMorph's layout with other widths, 0.28 M parameters (paper, Table I: 0.56 / 0.84 / 1.12 M for 1 / 2 / 3).

    Table I counts the stem as one more network. Encoder: 3x3x3 stride-2 convolutions 32, 32, 32, 16. Decoder:
    nearest-neighbour x2, skip, 3x3x3 convolutions 32, 32, 32, 32, 16; then at full size, beside the two input images,
    16, 16 and a 3-channel flow layer. LeakyReLU(0.1). It has a fifth of the parameters of `LDR` and seven times the
    arithmetic, because it works at full size: fewer parameters do not mean less time.
    """

    def __init__(self) -> None:
        super().__init__(encoder=(32, 32, 32, 16), decoder=(32, 32, 32, 32, 16, 16, 16))
