"""The Python modules qt and ctk and the qMRML widgets, on PySide6, as far as the module's panel uses them.

Slicer's PythonQt lets Python read and set Qt properties as attributes (button.enabled = True, widget.text). Thin
subclasses give PySide6's widgets the same, without taking away the methods of these names that Qt itself needs.
"""

from __future__ import annotations

import os
import sys
import tempfile
import types
from typing import Any

import slicer
from PySide6 import QtCore, QtGui, QtUiTools, QtWidgets


def attribute(getter: str, setter: str) -> property:
    """A Qt property as an attribute, through the methods of the class it is inherited from."""

    def read(self: Any) -> Any:
        return getattr(super(type(self), self), getter)()

    def write(self: Any, value: Any) -> None:
        getattr(super(type(self), self), setter)(value)

    return property(read, write)


def standin(base: type, **attributes: tuple[str, str]) -> type:
    """A subclass of a PySide6 widget with attributes for its properties."""
    always = {
        "name": ("objectName", "setObjectName"),
        "enabled": ("isEnabled", "setEnabled"),
        "visible": ("isVisible", "setVisible"),
        "toolTip": ("toolTip", "setToolTip"),
    }
    members = {name: attribute(*methods) for name, methods in {**always, **attributes}.items()}
    return type(base.__name__, (base,), members)


TEXT = ("text", "setText")
VALUE = {name: (name, f"set{name[0].upper()}{name[1:]}") for name in ("value", "minimum", "maximum", "singleStep")}
QPushButton = standin(
    QtWidgets.QPushButton, text=TEXT, checked=("isChecked", "setChecked"), checkable=("isCheckable", "setCheckable")
)
QCheckBox = standin(QtWidgets.QCheckBox, text=TEXT, checked=("isChecked", "setChecked"))
QLabel = standin(QtWidgets.QLabel, text=TEXT)
QSpinBox = standin(QtWidgets.QSpinBox, **VALUE)
QDoubleSpinBox = standin(QtWidgets.QDoubleSpinBox, **VALUE, decimals=("decimals", "setDecimals"))
QProgressBar = standin(QtWidgets.QProgressBar, value=VALUE["value"], maximum=VALUE["maximum"])
QComboBox = standin(
    QtWidgets.QComboBox, currentIndex=("currentIndex", "setCurrentIndex"), currentText=("currentText", "setCurrentText")
)
QListWidget = standin(QtWidgets.QListWidget)


class ctkCollapsibleButton(QtWidgets.QWidget):
    """A heading that shows and hides what lies below it."""

    def __init__(self, parent: Any = None):
        super().__init__(parent)
        self._heading = QtWidgets.QToolButton(self)
        self._heading.setCheckable(True)
        self._heading.setChecked(True)
        self._heading.setToolButtonStyle(QtCore.Qt.ToolButtonStyle.ToolButtonTextBesideIcon)
        self._heading.setArrowType(QtCore.Qt.ArrowType.DownArrow)
        self._heading.setStyleSheet(
            "QToolButton { background: #dfe3e8; border: none; border-radius: 3px; padding: 3px; text-align: left; }"
        )
        self._heading.toggled.connect(self._unfold)
        self.setContentsMargins(8, 30, 4, 4)

    def resizeEvent(self, event: Any) -> None:
        self._heading.setGeometry(0, 0, self.width(), 26)

    def _unfold(self, shown: bool) -> None:
        kinds = QtCore.Qt.ArrowType
        self._heading.setArrowType(kinds.DownArrow if shown else kinds.RightArrow)
        for child in self.children():
            if isinstance(child, QtWidgets.QWidget) and child is not self._heading:
                child.setVisible(shown)
        self.setMaximumHeight(16777215 if shown else 26)

    def showEvent(self, event: Any) -> None:
        self._unfold(self._heading.isChecked())

    def _text(self) -> str:
        return self._heading.text()

    def _set_text(self, text: str) -> None:
        self._heading.setText(text)

    def _collapsed(self) -> bool:
        return not self._heading.isChecked()

    def _set_collapsed(self, collapsed: bool) -> None:
        self._heading.setChecked(not collapsed)
        self._unfold(not collapsed)

    text = QtCore.Property(str, _text, _set_text)
    collapsed = QtCore.Property(bool, _collapsed, _set_collapsed)
    name = attribute("objectName", "setObjectName")


