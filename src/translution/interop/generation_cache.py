"""The cache of transformers' `generate`, for models of this library."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import Cache, CacheLayerMixin

from ..models import GPT
from ..modules import cache as modules_cache

__all__ = ["TranslutionCache"]


class TranslutionCache(Cache):
    """The memories of a model's blocks: exact, so generation with them gives what it gives without.

    Attributes:
        caches: one `translution.modules.cache.Cache` for each block.
    """

    def __init__(self, model: GPT):
        super().__init__(layers=[_Layer(block.mixer) for block in model.blocks])

    @property
    def caches(self) -> Sequence[modules_cache.Cache]:
        return [layer.cache for layer in self.layers]  # type: ignore[union-attr]


class _Layer(CacheLayerMixin):
    """One block's memory. What it holds is not keys and values, so `update` is not for it."""

    supports_early_init = False
    is_croppable = True

    def __init__(self, mixer: Any):
        super().__init__()
        self.mixer, self.is_initialized, self.record_past = mixer, True, False
        self.reset()

    def reset(self) -> None:
        self.cache: modules_cache.Cache = self.mixer.make_cache()
        if self.record_past:
            self.cache.record()

    def activate_past_recording(self) -> None:
        self.record_past = True
        self.cache.record()

    def get_seq_length(self) -> int:
        return self.cache.length

    def get_max_length(self) -> int:
        return -1

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self.cache.length + query_length, 0

    def reorder_cache(self, beam_idx: Tensor) -> None:
        self.cache.select(beam_idx)

    batch_select_indices = reorder_cache

    def batch_repeat_interleave(self, repeats: int) -> None:
        texts = torch.arange(self.cache.batch)
        self.cache.select(texts.repeat_interleave(repeats))

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        raise NotImplementedError("the model fills its caches itself")

    def update(self, key_states: Tensor, value_states: Tensor, *_: Any, **__: Any) -> Any:
        raise NotImplementedError("the model fills its caches itself")

    def crop(self, tokens_to_remove: int) -> None:
        if tokens_to_remove > 0:  # it once was the number of tokens that remain
            tokens_to_remove -= self.cache.length
        self.cache.crop(max(0, -tokens_to_remove))
