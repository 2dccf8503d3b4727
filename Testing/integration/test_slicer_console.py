"""docs/slicer-console.md: its commands, run as they are written."""

from __future__ import annotations

import re

import numpy as np
import pytest
import SimpleITK as sitk

from Testing.slicer_scene import (
    add_volume,
    array,
    frames,
    image_of,
    linear,
    local,
    turned,
)

slicer = pytest.importorskip("slicer", reason="needs slicer-core (make test installs it)")
import vtk

from Testing.standin import application


def test_the_console_page_runs_as_it_is_written(slicer_module, scene, capsys, tmp_path):
    page = (application.ROOT / "docs" / "slicer-console.md").read_text(encoding="utf-8")
    blocks = re.findall(r"```python\n(.*?)```", page, re.DOTALL)
    assert len(blocks) == 7
    fixed, sequence = frames(scene, 2)
    moving = scene.GetFirstNodeByName("blob 1")
    add_volume("MRI a year later", slicer.util.arrayFromVolume(moving)[:, ::-1], local(moving))
    for node, name in ((fixed, "MRI before"), (moving, "MRI after"), (sequence, "Breathing")):
        node.SetName(name)
    for name, node in (("Brain", fixed), ("Tumour", moving)):
        labels = add_volume(f"{name} labels", (array(node) > 100).astype(np.uint8), local(node), "LabelMap")
        segmentation = scene.AddNewNodeByClass("vtkMRMLSegmentationNode", name)
        slicer.vtkSlicerSegmentationsModuleLogic.ImportLabelmapToSegmentationNode(labels, segmentation)
        scene.RemoveNode(labels)
    linear("Manual", turned(2, (1, 0, 0)))
    result = scene.AddNewNodeByClass("vtkMRMLTransformNode", "Result")
    scene.AddNewNodeByClass("vtkMRMLMarkupsFiducialNode", "F").AddControlPoint(vtk.vtkVector3d(1, 2, 3))
    for node, name in ((fixed, "before"), (moving, "after")):
        sitk.WriteImage(image_of(node), str(tmp_path / f"{name}.nii.gz"))
    names = {"slicer": slicer, "getNode": slicer.util.getNode}  # as Slicer's console has them
    names["folder"] = tmp_path  # as the page says
    for block in blocks:
        exec(compile(block, "slicer-console.md", "exec"), names, names)
    assert names["outputs"].report["similarity"]["after"] > 0.5
    assert names["made"]["warped"].GetNumberOfDataNodes() == 2
    assert names["initial"].GetName() == "warp"
    assert (names["summary"]["done"], names["summary"]["failed"]) == (1, 0)
    assert result.GetNodeReference(result.GetFixedNodeReferenceRole()) is fixed
    assert "MRI after 0." in capsys.readouterr().out
