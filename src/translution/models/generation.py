"""Generates text with a causal language model, one token at a time."""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Iterator

import torch
from torch import Tensor

from .language_model import GPT

__all__ = ["generate", "probabilities"]


def generate(
    model: GPT,
    ids: Tensor,
    max_new_tokens: int,
    temperature: float = 1.0,
    top_k: int | None = None,
    top_p: float | None = None,
    stop: Collection[int] = (),
    seed: int | torch.Generator | None = None,
    cache: bool = True,
    slide: int | None = None,
) -> Iterator[Tensor]:
    """Continue each text of a batch.

    The model sees at most the last C tokens of a text, where C is its context. Once a text has C
    tokens, the oldest `slide` of them are dropped before each token that would exceed C. The tokens
    that remain are computed as if the text began with them. With t tokens so far, they start at the
    smallest multiple of `slide` from which at most C remain.

    The generated tokens do not depend on `cache`, which only saves time: with a cache, the model
    computes only the new token at each step, and all remaining tokens after each slide. With
    slide=1 that is every step once the context is full.

    Args:
        model: a causal language model in evaluation mode.
        ids: the texts so far, int64 [batch, length] on the model's device; all have the same
            length, of at least one token.
        max_new_tokens: the largest number of tokens to generate per text.
        temperature: the number that divides the logits; 0 takes the most likely token.
        top_k: sample only from the k most likely tokens (and those as likely as the k-th).
        top_p: sample only from the smallest set of most likely tokens whose probabilities sum to at
            least this number.
        stop: tokens that end a text. An ended text repeats its last token until all texts of the
            batch have ended.
        seed: the seed of the random numbers, of which each text uses one per token. A generator
            continues from its current state, and None uses torch's default generator.
        cache: whether to cache keys and values (or inputs, where they are relative).
        slide: the number of tokens to drop when the context is full, from 1 to the context; None
            drops a quarter of it. 0 drops none, which works for models whose `unbounded` is True
            (those with buckets, or with windows, and without absolute positions).

    Returns:
        an iterator over int64 [batch], the next token of each text.

    Raises:
        ValueError: an argument is wrong. It is raised by the call itself, before the iteration.
    """
    context, vocab = model.config.context, model.config.vocab_size
    if model.training:
        raise ValueError("model: got one in training mode, want model.eval()")
    _check_ids(ids, vocab)
    if isinstance(max_new_tokens, bool) or max_new_tokens < 0:
        raise ValueError(f"max_new_tokens: got {max_new_tokens!r}, want at least 0")
    _check_sampling(temperature, top_k, top_p)
    for token in stop:
        if not 0 <= token < vocab:
            raise ValueError(f"stop: got token {token}, want 0 to {vocab - 1}")
    if slide is None:
        slide = max(1, context // 4)
    if slide == 0 and not model.unbounded:
        raise ValueError(
            f"slide: got 0, want 1 to the context {context}; only a model with buckets, or with "
            "windows that its tables cover, and without absolute positions can take longer texts"
        )
    if not 0 <= slide <= context:
        raise ValueError(
            f"slide: got {slide}, want 1 to the context {context} (or 0 to drop no token)"
        )
    if cache:
        model.make_caches()  # fails here, and not at the first token, if a mixer has none
    if isinstance(seed, int):
        seed = torch.Generator().manual_seed(seed)
    source = seed

    def choose(logits: Tensor) -> Tensor:
        if temperature == 0:
            return logits.argmax(-1)
        return _draw(probabilities(logits, temperature, top_k, top_p), source)

    if slide:  # drop what would have been dropped if the whole text had been generated
        ids = ids[:, slide * max(0, -(-(ids.shape[1] - context) // slide)) :]
    return _stream(model, ids.long(), max_new_tokens, choose, frozenset(stop), cache, slide)


@torch.no_grad()
def _stream(
    model: GPT,
    seen: Tensor,
    max_new_tokens: int,
    choose: Callable[[Tensor], Tensor],
    stop: frozenset[int],
    cache: bool,
    slide: int,
) -> Iterator[Tensor]:
    ends = torch.tensor(sorted(stop), dtype=torch.int64, device=seen.device)
    ended = torch.zeros(seen.shape[0], dtype=torch.bool, device=seen.device)
    caches, new, token = model.make_caches() if cache else None, seen, seen[:, -1]
    for _ in range(max_new_tokens):
        hidden = model.hidden(new if cache else seen, caches)
        logits = model.head(hidden[:, -1])
        if not bool(logits.isfinite().all()):
            raise ValueError("model: got logits that are not finite, want a model that was trained")
        token = torch.where(ended, token, choose(logits))
        yield token
        ended |= torch.isin(token, ends)
        if stop and bool(ended.all()):
            return
        new = token[:, None]
        full = bool(slide) and seen.shape[1] == model.config.context
        seen = torch.cat([seen[:, slide:] if full else seen, new], 1)
        if full and cache:
            caches, new = model.make_caches(), seen


def probabilities(
    logits: Tensor,
    temperature: float = 1.0,
    top_k: int | None = None,
    top_p: float | None = None,
) -> Tensor:
    """Compute the probabilities from which `generate` samples.

    `top_k` is applied first, then `top_p` to the tokens that remain.

    Args:
        logits: [..., vocab_size].
        temperature: a number greater than 0 that divides the logits.
        top_k, top_p: as in `generate`.

    Returns:
        [..., vocab_size] in float64 (float32 on mps, which has no float64); each row sums to 1.

    Raises:
        ValueError: temperature, top_k or top_p is out of range.
    """
    _check_sampling(temperature, top_k, top_p)
    if temperature == 0:
        raise ValueError("temperature: got 0, want more than 0")
    logits = logits.to(torch.float32 if logits.device.type == "mps" else torch.float64)
    # subtract the largest logit first, so that a very small temperature does not overflow
    logits = (logits - logits.amax(-1, keepdim=True)) / temperature
    if top_k is not None and top_k < logits.shape[-1]:
        least = logits.topk(top_k).values[..., -1:]
        logits = logits.masked_fill(logits < least, float("-inf"))
    p = logits.softmax(-1)
    if top_p is not None and top_p < 1:
        most, order = p.sort(dim=-1, descending=True, stable=True)
        enough = most.cumsum(-1) - most >= top_p  # where the more likely tokens reach top_p already
        p = torch.zeros_like(p).scatter(-1, order, most.masked_fill(enough, 0.0))
        p = p / p.sum(-1, keepdim=True)
    return p


def _draw(p: Tensor, generator: torch.Generator | None) -> Tensor:
    """Sample one token from each row of p [batch, vocab_size], by its cumulative sums."""
    device = p.device if generator is None else generator.device
    uniform = torch.rand(len(p), 1, generator=generator, dtype=p.dtype, device=device).to(p.device)
    sums = p.cumsum(-1)
    return torch.searchsorted(sums, uniform * sums[:, -1:], right=True)[:, 0]


def _check_ids(ids: Tensor, vocab: int) -> None:
    if ids.ndim != 2 or ids.dtype not in (torch.int64, torch.int32) or not ids.numel():
        raise ValueError(
            f"ids: got {ids.dtype} of shape {tuple(ids.shape)}, want int64 of shape (batch, length)"
            ", with at least one token"
        )
    least, most = int(ids.min()), int(ids.max())
    if least < 0 or most >= vocab:
        wrong = least if least < 0 else most
        raise ValueError(f"ids: got token {wrong}, want 0 to {vocab - 1}")


def _check_sampling(temperature: float, top_k: int | None, top_p: float | None) -> None:
    if not (temperature >= 0 and math.isfinite(temperature)):
        raise ValueError(f"temperature: got {temperature}, want a finite number of at least 0")
    if top_k is not None and (isinstance(top_k, bool) or top_k < 1):
        raise ValueError(f"top_k: got {top_k!r}, want at least 1")
    if top_p is not None and not 0 < top_p <= 1:
        raise ValueError(f"top_p: got {top_p}, want more than 0 and at most 1")
