"""The backend in plain torch: it computes every operator on every device."""

from __future__ import annotations

from typing import Any

import torch

from .neighborhood import neighborhood_attention, neighborhood_attention_backward
from .offset import mix, mix_backward, scores, scores_backward

__all__ = [
    "mix",
    "mix_backward",
    "neighborhood_attention",
    "neighborhood_attention_backward",
    "prepare_mix",
    "prepare_scores",
    "scores",
    "scores_backward",
    "unavailable",
]


def unavailable(device: torch.device, dtype: torch.dtype) -> str | None:
    """Why this backend cannot compute with `dtype` on `device`; None where it can."""
    return None if dtype.is_floating_point else f"it computes in floating point, not {dtype}"


def prepare_mix(*_: Any) -> None:
    """Nothing has to be compiled before a mix."""


def prepare_scores(*_: Any) -> None:
    """Nothing has to be compiled before scores."""
