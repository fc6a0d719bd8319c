"""The backends, which compute the operators, and the function that chooses one.

A backend is a module with the functions `scores`, `mix` and `neighborhood_attention`, each of them
with a second one for its gradients (`scores_backward` and so on); `prepare_scores` and
`prepare_mix`, which may begin to compile kernels; and `unavailable(device, dtype)`, which returns
the reason why it cannot compute there, or None if it can.
"""

from __future__ import annotations

from types import ModuleType

from torch import device as Device
from torch import dtype as Dtype

# In this module `torch` and `triton` are the backends, not the libraries.
from . import torch, triton

__all__ = ["BACKENDS", "choose", "explain"]

BACKENDS: dict[str, ModuleType] = {"torch": torch, "triton": triton}


def explain(device: Device, dtype: Dtype) -> dict[str, str | None]:
    """Why each backend cannot compute with `dtype` on `device`; None for one that can."""
    return {name: backend.unavailable(device, dtype) for name, backend in BACKENDS.items()}


def choose(name: str, device: Device, dtype: Dtype) -> ModuleType:
    """Return the backend of a name. There is no fall-back to another one.

    Args:
        name: a backend, or "auto": on CUDA devices Triton if it is available, else plain torch.
        device, dtype: of the tokens.

    Raises:
        ValueError: the name is unknown, or the backend cannot compute here. The message lists those
            that can.
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
