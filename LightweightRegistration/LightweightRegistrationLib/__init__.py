"""The parts of the module LightweightRegistration. Importing this package imports neither torch nor LDRCore.

| file | for |
|---|---|
| library.py | finds LDRCore and imports from it |
| module_errors.py | the errors of the module |
| volume_nodes.py | reads volume and mask nodes as arrays in world coordinates, and checks them |
| transform_nodes.py | converts transform nodes to displacement fields and back |
| machine.py | the computer's memory, and whether torch exists for it |
| worker.py | the worker process: the only file that registers with LDRCore, and uses torch through it |
| background.py | starts, feeds, polls and ends that process; needs neither Slicer nor torch |
| jobs.py | a job reads inputs and creates outputs on the main thread, in short steps |
| registration_job.py | the job of one registration |
| sequences.py | the job that registers every frame of a sequence |
| transform_files.py | the jobs that write and read transforms of other programs |
| batch.py | the job that registers a list of pairs of files |
| node_warping.py | the job that warps another volume, segmentation, markups or model through a registration |
| outputs.py | creates and fills output nodes |
| slice_display.py | slice views: layers, deformation grid, Jacobian colours, early view |
| overlays.py | what is computed for display: checkerboard, Jacobian map without background, folding outline |
| file_logic.py | the logic's part that works on files |
| parameters.py | the parameter node, which is saved in the scene |
| panel.py | the panel: buttons, selectors, jobs |
| job_runner.py | the panel's part that runs jobs and shows errors |
| panel_files.py | the panel's sections Transform files and Batch |
| others_list.py | the panel's list of nodes to bring along |
| panel_display.py | the panel's section Display |
| session_log.py | a log that outlives the application |
| report_text.py | a registration's report and a model's card in words |
| torch_setup.py | installs torch through the PyTorch extension, after asking |
| self_test.py | the test that runs inside the application |
| sample.py | the bundled pair of brains |

Arrays are (k, j, i) as MRML gives them; matrices are 4x4; "world" is RAS in mm after the nodes' parent transforms;
`_lps` is what LDRCore uses. A registration transform maps points of the fixed volume to points of the moving volume: in
Slicer's words it is the transform from parent.
"""
