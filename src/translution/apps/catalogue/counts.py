"""Count what a model costs on the meta device: from shapes alone, without memory or arithmetic."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from ...models import GPT, create_model
from ...models.configuration import input_shape
from ...utils.measuring import multiply_adds

__all__ = ["Costs", "Entry", "costs", "entry"]


@dataclass(frozen=True)
class Entry:
    """A model of the registry.

    Attributes:
        name: the name of the model.
        family: "vit", "gpt", "resnet", "san", "pvt" or "swin".
        mixer: the name of its mixer.
        parameters: the number of parameters.
        input: the shape of one sample, (channels, height, width) or (tokens,).
    """

    name: str
    family: str
    mixer: str
    parameters: int
    input: tuple[int, ...]


@dataclass(frozen=True)
class Costs:
    """The operations and the memory that a model needs for one sample in float32.

    torch's attention is counted as matrix products that store dense attention weights; its fused
    kernels store less.

    Attributes:
        multiply_adds: the multiply-adds of a forward pass, as `measuring.multiply_adds` counts.
        weights: the bytes of parameters and buffers.
        parameter_bytes: the bytes of the parameters alone.
        activations: the peak bytes of the tensors that a forward pass without gradients creates,
            computed from shapes. The working memory within an operator is not included.
        saved: the bytes that a forward pass in training saves for the backward pass, without
            weights. Each storage counts once.
    """

    multiply_adds: int
    weights: int
    parameter_bytes: int
    activations: int
    saved: int

    def inference(self, batch: int = 1) -> int:
        """Return the bytes of inference: the weights, and the activations of each sample."""
        return self.weights + batch * self.activations

    def training(self, batch: int = 1) -> int:
        """Return the bytes of a training step with AdamW.

        These are the weights, a gradient and two states of each parameter, and the tensors that are
        saved for each sample. The working memory of the backward pass is not included.
        """
        return self.weights + 3 * self.parameter_bytes + batch * self.saved


def entry(name: str) -> Entry:
    """Describe the model of a name.

    Raises:
        ValueError: there is no such model.
    """
    return _entry(name, _made(name))


def costs(name: str) -> Costs:
    """Count the operations and the memory of a model; it takes up to a few seconds.

    Args:
        name: the name of the model.

    Raises:
        ValueError: there is no such model.
    """
    model = _made(name)
    x = _input(model, _entry(name, model))
    made = _Made()

    def run() -> None:
        with torch.no_grad(), made:
            model.eval()(x)

    adds = multiply_adds(run)
    saved = _saved(model.train(), x)
    parameters = sum(map(_bytes, model.parameters()))
    weights = parameters + sum(map(_bytes, model.buffers()))
    return Costs(adds, weights, parameters, made.most, saved)


def _made(name: str) -> nn.Module:
    with torch.device("meta"):
        return create_model(name)


def _entry(name: str, model: nn.Module) -> Entry:
    config: Any = model.config
    count = sum(p.numel() for p in model.parameters())
    return Entry(name, type(model).__name__.lower(), config.mixer, count, input_shape(config))


def _input(model: nn.Module, of: Entry) -> Tensor:
    dtype = torch.int64 if isinstance(model, GPT) else torch.float32
    return torch.empty(1, *of.input, dtype=dtype, device="meta")


def _bytes(x: Tensor) -> int:
    return x.numel() * x.element_size()


class _Made(TorchDispatchMode):
    """Adds up the bytes of the tensor storages that operations create and that still exist.

    Attributes:
        now: the bytes that exist now.
        most: the largest value that `now` had.
    """

    def __init__(self) -> None:
        super().__init__()
        self.now = self.most = 0
        self.known = weakref.WeakSet[Any]()

    def __torch_dispatch__(
        self, func: Callable[..., Any], types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        given = {id(t.untyped_storage()) for t in tree_leaves((args, kwargs)) if _is(t)}
        out = func(*args, **(kwargs or {}))
        for t in tree_leaves(out):
            storage = t.untyped_storage() if _is(t) else None
            if storage is None or id(storage) in given or storage in self.known:
                continue
            self.known.add(storage)
            self.now += storage.nbytes()
            weakref.finalize(storage, self._gone, storage.nbytes())
        self.most = max(self.most, self.now)
        return out

    def _gone(self, size: int) -> None:
        self.now -= size


def _is(value: Any) -> bool:
    return isinstance(value, Tensor)


def _saved(model: nn.Module, x: Tensor) -> int:
    """Return the bytes that a forward pass saves for the backward pass, without weights."""
    own = {t.untyped_storage()._cdata for t in (*model.parameters(), *model.buffers())}
    found: dict[int, torch.UntypedStorage] = {}  # storing them keeps their ids unique

    def pack(t: Tensor) -> Tensor:
        storage = t.untyped_storage()
        if storage._cdata not in own:
            found[storage._cdata] = storage
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        model(x)
    return sum(storage.nbytes() for storage in found.values())
