"""What can be measured: each operator with its shapes, inputs, flops and bytes."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ...functional import offset_mix, offset_scores
from ...layouts import Layout
from ...modules import ACmix2d, AlphaTranslution1d, AlphaTranslution2d
from .dense import dense_bytes, dense_translution
from .unfold import unfold_acmix, unfold_bytes

__all__ = ["BESIDE", "OPERATORS", "Built", "Case"]


@dataclass(frozen=True)
class Case:
    """One row of the table."""

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

    def check(self) -> None:
        """Refuse what cannot be built, before anything runs."""
        if self.operator != "acmix":
            self.layout  # noqa: B018  (it checks)
        elif len(self.grid) != 2 or self.causal:
            raise ValueError(f"grid: got {self.grid}, acmix wants two axes, and not causal")

    @property
    def layout(self) -> Layout:
        return Layout(self.grid, causal=self.causal)

    @property
    def pairs(self) -> int:
        return int((self.layout.index >= 0).sum())

    @property
    def name(self) -> str:
        grid = "×".join(map(str, self.grid)) + (" causal" if self.causal else "")
        stride = f" stride {self.stride}" if self.stride > 1 else ""
        return f"{self.operator} {grid}{stride}, batch {self.batch}, width {self.width}"


@dataclass
class Built:
    """A case ready to run."""

    forward: Callable[[], Tensor]
    leaves: list[Tensor]  # what gets a gradient
    flops: int  # of the forward pass; forward + backward counts three times as many
    bytes: int  # inputs and weights read, outputs written
    beside: str  # the ordinary operator that it is compared with, one of BESIDE
    dense: Callable[[], Tensor] | None = None  # the obvious implementation that copies
    dense_bytes: Callable[..., int] | None = None  # of (backward, batch = that of the case)


def _leaf(*shape: int, case: Case, device: torch.device, scale: float = 1.0) -> Tensor:
    return (torch.randn(*shape, device=device) * scale).to(case.dtype).requires_grad_()


def translution(case: Case, device: torch.device) -> Built:
    """offset_scores, softmax, offset_mix: the two primitives without the output projection.

    A unit is 2 · batch · pairs · width² flops, one per relative projection; a shared projection is
    2 · batch · tokens · width², and a product of attention that is left dense 2 · batch · pairs ·
    width.
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

    unit = 2 * case.batch * case.pairs * width * width
    shared = 2 * case.batch * layout.tokens * width * width
    flops = len(case.relative) * unit + (3 - len(case.relative)) * shared
    moved = sum(t.numel() for t in (x, x, *sides)) * x.element_size()
    built = Built(forward, [x, *sides], flops, moved, "attention")
    if case.relative == "qkv" and not case.causal:
        index = layout.index_on(device)
        built.dense = lambda: dense_translution(x, wq, wk, wv, index, heads)
        built.dense_bytes = lambda backward, batch=case.batch: dense_bytes(
            batch, layout.tokens, width, width, backward, x.element_size()
        )
    return built


def alpha(case: Case, device: torch.device) -> Built:
    """The whole α-Translution module, its projections included."""
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
    """The whole ACmix2d module. The grid is the map that comes in."""
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
    """Ordinary self-attention on the same tokens: q, k, v and scaled_dot_product_attention."""
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
    """A 3×3 convolution of the same map."""
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
