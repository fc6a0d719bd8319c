"""Positions for attention whose projections are shared: rotary, and a learned relative bias."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from .. import functional  # noqa: F401  (registers the operators)
from ..layouts import Layout

__all__ = ["RelativeBias", "check_rotary", "rotate", "turns"]


def check_rotary(head_dim: int, axes: int) -> None:
    """Rotary positions pair channels, and divide the pairs over the axes."""
    if head_dim % (2 * axes):
        raise ValueError(
            f"head_dim: got {head_dim}, rotary on {axes} axes wants a multiple of {2 * axes}"
        )


def turns(x: Tensor, layout: Layout, start: int = 0) -> tuple[Tensor, Tensor]:
    """Rotary positions: cosine and sine of the angles, linear in the position, that `rotate` turns
    the channel pairs of a head by.

    With A axes and head_dim d, channel p pairs with p + d/2; the first d/(2A) pairs turn with the
    first axis, the next with the second; angle = position * 10000^(-p / (d / (2A))). Prefix tokens
    have no place and are not turned.

    Args:
        x: [batch, heads, tokens, head_dim], the last tokens of the layout (all, or without a prefix
            the new ones after those that a cache holds).
        layout: where the tokens are.
        start: the position of the grid's first token.

    Returns:
        two of [tokens, head_dim / 2], float64 for float64, else float32.
    """
    each = x.shape[-1] // (2 * len(layout.grid))
    wide = torch.float64 if x.dtype == torch.float64 else torch.float32
    rate = 10000.0 ** (-torch.arange(each, device=x.device, dtype=wide) / each)
    places = torch.ops.translution.layout_positions(x, layout.key)[layout.tokens - x.shape[-2] :]
    angle = ((places + start).to(wide)[..., None] * rate).flatten(1)
    angle = torch.cat([angle.new_zeros(layout.prefix, angle.shape[1]), angle])
    return angle.cos(), angle.sin()


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Turn `x`, [batch, heads, tokens, head_dim]: the first of the tokens `turns` was asked for."""
    cos, sin = cos[: x.shape[-2]], sin[: x.shape[-2]]
    first, second = x.to(cos.dtype).chunk(2, -1)
    turned = torch.cat([first * cos - second * sin, second * cos + first * sin], -1)
    return turned.to(x.dtype)


class RelativeBias(nn.Module):
    """A learned number per class of pairs and head, added to the scores.

    Attributes:
        weight: [classes, heads], starts at zero.
    """

    def __init__(self, classes: int, heads: int):
        super().__init__()
        self.classes, self.heads = classes, heads
        self.weight = nn.Parameter(torch.zeros(classes, heads))

    def forward(self, index: Tensor) -> Tensor:
        """[heads, queries, keys] of an index [queries, keys]; -inf where the pair is absent."""
        bias = self.weight[index.clamp(min=0)].permute(2, 0, 1)
        return bias.masked_fill(index < 0, float("-inf"))

    def extra_repr(self) -> str:
        return f"classes={self.classes}, heads={self.heads}"
