"""The command `translution generate`: text from a trained language model, as it is made."""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import torch
import typer

from ...models.generation import generate as continued
from ...models.language_model import GPT

if TYPE_CHECKING:
    from tokenizers import Tokenizer

__all__ = ["TextStream", "generate", "write_samples"]


def generate(
    checkpoint: Annotated[Path, typer.Argument(help="Of a language model.")],
    prompt: Annotated[str, typer.Option(help="The text to continue; - reads stdin.")] = "",
    prompt_file: Annotated[str, typer.Option(help="Instead: a UTF-8 file.")] = "",
    max_tokens: Annotated[int, typer.Option(help="At most so many new tokens.")] = 200,
    temperature: Annotated[float, typer.Option(help="0: always the most likely token.")] = 1.0,
    top_k: Annotated[int, typer.Option(help="Among the k most likely; 0: all.")] = 0,
    top_p: Annotated[float, typer.Option(help="Among the most likely that reach this.")] = 1.0,
    stop: Annotated[
        list[str] | None, typer.Option(help="End before this text, or at this token; repeatable.")
    ] = None,
    seed: Annotated[int, typer.Option(help="Of the first sample; the next has seed + 1.")] = 0,
    samples: Annotated[int, typer.Option(help="How many texts.")] = 1,
    slide: Annotated[
        int,
        typer.Option(
            help="Tokens forgotten when the context is full: 1 to the context; -1: a quarter; "
            "0: none, if the model has no limit (buckets or windows, no absolute positions)."
        ),
    ] = -1,
    echo: Annotated[bool, typer.Option(help="Write the prompt too.")] = False,
    cache: Annotated[bool, typer.Option(help="Without, all is computed for each token.")] = True,
    device: Annotated[str, typer.Option(help="auto, cpu, cuda or mps.")] = "auto",
) -> None:
    """Continue a text with a trained language model."""
    from .checkpoints import open_checkpoint
    from .engine import pick_device

    _check(
        samples=(samples, samples >= 1, "at least 1"),
        max_tokens=(max_tokens, max_tokens >= 0, "0 or more"),
        temperature=(temperature, 0 <= temperature < math.inf, "0 (the likeliest) or more"),
        top_k=(top_k, top_k >= 0, "0 (all) or more"),
        top_p=(top_p, 0 < top_p <= 1, "more than 0, at most 1 (all)"),
        slide=(slide, slide >= -1, "1 to the context, 0 (none) or -1 (a quarter)"),
        stop=("an empty text", "" not in (stop or []), "one character at least"),
    )
    where = torch.device(pick_device(device))
    text = read_prompt(prompt, prompt_file)
    opened = open_checkpoint(checkpoint)
    model, tokenizer = opened.model, opened.tokenizer
    if not isinstance(model, GPT) or tokenizer is None:
        has = type(model).__name__ + ("" if tokenizer else " without a tokenizer")
        raise ValueError(f"{checkpoint}: holds a {has}, want a language model with its tokenizer")
    write_samples(
        model.to(where), tokenizer, text, sys.stdout.write, sys.stdout.flush,
        seeds=range(seed, seed + samples), stop=stop or [], echo=echo,
        max_new_tokens=max_tokens, temperature=temperature, top_k=top_k or None, top_p=top_p,
        slide=None if slide == -1 else slide, cache=cache,
    )  # fmt: skip


def _check(**options: tuple[Any, bool, str]) -> None:
    """By name: what came, whether it is right, what is wanted. Before anything is loaded."""
    for name, (got, right, want) in options.items():
        if not right:
            raise ValueError(f"{name}: got {got}, want {want}")


