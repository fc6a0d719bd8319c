"""Models as programs: traced, and free of this library's operators."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.export import Dim, ExportedProgram
from torch.fx.node import map_arg
from torch.utils._pytree import tree_leaves

from ...models import GPT
from ...models.configuration import input_shape
from .plain import PLAIN

__all__ = ["Difference", "difference", "example", "portable"]


def example(model: nn.Module, batch: int, size: int | None = None) -> Tensor:
    """Random input of a model: ids [batch, size] of a GPT, else an image [batch, channels, size,
    size]. Default is the size it was made for (224 pixels for those made for any)."""
    config: Any = getattr(model, "config", None)
    device = next(model.parameters()).device
    dtype = next(p.dtype for p in model.parameters() if p.is_floating_point())
    shape = input_shape(config)
    if isinstance(model, GPT):
        return torch.randint(config.vocab_size, (batch, size or shape[0]), device=device)
    image = (size, size) if size else shape[1:]
    return torch.randn(batch, shape[0], *image, device=device, dtype=dtype)


def portable(model: nn.Module, x: Tensor, dynamic: bool = True) -> ExportedProgram:
    """The model in evaluation as a program of torch's own operations, for any batch or for that of
    `x`. Nothing of this library is needed to run it.

    Its sizes are those of `x`. Per sample it holds `plain.NUMBERS` numbers per projection (or one
    class) and, for attention with tables, the dense scores, like the model.

    Args:
        model: of this library, or one that holds its layers.
        x: an input of the model, such as `example` makes.
        dynamic: any batch; `x` then needs two samples or more.

    Raises:
        ValueError: a batch of one with `dynamic`, or an input that the model does not take.
    """
    if dynamic and x.shape[0] < 2:
        raise ValueError(f"x: got a batch of {x.shape[0]}, want at least 2 to trace any batch")
    was = model.training
    shapes = ({0: Dim.DYNAMIC if dynamic else None},)
    try:
        with torch.no_grad():
            model.eval()(x)  # what is wrong with x is told plainly here
            # strict: reading Python, it keeps len(x) symbolic
            traced = torch.export.export(model.eval(), (x,), dynamic_shapes=shapes, strict=True)
            graph = _translated(traced)
            return torch.export.export(graph, (x,), dynamic_shapes=shapes, strict=False)
    finally:
        model.train(was)


def _translated(program: ExportedProgram) -> torch.fx.GraphModule:
    """With a module of `plain` in place of each operator; equal ones share it."""
    module: Any = program.module(check_guards=False)
    known: dict[Any, str] = {}
    for node in list(module.graph.nodes):
        # each of torch's attention kernels answers in strides of its own, and views of them would
        # tie the program to one
        if node.target is torch.ops.aten.view.default:
            node.target = torch.ops.aten.reshape.default
        if node.target is torch.ops.aten.scaled_dot_product_attention.default:
            with module.graph.inserting_after(node):
                dense = module.graph.call_function(torch.ops.aten.clone.default)
            node.replace_all_uses_with(dense)
            dense.args, dense.kwargs = (node,), {"memory_format": torch.contiguous_format}
        make = PLAIN.get(node.target)
        if make is None:
            continue
        given = map_arg(node.args, lambda n: n.meta["val"])
        plain, count = make(*given)
        key = (node.target, repr([_told(value) for value in given]))
        if key not in known:
            known[key] = f"plain{len(known)}"
            module.add_submodule(known[key], plain)
        with module.graph.inserting_before(node):
            new = module.graph.call_module(known[key], tuple(node.args[:count]))
        node.replace_all_uses_with(new)
        module.graph.erase_node(node)
    module.graph.lint()
    module.recompile()
    return module


def _told(value: Any) -> Any:
    return tuple(value.shape) if isinstance(value, Tensor) else value


class Difference(NamedTuple):
    """How far apart outputs are: the largest difference, the same as a share of the largest output,
    and the mean."""

    largest: float
    share: float
    mean: float


def difference(found: Any, want: Any) -> Difference:
    """Of all outputs together.

    Raises:
        ValueError: outputs that do not belong together.
    """
    pairs = list(zip(tree_leaves(found), tree_leaves(want), strict=True))
    for left, right in pairs:
        if left.shape != right.shape:
            raise ValueError(f"found: got shape {tuple(left.shape)}, want {tuple(right.shape)}")
    off = torch.cat([(left - right).detach().abs().flatten() for left, right in pairs])
    largest = float(off.max())
    most = max(float(right.abs().max()) for _, right in pairs)
    return Difference(largest, largest / most, float(off.double().mean()))
