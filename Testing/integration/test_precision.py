"""Half-precision convolutions change a registration less than anyone can see, and only where a device has them."""

from __future__ import annotations

import numpy as np
import pytest
import SimpleITK as sitk
import torch

import LDRCore
from LDRCore import RegistrationError
from LDRCore.cli.doctor import examine
from LDRCore.cpu import precision
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
    model = LDRCore.load_model("brain-t1")
    assert model.cascade.precision == expected
    assert all(network.precision == expected for network in model.cascade.networks)
    assert model.cascade.stem._first.weight.dtype == torch.float32
    assert all(p.dtype == torch.float32 for p in weights.load_cascade("brain-t1").parameters())


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


def raises(*arguments):
    raise RuntimeError("no such check on this platform")


def of_another_signature(device):
    return True


def of_another_result():
    return object()


@pytest.mark.parametrize("check", [None, raises, of_another_signature, of_another_result])
def test_a_torch_without_these_checks_means_single_precision(monkeypatch, check):
    monkeypatch.setattr(precision, "_processor", lambda: "vendor_id : AuthenticAMD")
    for name in ("_is_avx512_bf16_supported", "_is_amx_tile_supported"):
        if check is None:
            monkeypatch.delattr(torch.cpu, name, raising=False)
        else:
            monkeypatch.setattr(torch.cpu, name, check, raising=False)
    assert not precision.cpu_gains_by_bfloat16()


def test_the_processor_is_named_where_the_system_tells(monkeypatch):
    monkeypatch.setattr("builtins.open", raises_oserror)
    assert isinstance(precision._processor(), str)


def raises_oserror(*arguments, **options):
    raise OSError("no /proc here")


def test_another_word_is_refused_in_one_sentence(demo_pair, monkeypatch):
    monkeypatch.setenv(precision.VARIABLE, "half")
    with pytest.raises(RegistrationError, match=r"LDR_PRECISION must be one of .*, got 'half'"):
        LDRCore.register(demo_pair["fixed"], demo_pair["moving"])
    assert any("LDR_PRECISION" in problem for problem in examine()[1])
