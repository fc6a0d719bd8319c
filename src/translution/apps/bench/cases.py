"""The operators that can be measured, with their inputs, floating-point operations and bytes."""

from __future__ import annotations

import math
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ...backends.torch import per_token
from ...functional import offset_mix, offset_scores
from ...layouts import Layout
from ...modules import ACmix2d, AlphaTranslution1d, AlphaTranslution2d
from .dense import dense_bytes, dense_translution
from .unfold import unfold_acmix, unfold_bytes

__all__ = ["BESIDE", "OPERATORS", "Built", "Case"]


@dataclass(frozen=True)
class Case:
    """An operator with the shapes and the dtype with which it is measured.

    Attributes:
        operator: a name of `OPERATORS`.
        grid: the number of tokens along each axis; for acmix the size of the input map.
        causal: whether a token only sees the tokens before it and itself.
        width: the number of channels of a token.
        heads: the number of attention heads, a divisor of the width.
        batch: the number of samples.
        dtype: the dtype of inputs and weights.
        relative: which of the projections q, k and v depend on the offset.
        rank: the rank per head of α-Translution.
        kernel: the size of ACmix's attention window in pixels.
        stride: the stride of ACmix.
        backend: the backend that computes the operator, or "auto".
        buckets: the matrices on each side of offset 0, per axis; None gives each offset its own.
    """

    operator: str
    grid: tuple[int, ...]
    causal: bool
    width: int
    heads: int
    batch: int
    dtype: torch.dtype
    relative: str = "qkv"
    rank: int = 8
    kernel: int = 7
    stride: int = 1
    backend: str = "auto"
    buckets: int | None = None

    def check(self) -> None:
        """Check that the case can be built, before anything runs.

        Raises:
            ValueError: the grid does not suit the operator.
        """
        if self.operator != "acmix":
            self.layout  # noqa: B018  (the property checks the grid)
        elif len(self.grid) != 2 or self.causal:
            raise ValueError(f"grid: got {self.grid}, acmix wants two axes that are not causal")

    @property
    def layout(self) -> Layout:
        """The offset class of each pair of tokens."""
        buckets = None if self.buckets is None else (self.buckets,) * len(self.grid)
        return Layout(self.grid, causal=self.causal, buckets=buckets)

    @property
    def pairs(self) -> int:
        """The number of pairs of tokens that interact in one sample."""
        return int((self.layout.index >= 0).sum())

    @property
    def name(self) -> str:
        """The case in words, for a table."""
        grid = "×".join(map(str, self.grid)) + (" causal" if self.causal else "")
        stride = f" stride {self.stride}" if self.stride > 1 else ""
        grid += f", {self.buckets} buckets" if self.buckets else ""
        return f"{self.operator} {grid}{stride}, batch {self.batch}, width {self.width}"


@dataclass
class Built:
    """A case with its inputs and weights, ready to run.

    Attributes:
        forward: computes the output.
        leaves: the inputs and weights that get a gradient.
        flops: floating-point operations of the forward pass; forward and backward together count
            as three times as many.
        bytes: the bytes of the inputs and weights that are read and of the outputs.
        beside: the ordinary operator to compare with, a name of `BESIDE`.
        dense: the direct implementation, which copies a matrix or a value for every pair. With
            buckets it is the operator itself, which then projects a token once per pair.
        around: the context in which `dense` is computed, in both directions.
        dense_bytes: estimates the memory of `dense`, from (backward, batch).
    """

    forward: Callable[[], Tensor]
    leaves: list[Tensor]
    flops: int
    bytes: int
    beside: str
    dense: Callable[[], Tensor] | None = None
    around: Callable[[], AbstractContextManager[None]] = nullcontext
    dense_bytes: Callable[..., int] | None = None


def _leaf(*shape: int, case: Case, device: torch.device, scale: float = 1.0) -> Tensor:
    return (torch.randn(*shape, device=device) * scale).to(case.dtype).requires_grad_()


