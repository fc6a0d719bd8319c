"""The attention weights and the tokens inside a model, for looking at them."""

from __future__ import annotations

import contextlib
import inspect
from collections.abc import Iterator
from typing import Any

from torch import Tensor, nn

from ..modules.reduced import ReducedAttention2d
from .language_model import GPT
from .vision_transformer import ViT

__all__ = ["attention_weights", "record_tokens", "record_weights"]


def attention_weights(model: ViT | GPT, x: Tensor) -> tuple[Tensor, list[Tensor | None]]:
    """The output of a model, and the attention weights of each block.

    The weights are float32 [batch, heads, queries, keys], and those of a query sum to 1. A block
    whose mixer has no attention weights, such as a convolution, has None. The class token comes
    before the patches. The last block of a ViT with a class token has that one query only, unless
    the model has `full_last_block`. In training mode dropout applies, so call `model.eval()` first.

    Each mixer is computed twice, as hooks record its inputs; the function is not thread-safe.

    Raises:
        ValueError: the model is neither a ViT nor a GPT.
    """
    if not isinstance(model, ViT | GPT):
        raise ValueError(f"model: got {type(model).__name__}, want a ViT or a GPT")
    with record_weights(model) as weights:
        output = model(x)
    return output, weights


@contextlib.contextmanager
def record_weights(model: ViT | GPT) -> Iterator[list[Tensor | None]]:
    """Within it, a call of the model puts the attention weights of each block into the list."""
    found: list[Tensor | None] = []

    def ask(mixer: nn.Module, arguments: Any, keywords: Any) -> Any:
        # a second call would find the tokens of the first one in the cache
        more = {"return_weights": True} if keywords.get("cache") is not None else {}
        return arguments, keywords | more

    def take(mixer: nn.Module, arguments: Any, result: Any) -> Any:
        if not isinstance(result, tuple):
            return result
        found.append(result[1].float())
        return result[0]

    def call_again(block: Any, arguments: Any, result: Tensor) -> None:
        # outside of the block, which activation checkpointing may run twice
        x, grid, cache, mask = (*arguments, None, None)[:4]
        if cache is None:
            more = {} if mask is None else {"mask": mask}
            found.append(_weights(block.mixer, block.norm1(x), grid=grid, **more))

    blocks: Any = model.blocks
    with contextlib.ExitStack() as hooks:
        for block in blocks:
            hooks.callback(block.mixer.register_forward_pre_hook(ask, with_kwargs=True).remove)
            hooks.callback(block.mixer.register_forward_hook(take).remove)
            hooks.callback(block.register_forward_hook(call_again).remove)
        yield found


def _weights(mixer: Any, x: Tensor, **given: Any) -> Tensor | None:
    if "return_weights" in inspect.signature(mixer.forward).parameters:
        return mixer.forward(x, **given, return_weights=True)[1].float()
    if isinstance(mixer, ReducedAttention2d):
        return mixer.weights(x, **given).float()
    return None


@contextlib.contextmanager
def record_tokens(model: ViT | GPT) -> Iterator[list[Tensor]]:
    """Within it, a call of the model puts the input of the first block, and the output of each
    block, into the list."""
    found: list[Tensor] = []
    blocks: Any = model.blocks

    def take_input(block: nn.Module, arguments: Any) -> None:
        found.append(arguments[0])

    def take_output(block: nn.Module, arguments: Any, output: Tensor) -> None:
        found.append(output)

    with contextlib.ExitStack() as hooks:
        hooks.callback(blocks[0].register_forward_pre_hook(take_input).remove)
        for block in blocks:
            hooks.callback(block.register_forward_hook(take_output).remove)
        yield found