def read_prompt(prompt: str, prompt_file: str) -> str:
    """The text to continue.

    Raises:
        ValueError: two sources or none, or a source that is not UTF-8.
        OSError: a file that cannot be read.
    """
    if bool(prompt) == bool(prompt_file):
        raise ValueError("prompt: want one of --prompt TEXT, --prompt - and --prompt-file FILE")
    if prompt and prompt != "-":
        return prompt
    source = prompt_file or "stdin"
    data = Path(prompt_file).read_bytes() if prompt_file else sys.stdin.buffer.read()
    try:
        text = data.decode("utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"{source}: not UTF-8 at byte {error.start}") from None
    if not text:
        raise ValueError(f"{source}: is empty, want a text to continue")
    return text


def write_samples(
    model: GPT,
    tokenizer: Tokenizer,
    prompt: str,
    write: Callable[[str], object],
    flush: Callable[[], object] = lambda: None,
    seeds: Iterable[int] = (0,),
    stop: Iterable[str] = (),
    echo: bool = False,
    **options: Any,
) -> None:
    """Write a continuation for each seed, piece by piece; blank lines with --- divide them.

    Args:
        write, flush: of the stream; `flush` is called after each piece.
        stop: as in `TextStream`; one that is a token ends the text there too.
        options: of `translution.models.generation.generate`.

    Raises:
        ValueError: a prompt without a token, an empty stop, or what `generate` refuses.
    """
    stops = list(stop)
    if "" in stops:
        raise ValueError("stop: got an empty text, want one character at least")
    ends = {token for text in stops if (token := tokenizer.token_to_id(text)) is not None}
    ids = tokenizer.encode(prompt).ids
    if not ids:
        raise ValueError(f"prompt: got {prompt!r}, which has no token, want one at least")
    tokens = torch.tensor([ids], device=next(model.parameters()).device)
    for number, seed in enumerate(seeds):
        made = continued(model, tokens, seed=seed, stop=ends, **options)
        if number:
            write("\n\n---\n\n")
        if echo:
            write(prompt)
        for piece in TextStream(tokenizer, ids, stops).pieces(int(token) for token in made):
            write(piece)
            flush()
    write("\n")
    flush()


class TextStream:
    """The text of tokens as they come.

    A character's bytes may be divided over tokens, and some decoders write a space only between
    two tokens. So a few tokens are decoded together, and what that adds is given out once it no
    longer ends in a broken character. What may yet become a stop text is held back.

    Args:
        before: tokens that the first ones follow.
        stop: texts that end the stream; they are not given out.
    """

    def __init__(self, tokenizer: Tokenizer, before: Iterable[int] = (), stop: Iterable[str] = ()):
        self.tokenizer, self.stop = tokenizer, list(stop)
        self.known = list(before)[-CONTEXT:]  # tokens whose text is out
        self.fresh: list[int] = []

    def pieces(self, tokens: Iterable[int]) -> Iterator[str]:
        """Texts that together are what the tokens decode to, up to the first stop text."""
        held = ""
        for token in tokens:
            self.fresh.append(token)
            held += self._text(whole=True)
            if (end := self._stopped(held)) is not None:
                yield held[:end]
                return
            out = len(held) - self._hold(held)
            if out:
                yield held[:out]
                held = held[out:]
        held += self._text(whole=False)
        held = held[: self._stopped(held)]
        if held:
            yield held

    def _text(self, whole: bool) -> str:
        """The text of the fresh tokens; with `whole` none while a character is not complete."""
        known = self.tokenizer.decode(self.known)
        both = self.tokenizer.decode(self.known + self.fresh)
        if whole and both.endswith(BROKEN):
            return ""
        self.known, self.fresh = (self.known + self.fresh)[-CONTEXT:], []
        return both[len(known) :]

    def _stopped(self, text: str) -> int | None:
        return min((at for s in self.stop if (at := text.find(s)) >= 0), default=None)

    def _hold(self, text: str) -> int:
        """The length of the longest end of `text` that a stop text begins with."""
        lengths = range(min(len(text), max(map(len, self.stop), default=1) - 1), 0, -1)
        return next((n for n in lengths if any(s.startswith(text[-n:]) for s in self.stop)), 0)


BROKEN = "\ufffd"  # what decoders write for bytes that are no character
CONTEXT = 8  # known tokens that are decoded with new ones
