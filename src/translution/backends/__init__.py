"""What computes the primitives, and the one place that chooses.

A backend is a module with `unavailable(device, dtype)`, which says in words why it can't serve (or
None), and the four functions `scores`, `scores_backward`, `mix`, `mix_backward`.
"""

from __future__ import annotations

from types import ModuleType

import torch

from . import eager

__all__ = ["BACKENDS", "choose", "explain"]

BACKENDS: dict[str, ModuleType] = {"torch": eager}


def explain(device: torch.device, dtype: torch.dtype) -> dict[str, str | None]:
    """Why each backend can't serve this device and dtype; None for one that can."""
    return {name: backend.unavailable(device, dtype) for name, backend in BACKENDS.items()}


def choose(name: str, device: torch.device, dtype: torch.dtype) -> ModuleType:
    """The backend of this name, or for "auto" the first that can serve. Never falls back.

    Raises:
        ValueError: an unknown name, or one that can't serve here; it says which can.
    """
    reasons = explain(device, dtype)
    able = [known for known, reason in reasons.items() if reason is None]
    if name == "auto" and able:
        return BACKENDS[able[0]]
    if name in able:
        return BACKENDS[name]
    why = reasons.get(name) or ("none can serve" if name == "auto" else "there is no such backend")
    raise ValueError(
        f"backend: got {name!r} for {dtype} on {device}: {why}; "
        f"want 'auto' or one of {able} (known: {list(BACKENDS)})"
    )
