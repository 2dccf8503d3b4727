"""The test that runs inside the application: Reload and Test, and ctest. See LightweightRegistrationTest."""

from __future__ import annotations

from typing import Any

import numpy as np
import slicer
from slicer.ScriptedLoadableModule import ScriptedLoadableModuleTest

from . import sample, torch_setup
from .module_errors import InputError


def new_logic() -> Any:
    """Return the module's logic; that file imports this one."""
    from LightweightRegistration import LightweightRegistrationLogic

    return LightweightRegistrationLogic()


class LightweightRegistrationTest(ScriptedLoadableModuleTest):
    """Runs inside the application (Reload and Test, ctest) on the bundled pair; skipped where torch is missing."""

    def setUp(self) -> None:
        """Clear the scene."""
        if torch_setup.torch_version() is None:
            self.skipTest("torch is not installed: press Apply in the panel once")
        slicer.mrmlScene.Clear(0)

    def runTest(self) -> None:
        """Run every test."""
        for test in (self.test_register, self.test_bring_along, self.test_refusal):
            self.setUp()
            test()
            self.delayDisplay(f"{test.__name__} passed")

    def test_register(self) -> None:
        """The similarity to the fixed volume grows, the transform can be hardened, the Jacobian lies around 1."""
        pair = sample.load_pair()
        outputs = new_logic().register(pair["fixed"], pair["moving"])
        similarity = outputs.report["similarity"]
        self.assertGreater(similarity["after"], similarity["affine"])
        self.assertGreater(similarity["affine"], similarity["before"])
        self.assertLess(outputs.report["folding_fraction"], 0.001)
        warped, fixed = (slicer.util.arrayFromVolume(node) for node in (outputs.warped, pair["fixed"]))
        self.assertEqual(warped.shape, fixed.shape)
        self.assertEqual(outputs.transform.GetClassName(), "vtkMRMLTransformNode")
        ends = [
            outputs.transform.GetNodeReference(role)
            for role in (
                outputs.transform.GetFixedNodeReferenceRole(),
                outputs.transform.GetMovingNodeReferenceRole(),
            )
        ]
        self.assertEqual(ends, [pair["fixed"], pair["moving"]])
        before = slicer.util.arrayFromVolume(pair["moving"]).copy()
        pair["moving"].SetAndObserveTransformNodeID(outputs.transform.GetID())
        pair["moving"].HardenTransform()
        self.assertFalse(np.array_equal(before, slicer.util.arrayFromVolume(pair["moving"])))
        jacobian = slicer.util.arrayFromVolume(outputs.jacobian)
        self.assertGreater(float(jacobian.max()), 1.0)
        self.assertLess(float(jacobian.min()), 1.0)

    def test_bring_along(self) -> None:
        """Warped labels overlap with the fixed ones."""
        pair = sample.load_pair()
        labels = {name: sample.load(f"{name}_labels", f"{name} labels", "vtkMRMLLabelMapVolumeNode") for name in pair}
        logic = new_logic()
        outputs = logic.register(pair["fixed"], pair["moving"], 1, warped=False, jacobian=False)
        brought = slicer.util.arrayFromVolume(logic.bringAlong(labels["moving"], outputs.transform)) > 0
        there = slicer.util.arrayFromVolume(labels["fixed"]) > 0
        dice = 2 * (brought & there).sum() / (brought.sum() + there.sum())
        self.assertGreater(float(dice), 0.93)

    def test_refusal(self) -> None:
        """Input that cannot be registered raises InputError and leaves the scene unchanged."""
        pair = sample.load_pair()
        count = slicer.mrmlScene.GetNumberOfNodes()
        with self.assertRaisesRegex(InputError, "two different volumes, got 'Brain A"):
            new_logic().register(pair["fixed"], pair["fixed"])
        self.assertEqual(slicer.mrmlScene.GetNumberOfNodes(), count)
