"""What the module needs around it: sample data, and torch through the PyTorch extension."""

from __future__ import annotations

import sys
import types
from pathlib import Path

import numpy as np
import pytest
import SimpleITK as sitk

from LDRCore.cli import demo
from Testing.slicer_scene import array, blobs, snapshot

slicer = pytest.importorskip("slicer", reason="needs slicer-core (make test installs it)")

from Testing.standin import application

# sample data


def test_the_sample_is_the_librarys_demo_pair(pair):
    paths = demo.find_pair()
    for name, node in pair.items():
        image = sitk.DICOMOrient(sitk.ReadImage(paths[name]), "LPS")
        assert np.array_equal(array(node).ravel().sum(), sitk.GetArrayFromImage(image).astype(float).sum())
        assert node.GetDisplayNode() is not None
    assert pair["fixed"].GetName() == "Brain A"


def test_the_pair_appears_in_sample_data_after_start(slicer_module):
    import SampleData

    slicer.app.slots.clear()
    SampleData.SampleDataLogic.registered.clear()
    slicer_module.LightweightRegistration(types.SimpleNamespace(path=str(application.MODULE)))
    assert SampleData.SampleDataLogic.registered == []  # nothing before the application has started
    slicer.app.emit("startupCompleted()")
    slicer.app.emit("startupCompleted()")
    (source,) = SampleData.SampleDataLogic.registered
    assert source["category"] == "Registration"
    for uri in source["uris"]:
        assert uri.startswith("file:")
        assert Path(uri.removeprefix("file://")).is_file()
    assert Path(source["thumbnailFileName"]).is_file()


# torch


@pytest.fixture
def no_torch(slicer_module, monkeypatch, tmp_path):
    """Slicer's Python without torch, and a switch for the PyTorch extension's answer."""
    from LightweightRegistrationLib import torch_setup

    state = types.SimpleNamespace(version=None, calls=[], answer=lambda: None, module=torch_setup)
    monkeypatch.setattr(torch_setup, "torch_version", lambda: state.version)
    monkeypatch.setattr(torch_setup, "asked", state, raising=False)  # where the extension below finds it

    def extension() -> None:
        (tmp_path / "PyTorchUtils.py").write_text(
            "from LightweightRegistrationLib.torch_setup import asked\n"
            "class PyTorchUtilsLogic:\n"
            "    def installTorch(self, **options):\n"
            "        asked.calls.append(options)\n"
            "        return asked.answer()\n"
        )
        monkeypatch.syspath_prepend(tmp_path)
        monkeypatch.delitem(sys.modules, "PyTorchUtils", raising=False)

    state.extension = extension
    yield state
    sys.modules.pop("PyTorchUtils", None)


def test_without_the_extension_it_is_named(no_torch, logic, scene):
    from LightweightRegistrationLib.module_errors import InputError

    fixed, moving = blobs()
    before = snapshot()
    with pytest.raises(
        InputError, match="needs the extension PyTorch, which is not installed: install 'PyTorch' in the"
    ):
        logic.register(fixed, moving, 1)
    assert snapshot() == before


def test_torch_is_installed_through_the_extension_after_asking(no_torch):
    def answer():
        no_torch.version = (2, 9)
        return types.ModuleType("torch")

    no_torch.extension()
    no_torch.answer = answer
    no_torch.module.ensure_torch()
    assert no_torch.calls == [{"askConfirmation": True, "torchVersionRequirement": ">=2.6"}]
    no_torch.module.ensure_torch()
    assert len(no_torch.calls) == 1


@pytest.mark.parametrize(
    ("version", "answer", "message"),
    [
        (None, lambda: None, "registration needs torch, and its installation was declined: press Apply again"),
        (None, lambda: types.ModuleType("torch"), "torch was installed but cannot be used yet: restart Slicer"),
        (
            None,
            lambda: 1 / 0,
            "torch must be installable by the extension PyTorch, got: division by zero: restart Slicer",
        ),
        (
            (2, 1),
            lambda: None,
            r"registration needs torch >=2\.6, got 2\.1: uninstall it in the module PyTorch Utils, restart",
        ),
    ],
)
def test_every_way_that_setting_up_torch_fails_is_one_sentence(no_torch, version, answer, message):
    from LightweightRegistrationLib.module_errors import InputError

    no_torch.extension()
    no_torch.version, no_torch.answer = version, answer
    with pytest.raises(InputError, match=message):
        no_torch.module.ensure_torch()


def test_the_installed_torch_is_found_without_importing_it(slicer_module):
    import torch
    from LightweightRegistrationLib import torch_setup

    assert torch_setup.torch_version() == tuple(int(n) for n in torch.__version__.split("+")[0].split(".")[:2])


def test_the_module_asks_for_the_torch_that_the_library_asks_for(slicer_module):
    from LightweightRegistrationLib import torch_setup

    text = (Path(__file__).parents[2] / "pyproject.toml").read_text(encoding="utf-8")
    assert f'"torch{torch_setup.REQUIREMENT}"' in text
