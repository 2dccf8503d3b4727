"""Stand-ins for the parts of 3D Slicer's application that are not on PyPI, so that the module's tests run without it.

Slicer's own MRML, logic, VTK and displayable managers come from slicer-core; Qt from PySide6. What is written here is
only what lies between them and a scripted module: the application object, the base classes, the parameter node wrapper,
ctk and qMRML widgets, and slice views that render off screen. It is as small as the module's use of it.

| file | stands in for |
|---|---|
| application.py | slicer.app, slicer.mrmlScene, slicer.modules, Sample Data, the scripted module base classes |
| wrapper.py | slicer.parameterNodeWrapper |
| widgets.py | the Python modules qt and ctk, and the qMRML widgets, on PySide6 |
| sliceview.py | slice views, off screen, with Slicer's own displayable managers |
"""
