"""Continuing a text with a causal language model, token by token."""

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

    The model never sees more than its context of C tokens. While a text has up to C, it sees all of
    it. When C are reached, the oldest `slide` are forgotten before the next one joins: with t
    tokens so far it sees those from the smallest multiple of `slide` on from which at most C
    remain. Everything is then computed as if the text began there, so what comes out does not
    depend on `cache`, which only saves work: a new token is computed alone, except after a slide,
    where the tokens that remain are computed once more. With slide=1 that is at every token.

    Args:
        model: in evaluation mode.
        ids: int64 [batch, length], the texts so far, all of one length and at least one token, on
            the model's device.
        max_new_tokens: how many at most.
        temperature: the logits are divided by it; 0 takes the most likely token.
        top_k: only the k most likely tokens (and those as likely as the k-th).
        top_p: only the fewest most likely tokens that together reach this probability.
        stop: tokens that end a text. It ends with that token; while others of the batch go on, it
            is repeated.
        seed: of the draws, one number per text and token; a generator is drawn from as it stands,
            None is torch's own.
        cache: keep what layers know of the tokens before.
        slide: from 1 to the context, default a quarter of it; 0 never forgets, for models that are
            `unbounded` (buckets, or windows, and no absolute positions).

    Returns:
        an iterator over int64 [batch], the next token of each text.

    Raises:
        ValueError: at once, naming the argument, what came and what is wanted.
    """
    context, vocab = model.config.context, model.config.vocab_size
    if model.training:
        raise ValueError("model: got one in training mode, want model.eval()")
    _check_ids(ids, vocab)
    if isinstance(max_new_tokens, bool) or max_new_tokens < 0:
        raise ValueError(f"max_new_tokens: got {max_new_tokens!r}, want at least 0")
    _check_choice(temperature, top_k, top_p)
    for token in stop:
        if not 0 <= token < vocab:
            raise ValueError(f"stop: got token {token}, want 0 to {vocab - 1}")
    if slide is None:
        slide = max(1, context // 4)
    if slide == 0 and not model.unbounded:
        raise ValueError(
            f"slide: got 0, want 1 to the context {context}; only a model with buckets, or windows "
            "that its tables hold, and without absolute positions goes on without a limit"
        )
    if not 0 <= slide <= context:
        raise ValueError(f"slide: got {slide}, want 1 to the context {context} (or 0: none)")
    if isinstance(seed, int):
        seed = torch.Generator().manual_seed(seed)
    source = seed

    def choose(logits: Tensor) -> Tensor:
        if temperature == 0:
            return logits.argmax(-1)
        return _draw(probabilities(logits, temperature, top_k, top_p), source)

    if slide:  # as if the text had been made from its first token on
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
        token = torch.where(ended, token, choose(model.head(hidden[:, -1])))
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
    """What tokens are drawn with: first `top_k` chooses, then `top_p` among what is left.

    Args:
        logits: [..., vocab_size].
        temperature: more than 0.
        top_k, top_p: as in `generate`.

    Returns:
        [..., vocab_size], float64 (float32 on mps, which has no float64), each row's sum 1.

    Raises:
        ValueError: naming the argument, what came and what is wanted.
    """
    _check_choice(temperature, top_k, top_p)
    if temperature == 0:
        raise ValueError("temperature: got 0, want more than 0")
    logits = logits.to(torch.float32 if logits.device.type == "mps" else torch.float64)
    # the largest becomes 0, so that a tiny temperature does not overflow
    logits = (logits - logits.amax(-1, keepdim=True)) / temperature
    if top_k is not None and top_k < logits.shape[-1]:
        least = logits.topk(top_k).values[..., -1:]
        logits = logits.masked_fill(logits < least, float("-inf"))
    p = logits.softmax(-1)
    if top_p is not None and top_p < 1:
        most, order = p.sort(dim=-1, descending=True, stable=True)
        enough = most.cumsum(-1) - most >= top_p  # those before it reach top_p already
        p = torch.zeros_like(p).scatter(-1, order, most.masked_fill(enough, 0.0))
        p = p / p.sum(-1, keepdim=True)
    return p


def _draw(p: Tensor, generator: torch.Generator | None) -> Tensor:
    """One token of each row of [batch, vocab_size]: where a uniform number falls among the sums."""
    device = p.device if generator is None else generator.device
    uniform = torch.rand(len(p), 1, generator=generator, dtype=p.dtype, device=device).to(p.device)
    sums = p.cumsum(-1)
    return torch.searchsorted(sums, uniform * sums[:, -1:], right=True)[:, 0]


def _check_ids(ids: Tensor, vocab: int) -> None:
    if ids.ndim != 2 or ids.dtype not in (torch.int64, torch.int32) or not ids.numel():
        raise ValueError(
            f"ids: got {ids.dtype} of shape {tuple(ids.shape)}, want int64 (batch, length), at "
            "least one token each"
        )
    least, most = int(ids.min()), int(ids.max())
    if least < 0 or most >= vocab:
        wrong = least if least < 0 else most
        raise ValueError(f"ids: got token {wrong}, want 0 to {vocab - 1}")


def _check_choice(temperature: float, top_k: int | None, top_p: float | None) -> None:
    if not (temperature >= 0 and math.isfinite(temperature)):
        raise ValueError(f"temperature: got {temperature}, want a finite number of at least 0")
    if top_k is not None and (isinstance(top_k, bool) or top_k < 1):
        raise ValueError(f"top_k: got {top_k!r}, want at least 1")
    if top_p is not None and not 0 < top_p <= 1:
        raise ValueError(f"top_p: got {top_p}, want more than 0 and at most 1")