def translution(case: Case, device: torch.device) -> Built:
    """Build Translution without its output projection: offset_scores, softmax and offset_mix.

    A relative projection counts 2 · batch · rows · width² floating-point operations, and a shared
    projection 2 · batch · tokens · width². The rows are the pairs; with buckets, a token is
    projected once for each of its classes, if that takes less time. The products of queries with
    keys and of weights with values are mostly small beside them and are not counted.
    """
    layout, width, heads = case.layout, case.width, case.heads
    x = _leaf(case.batch, layout.tokens, width, case=case, device=device)
    sides = []
    for name in "qkv":
        lead = (layout.classes,) if name in case.relative else ()
        sides.append(_leaf(*lead, width, width, case=case, device=device, scale=width**-0.5))
    wq, wk, wv = sides
    scale = (width // heads) ** -0.5

    def forward() -> Tensor:
        s = offset_scores(x, x, wq, wk, layout, heads=heads, scale=scale, backend=case.backend)
        return offset_mix(s.softmax(-1), x, wv, layout, backend=case.backend)

    rows, size = case.pairs, (width, width)
    own = {name: size if name in case.relative else None for name in "qkv"}
    if per_token.pays(layout, own["q"], own["k"] or own["v"], heads, case.batch, device):
        rows = per_token.counts_of(layout, device).keys
    unit = 2 * case.batch * width * width
    flops = unit * (len(case.relative) * rows + (3 - len(case.relative)) * layout.tokens)
    moved = sum(t.numel() for t in (x, x, *sides)) * x.element_size()
    built = Built(forward, [x, *sides], flops, moved, "attention")
    if case.buckets is not None:
        built.dense, built.around = forward, per_token.never
        scores = 12 * heads * layout.tokens**2
        built.dense_bytes = lambda backward, batch=case.batch: batch * scores
    elif case.relative == "qkv" and not case.causal:
        index = layout.index_on(device)
        built.dense = lambda: dense_translution(x, wq, wk, wv, index, heads)
        built.dense_bytes = lambda backward, batch=case.batch: dense_bytes(
            batch, layout.tokens, width, width, backward, x.element_size()
        )
    return built


def alpha(case: Case, device: torch.device) -> Built:
    """Build the whole α-Translution module, with all of its projections."""
    make: Any = AlphaTranslution1d if len(case.grid) == 1 else AlphaTranslution2d
    keywords = {"causal": True} if case.causal else {}
    grid: Any = case.grid[0] if len(case.grid) == 1 else case.grid
    module: nn.Module = make(
        case.width, grid, heads=case.heads, rank=case.rank, relative=case.relative, **keywords
    ).to(device, case.dtype)
    layout, width, low = case.layout, case.width, case.heads * case.rank
    x = _leaf(case.batch, layout.tokens, width, case=case, device=device)
    tokens, pairs = case.batch * layout.tokens, case.batch * case.pairs
    flops = 2 * tokens * (4 * width * width + 4 * width * low)
    flops += 2 * pairs * (2 * width + len(case.relative) * low * low + 2 * low)
    leaves = [x, *module.parameters()]
    moved = sum(t.numel() for t in (x, *leaves)) * x.element_size()
    return Built(lambda: module(x), leaves, flops, moved, "attention")


def acmix(case: Case, device: torch.device) -> Built:
    """Build the whole ACmix2d module; the grid of the case is the size of the input map."""
    width, places = case.width, math.prod(case.grid)
    layer = ACmix2d(width, width, case.heads, case.kernel, stride=case.stride)
    layer = layer.to(device, case.dtype)
    x = _leaf(case.batch, width, *case.grid, case=case, device=device)
    out = math.prod(-(-n // case.stride) for n in case.grid)
    flops = 2 * case.batch * places * 3 * width * width
    flops += 2 * case.batch * out * width * 2 * case.kernel**2
    flops += 2 * case.batch * out * width * 3 * case.heads * layer.convolution.kernel_size**2
    leaves = [x, *layer.parameters()]
    moved = sum(t.numel() for t in (x, *leaves)) * x.element_size()
    built = Built(lambda: layer(x), leaves, flops, moved, "convolution")
    built.dense = lambda: unfold_acmix(layer, x)
    built.dense_bytes = lambda backward, batch=case.batch: unfold_bytes(
        batch, width, out, case.kernel**2, backward, x.element_size()
    )
    return built


def attention(case: Case, device: torch.device) -> Built:
    """Build self-attention on the same tokens: q, k, v and scaled_dot_product_attention."""
    layout, width, heads = case.layout, case.width, case.heads
    x = _leaf(case.batch, layout.tokens, width, case=case, device=device)
    weight = _leaf(3 * width, width, case=case, device=device, scale=width**-0.5)

    def forward() -> Tensor:
        qkv = F.linear(x, weight).unflatten(-1, (3, heads, -1)).transpose(1, 3)
        q, k, v = qkv.unbind(2)
        y = F.scaled_dot_product_attention(q, k, v, is_causal=case.causal)
        return y.transpose(1, 2).flatten(2)

    flops = 2 * case.batch * (layout.tokens * 3 * width * width + case.pairs * 2 * width)
    moved = sum(t.numel() for t in (x, x, weight)) * x.element_size()
    return Built(forward, [x, weight], flops, moved, "attention")


def convolution(case: Case, device: torch.device) -> Built:
    """Build a 3×3 convolution of the same map."""
    width = case.width
    x = _leaf(case.batch, width, *case.grid, case=case, device=device)
    weight = _leaf(width, width, 3, 3, case=case, device=device, scale=(9 * width) ** -0.5)
    out = math.prod(-(-n // case.stride) for n in case.grid)
    flops = 2 * case.batch * out * 9 * width * width
    moved = sum(t.numel() for t in (x, x, weight)) * x.element_size()
    return Built(
        lambda: F.conv2d(x, weight, None, case.stride, 1), [x, weight], flops, moved, "convolution"
    )


BESIDE = {"attention": attention, "convolution": convolution}
OPERATORS: dict[str, Callable[[Case, torch.device], Built]] = {
    "translution": translution,
    "alpha": alpha,
    "acmix": acmix,
    "attention": attention,
}
