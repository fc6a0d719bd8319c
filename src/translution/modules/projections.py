"""Projections of tokens: one matrix for all pairs (nn.Linear), or a table with one per class."""

from __future__ import annotations

import contextlib
import contextvars
import math
from collections.abc import Iterator

import torch
from torch import Tensor, nn

from ..operands import Operand

__all__ = ["INITS", "RelativeLinear", "projection", "repeat_heads", "sharding"]

INITS = ("equal", "independent", "published")
"""How a table starts; `RelativeLinear` describes each."""

_SHARD: contextvars.ContextVar[tuple[int, int] | None] = contextvars.ContextVar(
    "shard", default=None
)


@contextlib.contextmanager
def sharding(shard: tuple[int, int] | None) -> Iterator[None]:
    """Tables made inside this context hold the rows of one shard only (`Layout.shard`).

    The rows start with the values that they have in a whole table, which is made nowhere.
    """
    token = _SHARD.set(shard)
    try:
        yield
    finally:
        _SHARD.reset(token)


class RelativeLinear(nn.Module):
    """A table of projections, one per offset class: q_ij = x_i W[c] + b[c], c the class of (i, j).

    Args:
        classes: the number of matrices in the whole table (`Layout.classes`).
        in_features, out_features: channels in and out.
        bias: whether there is a bias, one per class.
        init: how the table starts. "equal": all matrices are the same draw from the distribution of
            nn.Linear, so that the layer starts as self-attention. "independent": each matrix is a
            draw of its own. "published": the same with the bound 1 / in_features of the published
            code instead of 1 / sqrt(in_features).
        device, dtype: of the parameters.

    Attributes:
        weight: [classes, in_features, out_features].
        bias: [classes, out_features] or None.
        shard: (rank, world size) where the table is divided over processes and this one holds the
            rows of that `Layout.shard`; else None.

    Raises:
        ValueError: `init` is not one of `INITS`.
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
        self.init, self.shard = init, _SHARD.get()
        rows = len(range(classes)[self.own_classes])
        shape = (rows, in_features, out_features)
        self.weight = nn.Parameter(torch.empty(shape, device=device, dtype=dtype))
        self.bias: nn.Parameter | None = None
        if bias:
            self.bias = nn.Parameter(torch.empty(rows, out_features, device=device, dtype=dtype))
        self.reset_parameters()

    @property
    def own_classes(self) -> slice:
        """The classes whose matrices this process holds."""
        rank, world_size = self.shard or (0, 1)
        return slice(rank, None, world_size)

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Draw new weights as `init` says, and set the bias to zero.

        Each process of a divided table draws all matrices, one at a time, and keeps its own. With
        equal seeds the table is therefore the same for any number of processes.
        """
        bound = 1 / math.sqrt(self.in_features)
        if self.init == "published":
            bound = 1 / self.in_features
        row = self.weight.new_empty(self.weight.shape[1:]).uniform_(-bound, bound)
        if self.init == "equal":
            self.weight[:] = row
        elif not self.weight.is_meta:
            own = range(self.classes)[self.own_classes]
            for c in range(self.classes):
                drawn = row if c == 0 else row.uniform_(-bound, bound)
                if c in own:
                    self.weight[own.index(c)] = drawn
        if self.bias is not None:
            self.bias.zero_()

    def forward(self, x: Tensor) -> Operand:
        """The tokens together with the table, which a primitive multiplies pair by pair."""
        return Operand(x, self.weight, self.bias)

    def extra_repr(self) -> str:
        part = "" if self.shard is None else f" (shard {self.shard[0]} of {self.shard[1]})"
        return (
            f"classes={self.classes}{part}, in_features={self.in_features}, "
            f"out_features={self.out_features}, bias={self.bias is not None}, init={self.init!r}"
        )


def projection(
    in_features: int,
    out_features: int,
    classes: int | None,
    bias: bool,
    init: str = "equal",
    device: torch.device | str | None = None,
    dtype: torch.dtype | None = None,
) -> RelativeLinear | nn.Linear:
    """A table with one matrix for each of so many classes; for None, one matrix for all pairs."""
    if classes is None:
        return nn.Linear(in_features, out_features, bias, device, dtype)
    return RelativeLinear(classes, in_features, out_features, bias, init, device, dtype)


def repeat_heads(side: Operand, heads: int, head_dim: int) -> Operand:
    """Grouped keys or values, with each head repeated for the query heads that share it.

    A side with a table, or one that has all heads already, is returned as it is.

    Args:
        side: tokens [batch, tokens, kv_heads · head_dim].
        heads: the number of query heads; query head h shares head h // (heads / kv_heads).
        head_dim: channels per head.

    Returns:
        tokens [batch, tokens, heads · head_dim].
    """
    if side.weight is not None or side.x.shape[-1] == heads * head_dim:
        return side
    grouped = side.x.unflatten(-1, (-1, head_dim))
    each = heads // grouped.shape[-2]
    return Operand(grouped.repeat_interleave(each, -2).flatten(-2))
