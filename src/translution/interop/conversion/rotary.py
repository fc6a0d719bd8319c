"""Rotary positions of another library's model: applied to heads, or moved into a table."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

__all__ = ["put_rotation_into_table", "rotary_frequencies", "rotated"]


def rotary_frequencies(model: nn.Module, buckets: Any) -> tuple[Tensor, float]:
    """The frequencies [head_dim / 2] and the scaling factor of a model's rotary positions."""
    if buckets is not None:
        raise ValueError(
            "relative: q and k have rotary positions, so a table needs a matrix for every offset; "
            "want grid= (the longest input) and no buckets, or relative 'v', or to='alpha'"
        )
    embeddings: list[Any] = [m for m in model.modules() if hasattr(m, "inv_freq")]
    kinds = {getattr(m, "rope_type", "default") for m in embeddings}
    if len(embeddings) != 1 or kinds & {"dynamic", "longrope"}:
        raise ValueError(
            f"relative: got {len(embeddings)} rotary embeddings of the types {sorted(kinds)}, want "
            "one whose frequencies don't depend on the input; or relative 'v', or to='alpha'"
        )
    return embeddings[0].inv_freq, float(getattr(embeddings[0], "attention_scaling", 1.0))


@torch.no_grad()
def put_rotation_into_table(layer: Any, rates: Tensor, factor: float) -> None:
    """Multiply the matrix of each offset by the rotation of that offset.

    The scores then equal those of rotary positions, because (R_i q)·(R_j k) = (R_{i-j} q)·k. If
    only k has a table, its matrices are rotated by the negative offset.
    """
    name = "q" if "q" in layer.relative else "k"
    table = getattr(layer, f"{name}_proj")
    first = 0 if layer.layout.causal else 1 - layer.layout.grid[0]
    offset = torch.arange(first, layer.layout.grid[0], device=rates.device, dtype=torch.float64)
    angle = (offset if name == "q" else -offset)[:, None] * rates.double()
    angle = torch.cat([angle, angle], -1).to(table.weight.device)
    for p in table.parameters():
        cos, sin = (t.view(len(t), *(1,) * (p.ndim - 1), -1) for t in (angle.cos(), angle.sin()))
        heads = p.double().unflatten(-1, (layer.heads, -1))
        p.copy_((rotated(heads, cos, sin) * factor**2).flatten(-2))


def rotated(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate the channel pairs (p, p + d/2) of the last axis, in the order that Llama uses."""
    first, second = x.chunk(2, -1)
    return x * cos + torch.cat([-second, first], -1) * sin
