"""slicer.parameterNodeWrapper as far as the module uses it: typed properties kept in a vtkMRMLScriptedModuleNode.

Numbers, strings, booleans and enumerations are parameters as text; nodes are references under the parameter's name.
Widgets with the dynamic property SlicerParameterName are connected both ways.
"""

from __future__ import annotations

import contextlib
import enum
import types
import typing
from collections.abc import Callable, Iterator
from typing import Any

import slicer
import vtk


class WithinRange:
    """A number must lie in a range."""

    def __init__(self, minimum: float, maximum: float):
        self.minimum, self.maximum = minimum, maximum

    def check(self, value: float) -> None:
        if not self.minimum <= value <= self.maximum:
            raise ValueError(f"Value must be within range [{self.minimum}, {self.maximum}], is {value}")


class Parameter:
    """One typed parameter of a wrapped class."""

    def __init__(self, name: str, annotation: Any, default: Any):
        self.name = name
        self.kind, *self.rules = (
            typing.get_args(annotation) if typing.get_origin(annotation) is typing.Annotated else [annotation]
        )
        union = isinstance(self.kind, types.UnionType) or typing.get_origin(self.kind) is typing.Union
        options = [k for k in (typing.get_args(self.kind) if union else [self.kind]) if k is not type(None)]
        self.classes = tuple(k for k in options if isinstance(k, type) and issubclass(k, slicer.vtkMRMLNode))
        if self.classes and len(self.classes) != len(options):
            raise TypeError(f"{name}: cannot mix nodes with other types")
        self.default = default

    def is_in(self, node: Any) -> bool:
        return bool(node.HasParameter(self.name))

    def write(self, node: Any, value: Any) -> None:
        if self.classes:
            if value is not None and not isinstance(value, self.classes):
                raise TypeError(f"Value must be of type {self.classes}, is {type(value)}")
            node.SetParameter(self.name, "")
            node.SetNodeReferenceID(self.name, value.GetID() if value is not None else None)
            return
        allowed = (int, float) if self.kind is float else self.kind
        if not isinstance(value, allowed):
            raise TypeError(f"{self.name} must be of type {self.kind}, is {value!r}")
        for rule in self.rules:
            rule.check(value)
        node.SetParameter(self.name, value.name if isinstance(value, enum.Enum) else str(value))

    def read(self, node: Any) -> Any:
        if self.classes:
            return node.GetNodeReference(self.name)
        if not self.is_in(node):  # a scene that was saved by an earlier version
            self.write(node, self.default)
        text = node.GetParameter(self.name)
        if self.kind is bool:
            return text == "True"
        if issubclass(self.kind, enum.Enum):
            return self.kind[text]
        return self.kind(text)


@contextlib.contextmanager
def _one_event(node: Any) -> Iterator[None]:
    with slicer.util.NodeModify(node):
        yield


def parameterNodeWrapper(cls: type) -> type:
    hints = typing.get_type_hints(cls, include_extras=True)
    parameters = {}
    for name, annotation in hints.items():
        parameter = Parameter(name, annotation, None)
        if hasattr(cls, name):
            parameter.default = getattr(cls, name)
        elif not parameter.classes:
            parameter.default = (
                next(iter(parameter.kind)) if issubclass(parameter.kind, enum.Enum) else parameter.kind()
            )
        parameters[name] = parameter
        setattr(cls, name, _property(parameter))

    def init(self: Any, node: Any) -> None:
        self.parameterNode = node
        self._connections = {}
        self._updating = False
        for parameter in parameters.values():
            if not parameter.is_in(node):
                parameter.write(node, parameter.default)

    def connect(self: Any, gui: Any) -> int:
        connected = {}
        for widget in vars(gui).values():
            name = widget.property("SlicerParameterName") if hasattr(widget, "property") else None
            if name:
                connected[name] = Connector(self, widget, parameters[name])
        tag = len(self._connections)
        observer = self.AddObserver(vtk.vtkCommand.ModifiedEvent, lambda *_: _update(self, connected))
        self._connections[tag] = (connected, observer)
        for connector in connected.values():
            connector.show()
            connector.listen()
        return tag

    def disconnect(self: Any, tag: int | None) -> None:
        connected, observer = self._connections.pop(tag, ({}, None))
        for connector in connected.values():
            connector.forget()
        if observer is not None:
            self.RemoveObserver(observer)

    cls.__init__ = init
    cls.allParameters = parameters
    cls.connectGui = connect
    cls.disconnectGui = disconnect
    cls.StartModify = lambda self: self.parameterNode.StartModify()
    cls.EndModify = lambda self, was: self.parameterNode.EndModify(was)
    cls.AddObserver = lambda self, event, call, priority=0.0: self.parameterNode.AddObserver(event, call, priority)
    cls.RemoveObserver = lambda self, tag: self.parameterNode.RemoveObserver(tag)
    cls.Modified = lambda self: self.parameterNode.Modified()
    return cls


