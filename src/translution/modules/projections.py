"""Projections: one matrix for all pairs (nn.Linear), or a table with one per class."""

from __future__ import annotations

import contextlib
import contextvars
import math
from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor, nn

__all__ = ["INITS", "Projected", "RelativeLinear", "projection", "sharing"]

INITS = ("equal", "independent", "published")
_SHARE: contextvars.ContextVar[tuple[int, int] | None] = contextvars.ContextVar(
    "share", default=None
)


@contextlib.contextmanager
def sharing(share: tuple[int, int] | None) -> Iterator[None]:
    """Tables made within hold only the rows of this share (`Layout.share`), and start with the
    values that these rows of a whole table have: nowhere is a whole one made."""
    token = _SHARE.set(share)
    try:
        yield
    finally:
        _SHARE.reset(token)


class Projected(NamedTuple):
    """What one side hands to a primitive: its tokens, and a table if it is relative."""

    x: Tensor
    weight: Tensor | None = None
    bias: Tensor | None = None


class RelativeLinear(nn.Module):
    """A table of projections, one per class of pairs: q_ij = x_i W[c] + b[c] (c of the pair i, j).

    Args:
        classes: rows of the whole table (`Layout.classes`).
        in_features, out_features: channels in and out.
        bias: one bias per class.
        init: "equal", every entry starts as the same draw of nn.Linear's distribution, so that the
            layer starts as self-attention; "independent", every entry is a draw of its own;
            "published", as the published code, whose bound is 1/in_features instead of
            1/sqrt(in_features).

    Attributes:
        weight: [classes, in_features, out_features].
        bias: [classes, out_features] or None.
        share: (rank, ranks) where the table is divided over processes, and holds but the rows
            of this `Layout.share`; else None.

    Raises:
        ValueError: an init that is not one of `INITS`.
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
        self.init, self.share = init, _SHARE.get()
        rows = len(range(classes)[self.own])
        shape = (rows, in_features, out_features)
        self.weight = nn.Parameter(torch.empty(shape, device=device, dtype=dtype))
        self.bias: nn.Parameter | None = None
        if bias:
            self.bias = nn.Parameter(torch.empty(rows, out_features, device=device, dtype=dtype))
        self.reset_parameters()

    @property
    def own(self) -> slice:
        """The classes whose rows are here."""
        rank, ranks = self.share or (0, 1)
        return slice(rank, None, ranks)

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Start anew. Every process of a divided table draws all of it, a row at a time, and keeps
        its own: with equal seeds the table is the one of a single process."""
        bound = 1 / math.sqrt(self.in_features)
        if self.init == "published":
            bound = 1 / self.in_features
        row = self.weight.new_empty(self.weight.shape[1:]).uniform_(-bound, bound)
        if self.init == "equal":
            self.weight[:] = row
        elif not self.weight.is_meta:
            own = range(self.classes)[self.own]
            for c in range(self.classes):
                drawn = row if c == 0 else row.uniform_(-bound, bound)
                if c in own:
                    self.weight[own.index(c)] = drawn
        if self.bias is not None:
            self.bias.zero_()

    def forward(self, x: Tensor) -> Projected:
        """The tokens beside the table: a primitive takes their product pair by pair."""
        return Projected(x, self.weight, self.bias)

    def extra_repr(self) -> str:
        part = "" if self.share is None else f" (share {self.share[0]} of {self.share[1]})"
        return (
            f"classes={self.classes}{part}, in_features={self.in_features}, "
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
