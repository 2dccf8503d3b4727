"""What the module LightweightRegistration is made of. Importing this package imports neither torch nor LDRCore.

| file | for |
|---|---|
| core.py | finds LDRCore; the errors that users can mend |
| volumes.py | volume and mask nodes -> arrays in world coordinates, and what cannot be registered |
| transforms.py | transform nodes <-> displacement fields |
| worker.py | the other process: the only file that uses LDRCore for work, and torch through it |
| background.py | starts, feeds, polls and kills that process; knows neither Slicer nor torch |
| jobs.py | one registration, and one sequence of them: inputs captured, outputs created on the main thread |
| outputs.py | creates and fills output nodes |
| others.py | brings other volumes, segmentations and markups along |
| views.py | slice views: overlay, deformation grid, Jacobian colours, folding contours |
| parameters.py | what is saved in the scene |
| panel.py, results.py | the widget |
| torch_setup.py | torch through the PyTorch extension, asked first |
| sample.py | the bundled pair of brains |

Arrays are (k, j, i) as MRML gives them; matrices are 4x4; "world" is RAS in mm after the nodes' parent transforms;
`_lps` is what LDRCore uses. A registration transform maps points of the fixed volume to points of the moving volume: in
Slicer's words it is the transform from parent.
"""
