"""Traces models to programs that need none of this library's operators."""

from __future__ import annotations

import warnings
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.export import Dim, ExportedProgram
from torch.fx.node import map_arg
from torch.utils._pytree import tree_leaves

from ...models.configuration import input_shape
from .plain import PLAIN

__all__ = ["Difference", "difference", "example", "portable"]


def example(model: nn.Module, batch: int, size: int | None = None) -> Tensor:
    """A random input for a model.

    Args:
        model: a model of this library, or a converted model of transformers.
        batch: the number of samples.
        size: tokens, or pixels per side. The default is the size that the model was made for; for
            a model that takes any size, that of its preprocessing, or 224 pixels without one.

    Returns:
        token ids [batch, size] for a language model, else images [batch, channels, size, size].
    """
    config: Any = getattr(model, "config", None)
    device = next(model.parameters()).device
    dtype = next(p.dtype for p in model.parameters() if p.is_floating_point())
    shape = _shape_by_transformers(config) or input_shape(config)
    if len(shape) == 1:
        return torch.randint(config.vocab_size, (batch, size or shape[0]), device=device)
    preprocessing = getattr(model, "preprocessing", None)
    image = shape[1:] if preprocessing is None else preprocessing.image_size
    image = (size, size) if size else image
    return torch.randn(batch, shape[0], *image, device=device, dtype=dtype)


def _shape_by_transformers(config: Any) -> tuple[int, ...]:
    """The shape of one sample as a configuration of transformers gives it; () for other ones."""
    if hasattr(config, "max_position_embeddings"):
        return (config.max_position_embeddings,)
    if not hasattr(config, "num_channels"):
        return ()
    size = config.image_size
    return (config.num_channels, *(size if isinstance(size, tuple | list) else (size, size)))


def portable(model: nn.Module, x: Tensor, dynamic: bool = True) -> ExportedProgram:
    """Trace a model in evaluation mode to a program of torch's own operations.

    This library is not needed to run the program. The program takes inputs with the sizes of `x`;
    only the batch size may be dynamic. Per sample it needs memory for one group of pairs
    (`plain.NUMBERS` numbers per projection, or one offset class if that has more) and for the dense
    scores, which the model needs too.

    Args:
        model: a model of this library, or one that contains its layers, such as a converted model
            of transformers.
        x: an input of the model, such as `example` makes.
        dynamic: whether the program takes any batch size; `x` must then have at least two samples.

    Returns:
        the traced program.

    Raises:
        ValueError: x has fewer than two samples and `dynamic` is True, or the model does not accept
            x.
    """
    if dynamic and x.shape[0] < 2:
        raise ValueError(f"x: got a batch of {x.shape[0]}, want at least 2 to trace any batch")
    was = model.training
    config: Any = getattr(model, "config", None)
    caches = getattr(config, "use_cache", None)  # of transformers; a program returns tensors only
    shapes = ({0: Dim.DYNAMIC if dynamic else None},)
    try:
        if caches:
            config.use_cache = False
        with torch.no_grad(), warnings.catch_warnings():
            # converted models and transformers take notes during a call, which a program does not
            warnings.filterwarnings("ignore", "While compiling, we found certain side effects")
            model.eval()(x)  # raises a clear error if x is wrong, before tracing starts
            # strict mode keeps len(x) symbolic
            traced = torch.export.export(model.eval(), (x,), dynamic_shapes=shapes, strict=True)
            graph = _with_plain_modules(traced)
            return torch.export.export(graph, (x,), dynamic_shapes=shapes, strict=False)
    finally:
        model.train(was)
        if caches:
            config.use_cache = caches


def _with_plain_modules(program: ExportedProgram) -> torch.fx.GraphModule:
    """Replace each operator of this library by a module of `plain`; equal calls share a module."""
    module: Any = program.module(check_guards=False)
    names: dict[Any, str] = {}
    for node in list(module.graph.nodes):
        # the strides of an attention output depend on the kernel, and a view would fix that kernel
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
        arguments = map_arg(node.args, lambda n: n.meta["val"])
        plain, count = make(*arguments)
        key = (node.target, repr([_shape_or_value(value) for value in arguments]))
        if key not in names:
            names[key] = f"plain{len(names)}"
            module.add_submodule(names[key], plain)
        with module.graph.inserting_before(node):
            new = module.graph.call_module(names[key], tuple(node.args[:count]))
        node.replace_all_uses_with(new)
        module.graph.erase_node(node)
    module.graph.lint()
    module.recompile()
    return module


def _shape_or_value(value: Any) -> Any:
    return tuple(value.shape) if isinstance(value, Tensor) else value


class Difference(NamedTuple):
    """The difference between two outputs.

    Attributes:
        largest: the largest absolute difference.
        share: `largest` divided by the largest absolute value of the wanted output.
        mean: the mean absolute difference.
    """

    largest: float
    share: float
    mean: float


def difference(found: Any, want: Any) -> Difference:
    """Compare two outputs of a model, which may be nested tuples, lists and dicts of tensors.

    Raises:
        ValueError: the number of tensors or their shapes differ.
    """
    pairs = list(zip(tree_leaves(found), tree_leaves(want), strict=True))
    for left, right in pairs:
        if left.shape != right.shape:
            raise ValueError(f"found: got shape {tuple(left.shape)}, want {tuple(right.shape)}")
    off = torch.cat([(left - right).detach().abs().flatten() for left, right in pairs])
    largest = float(off.max())
    most = max(float(right.abs().max()) for _, right in pairs)
    return Difference(largest, largest / most, float(off.double().mean()))
