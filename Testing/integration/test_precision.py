"""Half-precision convolutions change a registration less than anyone can see, and only where a device has them."""

from __future__ import annotations

import numpy as np
import pytest
import SimpleITK as sitk
import torch

import LDRCore
from LDRCore import RegistrationError
from LDRCore.cli.doctor import examine
from LDRCore.cpu import layout, precision
from LDRCore.models import weights

MEAN_MM, LARGEST_MM = 0.05, 0.5


def displacement_mm(pair, monkeypatch, name: str) -> np.ndarray:
    monkeypatch.setenv(precision.VARIABLE, name)
    result = LDRCore.register(pair["fixed"], pair["moving"], cascades=3)
    assert result.report["precision"] == name
    dense = result.transform.GetNthTransform(1)
    dense = dense if dense.GetName() == "DisplacementFieldTransform" else result.transform.GetNthTransform(0)
    field = sitk.DisplacementFieldTransform(dense).GetDisplacementField()
    return sitk.GetArrayFromImage(field)


def test_bfloat16_stays_within_the_stated_tolerance(demo_pair, monkeypatch):
    # emulated where the processor has no such instructions: slow, the same numbers
    single = displacement_mm(demo_pair, monkeypatch, "float32")
    half = displacement_mm(demo_pair, monkeypatch, "bfloat16")
    assert np.abs(single).max() > 3
    off = np.linalg.norm(single - half, axis=-1)
    assert 0 < off.mean() < MEAN_MM
    assert off.max() < LARGEST_MM


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
def test_float16_on_a_gpu_stays_within_the_stated_tolerance(demo_pair, monkeypatch):
    single = displacement_mm(demo_pair, monkeypatch, "float32")
    half = displacement_mm(demo_pair, monkeypatch, "float16")
    off = np.linalg.norm(single - half, axis=-1)
    assert off.mean() < MEAN_MM
    assert off.max() < LARGEST_MM


@pytest.mark.parametrize(("gains", "expected"), [(True, torch.bfloat16), (False, torch.float32)])
def test_the_processor_decides(monkeypatch, gains, expected):
    monkeypatch.delenv(precision.VARIABLE, raising=False)
    monkeypatch.setattr(precision, "cpu_gains_by_bfloat16", lambda: gains)
    assert precision.of_convolutions("cpu") == expected
    model = weights.load_model("brain-t1")
    assert model.cascade.precision == expected
    assert all(p.dtype == torch.float32 for p in model.cascade.parameters())


@pytest.mark.parametrize(
    ("vectors", "matrices", "vendor", "gains"),
    [
        (True, True, "GenuineIntel", True),
        (True, False, "GenuineIntel", False),
        (True, False, "AuthenticAMD", True),
        (False, False, "AuthenticAMD", False),
    ],
)
def test_which_processors_gain_by_bfloat16(monkeypatch, vectors, matrices, vendor, gains):
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: vectors, raising=False)
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: matrices, raising=False)
    monkeypatch.setattr(precision, "_processor", lambda: f"vendor_id : {vendor}")
    assert precision.cpu_gains_by_bfloat16() == gains


def test_a_torch_without_these_checks_means_single_precision(monkeypatch):
    for name in ("_is_avx512_bf16_supported", "_is_amx_tile_supported"):
        monkeypatch.delattr(torch.cpu, name, raising=False)
    assert not precision.cpu_gains_by_bfloat16()


def test_another_word_is_refused_in_one_sentence(demo_pair, monkeypatch):
    monkeypatch.setenv(precision.VARIABLE, "half")
    with pytest.raises(RegistrationError, match=r"LDR_PRECISION must be one of .*, got 'half'"):
        LDRCore.register(demo_pair["fixed"], demo_pair["moving"])
    assert any("LDR_PRECISION" in problem for problem in examine()[1])


def test_a_processor_whose_onednn_refuses_bfloat16_still_convolves(monkeypatch):
    torch.manual_seed(0)
    layer = torch.nn.Conv3d(1, 16, 4, stride=2, padding=1)
    moving, fixed = torch.rand(2, 1, 1, 16, 16, 16)
    pair = torch.nn.Conv3d(2, 16, 4, stride=2, padding=1)
    found = []
    for takes in (layout.onednn_takes, lambda dtype: dtype == torch.float32):
        monkeypatch.setattr(cpu_layout, "onednn_takes", takes)
        with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
            images = layout.ImagePair(fixed, torch.bfloat16)
            images.put(moving)
            found.append(layout.convolve_pair(pair, images, relu=True))
            found.append(layout.convolve_half(layer, moving))
    assert all(f.dtype == torch.bfloat16 for f in found)
    assert torch.allclose(found[0].float(), found[2].float(), atol=0.02)
    assert torch.allclose(found[1].float(), found[3].float(), atol=0.02)


def test_rows_of_one_voxel_hold_what_was_computed():
    """oneDNN reads memory that nobody has written there, with the matrix unit."""
    torch.manual_seed(0)
    layer = torch.nn.Conv3d(16, 32, 4, stride=2, padding=1)
    features = torch.rand(1, 16, 4, 6, 2)
    expected = torch.nn.functional.conv3d(features, layer.weight, layer.bias, 2, 1)
    for _ in range(3):
        for size in (1 << 10, 1 << 14, 1 << 17):
            torch.full((size,), 1e38)
        with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
            found = layout.convolve_half(layer, features)
        assert found.dtype == torch.bfloat16
        assert torch.allclose(found.float(), expected, atol=0.02)
