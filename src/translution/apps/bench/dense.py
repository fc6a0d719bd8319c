"""What the operator costs when a matrix is gathered for every pair: for comparison only."""

from __future__ import annotations

from torch import Tensor

__all__ = ["dense_bytes", "dense_translution"]


def dense_translution(
    x: Tensor, wq: Tensor, wk: Tensor, wv: Tensor, index: Tensor, heads: int
) -> Tensor:
    """Translution [batch, tokens, heads * head_dim] with a matrix per pair and sample.

    The way of the published code: the table is gathered to [tokens, tokens, channels, inner], and a
    broadcast product with the tokens, summed over the channels, makes q, k and v of every pair.
    """

    def per_pair(table: Tensor, tokens: Tensor) -> Tensor:
        return (tokens[..., None] * table[index]).sum(-2).unflatten(-1, (heads, -1))

    query, key = x[:, :, None], x[:, None]
    scale = (wq.shape[-1] // heads) ** -0.5
    s = (per_pair(wq, query) * per_pair(wk, key)).sum(-1) * scale
    a = s.softmax(2)[..., None]
    return (a * per_pair(wv, key)).sum(2).flatten(2)


def dense_bytes(
    batch: int, tokens: int, channels: int, inner: int, backward: bool, width: int = 4
) -> int:
    """Memory of `dense_translution` by its shapes: going forward, one projection's gathered weights
    and products at a time; going back, the gathered weights of all three, and for one of them the
    products' gradients to its tokens and to its weights."""
    pairs = tokens * tokens
    gathered, product = pairs * channels * inner, batch * pairs * channels * inner
    result = batch * pairs * inner
    if backward:
        return width * (2 * product + 3 * (gathered + result))
    return width * (gathered + product + 2 * result)
