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

        self._longest_s = self._busiest_s = 0.0  # not a list of all: it would count as memory of the module
        self._last = time.perf_counter(), time.thread_time()
        self._timer = qt.QTimer()
        self._timer.setInterval(0)
        self._timer.timeout.connect(self._tick)
        self._timer.start()

    def _tick(self) -> None:
        now = time.perf_counter(), time.thread_time()
        self._longest_s = max(self._longest_s, now[0] - self._last[0])
        self._busiest_s = max(self._busiest_s, now[1] - self._last[1])
        self._last = now

    def during(self, act: Callable[[], None], until: Callable[[], bool]) -> tuple[float, float, float]:
        """Act and process events until something holds.

        Returns:
            The longest gap, the most that this thread computed within one gap (what other programs take from it does
            not count), and the whole time, in seconds.
        """
        import qt

        self._longest_s = self._busiest_s = 0.0
        began = time.perf_counter()
        self._last = began, time.thread_time()
        act()
        while not until():
            qt.QApplication.processEvents()
        qt.QApplication.processEvents()
        self._tick()
        return self._longest_s, self._busiest_s, self._last[0] - began


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


def add_others(moving: Any) -> None:
    """A segmentation of two segments on a volume's grid, and a sequence of two frames of the volume."""
    values = slicer.util.arrayFromVolume(moving)
    labels = slicer.mrmlScene.AddNewNodeByClass("vtkMRMLLabelMapVolumeNode", "labels")
    slicer.util.updateVolumeFromArray(labels, ((values > 250).astype(np.uint8) + (values > 350)))
    labels.CopyOrientation(moving)
    segmentation = slicer.mrmlScene.AddNewNodeByClass("vtkMRMLSegmentationNode", "segments")
    segmentation.CreateDefaultDisplayNodes()
    slicer.vtkSlicerSegmentationsModuleLogic.ImportLabelmapToSegmentationNode(labels, segmentation)
    slicer.mrmlScene.RemoveNode(labels)
    sequence = slicer.mrmlScene.AddNewNodeByClass("vtkMRMLSequenceNode", "frames")
    for n in range(2):
        sequence.SetDataNodeAtValue(moving, str(n))


def main() -> None:
    """Measure Apply, the overlays, bringing along, masks and a sequence."""
    shape = tuple(int(n) for n in reversed(sys.argv[1:4]))
    application.start()
    widgets.start()
    import qt

    module = application.module()
    application.clear()
    sliceview.add_views()
    from LightweightRegistrationLib.parameters import Overlay

    fixed, moving = large_pair(shape)
    add_others(moving)
    widget = module.LightweightRegistrationWidget()
    p, panel = widget._parameterNode, widget.panel
    ticks = Ticks()
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss

    def choose() -> None:
        p.wantJacobian = True
        p.fixedVolume, p.movingVolume = fixed, moving

    def show(overlay: Overlay) -> Callable[[], None]:
        return lambda: setattr(p, "overlay", overlay)

    def at_rest() -> bool:
        return panel.job is None and not panel.display.busy

    def mask() -> None:
        p.fixedMask = p.movingMask = slicer.mrmlScene.GetFirstNodeByName("segments")
        widget.ui.applyButton.click()

    def bring_along() -> None:
        widget.ui.othersList.findItems("segments", qt.Qt.MatchExactly)[0].setCheckState(qt.Qt.Checked)
        widget.ui.otherButton.click()

    def register_sequence() -> None:
        p.sequence = slicer.mrmlScene.GetFirstNodeByName("frames")
        widget.ui.sequenceButton.click()

    steps: list[tuple[str, Callable[[], None]]] = [
        ("choose", choose),
        ("Apply", widget.ui.applyButton.click),
        ("Apply again", widget.ui.applyButton.click),
        *((overlay.value, show(overlay)) for overlay in (Overlay.checkerboard, Overlay.jacobian, Overlay.warped)),
        ("folding outline", lambda: setattr(p, "showFolding", True)),
        ("bring a segmentation along", bring_along),
        ("masks from a segmentation", mask),
        ("sequence of 2 frames", register_sequence),
    ]
    for name, act in steps:
        longest, busiest, whole = ticks.during(act, at_rest)
        print(
            f"{name}: longest gap {longest:.2f} s, of it computing {busiest:.2f} s, of {whole:.1f} s; "
            f"{widget.ui.statusLabel.text}",
            flush=True,
        )
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    print(f"peak memory above the inputs: {(peak - before) / 1e6:.2f} GB")
    widget.cleanup()


if __name__ == "__main__":
    main()
