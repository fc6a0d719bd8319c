"""Where the Triton backend can compute, and how its kernels are launched."""

from __future__ import annotations

import functools
import importlib.util
from typing import Any

import torch
from torch import Tensor

__all__ = ["arithmetic", "interpreted", "launch", "unavailable"]

DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def unavailable(device: torch.device, dtype: torch.dtype) -> str | None:
    """Why this backend cannot compute with `dtype` on `device`; None where it can."""
    if importlib.util.find_spec("triton") is None:
        return "triton is not installed"
    if interpreted():  # the interpreter takes any dtype on any device; it is slow, for tests
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
    """Whether Triton interprets kernels on the CPU (its environment variable TRITON_INTERPRET)."""
    import triton

    return bool(triton.knobs.runtime.interpret)


def arithmetic(dtype: torch.dtype) -> dict[str, Any]:
    """The compile-time arguments SUMS, PRECISION and UPCAST of kernels (see `tile_math`)."""
    import triton.language as tl

    tf32 = dtype == torch.float32 and torch.backends.cuda.matmul.allow_tf32
    return {
        "SUMS": tl.float64 if dtype == torch.float64 else tl.float32,
        "PRECISION": "tf32" if tf32 else "ieee",
        "UPCAST": interpreted(),
    }


def launch(kernel: Any, programs: tuple[int, ...], *arguments: Any, **constants: Any) -> None:
    """Launch a kernel. If its tensors are on the meta device, compile it without launching it.

    Args:
        kernel: the kernel.
        programs: the sizes of its grid.
        arguments: its arguments in order.
        constants: its compile-time arguments, and options such as `num_warps`.
    """
    first = next(a for a in arguments if isinstance(a, Tensor))
    if first.device.type == "meta":
        kernel.warmup(*arguments, grid=programs, **constants)
    elif min(programs) > 0:
        with torch.cuda.device_of(first):  # Triton launches on the current device
            kernel[programs](*arguments, **constants)
