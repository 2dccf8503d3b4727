"""Measures how long the panel blocks the window: the longest gap between two ticks of a timer, for large volumes.

python -m Testing.standin.gaps 512 512 300
"""

from __future__ import annotations

import resource
import sys
import time
from collections.abc import Callable
from typing import Any

import numpy as np
import slicer

from Testing.standin import application, sliceview, widgets


class Ticks:
    """A timer without delay whose ticks come late where the main thread is busy."""

    def __init__(self) -> None:
        """Start it."""
        import qt

        self.gaps_s: list[float] = []
        self._last = time.perf_counter()
        self._timer = qt.QTimer()
        self._timer.setInterval(0)
        self._timer.timeout.connect(self._tick)
        self._timer.start()

    def _tick(self) -> None:
        now = time.perf_counter()
        self.gaps_s.append(now - self._last)
        self._last = now

    def during(self, act: Callable[[], None], until: Callable[[], bool]) -> tuple[float, float]:
        """Act and process events until something holds; return the longest gap and the whole time in seconds."""
        import qt

        self.gaps_s.clear()
        began = self._last = time.perf_counter()
        act()
        while not until():
            qt.QApplication.processEvents()
        qt.QApplication.processEvents()
        self._tick()
        return max(self.gaps_s), time.perf_counter() - began


def large_pair(shape: tuple[int, ...]) -> list[Any]:
    """Two int16 volumes of 0.5 mm with content."""
    nodes = []
    for n in range(2):
        k, j, i = np.ogrid[tuple(slice(-1, 1, size * 1j) for size in shape)]
        values = ((k * k + j * j + i * i < 0.7 + 0.05 * n) * (300 + 100 * np.sin(9 * i + n) * np.cos(7 * j))).astype(
            np.int16
        )
        node = slicer.mrmlScene.AddNewNodeByClass("vtkMRMLScalarVolumeNode", f"large {n}")
        node.SetSpacing(0.5, 0.5, 0.5)
        slicer.util.updateVolumeFromArray(node, values)
        node.CreateDefaultDisplayNodes()
        nodes.append(node)
    return nodes


def main() -> None:
    """Measure Apply and the overlays."""
    shape = tuple(int(n) for n in reversed(sys.argv[1:4]))
    application.start()
    widgets.start()
    module = application.module()
    application.clear()
    sliceview.add_views()
    from LightweightRegistrationLib.parameters import Overlay

    fixed, moving = large_pair(shape)
    widget = module.LightweightRegistrationWidget()
    p, panel = widget._parameterNode, widget.panel
    ticks = Ticks()
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss

    def choose() -> None:
        p.fixedVolume, p.movingVolume = fixed, moving

    def show(overlay: Overlay) -> Callable[[], None]:
        return lambda: setattr(p, "overlay", overlay)

    def at_rest() -> bool:
        return panel.job is None and not panel.display.busy

    steps: list[tuple[str, Callable[[], None]]] = [
        ("choose", choose),
        ("Apply", widget.ui.applyButton.click),
        ("Apply again", widget.ui.applyButton.click),
        *((overlay.value, show(overlay)) for overlay in (Overlay.checkerboard, Overlay.jacobian, Overlay.warped)),
        ("folding outline", lambda: setattr(p, "showFolding", True)),
    ]
    for name, act in steps:
        longest, whole = ticks.during(act, at_rest)
        print(f"{name}: longest gap {longest:.2f} s of {whole:.1f} s")
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    print(f"peak memory above the inputs: {(peak - before) / 1e6:.2f} GB; status: {widget.ui.statusLabel.text}")
    widget.cleanup()


if __name__ == "__main__":
    main()
