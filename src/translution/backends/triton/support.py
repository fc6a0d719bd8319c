"""Where the Triton backend can compute."""

from __future__ import annotations

import functools
import importlib.util

import torch

__all__ = ["interpreted", "unavailable"]

DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def unavailable(device: torch.device, dtype: torch.dtype) -> str | None:
    if importlib.util.find_spec("triton") is None:
        return "triton is not installed"
    if interpreted():  # every dtype and device, slowly: for tests
        return None if dtype.is_floating_point else f"it computes in floating point, not {dtype}"
    if device.type != "cuda":
        return f"it runs on cuda devices, not {device.type} (but in Triton's interpreter)"
    if dtype not in DTYPES:
        return f"it computes in float32, bfloat16 and float16, not {dtype}"
    if torch.cuda.get_device_capability(device) < (8, 0):
        return "it wants a GPU of compute capability 8.0 or newer"
    return None


@functools.cache
def interpreted() -> bool:
    """Whether Triton's interpreter is on, as its own variable TRITON_INTERPRET says."""
    import triton

    return bool(triton.knobs.runtime.interpret)
