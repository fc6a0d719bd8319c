"""Projections: one matrix for all pairs (nn.Linear), or a table with one per class."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor, nn

__all__ = ["INITS", "Projected", "RelativeLinear", "projection"]

INITS = ("equal", "independent", "published")


class Projected(NamedTuple):
    """What one side hands to a primitive: its tokens, and a table if it is relative."""

    x: Tensor
    weight: Tensor | None = None
    bias: Tensor | None = None


class RelativeLinear(nn.Module):
    """A table of projections, one per class of pairs: q_ij = x_i W[c] + b[c] (c of the pair i, j).

    Args:
        classes: rows of the table (`Layout.classes`).
        in_features, out_features: channels in and out.
        bias: one bias per class.
        init: "equal", every entry starts as the same draw of nn.Linear's distribution, so that the
            layer starts as self-attention; "independent", every entry is a draw of its own;
            "published", as the published code, whose bound is 1/in_features instead of
            1/sqrt(in_features).

    Attributes:
        weight: [classes, in_features, out_features].
        bias: [classes, out_features] or None.
    """

    def __init__(
        self,
        classes: int,
        in_features: int,
        out_features: int,
        bias: bool = False,
        init: str = "equal",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ):
        super().__init__()
        if init not in INITS:
            raise ValueError(f"init: got {init!r}, want one of {INITS}")
        self.classes, self.in_features, self.out_features = classes, in_features, out_features
        self.init = init
        shape = (classes, in_features, out_features)
        self.weight = nn.Parameter(torch.empty(shape, device=device, dtype=dtype))
        self.bias: nn.Parameter | None = None
        if bias:
            self.bias = nn.Parameter(torch.empty(classes, out_features, device=device, dtype=dtype))
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        bound = 1 / math.sqrt(self.in_features)
        if self.init == "published":
            bound = 1 / self.in_features
        if self.init == "equal":
            self.weight[:1].uniform_(-bound, bound)
            self.weight[1:] = self.weight[:1]
        else:
            self.weight.uniform_(-bound, bound)
        if self.bias is not None:
            self.bias.zero_()

    def forward(self, x: Tensor) -> Projected:
        """The tokens beside the table: a primitive takes their product pair by pair."""
        return Projected(x, self.weight, self.bias)

    def extra_repr(self) -> str:
        return (
            f"classes={self.classes}, in_features={self.in_features}, "
            f"out_features={self.out_features}, bias={self.bias is not None}, init={self.init!r}"
        )


class SharedLinear(nn.Linear):
    """nn.Linear, handing over tokens that are projected already."""

    def forward(self, x: Tensor) -> Projected:  # type: ignore[override]
        return Projected(super().forward(x))


def projection(
    in_features: int,
    out_features: int,
    classes: int | None,
    bias: bool,
    init: str = "equal",
) -> RelativeLinear | SharedLinear:
    """A table with this many classes, or for None one matrix for all pairs."""
    if classes is None:
        return SharedLinear(in_features, out_features, bias=bias)
    return RelativeLinear(classes, in_features, out_features, bias=bias, init=init)
