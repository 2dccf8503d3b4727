"""In which precision a model's convolutions run: half where the device is faster with it, single elsewhere.

Only the dense networks' convolutions: the stem, sampling, composing and every coordinate stay float32. What this may
change is bounded by a test (`Testing/integration/test_precision.py`): the field by 0.05 mm in the mean, 0.5 mm at most.
The environment variable LDR_PRECISION (float32, bfloat16 or float16) decides instead of the device.
"""

from __future__ import annotations

import os
import platform
from typing import TYPE_CHECKING

from LDRCore.errors import RegistrationError

if TYPE_CHECKING:
    import torch

VARIABLE = "LDR_PRECISION"
NAMES = ("float32", "bfloat16", "float16")


def of_convolutions(device: str) -> torch.dtype:
    """Return the precision for a device ("cpu", "cuda", "cuda:1" ...).

    bfloat16 on a CPU that is faster with it, float16 on a GPU with tensor cores, otherwise float32.

    Raises:
        RegistrationError: LDR_PRECISION holds something else than one of `NAMES`.
    """
    import torch

    wanted = os.environ.get(VARIABLE, "")
    if wanted:
        if wanted not in NAMES:
            raise RegistrationError(f"{VARIABLE} must be one of {NAMES}, got {wanted!r}")
        return getattr(torch, wanted)
    if device.startswith("cuda"):
        return torch.float16 if torch.cuda.get_device_capability(device) >= (7, 0) else torch.float32
    return torch.bfloat16 if device == "cpu" and cpu_gains_by_bfloat16() else torch.float32


def cpu_gains_by_bfloat16() -> bool:
    """Return whether this CPU convolves faster in bfloat16.

    It does with a matrix unit (AMX), or with vectors (AVX-512 BF16) of AMD's. Intel's vectors multiply bfloat16 no
    faster than float32; where a virtual machine hides the matrix unit LDR was 1.3 to 1.7 times slower with them.
    Without any such instructions bfloat16 is emulated, and slow. torch tells of them by private functions, which a
    version may lack or change: then the answer is no.
    """
    import torch

    def has(name: str) -> bool:
        try:
            return getattr(torch.cpu, name)() is True
        except Exception:  # whatever a private function may do
            return False

    return has("_is_amx_tile_supported") or (has("_is_avx512_bf16_supported") and "AuthenticAMD" in _processor())


def _processor() -> str:
    """What the system says of the processor, its vendor's name (as the processor itself spells it) included."""
    try:
        with open("/proc/cpuinfo", encoding="ascii", errors="replace") as lines:
            return next((line for line in lines if line.startswith("vendor_id")), "")
    except OSError:
        return platform.processor()
