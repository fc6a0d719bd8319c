"""Translution with a matrix gathered for every pair; the benchmarks compare with it."""

from __future__ import annotations

from torch import Tensor

__all__ = ["dense_bytes", "dense_translution"]


def dense_translution(
    x: Tensor, wq: Tensor, wk: Tensor, wv: Tensor, index: Tensor, heads: int
) -> Tensor:
    """Compute Translution in the way of the published code, with a matrix per pair and sample.

    Each table is gathered to [tokens, tokens, channels, inner]. A broadcast product with the
    tokens, summed over the channels, gives the q, k and v of every pair.

    Args:
        x: the tokens [batch, tokens, channels].
        wq: the table of the queries [classes, channels, inner].
        wk: the table of the keys [classes, channels, inner].
        wv: the table of the values [classes, channels, inner].
        index: the offset class of each pair, int64 [tokens, tokens].
        heads: the number of heads, a divisor of inner.

    Returns:
        The output [batch, tokens, inner].
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
    """Estimate the peak memory of `dense_translution` from its shapes.

    The forward pass holds the gathered weights and the products of one projection at a time. The
    backward pass holds the gathered weights of all three projections and, for one of them, the
    gradients of the products with respect to tokens and weights.

    Args:
        batch: the number of samples.
        tokens: the number of tokens of a sample.
        channels: the number of channels of a token.
        inner: the number of channels of all heads together.
        backward: whether the backward pass is included.
        width: the bytes of a number.

    Returns:
        The number of bytes.
    """
    pairs = tokens * tokens
    gathered, product = pairs * channels * inner, batch * pairs * channels * inner
    result = batch * pairs * inner
    if backward:
        return width * (2 * product + 3 * (gathered + result))
    return width * (gathered + product + 2 * result)