class ctkSliderWidget(QtWidgets.QWidget):
    """A slider and a spin box with one value."""

    valueChanged = QtCore.Signal(float)

    def __init__(self, parent: Any = None):
        super().__init__(parent)
        self._slider = QtWidgets.QSlider(QtCore.Qt.Orientation.Horizontal, self)
        self._box = QtWidgets.QDoubleSpinBox(self)
        layout = QtWidgets.QHBoxLayout(self)
        layout.setContentsMargins(0, 0, 0, 0)
        layout.addWidget(self._slider, 1)
        layout.addWidget(self._box)
        self._box.valueChanged.connect(self._box_changed)
        self._slider.valueChanged.connect(lambda steps: self._box.setValue(self._box.minimum() + steps * self._step()))
        self._scale()

    def _step(self) -> float:
        return self._box.singleStep() or 1.0

    def _scale(self) -> None:
        self._slider.blockSignals(True)
        self._slider.setRange(0, round((self._box.maximum() - self._box.minimum()) / self._step()))
        self._slider.setValue(round((self._box.value() - self._box.minimum()) / self._step()))
        self._slider.blockSignals(False)

    def _box_changed(self, value: float) -> None:
        self._scale()
        self.valueChanged.emit(value)

    def _set(self, name: str, value: Any) -> None:
        getattr(self._box, name)(value)
        self._scale()

    value = QtCore.Property(float, lambda self: self._box.value(), lambda self, v: self._box.setValue(v))
    minimum = QtCore.Property(float, lambda self: self._box.minimum(), lambda self, v: self._set("setMinimum", v))
    maximum = QtCore.Property(float, lambda self: self._box.maximum(), lambda self, v: self._set("setMaximum", v))
    singleStep = QtCore.Property(
        float, lambda self: self._box.singleStep(), lambda self, v: self._set("setSingleStep", v)
    )
    decimals = QtCore.Property(int, lambda self: self._box.decimals(), lambda self, v: self._set("setDecimals", v))
    suffix = QtCore.Property(str, lambda self: self._box.suffix(), lambda self, v: self._box.setSuffix(v))
    name = attribute("objectName", "setObjectName")
    enabled = attribute("isEnabled", "setEnabled")


class ctkPathLineEdit(QtWidgets.QWidget):
    """A line for a path. The button that opens a dialog is left out."""

    Files, Dirs = 0x002, 0x001  # of QDir::Filter

    def __init__(self, parent: Any = None):
        super().__init__(parent)
        self._line = QtWidgets.QLineEdit(self)
        layout = QtWidgets.QHBoxLayout(self)
        layout.setContentsMargins(0, 0, 0, 0)
        layout.addWidget(self._line)
        self.filters, self.nameFilters = 0, []

    currentPath = QtCore.Property(str, lambda self: self._line.text(), lambda self, path: self._line.setText(path))
    name = attribute("objectName", "setObjectName")
    enabled = attribute("isEnabled", "setEnabled")


class qMRMLWidget(QtWidgets.QWidget):
    """Hands its scene on to its children (the connections in .ui files do that in Slicer)."""

    name = attribute("objectName", "setObjectName")

    def setMRMLScene(self, scene: Any) -> None:
        for child in self.findChildren(QtWidgets.QWidget):
            if isinstance(child, qMRMLNodeComboBox):
                child.setMRMLScene(scene)


def _flag(name: str, kind: type) -> Any:
    return QtCore.Property(kind, lambda self: self._flags.get(name), lambda self, v: self._set_flag(name, v))


