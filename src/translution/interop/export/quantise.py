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

from ...functional import offset
from ...layouts import Layout
from ...modules.attention import Attention, Primitives
from ...modules.projections import RelativeLinear
from ...operands import Operand

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
        if layer.shard is not None:
            raise ValueError(
                f"model: got a table divided over {layer.shard[1]} processes, want a whole one"
            )
        super().__init__(layer, (1, 2))

    def forward(self, x: Tensor) -> Operand:
        rows: Any = Rows(self.values, self.scale.flatten())
        return Operand(x, rows, self.bias)


class QuantisedPrimitives(Primitives):
    """The primitives for tables of `Rows`: with one scale s per class, (x W s + b) is
    s (x W + b / s), so scores and weights of a pair are multiplied by its s."""

    @staticmethod
    def scores(
        query: Operand, key: Operand, layout: Layout, *, heads: int, scale: float = 1.0
    ) -> Tensor:
        query, q_scale = _parts(query)
        key, k_scale = _parts(key)
        tables = query.weight is not None or key.weight is not None
        backend = "torch" if tables else "auto"  # only the torch backend reads int8 tables
        s = offset.scores(query, key, layout, heads=heads, scale=scale, backend=backend)
        for per_class in (q_scale, k_scale):
            if per_class is not None:
                s = s * _of_pairs(per_class, layout, query.x).to(s.dtype)
        return s

    @staticmethod
    def mix(a: Tensor, value: Operand, layout: Layout) -> Tensor:
        value, per_class = _parts(value)
        if per_class is None:
            return offset.mix(a, value, layout)
        a = a * _of_pairs(per_class, layout, value.x).to(a.dtype)
        return offset.mix(a, value, layout, backend="torch")


def _parts(operand: Operand) -> tuple[Operand, Tensor | None]:
    """An operand with int8 values as its table, and the scale of each class; None without one."""
    rows: Any = operand.weight
    if rows is None:
        return operand, None
    bias = None if operand.bias is None else operand.bias / rows.scale[:, None]
    return Operand(operand.x, rows.values, bias), rows.scale


def _of_pairs(per_class: Tensor, layout: Layout, like: Tensor) -> Tensor:
    """[queries, keys]; of an absent pair any."""
    return per_class[torch.ops.translution.layout_index(like, layout.spec).clamp(min=0)]


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