def _property(parameter: Parameter) -> property:
    def write(self: Any, value: Any) -> None:
        with _one_event(self.parameterNode):
            parameter.write(self.parameterNode, value)

    return property(lambda self: parameter.read(self.parameterNode), write)


def _update(wrapper: Any, connected: dict[str, Connector]) -> None:
    if wrapper._updating:
        return
    wrapper._updating = True
    try:
        for connector in connected.values():
            connector.show()
    finally:
        wrapper._updating = False


class Connector:
    """One widget and one parameter. Widget types must match exactly, as in Slicer."""

    def __init__(self, wrapper: Any, widget: Any, parameter: Parameter):
        import ctk
        import qt

        self._wrapper, self._widget, self._parameter = wrapper, widget, parameter
        kind, ranges = parameter.kind, [r for r in parameter.rules if isinstance(r, WithinRange)]
        exact = type(widget)
        self._read: Callable[[], Any]
        if parameter.classes and exact is slicer.qMRMLNodeComboBox:
            widget.nodeTypes = tuple(c().GetClassName() for c in parameter.classes)
            self._read, self._show, self._signal = widget.currentNode, widget.setCurrentNode, widget.currentNodeChanged
        elif kind is bool and exact in (qt.QCheckBox, qt.QPushButton):
            if exact is qt.QPushButton and not widget.checkable:
                raise TypeError(f"{parameter.name}: a push button must be checkable")
            self._read, self._signal = lambda: widget.checked, widget.toggled
            self._show = lambda value: setattr(widget, "checked", value)
        elif kind in (int, float) and exact in (qt.QSpinBox, qt.QDoubleSpinBox, ctk.ctkSliderWidget):
            if exact is qt.QSpinBox and kind is float:
                raise TypeError(f"{parameter.name}: a QSpinBox holds whole numbers")
            if kind is int and exact is not qt.QSpinBox:
                widget.decimals = 0
            for limits in ranges:
                widget.minimum, widget.maximum = limits.minimum, limits.maximum
            if not ranges:
                raise TypeError(f"{parameter.name}: a slider or spin box needs a range")
            self._read, self._signal = lambda: kind(widget.value), widget.valueChanged
            self._show = lambda value: setattr(widget, "value", value)
        elif isinstance(kind, type) and issubclass(kind, enum.Enum) and exact is qt.QComboBox:
            choices = list(kind)
            widget.clear()
            for choice in choices:
                widget.addItem(choice.label() if hasattr(choice, "label") else choice.name)
            self._read, self._signal = lambda: choices[widget.currentIndex], widget.currentIndexChanged
            self._show = lambda value: setattr(widget, "currentIndex", choices.index(value))
        else:
            raise TypeError(f"Unable to connect parameter '{parameter.name}' of type {kind} to a {exact}")

    def show(self) -> None:
        self._show(self._parameter.read(self._wrapper.parameterNode))

    def listen(self) -> None:
        self._signal.connect(self._changed)

    def forget(self) -> None:
        self._signal.disconnect(self._changed)

    def _changed(self, *_: Any) -> None:
        if not self._wrapper._updating:
            with _one_event(self._wrapper.parameterNode):
                self._parameter.write(self._wrapper.parameterNode, self._read())
