"""Where the Triton backend can compute, and how its kernels are run."""

from __future__ import annotations

import functools
import importlib.util
from typing import Any

import torch
from torch import Tensor

__all__ = ["arithmetic", "interpreted", "launch", "unavailable"]

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


def arithmetic(dtype: torch.dtype) -> dict[str, Any]:
    """The constants SUMS, PRECISION and UPCAST of the kernels (see `tile_math`) for a dtype."""
    import triton.language as tl

    tf32 = dtype == torch.float32 and torch.backends.cuda.matmul.allow_tf32
    return {
        "SUMS": tl.float64 if dtype == torch.float64 else tl.float32,
        "PRECISION": "tf32" if tf32 else "ieee",
        "UPCAST": interpreted(),
    }


def launch(kernel: Any, programs: tuple[int, ...], *arguments: Any, **constants: Any) -> None:
    """Run a kernel; or only compile it, where its tensors are on the meta device."""
    first = next(a for a in arguments if isinstance(a, Tensor))
    if first.device.type == "meta":
        kernel.warmup(*arguments, grid=programs, **constants)
    elif min(programs) > 0:
        with torch.cuda.device_of(first):  # Triton launches on the current device
            kernel[programs](*arguments, **constants)
