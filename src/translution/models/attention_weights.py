"""Where a model looks."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from ..modules.reduced import ReducedAttention2d
from .gpt import GPT
from .vit import ViT

__all__ = ["attention_weights"]


def attention_weights(model: ViT | GPT, x: Tensor) -> tuple[Tensor, list[Tensor | None]]:
    """The model's output, and for each block its attention weights.

    The weights are float32 [batch, heads, queries, keys]; each query's sum to 1. None stands for a
    block whose mixer has none, such as a convolution. Class and register tokens come before the
    patches; the last block of a ViT with a class token may have that one query only (`all_rows`).
    Call `model.eval()` first to have none of it dropped. Each mixer runs twice, and not for two
    threads at once.

    Raises:
        ValueError: a model of another kind.
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
    if hasattr(mixer, "layout"):
        return mixer(*arguments, **keywords, return_weights=True)[1].float()
    if isinstance(mixer, ReducedAttention2d):
        return mixer.weights(*arguments, **keywords).float()
    return None
