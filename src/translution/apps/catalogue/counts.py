"""What a model costs, found on the meta device: from shapes alone, without memory or arithmetic."""

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
    """A model by name, made without memory: what it is, and how large.

    family: "vit", "gpt", "resnet", "san", "pvt" or "swin". input: shape of one sample, (channels,
    height, width) or (tokens,).
    """

    name: str
    family: str
    mixer: str
    parameters: int
    input: tuple[int, ...]


@dataclass(frozen=True)
class Costs:
    """Of a sample in float32; bytes.

    multiply_adds: `measuring.multiply_adds` of a forward pass. weights: parameters and buffers.
    passing: the most that a forward pass without gradients holds at once of what it made itself,
    by the shapes; the operators' own working memory is not seen. kept: what a forward pass in
    training keeps for the backward pass (each storage once, without weights). torch's attention is
    counted as matrix products that keep dense weights; its fused kernels keep less.
    trained: parameters alone.
    """

    multiply_adds: int
    weights: int
    trained: int
    passing: int
    kept: int

    def inference(self, batch: int = 1) -> int:
        """Weights, and `passing` of each sample."""
        return self.weights + batch * self.passing

    def training(self, batch: int = 1) -> int:
        """A step with AdamW: weights; a gradient and two states of each parameter; and `kept` of
        each sample. What the backward pass holds beside that is not seen."""
        return self.weights + 3 * self.trained + batch * self.kept


def entry(name: str) -> Entry:
    """Raises ValueError for an unknown name."""
    return _entry(name, _made(name))


def costs(name: str) -> Costs:
    """Count the model of this name; about a tenth of a second to a few seconds."""
    model = _made(name)
    x = _input(model, _entry(name, model))
    made = _Made()

    def run() -> None:
        with torch.no_grad(), made:
            model.eval()(x)

    adds = multiply_adds(run)
    kept = _kept(model.train(), x)
    trained = sum(map(_bytes, model.parameters()))
    weights = trained + sum(map(_bytes, model.buffers()))
    return Costs(adds, weights, trained, made.most, kept)


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
    """Sums the storages that operations make while they are alive.

    Attributes:
        most: bytes, the most at once.
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


def _kept(model: nn.Module, x: Tensor) -> int:
    own = {t.untyped_storage()._cdata for t in (*model.parameters(), *model.buffers())}
    found: dict[int, torch.UntypedStorage] = {}  # holding them keeps their numbers apart

    def pack(t: Tensor) -> Tensor:
        storage = t.untyped_storage()
        if storage._cdata not in own:
            found[storage._cdata] = storage
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        model(x)
    return sum(storage.nbytes() for storage in found.values())
