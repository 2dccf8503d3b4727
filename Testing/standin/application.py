"""slicer.app, slicer.mrmlScene, slicer.modules, Sample Data and the scripted module base classes, without Qt."""

from __future__ import annotations

import importlib
import sys
import tempfile
import types
import unittest
from pathlib import Path
from typing import Any

import slicer
import vtk

ROOT = Path(__file__).parents[2]
MODULE = ROOT / "LightweightRegistration"
LOGICS = {
    "Volumes": "vtkSlicerVolumesLogic",
    "Transforms": "vtkSlicerTransformLogic",
    "Markups": "vtkSlicerMarkupsLogic",
    "Segmentations": "vtkSlicerSegmentationsModuleLogic",
    "Sequences": "vtkSlicerSequencesLogic",
}


class Application:
    """slicer.app. Signals are kept and can be sent by tests with `emit`."""

    applicationName = "Slicer stand-in"
    applicationVersion = "5.12.0-stand-in"

    def __init__(self) -> None:
        self.slots: dict[str, list[Any]] = {}
        self.temporaryPath = tempfile.mkdtemp(prefix="slicer-standin-")
        (Path(self.temporaryPath) / "share" / "ColorFiles").mkdir(parents=True)
        (Path(self.temporaryPath) / ".slicer-cache").touch()
        self.slicerUserSettingsFilePath = str(Path(self.temporaryPath) / "settings" / "Slicer.ini")
        self._cache, self._io = slicer.vtkCacheManager(), slicer.vtkDataIOManager()
        self._cache.SetRemoteCacheDirectory(self.temporaryPath)
        self._io.SetCacheManager(self._cache)
        slicer.mrmlScene.SetCacheManager(self._cache)
        slicer.mrmlScene.SetDataIOManager(self._io)
        self._logic = slicer.vtkSlicerApplicationLogic()
        self._logic.SetHomeDirectory(self.temporaryPath)
        self._logic.SetShareDirectory("share")
        self._logic.SetMRMLScene(slicer.mrmlScene)
        self._collections = vtk.vtkCollection(), vtk.vtkCollection()
        self._logic.SetSliceLogics(self._collections[0])
        self._logic.SetViewLogics(self._collections[1])
        self.logics = {}
        for name, logic in {"Colors": "vtkSlicerColorLogic", **LOGICS}.items():
            made = getattr(slicer, logic)()
            made.SetMRMLApplicationLogic(self._logic)
            self._logic.SetModuleLogic(name, made)
            if name == "Colors":
                self._logic.SetColorLogic(made)
            made.SetMRMLScene(slicer.mrmlScene)
            self.logics[name] = made

    def applicationLogic(self) -> Any:
        return self._logic

    def connect(self, signal: str, slot: Any) -> None:
        self.slots.setdefault(signal, []).append(slot)

    def disconnect(self, signal: str, slot: Any) -> None:
        self.slots[signal].remove(slot)

    def emit(self, signal: str, *arguments: Any) -> None:
        for slot in list(self.slots.get(signal, [])):
            slot(*arguments)

    def moduleManager(self) -> Any:
        return self

    def translate(self, context: str, text: str) -> str:
        return text

    def testingEnabled(self) -> bool:
        return True

    def processEvents(self, *_: Any) -> None:
        if "qt" in sys.modules:
            sys.modules["qt"].QApplication.processEvents()

    def setOverrideCursor(self, cursor: Any) -> None: ...

    def restoreOverrideCursor(self) -> None: ...


class ScriptedLoadableModule:
    def __init__(self, parent: Any):
        self.parent = parent
        self.moduleName = type(self).__name__


class ScriptedLoadableModuleWidget:
    def __init__(self, parent: Any = None):
        import qt

        super().__init__()
        self.moduleName = type(self).__name__.removesuffix("Widget")
        self.parent = parent
        if parent is None:
            self.parent = slicer.qMRMLWidget()
            self.parent.setLayout(qt.QVBoxLayout())
        self.layout = self.parent.layout()
        if parent is None:
            self.setup()
            self.parent.show()

    def setup(self) -> None: ...

    def resourcePath(self, name: str) -> str:
        return str(MODULE / "Resources" / name)


class ScriptedLoadableModuleLogic:
    def __init__(self, parent: Any = None):
        self.moduleName = type(self).__name__.removesuffix("Logic")

    def getParameterNode(self) -> Any:
        node = slicer.mrmlScene.GetSingletonNode(self.moduleName, "vtkMRMLScriptedModuleNode")
        if node is None:
            node = slicer.mrmlScene.CreateNodeByClass("vtkMRMLScriptedModuleNode")
            node.UnRegister(None)
            node.SetSingletonTag(self.moduleName)
            node.SetName(self.moduleName)
            node = slicer.mrmlScene.AddNode(node)
        node.SetAttribute("ModuleName", self.moduleName)
        return node


class ScriptedLoadableModuleTest(unittest.TestCase):
    def delayDisplay(self, message: str, *_: Any) -> None:
        slicer.app.processEvents()

    def runTest(self) -> None:
        for name in (n for n in dir(self) if n.startswith("test")):
            self.setUp()
            getattr(self, name)()
            self.tearDown()


class SampleDataLogic:
    """Keeps what was registered."""

    registered: list[dict[str, Any]] = []  # noqa: RUF012

    @classmethod
    def registerCustomSampleDataSource(cls, **source: Any) -> None:
        if len({len(source[key]) for key in ("uris", "fileNames", "nodeNames")}) != 1:
            raise ValueError("All fields of sample data source must have the same length")
        if source not in cls.registered:
            cls.registered.append(source)


def _module(name: str, **members: Any) -> types.ModuleType:
    module = types.ModuleType(name)
    vars(module).update(members)
    sys.modules[name] = module
    parent, _, child = name.rpartition(".")
    if parent:
        setattr(sys.modules[parent], child, module)
    return module


def start() -> Application:
    """Install everything once in this process and return the application."""
    if hasattr(slicer, "app"):
        return slicer.app
    slicer.mrmlScene = slicer.vtkMRMLScene()
    slicer.app = Application()
    slicer.modules = types.SimpleNamespace()
    slicer.selfTests = {}
    bases = (
        ScriptedLoadableModule,
        ScriptedLoadableModuleWidget,
        ScriptedLoadableModuleLogic,
        ScriptedLoadableModuleTest,
    )
    _module("slicer.ScriptedLoadableModule", **{base.__name__: base for base in bases})
    _module("slicer.i18n", tr=lambda text: text, translate=slicer.app.translate)
    from . import wrapper

    _module("slicer.parameterNodeWrapper", **{n: getattr(wrapper, n) for n in ("parameterNodeWrapper", "WithinRange")})
    _module("SampleData", SampleDataLogic=SampleDataLogic)
    sys.path.insert(0, str(MODULE))
    return slicer.app


def module() -> types.ModuleType:
    """The module's file, imported as Slicer does, from the checkout."""
    start()
    return importlib.import_module("LightweightRegistration")


def clear() -> None:
    """A scene as after starting the application."""
    slicer.mrmlScene.Clear(0)
    slicer.app.logics["Colors"].AddDefaultColorNodes()