class qMRMLNodeComboBox(QtWidgets.QWidget):
    """A selector of nodes of some classes in a scene.

    As in Slicer, rows are removed and inserted, and Qt chooses the current row anew: a new `noneDisplay` replaces the
    row "None", and a selector that stood on it goes to the first node; when the current node leaves the scene, the node
    whose row takes its place becomes the current one.
    """

    currentNodeChanged = QtCore.Signal(object)

    def __init__(self, parent: Any = None):
        super().__init__(parent)
        self._scene: Any = None
        self._tags: list[int] = []
        self._classes: list[str] = []
        self._flags: dict[str, Any] = {"noneEnabled": False, "showChildNodeTypes": True, "baseName": ""}
        self._none = "None"
        self._nodes: list[Any] = []
        self._box = QtWidgets.QComboBox(self)
        self._box.setSizeAdjustPolicy(QtWidgets.QComboBox.SizeAdjustPolicy.AdjustToMinimumContentsLengthWithIcon)
        layout = QtWidgets.QHBoxLayout(self)
        layout.setContentsMargins(0, 0, 0, 0)
        layout.addWidget(self._box)
        self._box.activated.connect(self._picked)
        self._current: Any = None

    def setMRMLScene(self, scene: Any) -> None:
        while self._tags:
            self._scene.RemoveObserver(self._tags.pop())
        self._scene = scene
        if scene is None:
            return
        for event in (scene.NodeAddedEvent, scene.NodeRemovedEvent, scene.EndCloseEvent, scene.EndImportEvent):
            self._tags.append(scene.AddObserver(event, lambda *_: self._fill()))
        self._fill()

    def _fits(self, node: Any) -> bool:
        if node.GetHideFromEditors():
            return False
        if self._flags["showChildNodeTypes"]:
            return any(node.IsA(name) for name in self._classes)
        return node.GetClassName() in self._classes

    def _fill(self) -> None:
        if self._scene is None:
            return
        nodes = [self._scene.GetNthNode(n) for n in range(self._scene.GetNumberOfNodes())]
        row = next((k for k, node in enumerate(self._nodes) if node is self._current), 0)
        self._nodes = ([None] if self._flags["noneEnabled"] else []) + [n for n in nodes if self._fits(n)]
        self._box.blockSignals(True)
        self._box.clear()
        self._box.addItems([self._none if node is None else node.GetName() for node in self._nodes])
        known = next((k for k, node in enumerate(self._nodes) if node is self._current), -1)
        self._box.setCurrentIndex(known if known >= 0 else 0)
        self._box.blockSignals(False)
        if known < 0 and self._current is not None:
            self.setCurrentNode(
                None if self._scene.IsBatchProcessing() else self._nodes[min(row, len(self._nodes) - 1)]
            )

    def _picked(self, index: int) -> None:
        self.setCurrentNode(self._nodes[index])

    def currentNode(self) -> Any:
        return self._current

    def setCurrentNode(self, node: Any) -> None:
        changed = node is not self._current
        self._current = node
        index = next((k for k, known in enumerate(self._nodes) if known is node), -1)
        self._box.setCurrentIndex(index)
        if changed:
            self.currentNodeChanged.emit(node)

    def addNode(self) -> Any:
        """What "Create new" in the list does."""
        name = self._scene.GenerateUniqueName(self._flags["baseName"] or self._classes[0])
        node = self._scene.AddNewNodeByClass(self._classes[0], name)
        self.setCurrentNode(node)
        return node

    def _set_types(self, classes: Any) -> None:
        self._classes = list(classes)
        self._fill()

    def _set_none(self, text: str) -> None:
        if text == self._none:
            return
        self._none = text
        self._fill()
        real = [node for node in self._nodes if node is not None]
        if self._flags["noneEnabled"] and self._current is None and real:
            self.setCurrentNode(real[0])

    def _set_flag(self, name: str, value: Any) -> None:
        if self._flags.get(name) != value:
            self._flags[name] = value
            self._fill()

    nodeTypes = QtCore.Property("QStringList", lambda self: self._classes, _set_types)
    noneDisplay = QtCore.Property(str, lambda self: self._none, _set_none)
    noneEnabled, showChildNodeTypes = _flag("noneEnabled", bool), _flag("showChildNodeTypes", bool)
    addEnabled, removeEnabled = _flag("addEnabled", bool), _flag("removeEnabled", bool)
    renameEnabled = _flag("renameEnabled", bool)
    selectNodeUponCreation, baseName = _flag("selectNodeUponCreation", bool), _flag("baseName", str)
    name = attribute("objectName", "setObjectName")
    enabled = attribute("isEnabled", "setEnabled")


