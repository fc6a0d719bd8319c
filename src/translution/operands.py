"""What the primitives compute with: the tokens of one side of the pairs and their projection."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor

__all__ = ["Operand", "as_operand"]


class Operand(NamedTuple):
    """The queries, the keys or the values of all pairs, before a table has projected them.

    The projected row of a token in a pair of class c is `x[token] @ weight[c] + bias[c]`. It
    differs from pair to pair, so it is computed where it is needed and never stored for all pairs.

    Attributes:
        x: tokens [batch, tokens, channels].
        weight: a table [classes, channels, heads · head_dim]; None where `x` is projected already.
            (`functional.offset` also takes one matrix [channels, heads · head_dim] for all pairs.)
        bias: [classes, heads · head_dim] beside a table, or None.
    """

    x: Tensor
    weight: Tensor | None = None
    bias: Tensor | None = None

    @property
    def inner(self) -> int:
        """The number of projected channels, heads · head_dim."""
        return int((self.x if self.weight is None else self.weight).shape[-1])


def as_operand(projected: Tensor | Operand) -> Operand:
    """The result of a projection as an operand.

    A table returns an `Operand`. A linear layer, or whatever stands in its place (an adapter, a
    quantised layer), returns a tensor of projected tokens.
    """
    return projected if isinstance(projected, Operand) else Operand(projected)
