"""The backend in Triton, for NVIDIA GPUs of compute capability 8.0 and newer.

Triton is imported with the first call and not with this package, so that the library needs only
torch where this backend is not used.
"""

from __future__ import annotations

import importlib
from typing import Any

from .support import unavailable

__all__ = [
    "mix",
    "mix_backward",
    "prepare_mix",
    "prepare_scores",
    "scores",
    "scores_backward",
    "unavailable",
]

MODULES = {
    "mix": "offset",
    "mix_backward": "offset",
    "neighborhood_attention": "neighborhood",
    "neighborhood_attention_backward": "neighborhood",
    "prepare_mix": "ahead",
    "prepare_scores": "ahead",
    "scores": "offset",
    "scores_backward": "offset",
}
"""Which module of this package holds each function."""


def __getattr__(name: str) -> Any:
    if name not in MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f".{MODULES[name]}", __name__), name)
