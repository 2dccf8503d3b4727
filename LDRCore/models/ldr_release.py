"""The light student with the layer sizes of the authors' release, which Table I's parameter counts fit."""

from __future__ import annotations

from LDRCore.models.voxelmorph import VoxelMorph


class LDRRelease(VoxelMorph):
    """About 0.28 M parameters a network (paper, Table I: 0.56 / 0.84 / 1.12 M for stem + 1 / 2 / 3 networks).

    VoxelMorph's layout with other widths. Encoder: 3x3x3 stride-2 convolutions 32, 32, 32, 16. Decoder:
    nearest-neighbour x2, skip, 3x3x3 convolutions 32, 32, 32, 32, 16; then at full size, beside the two input images,
    16, 16 and a 3-channel flow layer. LeakyReLU(0.1). With a fifth of the parameters of `LDR` it costs seven times the
    arithmetic, because it works at full size: fewer parameters do not mean less time.
    """

    def __init__(self) -> None:
        super().__init__(encoder=(32, 32, 32, 16), decoder=(32, 32, 32, 32, 16, 16, 16))
