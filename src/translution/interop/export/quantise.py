"""Weights in eight bits: a quarter of the bytes, for inference.

A weight is stored as an int8 times a scale: per output channel (Linear, Conv2d), per row
(Embedding), and per class in a table. Each is symmetric: the largest magnitude is 127. Activations
stay as they are. A layer's weights are made again when they are used; of a table they never are:
its numbers are multiplied as they stand, class by class, and a class's scale goes to the scores or
attention weights of its pairs, one number per pair.
"""

from __future__ import annotations

import copy
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ...functional import offset_mix, offset_scores
from ...layouts import Layout
from ...modules.attention import Attention, Primitives
from ...modules.projections import Projected, RelativeLinear, SharedLinear

__all__ = ["quantise", "quantised", "stored_bytes"]


class Quantised(nn.Module):
    """An int8 weight and its scales.

    Attributes:
        values: int8, of the shape of the weight.
        scale: broadcastable to it.
        bias: as it was, or None.
    """

    values: Tensor
    scale: Tensor
    bias: nn.Parameter | None

    def __init__(self, layer: Any, axes: tuple[int, ...]):
        """`axes`: those that share a scale."""
        super().__init__()
        values, scale = quantised(layer.weight.detach(), axes)
        self.register_buffer("values", values)
        self.register_buffer("scale", scale)
        bias = getattr(layer, "bias", None)
        self.bias = None if bias is None else nn.Parameter(bias.detach(), requires_grad=False)

    @property
    def weight(self) -> Tensor:
        """As floating point numbers."""
        return self.values.to(self.scale.dtype) * self.scale

    def extra_repr(self) -> str:
        return f"int8 {tuple(self.values.shape)}"


class QuantisedLinear(Quantised):
    """nn.Linear."""

    def __init__(self, layer: nn.Linear):
        super().__init__(layer, (1,))

    def forward(self, x: Tensor) -> Any:
        return F.linear(x, self.weight.to(x.dtype), self.bias)


class QuantisedShared(QuantisedLinear):
    """The projection of an attention that is no table."""

    def forward(self, x: Tensor) -> Projected:
        return Projected(super().forward(x))


class QuantisedConv2d(Quantised):
    """nn.Conv2d with zeros around."""

    def __init__(self, layer: nn.Conv2d):
        super().__init__(layer, (1, 2, 3))
        self.how: Any = (layer.stride, layer.padding, layer.dilation, layer.groups)

    def forward(self, x: Tensor) -> Tensor:
        return F.conv2d(x, self.weight.to(x.dtype), self.bias, *self.how)


class QuantisedEmbedding(Quantised):
    """nn.Embedding: only the rows that are asked for become floating point numbers."""

    def __init__(self, layer: nn.Embedding):
        super().__init__(layer, (1,))

    def forward(self, ids: Tensor) -> Tensor:
        return self.values[ids].to(self.scale.dtype) * self.scale[ids]


class Rows(NamedTuple):
    """A table as `QuantisedTable` hands it over, in place of a tensor."""

    values: Tensor
    scale: Tensor


class QuantisedTable(Quantised):
    """`RelativeLinear`. Its attention computes with `QuantisedPrimitives`."""

    def __init__(self, layer: RelativeLinear):
        if layer.share is not None:
            raise ValueError(
                f"model: got a table divided over {layer.share[1]} processes, want a whole one"
            )
        super().__init__(layer, (1, 2))

    def forward(self, x: Tensor) -> Projected:
        rows: Any = Rows(self.values, self.scale.flatten())
        return Projected(x, rows, self.bias)


