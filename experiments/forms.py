"""Cheaper forms of Translution, which the experiments in forms-*.yaml compare.

The forms are options of the models `vit_forms` and `gpt_forms`, which an experiment imports with
`base.imports: [experiments/forms.py]`. Every form is a special case of a table T with a matrix for
each offset class c:

- bases: T[c] = Σ_m β[c, m] W_m, where M matrices are shared by all classes, and the coefficients β
  differ between classes and heads.
- small bases: T[c] = Σ_m β[c, m] W A_m, with M matrices A_m within each head behind one projection.
- fourier: bases whose coefficients are fixed sines and cosines of the offset. They are products of
  a function of the query's position and one of the key's, so ordinary attention with wider heads
  computes them.
- rotations: T[c] = W R(offset), where R rotates the channel pairs of a head (rotary positions, also
  for values).
- blocks: T[c] = W B[c], with a full matrix for each class within each head.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from translution.functional.offset_operators import layout_index, layout_positions
from translution.layouts import Layout
from translution.models.blocks import SIZES, Mixing
from translution.models.configuration import configure
from translution.models.language_model import GPT, GPTConfig
from translution.models.registry import register_family
from translution.models.vision_transformer import ViT, ViTConfig
from translution.modules.attention import Attention
from translution.modules.positions import apply_rotary
from translution.operands import Operand


class Scores(torch.autograd.Function):
    """s_ij = Σ_m β_m[i, j] q_i · k^m_j, one base at a time, in both directions."""

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, beta: Tensor) -> Tensor:
        """q [batch, heads, N, d], k [batch, heads, M, keys, d], beta [heads, M, N, keys]."""
        ctx.save_for_backward(q, k, beta)
        s = q.new_zeros(*q.shape[:3], k.shape[3])
        product = torch.empty_like(s)
        for m in range(k.shape[2]):
            torch.matmul(q, k[:, :, m].transpose(-1, -2), out=product)
            s.addcmul_(product, beta[:, m])
        return s

    @staticmethod
    def backward(ctx: Any, ds: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        q, k, beta = ctx.saved_tensors
        dq, dk, dbeta = torch.zeros_like(q), torch.empty_like(k), torch.empty_like(beta)
        weighted = torch.empty_like(ds)
        for m in range(k.shape[2]):
            torch.mul(ds, beta[:, m], out=weighted)
            dq += weighted @ k[:, :, m]
            dk[:, :, m] = weighted.transpose(-1, -2) @ q
            torch.matmul(q, k[:, :, m].transpose(-1, -2), out=weighted)
            dbeta[:, m] = weighted.mul_(ds).sum(0)
        return dq, dk, dbeta


class Mix(torch.autograd.Function):
    """y_i = Σ_m Σ_j a_ij β_m[i, j] v^m_j, one base at a time, in both directions."""

    @staticmethod
    def forward(ctx: Any, a: Tensor, v: Tensor, beta: Tensor) -> Tensor:
        """a [batch, heads, queries, keys], v [batch, heads, M, keys, d], beta as in `Scores`."""
        ctx.save_for_backward(a, v, beta)
        y = a.new_zeros(*a.shape[:3], v.shape[4])
        weighted = torch.empty_like(a)
        for m in range(v.shape[2]):
            torch.mul(a, beta[:, m], out=weighted)
            y += weighted @ v[:, :, m]
        return y

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        a, v, beta = ctx.saved_tensors
        da, dv, dbeta = torch.zeros_like(a), torch.empty_like(v), torch.empty_like(beta)
        weighted = torch.empty_like(a)
        for m in range(v.shape[2]):
            torch.mul(a, beta[:, m], out=weighted)
            dv[:, :, m] = weighted.transpose(-1, -2) @ dy
            torch.matmul(dy, v[:, :, m].transpose(-1, -2), out=weighted)
            da.addcmul_(weighted, beta[:, m])
            dbeta[:, m] = weighted.mul_(a).sum(0)
        return da, dv, dbeta


class Coefficients(nn.Module):
    """β [heads, M, queries, keys] from a learned coefficient per class, head and base.

    start: how the coefficients of the bases after the first begin: "random" (normal), "smooth"
        (cosines of the offset with a random frequency and phase per head), or "zero". Those of the
        first base begin at 1.
    deviation: the standard deviation of a random start, or the amplitude of a smooth one.
    speed: the factor by which coefficients learn faster (with AdamW, a factor of the rate).
    """

    def __init__(self, layout: Layout, heads: int, form: Form):
        super().__init__()
        self.speed = form.speed
        own = 1 if form.shared else heads
        more = torch.zeros(layout.classes, own, form.bases - 1)
        if form.start == "random":
            more.normal_(std=form.deviation)
        elif form.start == "smooth":
            axes = [torch.arange(n) - (0 if layout.causal else n // 2) for n in layout.axis_classes]
            offset = torch.stack(torch.meshgrid(*axes, indexing="ij"), -1).flatten(0, -2).float()
            reach = torch.tensor(layout.grid, dtype=torch.float32)
            frequency = torch.randn(len(axes), own, form.bases - 1) * math.pi
            phase = torch.rand(own, form.bases - 1) * 2 * math.pi
            angle = torch.einsum("ca,ahm->chm", offset / reach, frequency) + phase
            more[: len(offset)] = form.deviation * angle.cos()
        start = torch.cat([torch.ones(layout.classes, own, 1), more], -1)
        self.weight = nn.Parameter(start / self.speed)

    def forward(self, index: Tensor, heads: int) -> Tensor:
        beta = self.speed * self.weight[index.clamp(min=0)].permute(2, 3, 0, 1)
        return beta.expand(heads, -1, -1, -1).contiguous()


@dataclass(frozen=True)
class Form:
    """The form of the tables of one layer; the fields of `Forms`."""

    form: str
    bases: int
    start: str
    deviation: float
    speed: float
    shared: bool
    matrices: str
    frequencies: int
    base: float


def rotations(x: Tensor, layout: Layout, base: float) -> tuple[Tensor, Tensor]:
    """Cosines and sines of the angles of channel pairs, as `rotary_angles` with another base."""
    each = x.shape[-1] // (2 * len(layout.grid))
    rate = base ** (-torch.arange(each, device=x.device) / each)
    angle = (layout_positions(x, layout)[..., None] * rate).flatten(1)
    return angle.cos(), angle.sin()


class CheapTranslution(Attention):
    """Attention with tables of a cheaper form for those of q, k and v that are in `relative`.

    position: "rotary" rotates q and k with the library's rates, unless the form is "rotations",
        which has rates of its own for all of `relative`.
    """

    def __init__(self, dim: int, grid: Any, relative: str, form: Form, **options: Any):
        heads, head_dim = options.pop("heads"), options.pop("head_dim")
        super().__init__(dim, grid, heads, head_dim, **options)
        self.relative, self.form = relative, form
        self.make_projections("", False, "equal", None, None)
        d, inner, wide = self.head_dim, heads * self.head_dim, form.bases
        for name in relative:
            if form.form in ("bases", "small"):
                setattr(self, f"{name}_beta", Coefficients(self.layout, heads, form))
            if form.form == "fourier":
                wide = 1 + 2 * form.frequencies
            if form.form in ("bases", "fourier"):
                # all matrices start independent, or those after the first at zero
                proj = nn.Linear(dim, wide * inner, bias=False)
                if form.matrices == "zero":
                    nn.init.zeros_(proj.weight[inner:])
                setattr(self, f"{name}_proj", proj)
            if form.form == "small":
                eye = torch.eye(d).expand(heads, 1, d, d)
                more = torch.randn(heads, wide - 1, d, d) / math.sqrt(d)
                more = torch.zeros_like(more) if form.matrices == "zero" else more
                setattr(self, f"{name}_small", nn.Parameter(torch.cat([eye, more], 1)))
            if form.form == "blocks":
                block = torch.eye(d).repeat(heads, self.layout.classes, 1, 1)
                setattr(self, f"{name}_blocks", nn.Parameter(block))

    def _many(self, name: str, x: Tensor) -> Tensor:
        """The projections by all bases, [batch, heads, M, tokens, head_dim]."""
        x = getattr(self, f"{name}_proj")(x)
        if self.form.form == "small":
            return self.split(x)[:, :, None] @ getattr(self, f"{name}_small")
        return x.unflatten(-1, (-1, self.heads, self.head_dim)).permute(0, 3, 2, 1, 4).contiguous()

    def _beta(self, name: str, layout: Layout) -> Tensor:
        beta = getattr(self, f"{name}_beta")
        return beta(layout_index(beta.weight, layout), self.heads)

    def _waves(self, x: Tensor, layout: Layout) -> Tensor:
        """1, and cosine and sine of the position in a few directions, [1 + 2 F, tokens]."""
        position = layout_positions(x, layout).to(x.dtype)
        if position.shape[1] == 1:
            vectors = torch.arange(1, self.form.frequencies + 1, device=x.device)[:, None]
        else:
            near = [(0, 1), (1, 0), (1, 1), (1, -1), (0, 2), (2, 0), (2, 1), (1, 2), (2, 2)]
            vectors = torch.tensor(near[: self.form.frequencies], device=x.device)
        angle = vectors.to(x.dtype) @ (position * math.pi / position.new_tensor(layout.grid)).T
        return torch.cat([torch.ones_like(angle[:1]), angle.cos(), angle.sin()])

    def attend(
        self, query: Tensor, x: Tensor, layout: Layout, mask: Any, return_weights: bool,
        cache: Any = None,
    ) -> tuple[Tensor, None]:  # fmt: skip
        y = getattr(self, f"_{self.form.form}")(x, layout)
        return self.join(y), None

    def _qkv(self, x: Tensor, layout: Layout, skip: str) -> list[Tensor]:
        """Query, key and value [batch, heads, tokens, head_dim]; None for those in `skip`."""
        found: list[Any] = [None] * 3
        if not set(skip) & set("qk"):
            q, k = self.project_query_key(x, x, layout)
            found[:2] = self.split(q.x), self.split(k.x)
        for i, name in enumerate("qkv"):
            if found[i] is None and name not in skip:
                found[i] = self.split(getattr(self, f"{name}_proj")(x))
        return found

    def _softmax(self, s: Tensor, layout: Layout) -> Tensor:
        return self.primitives.softmax(
            s.masked_fill(layout_index(s, layout) < 0, -math.inf), None, layout.may_be_empty
        )

    def _bases(self, x: Tensor, layout: Layout) -> Tensor:
        relative = self.relative
        q, k, v = self._qkv(x, layout, relative)
        if "q" in relative and "k" in relative:
            qs, ks, bq = self._many("q", x), self._many("k", x), self._beta("q", layout)
            bk = self._beta("k", layout)
            s = sum(
                Scores.apply(self.scale * qs[:, :, m], ks, bq[:, m : m + 1] * bk)
                for m in range(qs.shape[2])
            )
        elif "k" in relative:
            s = Scores.apply(self.scale * q, self._many("k", x), self._beta("k", layout))
        elif "q" in relative:
            beta = self._beta("q", layout).transpose(-1, -2).contiguous()
            s = Scores.apply(self.scale * k, self._many("q", x), beta).transpose(-1, -2)
        else:
            s = (self.scale * q) @ k.transpose(-1, -2)
        a = self._softmax(s, layout)
        if "v" not in relative:
            return a @ v
        return Mix.apply(a, self._many("v", x), self._beta("v", layout))

    _small = _bases

    def _fourier(self, x: Tensor, layout: Layout) -> Tensor:
        """Heads of 1 + 2 F times as many channels, in scaled_dot_product_attention.

        The table is W_0 + Σ_f cos(f · offset) A_f + sin(f · offset) B_f. Sums of angles divide
        each cosine and sine into products of a function of the query and one of the key.
        """
        q, k, v = self._qkv(x, layout, self.relative)
        waves, n = self._waves(x, layout), self.form.frequencies
        one, cos, sin = waves[:1], waves[1 : n + 1], waves[n + 1 :]

        def parts(name: str) -> tuple[Tensor, Tensor, Tensor]:
            return self._many(name, x).split([1, n, n], 2)  # of W_0, A and B

        if "k" in self.relative:
            w, a, b = parts("k")
            # cos(i-j) = cos i cos j + sin i sin j, sin(i-j) = sin i cos j - cos i sin j
            c, s = cos[..., None], sin[..., None]
            wide_k = torch.cat([w, a * c - b * s, a * s + b * c], 2)
            wide_q = q[:, :, None] * torch.cat([one, cos, sin])[..., None]
            q, k = (t.transpose(2, 3).flatten(3) for t in (wide_q, wide_k))
        if "v" in self.relative:
            w, a, b = parts("v")
            c, s = cos[..., None], sin[..., None]
            wide_v = torch.cat([w, a * c - b * s, a * s + b * c], 2)
            v = wide_v.transpose(2, 3).flatten(3)
        y = F.scaled_dot_product_attention(q, k, v, is_causal=layout.causal, scale=self.scale)
        if "v" not in self.relative:
            return y
        y = y.unflatten(3, (-1, self.head_dim))
        return torch.einsum("bhimd,mi->bhid", y, torch.cat([one, cos, sin]))

    def _rotations(self, x: Tensor, layout: Layout) -> Tensor:
        q, k, v = self._qkv(x, layout, "")
        cos, sin = rotations(q, layout, self.form.base)
        if "k" in self.relative:
            q, k = apply_rotary(q, cos, sin), apply_rotary(k, cos, sin)
        if "v" in self.relative:
            v = apply_rotary(v, cos, sin)
        y = F.scaled_dot_product_attention(q, k, v, is_causal=layout.causal, scale=self.scale)
        return apply_rotary(y, cos, -sin) if "v" in self.relative else y

    def _blocks(self, x: Tensor, layout: Layout) -> Tensor:
        q, k, v = self._qkv(x, layout, "")
        made = []
        for h in range(self.heads):
            sides = {
                name: Operand(t[:, h], getattr(self, f"{name}_blocks")[h])
                if name in self.relative
                else Operand(t[:, h])
                for name, t in zip("qkv", (q, k, v), strict=True)
            }
            s = self.primitives.scores(sides["q"], sides["k"], layout, heads=1, scale=self.scale)
            a = self.primitives.softmax(s, None, layout.may_be_empty)
            made.append(self.primitives.mix(a, sides["v"], layout))
        return torch.stack(made, 1)


@dataclass
class Forms(Mixing):
    """Options of `Mixing`, with the form of the tables of the mixer "translution".

    form: "full" (the library's), "bases", "small", "fourier", "rotations" or "blocks".
    bases, frequencies: M, and F of "fourier".
    start, deviation, speed, shared: of the coefficients, as in `Coefficients`.
    matrices: how those after the first start: "independent" or "zero".
    base: the longest wavelength of "rotations", in units of 2π tokens.
    """

    form: str = "full"
    bases: int = 1
    start: str = "random"
    deviation: float = 0.5
    speed: float = 1.0
    shared: bool = False
    matrices: str = "independent"
    frequencies: int = 4
    base: float = 10.0

    def make(
        self, mixer: str, dim: int, grid: tuple[int, ...], heads: int, head_dim: int | None,
        causal: bool = False, prefix: int = 0, prefix_queries: bool = False,
    ) -> nn.Module:  # fmt: skip
        if mixer != "translution" or self.form == "full":
            return super().make(mixer, dim, grid, heads, head_dim, causal, prefix, prefix_queries)
        form = Form(**{name: getattr(self, name) for name in Form.__dataclass_fields__})
        return CheapTranslution(
            dim, grid, self.relative, form, heads=heads, head_dim=head_dim, causal=causal,
            prefix=prefix, prefix_queries=prefix_queries, position=self.position,
            dropout=self.dropout, window=self.window, dilation=self.dilation, buckets=self.buckets,
        )  # fmt: skip


@dataclass
class ViTFormsConfig(Forms, ViTConfig):
    """Options of a `ViT` and of `Forms`."""


@dataclass
class GPTFormsConfig(Forms, GPTConfig):
    """Options of a `GPT` and of `Forms`."""


def vit_forms(size: str = "tiny", **options: Any) -> ViT:
    return ViT(configure(ViTFormsConfig, **(vars(SIZES[size]) | options)))


def gpt_forms(size: str = "tiny", **options: Any) -> GPT:
    return GPT(configure(GPTFormsConfig, **(vars(SIZES[size]) | options)))


register_family("vit_forms", vit_forms, ViTFormsConfig)
register_family("gpt_forms", gpt_forms, GPTFormsConfig)