CUSTOM = {
    kind.__name__: kind
    for kind in (
        QPushButton,
        QCheckBox,
        QLabel,
        QSpinBox,
        QDoubleSpinBox,
        QProgressBar,
        QComboBox,
        QListWidget,
        ctkCollapsibleButton,
        ctkPathLineEdit,
        ctkSliderWidget,
        qMRMLWidget,
        qMRMLNodeComboBox,
    )
}


class QUiLoader(QtUiTools.QUiLoader):
    """Reads .ui files with the classes above."""

    def createWidget(self, kind: str, parent: Any = None, name: str = "") -> Any:
        if kind not in CUSTOM:
            return super().createWidget(kind, parent, name)
        widget = CUSTOM[kind](parent)
        widget.setObjectName(name)
        return widget


class QFileDialog(QtWidgets.QFileDialog):
    """Its static methods return the path alone, as PythonQt's do."""

    @staticmethod
    def getOpenFileName(*arguments: Any) -> str:
        return QtWidgets.QFileDialog.getOpenFileName(*arguments)[0]

    @staticmethod
    def getSaveFileName(*arguments: Any) -> str:
        return QtWidgets.QFileDialog.getSaveFileName(*arguments)[0]


class QFile(QtCore.QFile):
    ReadOnly = QtCore.QFile.OpenModeFlag.ReadOnly


def start() -> Any:
    """Install qt and ctk and a running QApplication; returns the QApplication."""
    if "qt" in sys.modules:
        return QtWidgets.QApplication.instance()
    os.environ.setdefault("QT_QPA_PLATFORM", "offscreen")
    # .ui files connect C++ signals that only Slicer's own widgets have; qMRMLWidget does here what they are for
    os.environ.setdefault("QT_LOGGING_RULES", "qt.core.qobject.connect=false")
    application = QtWidgets.QApplication.instance() or QtWidgets.QApplication([])
    QtCore.qInstallMessageHandler(lambda kind, context, text: None)  # the off-screen plugin has little to say
    QtCore.QSettings.setDefaultFormat(QtCore.QSettings.Format.IniFormat)  # settings of this process alone
    QtCore.QSettings.setPath(
        QtCore.QSettings.Format.IniFormat, QtCore.QSettings.Scope.UserScope, tempfile.mkdtemp(prefix="slicer-standin-")
    )
    application.setOrganizationName("Slicer stand-in")
    application.setStyle("Fusion")
    application.setPalette(application.style().standardPalette())
    qt, ctk = types.ModuleType("qt"), types.ModuleType("ctk")
    for library in (QtCore, QtGui, QtWidgets):
        for name in dir(library):
            if name.startswith("Q"):
                setattr(qt, name, getattr(library, name))
    own = {"QUiLoader": QUiLoader, "QFile": QFile, "QFileDialog": QFileDialog}
    for name, kind in {**CUSTOM, **own}.items():
        target = ctk if name.startswith("ctk") else slicer if name.startswith("qMRML") else qt
        setattr(target, name, kind)
    sys.modules["qt"], sys.modules["ctk"] = qt, ctk
    return application
