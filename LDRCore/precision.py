"""In which precision a model's convolutions run: half where the device is faster with it, single elsewhere.

Only the dense networks' convolutions: the stem, sampling, composing and every coordinate stay float32. What this may
change is bounded by a test (`Testing/integration/test_precision.py`): the field by 0.05 mm in the mean, 0.5 mm at most.
The environment variable LDR_PRECISION (float32, bfloat16 or float16) decides instead of the device.
"""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

from LDRCore.errors import RegistrationError

if TYPE_CHECKING:
    import torch

VARIABLE = "LDR_PRECISION"
NAMES = ("float32", "bfloat16", "float16")


def of_convolutions(device: str) -> torch.dtype:
    """The precision for a device ("cpu", "cuda", "cuda:1" ...).

    bfloat16 on a CPU that multiplies it (AVX-512 BF16 or AMX), float16 on a GPU with tensor cores, otherwise float32.

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
    return torch.bfloat16 if device == "cpu" and cpu_multiplies_bfloat16() else torch.float32


def cpu_multiplies_bfloat16() -> bool:
    """Whether this CPU has instructions for bfloat16; without them its convolutions are emulated, and slow.

    torch tells so by private functions, which a version may lack: then the answer is no.
    """
    import torch

    checks = (getattr(torch.cpu, name, None) for name in ("_is_avx512_bf16_supported", "_is_amx_tile_supported"))
    return any(check() for check in checks if check is not None)
