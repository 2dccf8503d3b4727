"""The panel's window for tests: opened on an empty scene, driven with the mouse, run with its own timer."""

from __future__ import annotations

import types
from collections.abc import Callable
from typing import Any

from Testing.slicer_scene import wait_until


def click(widget: Any) -> None:
    """Press and release the left mouse button in the middle of a widget (on the box of a check box)."""
    from PySide6 import QtCore, QtTest, QtWidgets

    assert widget.isVisible()
    at = QtCore.QPoint(8, widget.height() // 2) if isinstance(widget, QtWidgets.QCheckBox) else widget.rect().center()
    QtTest.QTest.mouseClick(widget, QtCore.Qt.MouseButton.LeftButton, QtCore.Qt.KeyboardModifier.NoModifier, at)
    settle()


def settle() -> None:
    """Let the window draw and react."""
    from PySide6 import QtWidgets

    QtWidgets.QApplication.processEvents()


def choose(selector: Any, text: str) -> None:
    """Pick an entry of a node selector or combo box by what is read there."""
    box = getattr(selector, "_box", selector)
    index = box.findText(text)
    assert index >= 0, [box.itemText(n) for n in range(box.count())]
    box.setCurrentIndex(index)
    box.activated.emit(index)
    settle()


def check(widget: Any, text: str) -> None:
    """Check an entry of a list."""
    from PySide6 import QtCore

    (item,) = widget.findItems(text, QtCore.Qt.MatchFlag.MatchExactly)
    item.setCheckState(QtCore.Qt.CheckState.Checked)


def unfold(button: Any) -> None:
    """Open a section."""
    if button.collapsed:
        click(button._heading)


def run(opened: Any, until: Callable[[], bool] = lambda: False) -> None:
    """Let the window's own timer work until the job is done, or something holds."""

    def holds() -> bool:
        settle()
        return opened.panel.job is None or until()

    wait_until(holds, lambda: opened.ui.statusLabel.text, pause_s=0.005)
    settle()


def composite() -> Any:
    """What the first slice view shows."""
    import slicer

    return slicer.util.getNodesByClass("vtkMRMLSliceCompositeNode")[0]


def open_window(module: Any, monkeypatch: Any) -> types.SimpleNamespace:
    """The module's window with three slice views; what it says in dialogs is kept in `said`, and answered with yes."""
    import slicer

    from Testing.standin import sliceview, widgets

    widgets.start()
    sliceview.add_views()
    said: list[str] = []
    details: list[str] = []

    def show_error(text: str, **options: str) -> None:
        said.append(text)
        details.append(options.get("detailedText", ""))

    monkeypatch.setattr(slicer.util, "errorDisplay", show_error)
    monkeypatch.setattr(slicer.util, "confirmYesNoDisplay", lambda text, **_: said.append(text) is None)
    widget = module.LightweightRegistrationWidget()
    widget.parent.resize(460, 1500)
    settle()
    return types.SimpleNamespace(said=said, details=details, widget=widget, ui=widget.ui, panel=widget.panel)


def close_window(opened: types.SimpleNamespace) -> None:
    """Close it and let go of the scene."""
    widget = opened.widget
    widget.setParameterNode(None)
    widget.removeObservers()
    widget.panel.close()
    widget.ui.LightweightRegistration.setMRMLScene(None)
    widget.parent.close()
    widget.parent.deleteLater()
    settle()
