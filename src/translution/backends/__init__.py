"""What computes the primitives, and the one place that chooses.

A backend is a module with `unavailable(device, dtype)`, which says in words why it can't serve (or
None), and the functions `scores`, `mix`, `neighborhood_attention` and the same with `_backward`.
"""

from __future__ import annotations

from types import ModuleType

from torch import device as Device
from torch import dtype as Dtype

# within this package the names `torch` and `triton` are those of the backends
from . import torch, triton

__all__ = ["BACKENDS", "choose", "explain"]

BACKENDS: dict[str, ModuleType] = {"torch": torch, "triton": triton}


def explain(device: Device, dtype: Dtype) -> dict[str, str | None]:
    """Why each backend can't serve this device and dtype; None for one that can."""
    return {name: backend.unavailable(device, dtype) for name, backend in BACKENDS.items()}


def choose(name: str, device: Device, dtype: Dtype) -> ModuleType:
    """The backend of this name; never falls back. "auto" is Triton on CUDA where it can serve, else
    plain torch.

    Raises:
        ValueError: an unknown name, or one that can't serve here; it says which can.
    """
    if name == "auto":
        order = ["triton", "torch"] if device.type == "cuda" else ["torch", "triton"]
        for known in order:
            if BACKENDS[known].unavailable(device, dtype) is None:
                return BACKENDS[known]
    elif name in BACKENDS and BACKENDS[name].unavailable(device, dtype) is None:
        return BACKENDS[name]
    reasons = explain(device, dtype)
    able = [known for known, reason in reasons.items() if reason is None]
    why = reasons.get(name) or ("none can serve" if name == "auto" else "there is no such backend")
    raise ValueError(
        f"backend: got {name!r} for {dtype} on {device}: {why}; "
        f"want 'auto' or one of {able} (known: {list(BACKENDS)})"
    )