class QuantisedPrimitives(Primitives):
    """The primitives for tables of `Rows`: with one scale s per class, (x W s + b) is
    s (x W + b / s), so scores and weights of a pair are multiplied by its s."""

    @staticmethod
    def scores(
        x_query: Tensor,
        x_key: Tensor,
        w_query: Any,
        w_key: Any,
        layout: Layout,
        *,
        heads: int,
        bias_query: Tensor | None = None,
        bias_key: Tensor | None = None,
        scale: float = 1.0,
    ) -> Tensor:
        wq, bq, q_scale = _parts(w_query, bias_query)
        wk, bk, k_scale = _parts(w_key, bias_key)
        backend = "auto" if wq is None and wk is None else "torch"  # the one that reads int8
        s = offset_scores(
            x_query, x_key, wq, wk, layout, heads=heads, bias_query=bq, bias_key=bk,
            scale=scale, backend=backend,
        )  # fmt: skip
        for per_class in (q_scale, k_scale):
            if per_class is not None:
                s = s * _of_pairs(per_class, layout, x_query).to(s.dtype)
        return s

    @staticmethod
    def mix(
        a: Tensor,
        x_value: Tensor,
        w_value: Any,
        layout: Layout,
        *,
        bias_value: Tensor | None = None,
    ) -> Tensor:
        w, b, per_class = _parts(w_value, bias_value)
        if per_class is None:
            return offset_mix(a, x_value, None, layout)
        a = a * _of_pairs(per_class, layout, x_value).to(a.dtype)
        return offset_mix(a, x_value, w, layout, bias_value=b, backend="torch")


def _parts(
    rows: Rows | None, bias: Tensor | None
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    if rows is None:
        return None, None, None
    return rows.values, None if bias is None else bias / rows.scale[:, None], rows.scale


def _of_pairs(per_class: Tensor, layout: Layout, like: Tensor) -> Tensor:
    """[queries, keys]; of an absent pair any."""
    return per_class[torch.ops.translution.layout_index(like, layout.key).clamp(min=0)]


def quantised(weight: Tensor, axes: tuple[int, ...]) -> tuple[Tensor, Tensor]:
    """(int8 values, scale) with values * scale about `weight`, each off by half a scale at most.

    Args:
        weight: floating point.
        axes: those that share a scale; they stay in `scale`, with size 1.

    Raises:
        ValueError: numbers that are not finite.
    """
    if not weight.is_meta and not bool(torch.isfinite(weight).all()):
        raise ValueError("model: got weights that are not finite, want finite ones to quantise")
    most = weight.abs().amax(axes, keepdim=True)
    scale = torch.where(most > 0, most / 127, torch.ones_like(most))
    return (weight / scale).round().clamp(-127, 127).to(torch.int8), scale


# By the exact type: a subclass may compute in another way.
LAYERS: dict[type[nn.Module], Any] = {
    nn.Linear: QuantisedLinear,
    SharedLinear: QuantisedShared,
    nn.Conv2d: QuantisedConv2d,
    nn.Embedding: QuantisedEmbedding,
    RelativeLinear: QuantisedTable,
}


def quantise(model: nn.Module) -> nn.Module:
    """A copy in evaluation mode with eight-bit weights. Its `state_dict` has `values` and `scale`
    in place of `weight`, and loads into the quantised copy of any model of the same options.

    Linear layers, convolutions, embeddings and tables are quantised; norms, biases and positions
    are not. float16 tokens may overflow, as they meet numbers up to 127: use bfloat16 or float32.

    Raises:
        ValueError: a model whose tables are divided over processes, or weights that are not finite.
    """
    model = copy.deepcopy(model).eval().requires_grad_(False)
    made: dict[nn.Module, nn.Module] = {}  # a layer that is used twice stays one
    for parent in list(model.modules()):
        for name, layer in list(parent.named_children()):
            if type(layer) in LAYERS and getattr(layer, "padding_mode", "zeros") == "zeros":
                if layer not in made:
                    made[layer] = LAYERS[type(layer)](layer)
                setattr(parent, name, made[layer])
        if isinstance(parent, Attention):
            parent.primitives = QuantisedPrimitives()
    return model


def stored_bytes(model: nn.Module) -> int:
    """Bytes of parameters and buffers."""
    return sum(t.numel() * t.element_size() for t in [*model.parameters(), *model.buffers()])
