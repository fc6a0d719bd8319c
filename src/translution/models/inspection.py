"""The attention weights of a model, for looking at them."""

from __future__ import annotations

import inspect
from typing import Any

from torch import Tensor, nn

from ..modules.reduced import ReducedAttention2d
from .language_model import GPT
from .vision_transformer import ViT

__all__ = ["attention_weights"]


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
    given: list[tuple[Any, Any, Any]] = []

    def note(mixer: nn.Module, arguments: Any, keywords: Any) -> None:
        given.append((mixer, arguments, keywords))

    blocks: Any = model.blocks
    hooks = [b.mixer.register_forward_pre_hook(note, with_kwargs=True) for b in blocks]
    try:
        output = model(x)
    finally:
        for hook in hooks:
            hook.remove()
    return output, [_weights(*one) for one in given]


def _weights(mixer: Any, arguments: tuple[Any, ...], keywords: dict[str, Any]) -> Tensor | None:
    if "return_weights" in inspect.signature(mixer.forward).parameters:
        return mixer(*arguments, **keywords, return_weights=True)[1].float()
    if isinstance(mixer, ReducedAttention2d):
        return mixer.weights(*arguments, **keywords).float()
    return None
