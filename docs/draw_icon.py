"""Draws the extension's icon: two outlines that meet, and the grid that bends one onto the other.

python docs/draw_icon.py LightweightRegistration/Resources/Icons/LightweightRegistration.png
"""

from __future__ import annotations

import sys

import matplotlib
import numpy as np

matplotlib.use("Agg")
from matplotlib import pyplot as plt
from matplotlib.patches import FancyBboxPatch

SIZE = 128
NIGHT, GREEN, MAGENTA, PAPER = "#14202e", "#3ddc84", "#ff4fd8", "#f4f6f8"


def bend(x: np.ndarray, y: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Pull the plane towards the lower left around the middle."""
    pull = np.exp(-((x - 0.5) ** 2 + (y - 0.5) ** 2) / 0.07)
    return x - 0.10 * pull, y - 0.10 * pull


def main() -> None:
    """Write the picture."""
    figure = plt.figure(figsize=(1, 1), dpi=SIZE)
    axes = figure.add_axes((0, 0, 1, 1))
    axes.set_xlim(0, 1)
    axes.set_ylim(0, 1)
    axes.axis("off")
    box = FancyBboxPatch((0.03, 0.03), 0.94, 0.94, boxstyle="round,pad=0,rounding_size=0.18", fc=NIGHT, ec="none")
    axes.add_patch(box)
    line = np.linspace(0.14, 0.86, 200)
    for at in np.linspace(0.14, 0.86, 6):
        for x, y in ((np.full_like(line, at), line), (line, np.full_like(line, at))):
            axes.plot(*bend(x, y), color=PAPER, lw=1.1, alpha=0.75, solid_capstyle="round")
    angle = np.linspace(0, 2 * np.pi, 300)
    x, y = 0.5 + 0.27 * np.cos(angle), 0.5 + 0.30 * np.sin(angle)
    axes.plot(x + 0.075, y + 0.075, color=MAGENTA, lw=4.2)
    axes.plot(x - 0.045, y - 0.045, color=GREEN, lw=4.2)
    figure.savefig(sys.argv[1], dpi=SIZE, transparent=True)


if __name__ == "__main__":
    main()
