"""The primitives of attention for processes that each have the pairs of some classes.

The scores of a query are divided over the processes, as its pairs are. Its softmax needs two values
from the other processes, the largest score and the sum of exponentials, and one in its backward
pass. So scores and weights are never sent. The forward pass sums the output tokens over all
processes, and the backward pass sums the gradients of the input tokens.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd import Function
from torch.autograd.function import once_differentiable

from ...functional import offset
from ...functional.offset import autocast
from ...layouts import Layout
from ...operands import Operand

__all__ = ["Divided"]


def _reduced(x: Tensor, group: Any, operation: Any = dist.ReduceOp.SUM) -> Tensor:
    """The sum, or another reduction, of x over the processes, as a new tensor."""
    x = x.clone(memory_format=torch.contiguous_format)
    dist.all_reduce(x, operation, group)
    return x


class _Enter(Function):
    """Returns x, which is the same in all processes. The gradient is summed over the processes."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, group: Any) -> Tensor:
        ctx.group = group
        return x.view_as(x)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return _reduced(grad, ctx.group), None


class _Leave(Function):
    """Sums x over the processes. The gradient of each process's x is that of the sum."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, group: Any) -> Tensor:
        return _reduced(x, group)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return grad, None


class _Softmax(Function):
    """The softmax of rows that are divided over the processes. A row of -inf becomes zeros."""

    @staticmethod
    def forward(ctx: Any, s: Tensor, group: Any) -> Tensor:
        top = _reduced(s.amax(-1, keepdim=True), group, dist.ReduceOp.MAX)
        a = (s - top.masked_fill(top.isneginf(), 0.0)).exp_()
        total = _reduced(a.sum(-1, keepdim=True), group)
        a /= total.masked_fill(total == 0.0, 1.0)
        ctx.group = group
        ctx.save_for_backward(a)
        return a

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        (a,) = ctx.saved_tensors
        return a * (grad - _reduced((a * grad).sum(-1, keepdim=True), ctx.group)), None


class Divided:
    """`modules.attention.Primitives` for tables that are divided over the processes of a group.

    Args:
        group: the process group.
        shard: (rank, world size), the classes that this process computes (`Layout.shard`).
    """

    def __init__(self, group: Any, shard: tuple[int, int]):
        self.group, self.shard = group, shard

    def __deepcopy__(self, memo: dict[int, Any]) -> Divided:
        return self  # a copy of a model has the same group

    def scores(
        self, query: Operand, key: Operand, layout: Layout, *, heads: int, scale: float = 1.0
    ) -> Tensor:
        """Scores [batch, heads, queries, keys]; -inf if a pair is absent or another process's."""
        x_query = self._enter(query.x)
        x_key = x_query if key.x is query.x else self._enter(key.x)
        query, key = query._replace(x=x_query), key._replace(x=x_key)
        return offset.scores(query, key, layout.sharded(*self.shard), heads=heads, scale=scale)

    def softmax(self, s: Tensor, mask: Tensor | None = None, empty_rows: bool = False) -> Tensor:
        """The attention weights of this process's pairs, and 0 for all others."""
        if mask is not None:
            s = s.masked_fill(~mask, float("-inf"))
        return _Softmax.apply(s, self.group)

    def mix(self, a: Tensor, value: Operand, layout: Layout) -> Tensor:
        """The mixed values [batch, queries, heads · head_dim], summed over the processes."""
        value = value._replace(x=self._enter(value.x))
        y = offset.mix(a, value, layout.sharded(*self.shard))
        return _Leave.apply(y, self.group)

    def weights(self, a: Tensor) -> Tensor:
        """The attention weights of all pairs, summed over the processes."""
        return _Leave.apply(a, self.group)

    def _enter(self, x: Tensor) -> Tensor:
        return _Enter.apply(autocast(x), self.group)  # the gradient is sent in autocast's dtype
