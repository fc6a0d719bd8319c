"""Weights in eight bits for inference, which take a quarter of the bytes of float32.

A weight is stored as int8 numbers and a scale: one scale per output channel of Linear and Conv2d,
per row of Embedding, and per class of a table. The largest magnitude becomes 127. Activations are
not quantised. A layer turns its weights into floating point when it uses them. A table is used as
int8, class by class, and the scale of a class multiplies the scores or attention weights of its
pairs.

The linear layers are our own and not torchao's: safetensors refuses torchao's weights ("invalid
python storage"), so a quantised model could not be saved. It would replace the few lines of
`QuantisedLinear` and not the tables, and it is a dependency of 28 MB.
"""

from __future__ import annotations

import copy
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ...functional import offset
from ...functional.offset_operators import layout_index
from ...layouts import Layout
from ...modules.attention import Attention, Primitives
from ...modules.projections import RelativeLinear
from ...operands import Operand

__all__ = ["quantise", "quantised", "stored_bytes"]


class Quantised(nn.Module):
    """An int8 weight and its scales.

    Args:
        layer: the layer to quantise.
        axes: the axes of its weight along which one scale is shared.

    Attributes:
        values: int8, of the shape of the weight.
        scale: floating point, broadcastable to that shape.
        bias: the bias of the layer in floating point, or None.
    """

    values: Tensor
    scale: Tensor
    bias: nn.Parameter | None

    def __init__(self, layer: Any, axes: tuple[int, ...]):
        super().__init__()
        values, scale = quantised(layer.weight.detach(), axes)
        self.register_buffer("values", values)
        self.register_buffer("scale", scale)
        bias = getattr(layer, "bias", None)
        self.bias = None if bias is None else nn.Parameter(bias.detach(), requires_grad=False)

    @property
    def weight(self) -> Tensor:
        """The weight in floating point."""
        return self.values.to(self.scale.dtype) * self.scale

    def extra_repr(self) -> str:
        return f"int8 {tuple(self.values.shape)}"


class QuantisedLinear(Quantised):
    """Replaces nn.Linear."""

    def __init__(self, layer: nn.Linear):
        super().__init__(layer, (1,))

    def forward(self, x: Tensor) -> Any:
        return F.linear(x, self.weight.to(x.dtype), self.bias)


class QuantisedConv2d(Quantised):
    """Replaces nn.Conv2d with padding by zeros."""

    def __init__(self, layer: nn.Conv2d):
        super().__init__(layer, (1, 2, 3))
        self.how: Any = (layer.stride, layer.padding, layer.dilation, layer.groups)

    def forward(self, x: Tensor) -> Tensor:
        return F.conv2d(x, self.weight.to(x.dtype), self.bias, *self.how)


class QuantisedEmbedding(Quantised):
    """Replaces nn.Embedding. Only the rows that are looked up become floating point."""

    def __init__(self, layer: nn.Embedding):
        super().__init__(layer, (1,))

    def forward(self, ids: Tensor) -> Tensor:
        return self.values[ids].to(self.scale.dtype) * self.scale[ids]


class Rows(NamedTuple):
    """The table that `QuantisedTable` gives to `QuantisedPrimitives`.

    values: int8 [classes, in, out]. scale: [classes].
    """

    values: Tensor
    scale: Tensor


class QuantisedTable(Quantised):
    """Replaces `RelativeLinear`. Its attention then uses `QuantisedPrimitives`."""

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
    """The primitives of attention for tables that are `Rows`.

    With a scale s per class, x W s + b equals s (x W + b / s). So the scores or the attention
    weights of a pair are multiplied by the scale of its class.
    """

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
    """The scale of each pair, [queries, keys]. That of an absent pair has no meaning."""
    return per_class[layout_index(like, layout).clamp(min=0)]


def quantised(weight: Tensor, axes: tuple[int, ...]) -> tuple[Tensor, Tensor]:
    """Quantise a weight. values * scale differs from it by at most half a scale.

    Args:
        weight: floating point.
        axes: the axes along which one scale is shared.

    Returns:
        values, int8 of the same shape, and scale, with size 1 along `axes`.

    Raises:
        ValueError: a weight that is not finite.
    """
    if not weight.is_meta and not bool(torch.isfinite(weight).all()):
        raise ValueError("model: got weights that are not finite, want finite ones to quantise")
    most = weight.abs().amax(axes, keepdim=True)
    scale = torch.where(most > 0, most / 127, torch.ones_like(most))
    return (weight / scale).round().clamp(-127, 127).to(torch.int8), scale


# Only these exact classes are replaced, because a subclass may compute something else.
LAYERS: dict[type[nn.Module], Any] = {
    nn.Linear: QuantisedLinear,
    nn.Conv2d: QuantisedConv2d,
    nn.Embedding: QuantisedEmbedding,
    RelativeLinear: QuantisedTable,
}


def quantise(model: nn.Module) -> nn.Module:
    """Make a copy of a model in evaluation mode with weights in eight bits.

    Linear layers, convolutions, embeddings and tables are quantised. Norms, biases and positions
    are not. The `state_dict` of the copy has `values` and `scale` instead of `weight`, and loads
    into the quantised copy of any model with the same options.

    Use bfloat16 or float32 tokens: float16 may overflow, because int8 weights are up to 127.

    Raises:
        ValueError: a model whose tables are divided over processes, or weights that are not finite.
    """
    model = copy.deepcopy(model).eval().requires_grad_(False)
    made: dict[nn.Module, nn.Module] = {}  # a layer may be used in two places
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
    """The bytes of all parameters and buffers of a model."""
    return sum(t.numel() * t.element_size() for t in [*model.parameters(), *model.buffers()])
